"""What is right and wrong in the events of a job: `Observer.violations` is put together here."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class Name:
    """A job's name: ids are unique within a client."""

    client: str | None
    id: str

    def __str__(self) -> str:
        return f"{self.client}/{self.id}" if self.client else self.id


@dataclass(frozen=True)
class Seen:
    """A message that came; `number` counts all messages of an observer, `at` is monotonic."""

    number: int
    at: float
    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    correlation: bytes | None
    expiry_s: int | None

    @cached_property
    def body(self) -> Body:
        """The payload as a JSON object; {} if it is none."""
        try:
            body = json.loads(self.payload)
        except (ValueError, RecursionError):
            return {}
        return body if isinstance(body, dict) else {}

    @cached_property
    def question(self) -> str:
        """What tells two requests with one id apart: the body, `reply_to` left out."""
        body = {name: value for name, value in self.body.items() if name != "reply_to"}
        return json.dumps(body, sort_keys=True)

    @property
    def type(self) -> str:
        """The event's type."""
        return str(self.body.get("type", ""))

    @property
    def name(self) -> Name | None:
        """The job an event is about."""
        name = self.body.get("id")
        return Name(self.body.get("client"), name) if isinstance(name, str) else None


@dataclass(frozen=True)
class Request:
    """A request that was published, as the broker gave it to the observer."""

    seen: Seen
    kind: str
    client: str | None

    @property
    def name(self) -> Name | None:
        """The job's name, if the request says one."""
        name = self.seen.body.get("id")
        return Name(self.client, name) if isinstance(name, str) else None


# One event ----------------------------------------------------------------------------------------


def sense_wrong(body: Body) -> Iterator[str]:
    """Yield what is wrong with an event that has the right fields."""
    if "Traceback" in body.get("message", "") or len(body.get("message", "")) >= 2000:
        yield f"the message is for nobody: {body['message'][:80]!r}"
    if body["type"] == "result":
        yield from _result_wrong(body)


def _result_wrong(body: Body) -> Iterator[str]:
    answers = body.get("answers", [body])
    text = "\n".join(answer["text"] for answer in answers)
    if hashlib.sha256(text.encode()).hexdigest() != body["sha256"]:
        yield "sha256 is wrong"
    for usage in (body["usage"], *(answer["usage"] for answer in answers)):
        least, prompt = min(usage.values()), usage["prompt_tokens"]
        if least < 0 or max(usage["image_tokens"], usage["cached_tokens"]) > prompt:
            yield f"usage is {usage}"
    frames = body.get("frames", {"used": [], "dropped": []})
    used = [frame["index"] for frame in frames["used"]]
    dropped = [frame["index"] for frame in frames["dropped"]]
    if used != sorted(used) or sorted(used + dropped) != list(range(len(used + dropped))):
        yield f"frames are {frames}"
    if any(len(frame["reason"]) == 0 for frame in frames["dropped"]):
        yield f"frames are dropped without a reason: {frames['dropped']}"


# One job ------------------------------------------------------------------------------------------


def judge(events: list[Seen], *, crashed: bool) -> Iterator[str]:
    """Yield what is wrong with a job's events, on all its topics."""
    finals = [each for each in events if each.type in {"result", "error"}]
    if len({each.payload for each in finals}) > 1:
        yield f"{len(finals)} finals differ: " + " | ".join(map(short, finals))
    for topic in {each.topic for each in events}:
        mine = [each for each in events if each.topic == topic]
        yield from (f"on {topic}: {wrong}" for wrong in _order(mine, crashed=crashed))
    if finals and finals[0].type == "result":
        yield from _chunks_wrong(events, finals[0].body, crashed=crashed)


def _order(events: list[Seen], *, crashed: bool) -> Iterator[str]:
    """Yield what is wrong with the order on one topic; repetitions of an event do not count."""
    first: dict[bytes, Seen] = {}
    for each in events:
        first.setdefault(each.payload, each)
    sure = [each for each in first.values() if each.qos]
    types = [each.type for each in sure]
    ends = [i for i, kind in enumerate(types) if kind in {"result", "error"}]
    if ends and ends[0] != len(types) - 1:
        yield f"after the final came {types[ends[0] + 1 :]}"
    if not crashed and types and types[0] != "accepted" and types[0] not in {"result", "error"}:
        yield f"it begins with {types[0]}, not with accepted"
    attempts = [each.body.get("attempt", 0) for each in sure if each.type == "started"]
    if any(b <= a for a, b in itertools.pairwise(attempts)):
        yield f"attempts started in the order {attempts}"
    chunks = [each for each in events if each.type == "chunk"]
    places = [(each.body.get("attempt", 0), each.body.get("seq", 0)) for each in chunks]
    if any(b <= a for a, b in itertools.pairwise(places)):
        yield f"chunks came in the order {places}"
    result = next((each for each in sure if each.type == "result"), None)
    if result is not None and attempts and not crashed and result.body["attempt"] != attempts[-1]:
        yield f"the result is of attempt {result.body['attempt']}, started was {attempts[-1]}"


def _chunks_wrong(events: list[Seen], final: Body, *, crashed: bool) -> Iterator[str]:
    for topic in {each.topic for each in events}:
        parts = {
            each.body["seq"]: each.body
            for each in events
            if each.type == "chunk"
            and each.topic == topic
            and each.body.get("attempt") == final["attempt"]
        }
        if not parts or set(parts) != set(range(len(parts))):
            continue  # one is missing, or this topic joined later
        said = "".join(parts[seq]["delta"] for seq in sorted(parts))
        text = final.get("text")
        if text is None:  # of several questions, each has its chunks
            for number, answer in enumerate(final["answers"]):
                mine = [parts[seq] for seq in sorted(parts) if parts[seq].get("question") == number]
                if "".join(each["delta"] for each in mine) != answer["text"]:
                    yield f"the chunks of question {number} on {topic} are not its text"
        elif said != text and not (crashed and text.startswith(said)):  # the last may be missing
            yield f"the chunks on {topic} are {said[:80]!r}…, the text {text[:80]!r}…"


def short(each: Seen) -> str:
    return f"#{each.number} {each.topic} {each.payload[:200]!r}"
