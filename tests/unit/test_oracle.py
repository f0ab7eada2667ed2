"""The oracle of the delivery tests finds what it is there to find."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.kit.observer import Name, Observer, Seen

ID = "j1"
TOPIC = f"edged/box/response/{ID}"
USAGE = {"prompt_tokens": 3, "image_tokens": 0, "cached_tokens": 0, "completion_tokens": 2}
TIMINGS = dict.fromkeys(
    (
        "queue_ms", "decode_images_ms", "encode_ms", "prefill_ms", "ttft_ms", "generate_ms",
        "tokens_per_second",
    ),
    1.5,
)  # fmt: skip


class Story:
    """What an observer saw, told by hand."""

    def __init__(self) -> None:
        self.observer = Observer(0)

    def add(self, topic: str, body: Any, *, qos: int = 1, retain: bool = False) -> Story:
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.observer.seen.append(
            Seen(len(self.observer.seen), 0.0, topic, payload, qos, retain, False, None, None)
        )
        return self

    def asked(self, kind: str = "text", **fields: Any) -> Story:
        return self.add(f"edged/box/request/{kind}", {"id": ID, "prompt": "x", **fields})

    def told(self, kind: str, topic: str = TOPIC, *, qos: int | None = None, **f: Any) -> Story:
        if qos is None:
            qos = 0 if kind in {"chunk", "progress"} else 1
        return self.add(topic, {"v": 1, "id": ID, "type": kind, **f}, qos=qos)

    def accepted(self, **fields: Any) -> Story:
        body: dict[str, Any] = {"position": 0, "durable": True, **fields}
        return self.told("accepted", **body)

    def started(self, attempt: int = 1) -> Story:
        return self.told("started", attempt=attempt, queue_ms=1)

    def chunk(self, seq: int, delta: str, attempt: int = 1) -> Story:
        return self.told("chunk", attempt=attempt, seq=seq, delta=delta)

    def result(self, text: str = "a b", attempt: int = 1, **fields: Any) -> Story:
        body: dict[str, Any] = {
            "text": text, "finish_reason": "stop", "usage": USAGE, "timings": TIMINGS,
            "attempt": attempt, "model": "m", "sha256": hashlib.sha256(text.encode()).hexdigest(),
        } | fields  # fmt: skip
        return self.told("result", **body)

    def refused(self, topic: str = TOPIC, **fields: Any) -> Story:
        body: dict[str, Any] = {
            "request": "text",
            "code": "invalid",
            "message": "no",
            "retryable": False,
        }
        return self.told("refused", topic, **{**body, **fields})

    def wrong(self, *, crashed: bool = False) -> str:
        return "\n".join(self.observer.violations(crashed=crashed))


def frames(used: list[int], dropped: Sequence[int] = ()) -> dict[str, Any]:
    return {
        "used": [{"index": index, "ts": None, "tokens": 313, "crops": 1} for index in used],
        "dropped": [{"index": index, "reason": "alike"} for index in dropped],
    }


def good() -> Story:
    return Story().asked().accepted().started().chunk(0, "a").chunk(1, " b").result()


def test_a_good_story_has_nothing_wrong() -> None:
    assert good().wrong() == ""
    assert Story().asked().refused().wrong() == ""
    assert good().result().wrong() == "", "a final may come twice"
    assert good().asked("cancel").refused(request="cancel", code="unknown_job").wrong() == ""


@pytest.mark.parametrize(
    ("story", "says"),
    [
        (Story().asked().accepted(), "has no final"),
        (Story().asked(), "has no answer"),
        (Story().add("edged/box/request/text", b"{no"), "has no answer"),
        (Story().accepted().result(), "nobody asked"),
        (good().result("other"), "finals differ"),
        (good().asked(prompt="y"), "has no answer"),
        (good().told("started", attempt=2, queue_ms=1), "after the final"),
        (Story().asked().started().accepted().result(), "begins with started"),
        (Story().asked().accepted().started(2).started(1).result(), "in the order [2, 1]"),
        (Story().asked().accepted().started(1).result(attempt=2), "of attempt 2"),
        (Story().asked().accepted().started().chunk(0, "a").result(), "the chunks on"),
        (Story().asked().accepted().started().chunk(0, "x").chunk(1, " b").result(), "the chunks"),
        (Story().asked().accepted().started().chunk(1, " b").chunk(0, "a").result(), "[(1, 1), "),
        (Story().asked().accepted().started().result(sha256="0" * 64), "sha256"),
        (Story().asked().accepted().started().result(extra=1), "'extra' was unexpected"),
        (
            Story().asked().accepted(durable="yes").started().result(),
            "durable: 'yes' is not of type 'boolean'",
        ),
        (
            Story().asked().accepted(position=True).started().result(),
            "position: True is not of type 'integer'",
        ),
        (good().told("chunk", qos=1, attempt=1, seq=2, delta=""), "QoS 1, it must be 0"),
        (good().told("told"), "no type 'told'"),
        (Story().asked().refused(code="why"), "code: 'why' is not one of"),
        (Story().asked().refused(code="expired"), "code: 'expired' is not one of"),
        (Story().asked().refused(message="Traceback (most recent"), "is for nobody"),
        (Story().asked().refused("edged/box/response/j2"), "not on its own"),
        (Story().asked().refused("edged/box/status"), "unexpected"),
        (good().add("edged/box/refused", {"v": 1, "type": "accepted"}), "'refused' was expected"),
        (Story().asked().told("refused", retryable=1), "retryable: 1 is not of type 'boolean'"),
        (Story().asked().refused("edged/box/elsewhere"), "no channel has this topic"),
        (good().result(usage={**USAGE, "cached_tokens": 4}), "usage is"),
        (good().result(usage={**USAGE, "image_tokens": -1}), "usage is"),
        (good().result(frames=frames([1, 0])), "frames are"),
        (good().result(frames=frames([0], [2])), "frames are"),
        (good().result(answers=[]), "answers: [] should be non-empty"),
        (Story().asked(stop=[]).accepted().started().result(), "are no text requests"),
        (Story().asked("vision").accepted().started().result(), "are no vision requests"),
    ],
)
def test_each_wrong_is_found(story: Story, says: str) -> None:
    assert says in story.wrong()


def test_a_crash_excuses_what_lived_in_memory_and_nothing_else() -> None:
    lost = Story().asked().started().chunk(0, "a").result()
    assert lost.wrong()
    assert lost.wrong(crashed=True) == ""
    assert "finals differ" in good().result("other").wrong(crashed=True)
    assert "has no final" in Story().asked().accepted().wrong(crashed=True)
    assert "the chunks" in Story().asked().chunk(0, "x").result().wrong(crashed=True)


STATUS = {
    "v": 1, "state": "ready", "instance": "0" * 32, "reason": "well", "ts": 1.7e9,
    "clock_synced": True, "interval_s": 10.0,
}  # fmt: skip


def test_what_is_retained_is_held_to_the_document() -> None:
    def wrong(body: Any, *, qos: int = 1, retain: bool = True) -> str:
        return Story().add("edged/box/status", body, qos=qos, retain=retain).wrong()

    assert wrong(STATUS) == ""
    assert "'more' was unexpected" in wrong({**STATUS, "more": 1})
    assert "'reason' is a required property" in wrong({k: STATUS[k] for k in list(STATUS)[:3]})
    assert "state: 'well' is not one of" in wrong({**STATUS, "state": "well"})
    assert "required property" in wrong(b"nonsense")
    assert "QoS 0, it must be 1" in wrong(STATUS, qos=0)
    assert "it must be retained" in wrong(STATUS, retain=False)


def test_what_is_wrong_fails_at_the_end_though_nobody_judges() -> None:
    story = Story().add("edged/box/status", {**STATUS, "more": 1}, retain=True)
    with pytest.raises(AssertionError, match="unexpected"):
        story.observer.__exit__(None, None, None)


def test_a_gap_in_the_chunks_is_no_fault() -> None:
    assert Story().asked().accepted().started().chunk(1, " b").result().wrong() == ""


def test_ids_that_edged_made_answer_requests_without_one() -> None:
    made = "e-" + "0" * 8 + "-0000-0000-0000-" + "0" * 12
    topic = f"edged/box/response/{made}"
    story = Story().add("edged/box/request/text", {"prompt": "x"})
    assert "has no answer" in story.wrong()
    story.add(topic, {"v": 1, "id": made, "type": "accepted", "position": 0, "durable": True})
    assert "has no answer" not in story.wrong()
    assert f"{made} was accepted and has no final" in story.wrong()


def test_what_was_sent_unseen_may_be_named() -> None:
    story = Story().accepted().started().result()
    story.observer.expected.add(Name(None, ID))

    assert story.wrong() == ""
