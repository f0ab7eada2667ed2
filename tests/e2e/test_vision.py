"""Pictures and cameras asked about on the command line: real daemon, real small model."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.e2e.test_ask_top import Program, environment
from tests.kit.client import Peer
from tests.kit.daemon import ROOT, Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.vision import stock_copy

pytestmark = [pytest.mark.broker, pytest.mark.engine]


def jpeg(number: int) -> bytes:
    """Return a picture, another one for each number."""
    levels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).resize((320, 240), Image.Resampling.NEAREST).save(buffer, "JPEG")
    return buffer.getvalue()


def seeing(directory: Path, port: int, model: Path) -> Daemon:
    settings = {"model": {"path": str(model), "max_context": 2048}}
    return Daemon(directory, port, engine="real", settings=settings)


def result(ask: Program) -> dict[str, Any]:
    """Wait until `ask --json` has ended well and return the result."""
    assert ask.wait() == 0, ask.text
    last = json.loads(ask.out.splitlines()[-1])
    assert isinstance(last, dict)
    assert last["type"] == "result"
    return last


def test_ask_about_pictures_and_about_a_camera(
    broker: Mosquitto, tmp_path: Path, vision_folder: Path
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    pictures = ("--frame", str(tmp_path / "0.jpg"), "--frame", str(tmp_path / "1.jpg"))
    what = ("ask", "What changed?", "--max-tokens", "8", "--detail", "low")
    with (
        seeing(tmp_path, broker.port, vision_folder) as daemon,
        Peer(broker.port, "edged/box/camera/door/status") as camera,
    ):
        daemon.wait_ready()
        with Program(*what, *pictures, "--json", port=broker.port) as ask:
            about = result(ask)
        assert [each["index"] for each in about["frames"]["used"]] == [0, 1]
        assert about["usage"]["image_tokens"] == 2 * 313
        with Program(*what, *pictures, port=broker.port) as ask:
            assert ask.wait() == 0, ask.text
        assert ask.out == f"{about['text']}\n"
        with Program(*what, *pictures[2:], "--json", port=broker.port) as ask:
            assert result(ask)["text"] != about["text"]  # it does depend on the pictures
        # The same two, by way of a camera that sent three.
        for number in (7, 0, 1):
            camera.publish("edged/box/camera/door/frame", jpeg(number), qos=0)
        camera.wait(lambda seen: json.loads(seen[-1].payload)["buffered"] == 3 if seen else False)
        options = ("--camera", "door", "--last", "2", "--json")
        with Program(*what, *options, port=broker.port) as ask:
            assert result(ask)["text"] == about["text"]
        with Program("ask", "What?", "--camera", "yard", port=broker.port) as ask:
            assert ask.wait() == 1
        assert "no_frames: no camera yard has sent a frame" in ask.err
        (tmp_path / "cut.jpg").write_bytes(jpeg(3)[:-2])
        cut = ("--frame", str(tmp_path / "0.jpg"), "--frame", str(tmp_path / "cut.jpg"))
        with Program("ask", "What?", *cut, port=broker.port) as ask:
            assert ask.wait() == 1
        assert "bad_frame: frame 1: it is truncated" in ask.err
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_a_folder_that_is_not_fused_says_what_to_run_and_is_used_from_the_next_start(
    broker: Mosquitto, tmp_path: Path
) -> None:
    folder = stock_copy(tmp_path / "my model")
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    look = ("ask", "What is it?", "--frame", str(tmp_path / "a.jpg"), "--max-tokens", "4")
    with seeing(tmp_path, broker.port, folder) as daemon:
        daemon.wait_ready()
        with Program("ask", "Who are you?", "--max-tokens", "4", "--json", port=broker.port) as ask:
            result(ask)  # it answers text meanwhile
        with Program(*look, port=broker.port) as ask:
            assert ask.wait() == 1
        assert "unsupported: " in ask.err
        told = re.search(r"run: edged (models fuse (?:'[^']+'|\S+))", ask.err)
        assert told is not None, ask.err
        command = [sys.executable, "-W", "error", "-m", "edged", *shlex.split(told[1])]
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), check=True, capture_output=True, text=True
        )
        assert "edged-fused.onnx" in done.stdout
        # What is loaded stays as it is until it is loaded anew.
        with Program(*look, port=broker.port) as ask:
            assert ask.wait() == 1
        assert daemon.stop() == 0
        daemon.start()
        daemon.wait_ready()
        with Program(*look, "--json", port=broker.port) as ask:
            assert len(result(ask)["frames"]["used"]) == 1
        assert daemon.stop() == 0
        assert daemon.faults() == []
