"""`edged demo` as a process: with each broker, interrupted, and without what it needs."""

from __future__ import annotations

import importlib.util
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def red_at(picture: Path) -> float:
    """Return how far from the left what is red in a picture is."""
    with Image.open(picture) as opened:
        levels = np.asarray(opened.convert("RGB")).astype(int)
    red = (levels[:, :, 0] > 200) & (levels[:, :, 1] < 100)
    return float(np.nonzero(red)[1].mean())


def left_over(folder: Path) -> list[str]:
    """Return what is left of a demo: files in its TMPDIR, processes that were given it.

    The frames that it saved are meant to stay.
    """
    found = [str(path) for path in folder.iterdir() if "edged-demo-frames-" not in path.name]
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
    assert out.count("  right ") == 8
    # The frames that are asked about are saved where it says, the oldest first.
    told = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  frames ")]
    saved = [[Path(where) / name for name in names.split(", ")]
             for where, names in (each.split(": ") for each in told)]  # fmt: skip
    assert [len(each) for each in saved] == [1, 4, 4, 4]
    assert {path for each in saved for path in each} == set(folder.glob("edged-demo-frames-*/*"))
    assert [red_at(each) for each in saved[1]] == sorted(map(red_at, saved[1]))
    assert [red_at(each) for each in saved[2]] == [red_at(each) for each in saved[1]][::-1]
    assert red_at(saved[1][3]) - red_at(saved[1][0]) > 150
    assert left_over(folder) == []


@pytest.mark.broker
def test_the_frames_are_pictures_where_the_terminal_has_the_colours(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    screen, terminal = pty.openpty()
    colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "120"}
    env = environment(folder) | colours
    env.pop("NO_COLOR", None)
    demo = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "edged", "demo"],
        cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
    )  # fmt: skip
    os.close(terminal)
    out = b""
    with suppress(OSError):  # its other end is closed
        while part := os.read(screen, 65536):
            out += part
    os.close(screen)
    assert demo.wait(LIMIT_S) == 0, out
    text = out.decode()
    assert "All answers were right." in text
    assert "edged-demo-frames-" not in text
    rows = [line for line in text.splitlines() if "▀" in line]
    # A frame is 16 characters wide; the circle is red in each.
    assert {row.count("▀") for row in rows} == {16, 4 * 16}
    four = [row.split("▀")[:-1] for row in rows if row.count("▀") == 4 * 16]
    red = re.compile(r"38;2;2[45]\d;\d?\d;\d?\d;")
    where = [[n % 16 for row in four[:6] for n in range(16 * k, 16 * k + 16) if red.search(row[n])]
             for k in range(4)]  # fmt: skip
    assert all(where)
    assert [min(each) for each in where] == sorted({min(each) for each in where})
    assert list(folder.iterdir()) == []
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


@pytest.mark.parametrize("command", ["demo", "selftest"])
def test_without_the_packages_that_draw_it_says_what_to_install(
    tmp_path: Path, command: str
) -> None:
    """An environment like ours in all but Pillow and the engine."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    site = tmp_path / "site"
    site.mkdir()
    (installed,) = {Path(each.__file__).parents[1] for each in (np, pytest) if each.__file__}
    hidden = ("PIL", "pillow", "onnxruntime")
    for each in installed.iterdir():
        if not each.name.startswith(hidden):
            (site / each.name).symlink_to(each)
    code = (
        f"import sys; sys.path += [{str(ROOT)!r}, {str(site)!r}]; "
        f"from edged.cli import main; sys.exit(main([{command!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path, env=environment(folder), capture_output=True, check=False,
        text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 1
    assert "PIL" in done.stderr
    assert "pip install 'edged[cpu]'" in done.stderr
    assert "Traceback" not in done.stderr
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
