"""Pictures and cameras asked about on the command line: real daemon, real small model."""

from __future__ import annotations

import base64
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from edged.models.record import FUSED_GRAPH, FUSED_RECORD
from edged.selftest.cases import PLACES, READING, READING_ANSWER, form
from edged.selftest.drawings import COLOURS, Mark, Point, encoded, frame
from tests.e2e.test_ask_top import Program, environment
from tests.kit.client import Peer
from tests.kit.daemon import ROOT, SHIPPED, Daemon
from tests.kit.mosquitto import PROGRAM, Mosquitto

pytestmark = [pytest.mark.broker, pytest.mark.engine]

#: How a place is spelled is the schema's choice: with any string the model takes either centre.
FORM = form(shape="string", colour="string", place=PLACES)


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


def draw(
    *at: Point, colour: str = "red", kind: Literal["JPEG", "PNG"] = "JPEG", quality: int = 90
) -> bytes:
    """Return a frame with circles of one colour."""
    marks = [Mark(shape="circle", rgb=COLOURS[colour], at=each, size=0.35) for each in at]
    return encoded(frame(marks), kind, quality)


WHICH_WAY = "Which way does the red circle move?"
TO_THE_RIGHT: tuple[Point, ...] = ((0.18, 0.5), (0.39, 0.5), (0.61, 0.5), (0.82, 0.5))


class Eyes:
    """A daemon with the model that ships, asked by an MQTT client that knows nothing of edged."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._jobs = itertools.count(1)

    def look(self, frames: Sequence[bytes], **request: Any) -> dict[str, Any]:
        """Return the result of a request about frames."""
        job = f"look-{next(self._jobs)}"
        images = [{"image": base64.b64encode(each).decode()} for each in frames]
        body = {"id": job, "frames": images, **request}
        self._peer.publish("edged/box/request/vision", json.dumps(body))
        topic = f"edged/box/response/{job}"

        def finals() -> list[dict[str, Any]]:
            events = [json.loads(m.payload) for m in list(self._peer.seen) if m.topic == topic]
            return [each for each in events if each["type"] in ("result", "error", "refused")]

        self._peer.wait(lambda _: bool(finals()), timeout_s=60)
        (final,) = finals()
        assert final["type"] == "result", final
        return final

    def says(self, frames: Sequence[bytes], prompt: str) -> str:
        """Return the answer to a question about frames."""
        return str(self.look(frames, prompt=prompt)["text"])


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Eyes]:
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    directory = tmp_path_factory.mktemp("eyes")
    with (
        Mosquitto(directory) as broker,
        seeing(directory, broker.port, SHIPPED) as daemon,
        Peer(broker.port, "edged/box/response/#") as peer,
    ):
        daemon.wait_ready()
        yield Eyes(peer)
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_the_answer_turns_round_with_the_frames(eyes: Eyes) -> None:
    frames = [draw(at) for at in TO_THE_RIGHT]
    assert eyes.says(frames, WHICH_WAY) == "The red circle moves to the right."
    assert eyes.says(frames[::-1], WHICH_WAY) == "The red circle moves to the left."


def test_frames_out_of_order_are_noticed(eyes: Eyes) -> None:
    frames = [draw(TO_THE_RIGHT[n]) for n in (2, 0, 3, 1)]
    assert eyes.says(frames, "What happens?") == (
        "The red circle jumps about: the frames are out of order."
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [(0, "A red circle appears in frame 2."), (3, "The red circle vanishes in frame 4.")],
)
def test_one_frame_of_four_changes_the_answer(eyes: Eyes, changed: int, said: str) -> None:
    frames = [draw((0.3, 0.4))] * 4
    assert eyes.says(frames, "What happens?") == "Nothing changes."
    frames[changed] = draw()
    assert eyes.says(frames, "What happens?") == said


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow"])
def test_the_file_format_does_not_change_the_answer(eyes: Eyes, colour: str) -> None:
    files = (
        draw((0.5, 0.5), colour=colour, kind="PNG"),
        draw((0.5, 0.5), colour=colour, quality=60),
    )
    for file in files:
        assert eyes.says([file], "What colour is the circle?") == f"The circle is {colour}."
        where = eyes.look([file], prompt="Describe the picture.", response_format=FORM)
        assert where["json"] == {"colour": colour, "shape": "circle", "place": "centre"}


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow"])
@pytest.mark.parametrize("way", ["right", "left", "up", "down"])
def test_the_file_format_does_not_change_what_moves_where(
    eyes: Eyes, colour: str, way: str
) -> None:
    along = [at[0] for at in TO_THE_RIGHT]
    if way in {"left", "up"}:
        along.reverse()
    path = [(0.5, at) if way in {"up", "down"} else (at, 0.5) for at in along]
    said = {"right": "to the right", "left": "to the left"}.get(way, way)
    formats: tuple[dict[str, Any], ...] = ({"kind": "PNG"}, {"kind": "JPEG", "quality": 60})
    for file in formats:
        frames = [draw(at, colour=colour, **file) for at in path]
        moves = f"Which way does the {colour} circle move?"
        assert eyes.says(frames, moves) == f"The {colour} circle moves {said}."


def test_several_questions_about_the_same_frames(eyes: Eyes) -> None:
    frames = [draw(at) for at in TO_THE_RIGHT]
    questions = ["Which way does the circle move?", "What colour is the circle?"]
    result = eyes.look(frames, questions=questions)
    assert [each["text"] for each in result["answers"]] == [
        "The red circle moves to the right.", "The circle is red.",
    ]  # fmt: skip
    assert [each["index"] for each in result["frames"]["used"]] == [0, 1, 2, 3]


def test_ask_about_pictures_and_about_a_camera(broker: Mosquitto, tmp_path: Path) -> None:
    drawn = [draw(at) for at in TO_THE_RIGHT]
    for number, frame_ in enumerate(drawn):
        (tmp_path / f"{number}.jpg").write_bytes(frame_)

    def pictures(*numbers: int) -> list[str]:
        names = (str(tmp_path / f"{number}.jpg") for number in numbers)
        return [each for name in names for each in ("--frame", name)]

    which_way = ("ask", WHICH_WAY, "--detail", "low")
    right, left = ("The red circle moves to the right.", "The red circle moves to the left.")
    with (
        seeing(tmp_path, broker.port, SHIPPED) as daemon,
        Peer(broker.port, "edged/box/camera/door/status") as camera,
    ):
        daemon.wait_ready()
        with Program(*which_way, *pictures(0, 1, 2, 3), "--json", port=broker.port) as ask:
            about = result(ask)
        assert about["text"] == right
        assert [each["index"] for each in about["frames"]["used"]] == [0, 1, 2, 3]
        assert about["usage"]["image_tokens"] == 4 * 25
        with Program(*which_way, *pictures(3, 2, 1, 0), port=broker.port) as ask:
            assert ask.wait() == 0, ask.text
        assert ask.out == f"{left}\n"
        with Program("ask", "Where is the circle?", *pictures(3), port=broker.port) as ask:
            assert ask.wait() == 0, ask.text
        assert ask.out == "The red circle is on the right.\n"

        def seen_by_camera(frames: Sequence[bytes], buffered: int) -> None:
            for each in frames:
                camera.publish("edged/box/camera/door/frame", each, qos=0)
            camera.wait(
                lambda seen: bool(seen) and json.loads(seen[-1].payload)["buffered"] == buffered
            )

        # The newest four count, not what was before them.
        of_the_camera = ("--camera", "door", "--last", "4")
        seen_by_camera([draw((0.5, 0.5), colour="blue"), *drawn], 5)
        with Program(*which_way, *of_the_camera, port=broker.port) as ask:
            assert ask.wait() == 0, ask.text
        assert ask.out == f"{right}\n"
        seen_by_camera(drawn[::-1], 9)
        with Program(*which_way, *of_the_camera, "--json", port=broker.port) as ask:
            about = result(ask)
        assert about["text"] == left
        assert [each["index"] for each in about["frames"]["used"]] == [0, 1, 2, 3]
        with Program("ask", "What?", "--camera", "yard", port=broker.port) as ask:
            assert ask.wait() == 1
        assert "no_frames: no camera yard has sent a frame" in ask.err
        (tmp_path / "4.jpg").write_bytes(drawn[3][:-2])
        with Program("ask", "What?", *pictures(0, 4), port=broker.port) as ask:
            assert ask.wait() == 1
        assert "bad_frame: frame 1: it is truncated" in ask.err
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_a_folder_that_is_not_fused_says_what_to_run_and_is_used_from_the_next_start(
    broker: Mosquitto, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "my model"))
    for name in (FUSED_GRAPH, FUSED_RECORD):
        (folder / name).unlink()
    (tmp_path / "a.jpg").write_bytes(draw((0.5, 0.5)))
    look = ("ask", "What colour is the circle?", "--frame", str(tmp_path / "a.jpg"))
    with seeing(tmp_path, broker.port, folder) as daemon:
        daemon.wait_ready()
        with Program("ask", READING, "--json", port=broker.port) as ask:
            assert result(ask)["text"] == READING_ANSWER  # it answers text meanwhile
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
            assert result(ask)["text"] == "The circle is red."
        assert daemon.stop() == 0
        assert daemon.faults() == []
