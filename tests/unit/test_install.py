"""deploy/install.sh looks before it changes anything; the rest is tests/e2e/install_in_root.sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.daemon import ROOT

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
