"""Vision requests: what is taken, what is refused and in which words, and what a job keeps."""

import base64
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import Code, Refused
from edged.jobs import Key, Kind
from edged.ports import (
    Answer,
    Choice,
    DroppedFrame,
    FramePlan,
    PlannedFrame,
    Timings,
    Usage,
)
from edged.protocol import (
    MAX_QUESTIONS,
    Run,
    StoredVision,
    VisionRequest,
    decoded_image,
    decoded_images,
    digest,
    plan_of,
    result_event,
    stored,
    validate,
)

JPEG = b"\xff\xd8\xff\xe0 not looked into here"
IMAGE = base64.b64encode(JPEG).decode()
URL = f"data:image/jpeg;base64,{IMAGE}"


def seen(url: str = URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def frame(**fields: Any) -> dict[str, Any]:
    return {"image": IMAGE, **fields}


def why(body: dict[str, Any]) -> str:
    with pytest.raises(Refused) as refused:
        decoded_images(validate(VisionRequest, body))
    assert refused.value.code is Code.INVALID
    assert IMAGE not in refused.value.message
    return refused.value.message


def test_frames_come_in_their_order_with_their_times() -> None:
    body = {
        "prompt": "what changed?",
        "frames": [frame(ts="2026-01-01T00:00:00Z"), frame(ts=3), frame()],
    }
    request = validate(VisionRequest, body)
    assert decoded_images(request) == (JPEG, JPEG, JPEG)
    assert request.taken() == [1767225600.0, 3.0, None]
    assert request.conversation(3) == ({"role": "user", "content": [0, 1, 2, "what changed?"]},)
    assert request.detail == "auto"
    assert request.camera is None


def test_frames_in_messages_keep_their_places() -> None:
    body = {
        "system": "be brief",
        "messages": [
            {"role": "user", "content": [said("before "), seen(), said("after "), seen()]},
            {"role": "assistant", "content": "well"},
            {"role": "user", "content": [seen(), said("and now?")]},
        ],
    }
    request = validate(VisionRequest, body)
    assert len(decoded_images(request)) == 3
    assert request.conversation(3) == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": ["before ", 0, "after ", 1]},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": [2, "and now?"]},
    )


def test_frames_beside_messages_come_before_the_last_text() -> None:
    body = {
        "messages": [
            {"role": "user", "content": "I show you a door"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [said("is it "), said("open?")]},
        ],
        "frames": [frame(), frame()],
    }
    turns = validate(VisionRequest, body).conversation(2)
    assert turns[0]["content"] == "I show you a door"
    assert turns[-1]["content"] == [0, 1, "is it ", "open?"]


def test_questions_follow_the_frames_one_by_one() -> None:
    request = validate(VisionRequest, {"questions": ["a?", "b?"], "frames": [frame()]})
    assert request.questions == ["a?", "b?"]
    assert request.conversation(1) == ({"role": "user", "content": [0]},)


@pytest.mark.parametrize(
    ("frames", "choice"),
    [
        ({"camera": "door", "last": 4}, Choice(camera="door", last=4)),
        (
            {"camera": "door", "last": 4, "span_s": 8, "max_age_s": 2.5},
            Choice(camera="door", last=4, span_s=8.0, max_age_s=2.5),
        ),
        (
            {"camera": "door", "window": {"min": 4, "max": 12}},
            Choice(camera="door", window=(4, 12)),
        ),
    ],
)
def test_a_cameras_frames_are_asked_for(frames: dict[str, Any], choice: Choice) -> None:
    request = validate(VisionRequest, {"prompt": "x", "frames": frames})
    assert request.camera is not None
    assert request.camera.choice() == choice
    assert decoded_images(request) == ()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "x"}, "there are no frames"),
        ({"messages": [{"role": "user", "content": "x"}]}, "there are no frames"),
        ({"frames": [frame()]}, 'exactly one of "prompt", "messages" and "questions"'),
        ({"prompt": "x", "questions": ["y"], "frames": [frame()]}, "exactly one of"),
        ({"questions": [], "frames": [frame()]}, "questions"),
        ({"questions": [""], "frames": [frame()]}, "questions.0"),
        ({"questions": ["x"] * (MAX_QUESTIONS + 1), "frames": [frame()]}, "questions"),
        ({"prompt": "x", "frames": []}, "frames"),
        ({"prompt": "x", "frames": "door"}, 'a list of {"image": …} or one {"camera": …}'),
        ({"prompt": "x", "frames": None, "detail": "low"}, "frames"),
        ({"prompt": "x", "frames": [frame()], "detail": "best"}, "detail"),
        ({"prompt": "x", "frames": [frame(), {}]}, "frames.1.image"),
        ({"prompt": "x", "frames": [{"image": 7}]}, "frames.0.image"),
        ({"prompt": "x", "frames": [{"image": ""}]}, "frames.0.image"),
        ({"prompt": "x", "frames": [frame(), {"image": "!!!"}]}, "frames.1.image"),
        ({"prompt": "x", "frames": [{"image": IMAGE[:-1]}]}, "base64"),
        ({"prompt": "x", "frames": [{"image": "é"}]}, "base64"),
        ({"prompt": "x", "frames": [frame(ts="yesterday")]}, "frames.0.ts"),
        ({"prompt": "x", "frames": [frame(ts="2026-01-01T00:00:00")]}, "RFC 3339"),
        ({"prompt": "x", "frames": [frame(ts=True)]}, "frames.0.ts"),
        ({"prompt": "x", "frames": [frame(url="http://x/")]}, "unknown field 'url'"),
        ({"prompt": "x", "frames": {"camera": "door"}}, 'exactly one of "last" and "window"'),
        ({"prompt": "x", "frames": {"camera": "door", "last": 0}}, "frames.last"),
        ({"prompt": "x", "frames": {"camera": "do/or", "last": 1}}, "frames.camera"),
        ({"prompt": "x", "frames": {"last": 1}}, "frames.camera"),
        (
            {"prompt": "x", "frames": {"camera": "d", "window": {"min": 3, "max": 2}}},
            '"min" is above "max"',
        ),
        (
            {"prompt": "x", "frames": {"camera": "d", "window": {"min": 1, "max": 2}, "last": 1}},
            'exactly one of "last" and "window"',
        ),
        (
            {"prompt": "x", "frames": {"camera": "d", "window": {"min": 1, "max": 2}, "span_s": 1}},
            '"span_s" goes with "last"',
        ),
        (
            {"messages": [{"role": "user", "content": [seen("http://x/a.jpg")]}]},
            "messages.0.content.0.image_url.url: must be a data: URL, edged fetches nothing",
        ),
        (
            {"messages": [{"role": "user", "content": [seen(), {"type": "text"}]}]},
            "messages.0.content.1.text: ",
        ),
        ({"messages": [{"role": "user", "content": [seen("data:image/png,abc")]}]}, "base64"),
        (
            {"messages": [{"role": "user", "content": [seen()]}], "frames": [frame()]},
            'either in "frames" or in "messages"',
        ),
        (
            {"messages": [{"role": "assistant", "content": [seen()]}]},
            "a frame in a turn of the assistant",
        ),
        (
            {"messages": [{"role": "user", "content": [seen()]}, {"role": "assistant"}]},
            "messages.1.content",
        ),
        ({"messages": [{"role": "user", "content": 7}]}, "a text or a list of parts"),
        ({"prompt": "x", "frames": [frame()], "framez": 1}, "did you mean frames?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body: dict[str, Any], words: str) -> None:
    assert words in why(body)


def test_base64_with_line_ends_is_taken() -> None:
    wrapped = base64.encodebytes(JPEG * 10).decode()
    assert "\n" in wrapped.strip()
    request = validate(VisionRequest, {"prompt": "x", "frames": [{"image": wrapped}]})
    assert decoded_images(request) == (JPEG * 10,)


def test_base64_full_of_blanks_costs_no_more_than_other_base64() -> None:
    # as words of their own, these are two hundred megabytes
    blanks = " ".join(["QUFB"] * 800_000)
    tracemalloc.start()
    try:
        assert decoded_image(blanks) == b"AAA" * 800_000
        assert tracemalloc.get_traced_memory()[1] < 4 * len(blanks)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("text", ["", "QUF", "QU\u00c4B", "QU\u3000FB", "QU FB!"])
def test_what_is_no_base64_is_nothing(text: str) -> None:
    assert decoded_image(text) == b""


def test_a_job_keeps_its_request_without_the_images() -> None:
    for body in (
        {"prompt": "x", "frames": [frame(ts=1), frame()], "reply_to": "a/b", "detail": "low"},
        {"messages": [{"role": "user", "content": [said("a"), seen(), said("b")]}], "seed": 7},
        {"questions": ["x", "y"], "frames": {"camera": "door", "window": {"min": 1, "max": 2}}},
    ):
        request = validate(VisionRequest, body)
        moments = request.taken() or [5.0]
        kept = stored(body, moments)
        text = json.dumps(kept)
        assert IMAGE not in text
        assert "reply_to" not in text
        again = validate(StoredVision, json.loads(text))
        assert again.moments == moments
        assert again.conversation(len(moments)) == request.conversation(len(moments))
        assert again.questions == request.questions
        assert again.camera == request.camera
        assert again.detail == request.detail


@given(st.lists(st.binary(min_size=1, max_size=9), min_size=1, max_size=3))
def test_the_digest_tells_other_images_and_no_other_writing(images: list[bytes]) -> None:
    def of(frames: list[bytes], *, wrap: bool = False) -> bytes:
        write = base64.encodebytes if wrap else base64.b64encode
        body = {"prompt": "x", "frames": [{"image": write(f).decode()} for f in frames]}
        request = validate(VisionRequest, body)
        hashes = [f.hex() for f in decoded_images(request)]
        return digest(Kind.VISION, stored(body, request.taken()) | {"images": hashes})

    assert of(images) == of(images, wrap=True)
    assert of(images) != of([*images, b"one more"])
    assert of(images) != of([images[0] + b"!", *images[1:]])


PLAN = FramePlan(
    used=(PlannedFrame(index=0, crops=1, tokens=313), PlannedFrame(index=2, crops=4, tokens=757)),
    dropped=(DroppedFrame(index=1, reason="as frame 0"),),
)


def test_a_plan_comes_back_from_the_journals_json() -> None:
    kept = json.loads(
        json.dumps(
            {
                "used": [
                    {"index": f.index, "crops": f.crops, "tokens": f.tokens} for f in PLAN.used
                ],
                "dropped": [{"index": f.index, "reason": f.reason} for f in PLAN.dropped],
            }
        )
    )
    assert plan_of(kept) == PLAN
    kept["used"][0]["since"] = "a later version"
    assert plan_of(kept) is None


def test_a_result_tells_what_became_of_the_frames() -> None:
    answer = Answer(text="a", finish_reason="stop", usage=Usage(prompt_tokens=1100))
    run = Run(attempt=1, queue_ms=1, model="phi", frames=PLAN, moments=(1.5, 2.5, None))
    body = json.loads(result_event(Key(None, "j"), [answer], Timings(), run))
    assert body["text"] == "a"
    assert body["frames"] == {
        "used": [
            {"index": 0, "ts": 1.5, "tokens": 313, "crops": 1},
            {"index": 2, "ts": None, "tokens": 757, "crops": 4},
        ],
        "dropped": [{"index": 1, "reason": "as frame 0"}],
    }


def test_answers_to_questions_stand_in_a_list_and_are_summed() -> None:
    answers = [
        Answer(
            text="yes", finish_reason="stop",
            usage=Usage(prompt_tokens=320, image_tokens=313, completion_tokens=2),
        ),
        Answer(
            text="{}", finish_reason="stop", json={}, has_json=True,
            usage=Usage(prompt_tokens=5, completion_tokens=3),
        ),
    ]  # fmt: skip
    run = Run(attempt=1, queue_ms=1, model="phi", frames=PLAN, moments=(1, 2, 3), several=True)
    body = json.loads(result_event(Key("door", "j"), answers, Timings(), run))
    assert "text" not in body
    assert "finish_reason" not in body
    assert [a["text"] for a in body["answers"]] == ["yes", "{}"]
    assert body["answers"][1]["json"] == {}
    assert body["usage"] == {
        "prompt_tokens": 325, "image_tokens": 313, "cached_tokens": 0, "completion_tokens": 5,
    }  # fmt: skip
    one = json.loads(result_event(Key("door", "j"), answers[:1], Timings(), run))
    assert len(one["answers"]) == 1
