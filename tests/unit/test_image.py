"""The container files: what they promise, and that what they name is there.

`make arm64` builds the image of Dockerfile.arm64 and runs it under emulation, which takes too long
here. That of deploy/jetson was never built, for want of a Jetson: this is all there is for it.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from edged import __version__
from edged.settings import load

yaml: Any = pytest.importorskip("yaml")  # comes with amqtt, and so with the lock

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CPU, JETSON = ROOT / "Dockerfile.arm64", DEPLOY / "jetson" / "Dockerfile"
SCRIPTS = (DEPLOY / "build-image.sh", DEPLOY / "arm64-check.sh")

Instruction = tuple[str, str]


def stages(path: Path) -> list[list[Instruction]]:
    """Return a Dockerfile's instructions by stage; those before the first FROM come first."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[Instruction]] = [[]]
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append((name, " ".join(rest.split())))
    return found


def all_of(stage: list[Instruction], name: str) -> list[str]:
    return [rest for each, rest in stage if each == name]


def one(stage: list[Instruction], name: str) -> str:
    (rest,) = all_of(stage, name)
    return rest


def environment(stage: list[Instruction]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in shlex.split(one(stage, "ENV")))


@pytest.fixture(params=[CPU, JETSON], ids=["arm64", "jetson"], name="path")
def _path(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def test_the_base_can_be_pinned_by_its_digest(path: Path) -> None:
    before, *built = stages(path)
    name, default = one(before, "ARG").split("=")
    assert name == "BASE"
    assert re.fullmatch(r"[a-z0-9./-]+:[\w.-]+", default)
    assert {one(stage, "FROM").split()[0] for stage in built} == {"${BASE}"}


def test_every_file_that_is_copied_is_there_and_let_through(path: Path) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignored
    for stage in stages(path):
        for copied in all_of(stage, "COPY"):
            *sources, _ = copied.split()
            if sources[0].startswith("--from="):
                continue
            for source in sources:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored


def test_what_is_installed_was_checked_by_its_hash(path: Path) -> None:
    _, build, _ = stages(path)
    commands = re.split(r"\s&&\s", " && ".join(all_of(build, "RUN")))
    gets = [each for each in commands if re.search(r"pip .*(install|download)", each)]
    for each in gets:
        checked = "--require-hashes --only-binary :all: --requirement " in " ".join(each.split())
        # what is built here, and what only builds on the Jetson
        builds = path == JETSON and re.match(r"(uv|tools)/bin/pip install ", each)
        assert checked or "--no-index" in each or builds
    assert any("--require-hashes" in each for each in gets)


def test_nothing_that_builds_is_left(path: Path) -> None:
    *_, final = stages(path)
    installed = {
        word
        for run in all_of(final, "RUN")
        for part in re.findall(r"apt-get install ([^&]*)", run)
        for word in part.split()
        if not word.startswith("-")
    }
    assert installed <= {"ca-certificates", "python3", "tini"}
    assert not any("pip" in run for run in all_of(final, "RUN"))
    for run in all_of(final, "RUN"):
        assert "rm -rf /var/lib/apt/lists/*" in run


def test_it_runs_as_nobody_in_particular_and_stops_when_told(path: Path) -> None:
    *_, final = stages(path)
    uid, gid = one(final, "USER").split(":")
    made = " ".join(all_of(final, "RUN"))
    assert int(uid) > 999
    assert f"groupadd --gid {gid} " in made
    assert f"useradd --uid {uid} " in made
    assert one(final, "STOPSIGNAL") == "SIGTERM"
    # tini: as process 1 edged itself would leave dead orphans lying
    assert json.loads(one(final, "ENTRYPOINT")) == ["tini", "--", "edged"]
    assert json.loads(one(final, "CMD")) == ["run"]


def test_its_health_is_that_of_a_client(path: Path) -> None:
    *_, final = stages(path)
    options, _, command = one(final, "HEALTHCHECK").partition("CMD ")
    assert json.loads(command) == ["edged", "top", "--once"]
    assert "--start-period=" in options
    # `top --once` waits three beats, of ten seconds each
    timeout = re.search(r"--timeout=(\d+)s", options)
    assert timeout is not None
    assert int(timeout[1]) > 3 * load(environ={}).health.interval_s


def test_its_environment_is_that_of_a_service(path: Path) -> None:
    *_, final = stages(path)
    given = environment(final)
    assert given["ORT_DISABLE_TELEMETRY"] == "1"
    assert given["PATH"].split(":")[0] == "/opt/edged/bin"
    state = load(environ={**given, "HOME": "/nowhere"}).state.dir
    assert str(state) == one(final, "VOLUME") == one(final, "WORKDIR")
    assert f"--owner edged --group edged {state}" in " ".join(all_of(final, "RUN"))


def test_the_jetsons_versions_are_those_that_edged_wants() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["cuda"]
    _, wheels, _ = stages(JETSON)
    arguments = dict(each.split("=") for each in all_of(wheels, "ARG"))
    genai = next(each for each in extra if each.startswith("onnxruntime-genai-cuda"))
    assert genai.endswith(f"~={arguments['GENAI']}")
    lock = (ROOT / "requirements.lock").read_text()
    assert f"\nonnxruntime=={arguments['ONNXRUNTIME']} " in lock
    assert f"uv=={one_version('UV := uv==')}" in " ".join(all_of(wheels, "RUN"))


def one_version(prefix: str) -> str:
    return next(
        line.removeprefix(prefix)
        for line in (ROOT / "Makefile").read_text().splitlines()
        if line.startswith(prefix)
    )


def test_the_jetsons_files_say_that_they_were_not_run() -> None:
    assert "NOT RUN" in JETSON.read_text().split("\n\n")[0]
    assert "**Not run.**" in (DEPLOY / "jetson" / "README.md").read_text()[:200]


# Scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda each: each.name)
def test_a_script_says_how_it_is_used(script: Path) -> None:
    assert script.stat().st_mode & stat.S_IXUSR
    helped = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout.startswith(f"usage: deploy/{script.name}")
    for wrong in (["--nonsense"], ["--cache"], ["--tag", ""]):
        refused = subprocess.run([script, *wrong], capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert refused.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", *SCRIPTS], check=True)


@pytest.fixture(name="path_with")
def _path_with(tmp_path: Path) -> Any:
    """A PATH with a few programs, and stand-ins."""

    def make(**programs: str) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("bash", "dirname", "sed", "grep", "mktemp", "rm", "cat", "wc"):
            (folder / name).symlink_to(str(shutil.which(name)))
        for name, text in programs.items():
            (folder / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
            (folder / name).chmod(0o755)
        return {"PATH": str(folder), "TMPDIR": str(tmp_path)}

    return make


ANSWERS = 'case "$*" in *--format*) echo 28.0 ;; "buildx version") exit 1 ;; esac; exit 0'


@pytest.mark.parametrize(
    ("programs", "options", "says"),
    [
        ({}, [], "neither docker nor buildah: apt install buildah"),
        ({"docker": "exit 1"}, [], "systemctl start docker"),
        ({"docker": "exit 1"}, ["--with", "buildah"], "apt install buildah"),
        ({"buildah": ""}, ["--with", "docker"], "apt install docker.io"),
        ({"buildah": "", "uname": "echo armv7l"}, [], "install the 64-bit one"),
        ({"docker": ANSWERS, "uname": "echo aarch64"}, [], "apt install docker-buildx"),
    ],
)
def test_what_is_missing_for_a_build_is_said_in_one_line(
    path_with: Any, programs: dict[str, str], options: list[str], says: str
) -> None:
    done = subprocess.run(
        [SCRIPTS[0], *options], env=path_with(**programs), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_mirror_is_a_secret_of_the_build_and_the_base_is_recorded(
    path_with: Any, tmp_path: Path
) -> None:
    buildah = f"""
        case $1 in
            inspect) echo sha256:feed ;;
            build)
                cd {tmp_path}
                printf '%s\\n' "$@" >arguments
                for each; do
                    case $each in id=pip.conf,src=*) cat "${{each#*src=}}" >pip.conf ;; esac
                done ;;
        esac"""
    python = """
        echo ":env:.cert='/mirror/ca.crt'"
        echo "global.index-url='https://mirror.example/simple'"
        echo "global.extra-index-url='https://elsewhere.example/simple'"
        echo "global.timeout='90'" """
    programs = {"buildah": buildah, "python3": python, "uname": "echo aarch64"}
    done = subprocess.run(
        [SCRIPTS[0], "--tag", "localhost/x:1"], env=path_with(**programs), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    arguments = (tmp_path / "arguments").read_text().splitlines()
    base = one(stages(CPU)[0], "ARG").split("=")[1]
    assert f"BASE={base}" in arguments
    assert "org.opencontainers.image.base.digest=sha256:feed" in arguments
    assert f"org.opencontainers.image.version={__version__}" in arguments
    assert "id=ca.crt,src=/mirror/ca.crt" in arguments
    assert arguments[-3:] == ["--tag", "localhost/x:1", "."]
    assert (tmp_path / "pip.conf").read_text().splitlines() == [
        "[global]",
        "index-url = https://mirror.example/simple",
        "timeout = 90",
        "cert = /run/ca.crt",
    ]
    assert not any("mirror.example" in each for each in arguments)
    assert f"--base {base.rpartition(':')[0]}@sha256:feed" in done.stdout
    assert list(tmp_path.glob("tmp.*")) == []  # the secrets are gone


def test_the_default_base_is_everywhere_the_same() -> None:
    base = one(stages(CPU)[0], "ARG").split("=")[1]
    assert f"\nbase={base}\n" in SCRIPTS[0].read_text()
    assert f"(default: {base})" in SCRIPTS[0].read_text()


# Compose


@pytest.fixture(name="compose")
def _compose() -> dict[str, Any]:
    """deploy/compose.yaml with every variable at its default."""
    text = (DEPLOY / "compose.yaml").read_text()
    text = re.sub(r"\$\{\w+:\?[^}]*\}", "/somewhere", text)
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    assert "$" not in text.partition("\nname:")[2]
    return dict(yaml.safe_load(text))


def test_compose_settings_are_edgeds(compose: dict[str, Any], tmp_path: Path) -> None:
    service = compose["services"]["edged"]
    for name in service["secrets"]:
        assert name in compose["secrets"]
        (tmp_path / name).write_text("-----BEGIN " if name == "mqtt-ca" else "secret\n")
    settings = load(
        # the certificate is no real one: what is asked is where the settings come from
        environ={**service["environment"], "CREDENTIALS_DIRECTORY": str(tmp_path)},
        default_config=tmp_path / "none",
        overrides={"mqtt.ca": ""},
    )
    assert settings.mqtt.tls
    assert settings.mqtt.host == "broker" in compose["services"]
    assert settings.mqtt.password_file == tmp_path / "mqtt-password"
    assert settings.client.password_file == tmp_path / "client-password"
    assert settings.mqtt.port == 8883
    assert str(settings.model.path) in {each.split(":")[1] for each in service["volumes"]}
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.state.stop_s + 20
    assert service["image"] == f"localhost/edged:{__version__}"


def test_compose_gives_no_more_than_is_needed(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["restart"] == "unless-stopped"
        assert service["mem_limit"]
        assert service["healthcheck"]["test"]
        assert ("ports" in service) == (name == "broker")
        assert not {"privileged", "network_mode", "pid", "cap_add", "devices"} & set(service)
    assert [each.rpartition(":")[2] for each in services["broker"]["ports"]] == ["8883"]
    assert any(each.startswith("/tmp") for each in services["edged"]["tmpfs"])
    assert "state:/var/lib/edged" in services["edged"]["volumes"]
    *_, final = stages(CPU)
    command = json.loads(one(final, "HEALTHCHECK").partition("CMD ")[2])
    assert services["edged"]["healthcheck"]["test"] == ["CMD", *command]


def test_compose_names_files_that_are_there(compose: dict[str, Any]) -> None:
    for each in compose["services"]["broker"]["volumes"]:
        source, target, *_ = each.split(":")
        if source.startswith("./"):
            assert (DEPLOY / source).is_file(), source
            text = (DEPLOY / source).read_text()
            for named in re.findall(r"^\w*file (/\S+)$", text, re.MULTILINE):
                mounted = [v.split(":")[1] for v in compose["services"]["broker"]["volumes"]]
                assert named in mounted, f"{target} names {named}"


def test_compose_users_are_in_the_brokers_rules(compose: dict[str, Any]) -> None:
    given = compose["services"]["edged"]["environment"]
    rules = (DEPLOY / "brokers" / "mosquitto" / "acl").read_text()
    blocks = dict(re.findall(r"^user (\S+)\n((?:topic .*\n)+)", rules, re.MULTILINE))
    device = given["EDGED_DEVICE"]
    assert f"topic read edged/{device}/request/#" in blocks[given["EDGED_MQTT__USERNAME"]]
    assert "/status" in blocks[given["EDGED_CLIENT__USERNAME"]]
    assert "/health" in blocks[given["EDGED_CLIENT__USERNAME"]]
