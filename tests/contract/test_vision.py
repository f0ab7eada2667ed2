"""Vision jobs: which frames the engine gets, in which order, and what the result says of them.

The engine here answers with hashes of the frames it was given; what a model sees is tested with a
real one elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.box import Box, Protocol, serve
from tests.kit.observer import Body, Observer

pytestmark = pytest.mark.broker

MAX_FRAMES = 6
PAYLOAD = 400_000


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    protocol: Protocol = request.param
    with serve(
        tmp_path_factory.mktemp("vision"),
        protocol=protocol,
        settings={
            "limits": {"frames": MAX_FRAMES, "payload_mb": PAYLOAD / 1e6},
            "cameras": {"max": 40, "buffer_s": 600},
        },
        options=["--backoff", "0.05"],
    ) as box:
        yield box


def jpeg(number: int, size: int = 100) -> bytes:
    """Return bytes that begin as a JPEG does; nothing looks further here."""
    return b"\xff\xd8\xff\xe0" + f"frame {number} ".encode().ljust(size, b".")


def hashed(*numbers: int) -> str:
    """Return what the engine answers to `!frames` if it was given these."""
    return " ".join(hashlib.sha256(jpeg(n)).hexdigest()[:16] for n in numbers)


def text_of(*numbers: int) -> list[bytes]:
    return [jpeg(n) for n in numbers]


def code_of(observer: Observer, body: Body) -> tuple[str, str]:
    """Publish a vision request that must be refused; return its code and message."""
    name = observer.ask(kind="vision", **body)
    refusal = observer.refusal(name).body
    assert refusal["request"] == "vision"
    return refusal["code"], refusal["message"]


def image(number: int) -> str:
    return base64.b64encode(jpeg(number)).decode()


def url(number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image(number)}"}}


def film(observer: Observer, camera: str, *numbers: int, ts: float = 1_700_000_000.0) -> None:
    """Publish frames of a camera and wait until the box has them all."""
    topic = f"camera/{camera}"
    for number in numbers:
        body = {"image": image(number), "ts": ts + number}
        observer.send(f"{topic}/frame", body, qos=0, wait=False)
    observer.wait_on(f"{topic}/status", lambda body: body["buffered"] >= len(numbers))


# Frames in the request ----------------------------------------------------------------------------


def test_frames_reach_the_engine_in_their_order(observer: Observer) -> None:
    name = observer.look("!frames", text_of(3, 1, 2), client="desk")

    final = observer.final(name)

    assert final["text"] == hashed(3, 1, 2)
    assert [frame["index"] for frame in final["frames"]["used"]] == [0, 1, 2]
    assert final["frames"]["dropped"] == []
    assert final["usage"]["image_tokens"] == sum(f["tokens"] for f in final["frames"]["used"])
    kinds = [each.type for each in observer.events(name) if each.qos]
    assert kinds == ["accepted", "started", "result"]
    assert observer.event(name, "accepted").body["durable"] is True


def test_a_frames_time_stands_in_the_result(observer: Observer) -> None:
    frames = [
        {"image": image(1), "ts": 1_700_000_000.5},
        {"image": image(2), "ts": "2026-01-01T00:00:00Z"},
        {"image": image(3)},
    ]
    final = observer.final(observer.ask("!frames", kind="vision", frames=frames))
    assert [f["ts"] for f in final["frames"]["used"]] == [1_700_000_000.5, 1_767_225_600.0, None]


def test_frames_in_messages_are_taken_in_the_order_of_the_text(observer: Observer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "first "}, url(7), url(8)]},
        {"role": "assistant", "content": "seen"},
        {"role": "user", "content": [url(9), {"type": "text", "text": "!frames"}]},
    ]
    final = observer.final(observer.ask(kind="vision", messages=messages))
    assert final["text"] == hashed(7, 8, 9)


def test_the_same_frame_twice_is_two_frames(observer: Observer) -> None:
    final = observer.final(observer.look("!frames", text_of(4, 4)))
    assert final["text"] == hashed(4, 4)


def test_as_many_bytes_of_frames_as_the_limit_allows(observer: Observer) -> None:
    big = [jpeg(n, 45_000) for n in range(6)]
    final = observer.final(observer.look("!frames", big))
    assert final["text"] == " ".join(hashlib.sha256(f).hexdigest()[:16] for f in big)


def test_what_the_planner_drops_is_named(observer: Observer) -> None:
    final = observer.final(observer.look("!drop 1 !frames", text_of(1, 2, 3)))
    assert [f["index"] for f in final["frames"]["used"]] == [0, 2]
    assert [f["index"] for f in final["frames"]["dropped"]] == [1]


def test_progress_and_stream_can_be_left_out(observer: Observer) -> None:
    name = observer.look("!encode 6 300 !say x", text_of(1, 2), stream=False)
    observer.final(name)
    assert {each.type for each in observer.events(name)} == {"accepted", "started", "result"}


def test_progress_tells_the_stage(observer: Observer) -> None:
    name = observer.look("!encode 6 300 !say x", text_of(1, 2))
    observer.final(name)
    progress = [each.body for each in observer.events(name, "progress")]
    assert {each["stage"] for each in progress} <= {"decode_images", "encode", "prefill"}
    assert any(each["stage"] == "encode" and each["total"] == 6 for each in progress)


@pytest.mark.parametrize("stage", ["decode", "encode"])
def test_a_job_is_cancelled_between_two_frames(observer: Observer, stage: str) -> None:
    name = observer.look(f"!{stage} 200 100", text_of(1))
    observer.event(name, "progress")
    observer.cancel(name)
    final = observer.final(name)
    assert final["code"] == "cancelled"
    ended = observer.finals(name)[0].at
    assert observer.event(observer.ask("!say next"), "started").at - ended < 3


# Questions ----------------------------------------------------------------------------------------


def test_questions_are_answered_in_order_from_one_look(observer: Observer) -> None:
    name = observer.ask(
        kind="vision", questions=["!frames", "!tokens 12 30", "!say three"],
        frames=[{"image": image(1)}, {"image": image(2)}],
    )  # fmt: skip

    final = observer.final(name)

    texts = [answer["text"] for answer in final["answers"]]
    assert texts == [hashed(1, 2), " ".join(f"w{n}" for n in range(12)), "three"]
    assert "text" not in final
    for field in ("prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens"):
        assert final["usage"][field] == sum(a["usage"][field] for a in final["answers"])
    assert [a["usage"]["image_tokens"] > 0 for a in final["answers"]] == [True, False, False]
    chunks = [each.body for each in observer.events(name, "chunk")]
    assert [each["seq"] for each in chunks] == list(range(len(chunks)))
    assert [each["question"] for each in chunks] == sorted(each["question"] for each in chunks)
    assert {each["question"] for each in chunks} == {0, 1, 2}


def test_one_question_is_a_list_too(observer: Observer) -> None:
    name = observer.ask(kind="vision", questions=["!say a"], frames=[{"image": image(1)}])
    assert [a["text"] for a in observer.final(name)["answers"]] == ["a"]


# Cameras ------------------------------------------------------------------------------------------


def test_the_newest_frames_of_a_camera(observer: Observer) -> None:
    film(observer, "door", *range(8))

    final = observer.final(observer.look("!frames", {"camera": "door", "last": 3}))

    assert final["text"] == hashed(5, 6, 7)
    assert [f["ts"] for f in final["frames"]["used"]] == [1_700_000_000.0 + n for n in (5, 6, 7)]


def test_raw_frames_are_taken_as_they_are(observer: Observer) -> None:
    observer.send("camera/raw/frame", jpeg(5), qos=0)
    observer.wait_on("camera/raw/status", lambda body: body["buffered"] == 1)
    assert observer.final(observer.look("!frames", {"camera": "raw", "last": 1}))["text"] == (
        hashed(5)
    )


def test_a_window_grows_by_the_newest_frame_and_begins_anew(observer: Observer) -> None:
    film(observer, "yard", *range(4))
    window = {"camera": "yard", "window": {"min": 2, "max": 4}}
    seen = [observer.final(observer.look("!frames", window))["text"]]
    for number in range(4, 8):
        film(observer, "yard", number)
        observer.wait_on("camera/yard/status", lambda b, n=number: b["buffered"] >= n + 1)  # type: ignore[misc]
        seen.append(observer.final(observer.look("!frames", window))["text"])
    assert seen == [
        hashed(2, 3),
        hashed(2, 3, 4),
        hashed(2, 3, 4, 5),
        hashed(5, 6),
        hashed(5, 6, 7),
    ]


def test_an_engine_that_uses_no_frame_of_a_window_ends_nobody(observer: Observer) -> None:
    film(observer, "blind", 0)
    window = {"camera": "blind", "window": {"min": 1, "max": 3}}
    name = observer.look("!drop 0 !say nothing", window)
    assert observer.final(name)["text"] == "nothing"
    assert observer.final(observer.ask("!say well"))["text"] == "well"
    observer.forget(name)  # no result of a real engine


def test_a_repeated_request_does_not_move_its_window(observer: Observer) -> None:
    film(observer, "shed", 1, 2, 3)
    window = {"camera": "shed", "window": {"min": 2, "max": 6}}
    name = observer.look("!frames", window, id="one-tick")
    assert observer.final(name)["text"] == hashed(2, 3)
    for number in (4, 5):
        observer.send("camera/shed/frame", jpeg(number), qos=0)
        observer.wait_on("camera/shed/status", lambda b, n=number: b["buffered"] >= n)  # type: ignore[misc]
        before = len(observer.finals(name))
        observer.look("!frames", window, id="one-tick")
        observer.wait(lambda: len(observer.finals(name)) > before, "the final again")  # noqa: B023
    assert observer.final(observer.look("!frames", window))["text"] == hashed(2, 3, 5)


def test_a_camera_job_is_cancelled_at_once(observer: Observer) -> None:
    film(observer, "path", 1)
    names = [observer.look("!tokens 200 20", {"camera": "path", "last": 1}) for _ in range(2)]
    for name in names:
        observer.cancel(name)
    assert [observer.final(name)["code"] for name in names] == ["cancelled", "cancelled"]


def test_a_cameras_frames_are_the_jobs_from_its_acceptance(observer: Observer) -> None:
    film(observer, "gate", 1, 2)
    busy = observer.ask("!tokens 30 20")
    observer.event(busy, "started")
    name = observer.look("!frames", {"camera": "gate", "last": 2})
    observer.event(name, "accepted")
    for number in range(3, 9):
        observer.send("camera/gate/frame", jpeg(number), qos=0)
    assert observer.final(name)["text"] == hashed(1, 2)


@pytest.mark.parametrize(
    "frames",
    [
        {"camera": "nobody", "last": 1},
        {"camera": "few-1", "last": 3},
        {"camera": "few-2", "window": {"min": 3, "max": 5}},
        {"camera": "few-3", "last": 2, "max_age_s": 0.001},
    ],
)
def test_no_frames_is_told_with_the_age(observer: Observer, frames: Body) -> None:
    if frames["camera"] != "nobody":
        film(observer, frames["camera"], 1, 2)
    code, message = code_of(observer, {"prompt": "!frames", "frames": frames})
    assert code == "no_frames"
    assert frames["camera"] in message
    if frames["camera"] != "nobody":
        assert " s" in message  # the age of the newest


def test_camera_status_tells_what_came(observer: Observer) -> None:
    observer.send("camera/hall/frame", jpeg(1), qos=0)
    observer.send("camera/hall/frame", b"GIF89a no frame", qos=0)
    status = observer.wait_on("camera/hall/status", lambda body: body["refused"] == 1)
    assert set(status.body) == {"v", "fps", "buffered", "newest_age_s", "refused", "ts"}
    assert status.body["buffered"] == 1
    assert (status.qos, status.body["v"]) == (0, 1)
    health = observer.wait_on("health", lambda body: "hall" in body.get("cameras", {}))
    assert set(health.body["cameras"]["hall"]) == {"fps", "newest_age_s"}


# The same again -----------------------------------------------------------------------------------


def test_a_repetition_is_answered_and_not_run(observer: Observer) -> None:
    name = observer.look("!frames", text_of(1, 2), id="again")
    observer.final(name)
    observer.look("!frames", text_of(1, 2), id="again")
    observer.wait(lambda: len(observer.finals(name)) == 2, "the final again")
    first, second = observer.finals(name)
    assert first.payload == second.payload
    assert len(observer.events(name, "started")) == 1


def test_another_image_under_the_same_id_is_a_conflict(observer: Observer) -> None:
    name = observer.look("!frames", text_of(1), id="other-image")
    observer.final(name)
    observer.look("!frames", text_of(2), id="other-image")
    assert observer.refusal(name).body["code"] == "conflict"


def test_a_cameras_repeated_job_is_known_when_its_frames_are_gone(observer: Observer) -> None:
    film(observer, "brief", 1)
    frames = {"camera": "brief", "last": 1, "max_age_s": 30}
    name = observer.look("!frames", frames, id="known")
    observer.final(name)
    observer.ask("!frames", kind="vision", id="known", frames=frames)
    observer.wait(lambda: len(observer.finals(name)) == 2, "the final again")
    assert len(observer.events(name, "started")) == 1


# What is refused ----------------------------------------------------------------------------------

FRAME = {"image": image(1)}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "x"}, "no frames"),
        ({"prompt": "x", "frames": []}, "frames"),
        ({"prompt": "x", "frames": [FRAME] * (MAX_FRAMES + 1)}, "limits.frames"),
        ({"prompt": "x", "frames": {"camera": "d", "last": MAX_FRAMES + 1}}, "limits.frames"),
        (
            {"prompt": "x", "frames": {"camera": "d", "window": {"min": 1, "max": 99}}},
            "limits.frames",
        ),
        ({"frames": [FRAME]}, "questions"),
        ({"prompt": "x", "questions": ["y"], "frames": [FRAME]}, "exactly one"),
        ({"prompt": "x", "frames": [{"image": "?"}]}, "base64"),
        ({"prompt": "x", "frames": [FRAME], "detail": "ultra"}, "detail"),
        ({"prompt": "x", "frames": [FRAME], "frame": 1}, "frame"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.jpg"}}
                        ],
                    }
                ]
            },
            "fetches nothing",
        ),
        (
            {"messages": [{"role": "user", "content": [url(1)]}], "frames": [FRAME]},
            "either",
        ),
    ],
)
def test_a_bad_vision_request_is_invalid(observer: Observer, body: Body, words: str) -> None:
    code, message = code_of(observer, body)
    assert code == "invalid"
    assert words in message
    assert image(1) not in message


def test_a_request_above_the_limit_is_too_large(observer: Observer) -> None:
    observer.look("!frames", [jpeg(1, PAYLOAD)])
    refusal = observer.refusal(None).body
    assert refusal["code"] == "too_large"


def test_info_says_that_frames_are_looked_at(observer: Observer) -> None:
    info = observer.wait_on("info", lambda body: body["capabilities"]["vision"]).body
    assert info["limits"]["frames"] == MAX_FRAMES


# Boxes of another kind ----------------------------------------------------------------------------


def test_a_model_without_vision_is_unsupported_at_once(tmp_path: Any) -> None:
    with (
        serve(tmp_path, options=["--engine-option=--no-vision"]) as box,
        box.observer() as observer,
    ):
        name = observer.look("!frames", text_of(1), client="desk")
        refusal = observer.refusal(name)
        assert refusal.body["code"] == "unsupported"
        assert "--no-vision" in refusal.body["message"]  # what the engine says to do about it
        assert refusal.topic == f"edged/box/response/{name}"
        camera = observer.look("!frames", {"camera": "door", "last": 1})
        assert observer.refusal(camera).body["code"] == "unsupported"
        assert observer.final(observer.ask("!say text goes on"))["text"] == "text goes on"
        observer.check()


def test_frames_may_be_kept_in_memory_only(tmp_path: Any) -> None:
    with (
        serve(tmp_path, settings={"state": {"frames": "none"}}) as box,
        box.observer() as observer,
    ):
        name = observer.look("!frames", text_of(1, 2))
        assert observer.event(name, "accepted").body["durable"] is False
        assert observer.final(name)["text"] == hashed(1, 2)
        assert observer.event(observer.ask("!say x"), "accepted").body["durable"] is True
        observer.check()


# Crashes ------------------------------------------------------------------------------------------


def stored(box: Box) -> list[str]:
    """Return the files of frames in the state directory."""
    return sorted(path.name for path in (box.daemon.state_dir / "frames").glob("*"))


def test_frames_survive_a_kill_of_the_daemon_and_are_removed_in_the_end(tmp_path: Any) -> None:
    with serve(tmp_path) as box, box.observer() as observer:
        block = observer.ask("!sleep 60")
        observer.event(block, "started")
        names = [observer.look("!frames", text_of(n, n + 1)) for n in range(4)]
        for name in names:
            observer.event(name, "accepted")
        assert len(stored(box)) == 4
        observer.cancel(block)
        box.daemon.kill()
        box.daemon.start()
        assert [observer.final(name)["text"] for name in names] == [
            hashed(n, n + 1) for n in range(4)
        ]
        observer.check(crashed=True)
        assert stored(box) == []


def test_every_attempt_keeps_the_plan_of_the_first(tmp_path: Any) -> None:
    with serve(tmp_path, options=["--backoff", "0.05"]) as box, box.observer() as observer:
        name = observer.look("!drop 1 !encode 100 100 !plan", text_of(1, 2, 3))
        observer.event(name, "progress")
        os.kill(box.daemon.engine_pid, signal.SIGKILL)
        observer.event(name, "started", count=2)
        observer.cancel(name)
        observer.check(crashed=True)
        plan = observer.look("!drop 1 !plan", text_of(1, 2, 3))
        assert [f["index"] for f in json.loads(observer.final(plan)["text"])["used"]] == [0, 2]


def test_a_request_that_gets_no_place_does_not_move_its_window(tmp_path: Any) -> None:
    with serve(tmp_path, settings={"limits": {"queue": 1}}) as box, box.observer() as observer:
        window = {"camera": "yard", "window": {"min": 2, "max": 6}}
        film(observer, "yard", 0, 1)
        assert observer.final(observer.look("!frames", window))["text"] == hashed(0, 1)
        busy = observer.ask("!tokens 1000 50")
        observer.event(busy, "started")
        waits = observer.ask("!say x")
        observer.event(waits, "accepted")
        film(observer, "yard", 2)
        observer.wait_on("camera/yard/status", lambda body: body["buffered"] == 3)
        assert observer.refusal(observer.look("!frames", window)).body["code"] == "queue_full"
        observer.cancel(busy)
        observer.final(waits)
        film(observer, "yard", 3)
        observer.wait_on("camera/yard/status", lambda body: body["buffered"] == 4)
        assert observer.final(observer.look("!frames", window))["text"] == hashed(0, 1, 3)
        nobody = {"camera": "nobody", "last": 1}
        for _ in range(3):  # none of them keeps a place
            assert observer.refusal(observer.look("!frames", nobody)).body["code"] == "no_frames"
        assert observer.final(observer.ask("!say x"))["text"] == "x"
        observer.check()
