"""`edged demo` as a process: with each broker, interrupted, and without what it needs."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edged.selftest.cases import READING_ANSWER, REFUSAL
from tests.kit.daemon import ROOT
from tests.kit.mosquitto import PROGRAM

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

LIMIT_S = 240.0


def environment(folder: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("EDGED_")}
    return env | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder)}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir()
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "edged", "demo", *arguments],
        cwd=ROOT, env=environment(folder), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def left_over(folder: Path) -> list[str]:
    """Return what is left of a demo: files in its TMPDIR, processes that were given it."""
    found = [str(path) for path in folder.iterdir()]
    mark = f"TMPDIR={folder}\0".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes() + b"\0":
                found.append((path.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.parametrize("broker", ["mosquitto", "amqtt"])
def test_the_demo_is_right_and_leaves_nothing(tmp_path: Path, broker: str) -> None:
    if broker == "mosquitto" and PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    if broker == "amqtt" and importlib.util.find_spec("amqtt") is None:
        pytest.skip("amqtt is not installed")
    folder = tmp_path / "tmp"
    demo = start(folder, "--broker", broker)
    out, err = demo.communicate(timeout=LIMIT_S)
    assert demo.returncode == 0, f"{out}\n{err}"
    assert err == ""
    assert "\x1b" not in out
    for words in (
        f"{broker}, MQTT", "ready: ", "beat ", "1. A frame", "error      cancelled",
        "    The circle is red.\n", "    The red circle moves to the right.\n",
        "    The red circle moves to the left.\n", '"direction":"left"',
        f"    {READING_ANSWER}\n", f"    {REFUSAL}\n", "offline: stopped",
        "All answers were right.",
    ):  # fmt: skip
        assert words in out
    # The frames are drawn: the circle's letters, further right in each of the first four.
    drawn = (line.split() for line in out.splitlines() if "rrr" in line)
    row = next(frames for frames in drawn if len(frames) > 1)
    assert [each.index("r") for each in row] == sorted(each.index("r") for each in row)
    assert len(row) == 4
    assert out.count("  right ") == 8
    assert left_over(folder) == []


@pytest.mark.broker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("when", ["broker", "1. A frame"])
def test_an_interrupted_demo_leaves_nothing(
    tmp_path: Path, number: signal.Signals, when: str
) -> None:
    folder = tmp_path / "tmp"
    demo = start(folder)
    assert demo.stdout is not None
    for line in demo.stdout:
        if line.startswith(when):
            break
    else:
        pytest.fail("it ended by itself")
    demo.send_signal(number)
    out, err = demo.communicate(timeout=LIMIT_S)
    assert demo.returncode == 128 + number, f"{out}\n{err}"
    assert err == ""
    assert left_over(folder) == []


def test_says_in_one_line_what_to_install(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    hide = (
        "import importlib.util, sys; real = importlib.util.find_spec; "
        "importlib.util.find_spec = lambda name, *a: None if name in HIDDEN else real(name, *a); "
        "from edged import sandbox; sandbox.find_mosquitto = lambda: None; "
        "from edged.cli import main; sys.exit(main(['demo']))"
    )
    folder.mkdir()
    for hidden, words in (
        ("onnxruntime_genai", "(onnxruntime_genai): pip install 'edged[cpu]'"),
        ("amqtt", "no broker is installed: apt install mosquitto, or pip install 'edged[demo]'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", f"HIDDEN = {{{hidden!r}}}; {hide}"],
            cwd=ROOT, env=environment(folder), capture_output=True, check=False,
        text=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert left_over(folder) == []


@pytest.mark.broker
def test_a_wrong_answer_fails_the_demo(tmp_path: Path, vision_folder: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path; from edged import demo; "
        f"demo.verify = lambda: Path({str(vision_folder)!r}); "
        "from edged.cli import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment(folder), capture_output=True, check=False,
        text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 1
    assert "WRONG      the right answer is The circle is red." in done.stdout
    assert "not all was as it must be:" in done.stdout
    assert "right      one final: the error `cancelled`" in done.stdout
    assert left_over(folder) == []


@pytest.mark.broker
def test_says_why_the_daemon_does_not_come_up(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path; from edged import demo; "
        f"demo.verify = lambda: Path({str(tmp_path / 'nowhere')!r}); demo.READY_S = 20.0; "
        "from edged.cli import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=environment(folder), capture_output=True, check=False,
        text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 1
    assert "edged is not ready after 20 s (degraded: " in done.stderr
    assert "Traceback" not in done.stderr
    assert left_over(folder) == []
