"""deploy/install.sh looks before it changes anything; the rest is tests/e2e/install_*.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.daemon import ROOT
from tests.kit.hub import Hub, serve

SCRIPTS = sorted(ROOT.glob("deploy/*.sh")) + sorted(ROOT.glob("tests/e2e/*.sh"))
SYSTEM = 'ID=debian\nVERSION_ID="12"\n'
#: Where the system's own Python is: no other is one that the service could use.
PYTHON = Path("/usr/bin/python3")


def able(python: Path) -> bool:
    code = "import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))"
    return python.exists() and not subprocess.run([python, "-c", code], check=False).returncode


@pytest.fixture
def box() -> Iterator[Path]:
    """A folder that stands for the root of a system; everybody may look into it."""
    with tempfile.TemporaryDirectory() as name:
        box = Path(name)
        box.chmod(0o755)
        (box / "etc").mkdir()
        (box / "etc" / "os-release").write_text(SYSTEM)
        yield box


def model(folder: Path) -> Path:
    shutil.copytree(ROOT / "edged" / "selftest" / "model", folder)
    return folder


def install(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "deploy" / "install.sh", *options],
        cwd="/", env=os.environ | environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def contents(folder: Path) -> set[tuple[str, int, int]]:
    return {
        (str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")
    }


def refusal(box: Path, *options: str, **environment: str) -> str:
    """Return why it refuses; it must say it in a line, add what to do, and change nothing."""
    before = contents(box)
    done = install("--dry-run", "--root", str(box), *options, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    assert contents(box) == before
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert all(line.startswith("install.sh: ") for line in lines)
    return done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
def test_a_dry_run_says_what_it_would_do_and_changes_nothing(box: Path, tmp_path: Path) -> None:
    before = contents(box)
    done = install(
        "--dry-run", "--root", str(box), "--device", "door", "--broker", "broker.lan:8883",
        "--model", str(model(tmp_path / "phi")), PYTHON=str(PYTHON),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for each in ("edged.toml", "edged.service", "models/phi", "/usr/local/bin/edged"):
        assert any(
            line.startswith("would ") and each in line for line in done.stdout.splitlines()
        ), each
    assert contents(box) == before


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
def test_settings_that_are_there_are_not_overridden(box: Path) -> None:
    (box / "etc" / "edged").mkdir()
    (box / "etc" / "edged" / "edged.toml").write_text('[mqtt]\nhost = "other.lan"\n')
    options = ("--dry-run", "--root", str(box), "--broker")
    done = install(*options, "broker.lan", PYTHON=str(PYTHON))
    assert done.returncode == 1
    assert 'mqtt.host is "other.lan" there, not "broker.lan"' in done.stderr
    done = install(*options, "other.lan", PYTHON=str(PYTHON))
    assert done.returncode == 0, done.stderr
    assert "edged.toml" not in done.stdout


def test_an_old_python_is_refused_with_the_way_out(box: Path, tmp_path: Path) -> None:
    (box / "etc" / "os-release").write_text('ID=ubuntu\nVERSION_ID="22.04"\n')
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3 10 cpython\n")
    old.chmod(0o755)
    said = refusal(box, PYTHON=str(old))
    assert "3.11" in said
    assert "PYTHON=" in said
    assert "uv python" in said
    assert "container" in said
    assert "there is no /nowhere/python" in refusal(box, PYTHON="/nowhere/python")


def test_another_system_is_refused(box: Path) -> None:
    (box / "etc" / "os-release").write_text('ID=fedora\nVERSION_ID=44\nPRETTY_NAME="Fedora 44"\n')
    assert "Fedora 44" in refusal(box)


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--offline", "/nowhere.tar"], "cannot be read"),
        (["--wheel", "/nowhere/edged-1-py3-none-any.whl"], "cannot be read"),
        (["--wheel", "/etc/passwd"], "no wheel of edged"),
    ],
)
def test_what_cannot_be_read_is_refused(box: Path, options: list[str], said: str) -> None:
    done = install(
        "--dry-run", "--root", str(box), *options,
        PYTHON=str(PYTHON),
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
def test_a_model_that_the_disk_cannot_take_is_refused(box: Path, tmp_path: Path) -> None:
    large = model(tmp_path / "phi") / "vision.onnx.data"
    with large.open("wb") as file:
        file.truncate(shutil.disk_usage(box).total)  # it takes no room itself
    done = install(
        "--dry-run", "--root", str(box), "--model", str(large.parent),
        PYTHON=str(PYTHON),
    )  # fmt: skip
    assert done.returncode == 1
    assert "MB free" in done.stderr
    assert done.stdout == ""


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
def test_room_that_an_ended_run_has_taken_counts_as_free(box: Path, tmp_path: Path) -> None:
    if shutil.disk_usage(box).free < 8 << 30:
        pytest.skip("this disk is too full to tell")
    models = box / "var" / "lib" / "edged" / "models"
    (models / ".phi.part").mkdir(parents=True)
    with (models / ".phi.part" / "model.onnx.data").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 << 30)
    with (model(tmp_path / "phi") / "model.onnx.data").open("wb") as file:
        file.truncate(shutil.disk_usage(box).free)  # it takes no room itself
    options = ("--dry-run", "--root", str(box), "--model", str(tmp_path / "phi"))
    done = install(*options, PYTHON=str(PYTHON))
    assert done.returncode == 0, done.stderr
    (models / ".phi.part").rename(models / "another")
    done = install(*options, PYTHON=str(PYTHON))
    assert done.returncode == 1
    assert "MB free" in done.stderr


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A hub with a model, one of several, and one that is given only on terms."""
    hub = Hub()
    files = {
        path.name: path.read_bytes() for path in (ROOT / "tests" / "models" / "phi3").iterdir()
    }
    hub.repositories["someone/phi"] = {"a" * 40: files}
    hub.repositories["someone/many"] = {
        "a" * 40: {f"{each}/{name}": files[name] for each in ("cpu", "gpu/int4") for name in files}
    }
    hub.repositories["someone/gated"] = {"a" * 40: files}
    hub.repositories["someone/none"] = {"a" * 40: {"README.md": b"none\n"}}
    hub.refs = {name: {"main": "a" * 40} for name in hub.repositories}
    hub.gated.add("someone/gated")
    with serve(hub):
        yield hub


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["someone/typo"], "has no someone/typo"),
        (["someone/gated"], "accept them at"),
        (["someone/none"], "holds no genai_config.json"),
        (["someone/many"], "one of: cpu, gpu/int4"),
        (["someone/many", "--model-folder", "tpu"], "it has: cpu, gpu/int4"),
        (["someone/phi", "--revision", "v9"], "no revision v9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_that_the_hub_cannot_give_is_refused(
    box: Path, hub: Hub, options: list[str], said: str
) -> None:
    found = refusal(box, "--model", *options, PYTHON=str(PYTHON), HF_ENDPOINT=hub.url)
    assert said in found


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
def test_a_model_of_the_hub_is_asked_for_once(box: Path, hub: Hub) -> None:
    def dry(*options: str, url: str = hub.url) -> subprocess.CompletedProcess[str]:
        return install("--dry-run", "--root", str(box), "--model", "someone/many", *options,
                       PYTHON=str(PYTHON), HF_ENDPOINT=url)  # fmt: skip

    done = dry("--model-folder", "cpu")
    assert done.returncode == 0, done.stderr
    assert f"would fetch someone/many to {box}/var/lib/edged/models/many" in done.stdout

    there = box / "var" / "lib" / "edged" / "models" / "many"
    there.mkdir(parents=True)
    (there / "edged-source.json").write_text(
        '{"repository": "someone/many", "folder": "cpu", "revision": "main", "commit": "aaaa"}'
    )
    for options in ([], ["--revision", "main"], ["--revision", "aaaa", "--model-folder", "cpu"]):
        done = dry(*options, url="http://127.0.0.1:9")
        assert done.returncode == 0, done.stderr
        assert "fetch someone/many" not in done.stdout
    for options in (["--revision", "v2"], ["--model-folder", "gpu/int4"]):
        done = dry(*options)
        assert done.returncode == 1
        assert "rm -r /var/lib/edged/models/many" in done.stderr


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
def test_what_it_was_installed_with_holds_until_it_is_uninstalled(box: Path) -> None:
    (box / "opt" / "edged.d").mkdir(parents=True)
    (box / "opt" / "edged.d" / ".options").write_text("--no-systemd\n")
    done = install("--dry-run", "--root", str(box), PYTHON=str(PYTHON))
    assert done.returncode == 0, done.stderr
    assert "--no-systemd, as when it was installed" in done.stdout
    assert "edged.service" not in done.stdout
    assert ".options" not in done.stdout

    unit = box / "etc" / "systemd" / "system" / "edged.service"
    unit.parent.mkdir(parents=True)
    unit.touch()
    done = install("--dry-run", "--root", str(box), PYTHON=str(PYTHON))
    assert done.returncode == 1
    assert "--uninstall" in done.stderr


@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("mosquitto.conf", "include_dir /etc/mosquitto/conf.d\nlistener 8883\n"),
        ("mosquitto.conf", "include_dir /etc/mosquitto/conf.d\n  password_file /etc/mine\n"),
        ("mosquitto.conf", "persistence true\n"),
        ("conf.d/mine.conf", "allow_anonymous true\n"),
        ("conf.d/edged.conf", ""),
        ("certs/server.pem", ""),
        ("passwords", ""),
        ("acl", ""),
    ],
)
def test_a_mosquitto_that_others_set_up_is_refused(box: Path, file: str, text: str) -> None:
    path = box / "etc" / "mosquitto" / file
    path.parent.mkdir(parents=True)
    main = path.parents[len(Path(file).parts) - 1] / "mosquitto.conf"
    main.write_text("# as packaged\npersistence true\ninclude_dir /etc/mosquitto/conf.d\n")
    dry = ("--dry-run", "--root", str(box), "--with-mosquitto", "--device", "door")
    done = install(*dry, PYTHON=str(PYTHON))
    assert done.returncode == 0, done.stderr
    path.write_text(text)
    assert str(path) in refusal(box, *dry[3:], PYTHON=str(PYTHON))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.skipif(not able(PYTHON), reason=f"{PYTHON} is no Python 3.11 to 3.14 with venv")
def test_a_dry_run_of_any_user_leaves_out_what_only_root_may_read(box: Path) -> None:
    (box / "etc" / "edged").mkdir()
    (box / "etc" / "edged" / "edged.toml").touch(mode=0o640)
    for each in ("deploy", "systemd"):
        shutil.copytree(ROOT / each, box / "checkout" / each)
    (box / "checkout" / "edged-1-py3-none-any.whl").touch()
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
         box / "checkout" / "deploy" / "install.sh", "--dry-run", "--root", box,
         "--wheel", box / "checkout" / "edged-1-py3-none-any.whl"],
        cwd="/", env=os.environ | {"PYTHON": str(PYTHON)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "what only root may read is not looked at" in done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--with-mosquitto", "--broker", "broker.lan"],
        ["--with-mosquitto", "--no-systemd"],
        ["--offline", "x.tar", "--wheel", "edged.whl"],
        ["--user", "door"],
        ["--broker", "broker.lan", "--user", "door"],
        ["--uninstall", "--device", "door"],
        ["--purge"],
        ["--revision", "main"],
        ["--root", "/tmp"],
        ["--root"],
        ["--nonsense"],
    ],
    ids=" ".join,
)
def test_options_that_contradict_are_wrong_usage(options: list[str]) -> None:
    done = install(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_only_root_may_change_anything(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # where anybody may read it
        Path(name).chmod(0o755)
        script = Path(shutil.copytree(ROOT / "deploy", Path(name) / "deploy")) / "install.sh"
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        done = subprocess.run(
            [*(nobody if os.geteuid() == 0 else []), script],
            cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "only root" in done.stderr


def test_help_names_every_option() -> None:
    done = install("--help")
    assert done.returncode == 0
    text = (ROOT / "deploy" / "install.sh").read_text()
    begin, end = text.index("arguments() {"), text.index("wrong() {")
    for option in (
        "--broker",
        "--model",
        "--offline",
        "--wheel",
        "--cuda",
        "--purge",
        "--no-start",
    ):
        assert option in text[begin:end]
        assert option in done.stdout


def test_the_locks_of_a_box_are_part_of_the_lock_of_the_project() -> None:
    def pins(path: Path) -> set[str]:
        lines = path.read_text().splitlines()
        return {line.partition(";")[0].strip(" \\") for line in lines if "==" in line}

    project = pins(ROOT / "requirements.lock")
    only_cuda = {"onnxruntime-gpu", "onnxruntime-genai-cuda"}
    for path in sorted((ROOT / "deploy" / "locks").glob("*.lock")):
        strangers = {pin for pin in pins(path) - project if pin.partition("==")[0] not in only_cuda}
        assert not strangers, f"{path}: run make lock"
