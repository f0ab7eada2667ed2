"""What is right and wrong in the events of a job: `Observer.violations` is put together here."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

#: What a refusal, and what the `error` final of an accepted job may say.
REFUSALS = frozenset(
    {
        "invalid",
        "too_large",
        "unsupported",
        "forbidden_reply",
        "queue_full",
        "disk_full",
        "conflict",
        "unknown_job",
        "retained",
        "no_frames",
        "memory",
        "stopping",
    }
)
FINAL_CODES = frozenset(
    {
        "too_long",
        "bad_frame",
        "memory",
        "invalid",
        "unsupported",
        "expired",
        "cancelled",
        "bad_output",
        "dead",
        "too_large",
    }
)

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


def _int(least: int = 0) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _number(value: Any) -> bool:
    return type(value) in {int, float} and value >= 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _said(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 2000 and "Traceback" not in value


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


def _in(*values: str) -> Callable[[Any], bool]:
    return lambda value: value in values


def is_usage(value: Any) -> bool:
    """Return whether this is a `usage` of the contract."""
    names = ("prompt_tokens", "image_tokens", "cached_tokens", "completion_tokens")
    if not isinstance(value, dict) or tuple(sorted(value)) != tuple(sorted(names)):
        return False
    prompt, image, cached, _ = (value[name] for name in names)
    return all(_int()(value[name]) for name in names) and image <= prompt and cached <= prompt


def _timings(value: Any) -> bool:
    names = {
        "queue_ms", "decode_images_ms", "encode_ms", "prefill_ms", "ttft_ms", "generate_ms",
        "tokens_per_second",
    }  # fmt: skip
    return isinstance(value, dict) and set(value) == names and all(map(_number, value.values()))


def _answers(value: Any) -> bool:
    names = {"text", "finish_reason", "usage"}
    return (
        isinstance(value, list)
        and bool(value)
        and all(set(each) - {"json"} == names and is_usage(each["usage"]) for each in value)
    )


def _frames(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"used", "dropped"}:
        return False
    used, dropped = value["used"], value["dropped"]
    indexes = [each["index"] for each in (*used, *dropped)]
    return (
        bool(used)
        and sorted(indexes) == list(range(len(indexes)))
        and [each["index"] for each in used] == sorted(each["index"] for each in used)
        and all(
            set(each) == {"index", "ts", "tokens", "crops"}
            and (each["ts"] is None or type(each["ts"]) in {int, float})
            and _int(1)(each["tokens"])
            and _int(1)(each["crops"])
            for each in used
        )
        and all(set(each) == {"index", "reason"} and _said(each["reason"]) for each in dropped)
    )


_FINISH = _in("stop", "length", "stop_string")
_ERROR: dict[str, Callable[[Any], bool]] = {"code": _text, "message": _said, "retryable": _bool}
_RETRY: dict[str, Callable[[Any], bool]] = {"retry_after_s": _number}
_Fields = dict[str, Callable[[Any], bool]]
#: type -> QoS, fields that must be there, fields that may be.
_SHAPES: dict[str, tuple[int, _Fields, _Fields]] = {
    "accepted": (1, {"position": _int(), "durable": _bool}, {"eta_s": _number}),
    "started": (1, {"attempt": _int(1), "queue_ms": _number}, {}),
    "progress": (
        0,
        {
            "attempt": _int(1), "stage": _in("decode_images", "encode", "prefill"),
            "done": _int(), "total": _int(),
        },
        {"question": _int()},
    ),
    "chunk": (0, {"attempt": _int(1), "seq": _int(), "delta": _text}, {"question": _int()}),
    "result": (
        1,
        {
            "usage": is_usage, "timings": _timings, "attempt": _int(1), "model": _text,
            "sha256": lambda value: re.fullmatch("[0-9a-f]{64}", value) is not None,
        },
        {
            "text": _text, "finish_reason": _FINISH, "json": lambda _: True, "answers": _answers,
            "frames": _frames,
        },
    ),
    "error": (1, _ERROR, _RETRY),
    "refused": (
        1,
        {**_ERROR, "request": _in("text", "vision", "cancel")},
        {"id": _text, **_RETRY},
    ),
}  # fmt: skip


def fields_wrong(each: Seen) -> Iterator[str]:
    body = each.body
    if each.type not in _SHAPES:
        yield f"there is no type {each.type!r}"
        return
    qos, must, may = _SHAPES[each.type]
    if each.qos != qos:
        yield f"QoS {each.qos}, it must be {qos}"
    must = {"v": lambda v: v == 1 and type(v) is int, "type": _text, **must}
    if each.type != "refused":
        must["id"] = _text
    may = {"client": _text, **may}
    yield from (f"{name} is missing" for name in must if name not in body)
    for name, value in body.items():
        fits = must.get(name) or may.get(name)
        if fits is None:
            yield f"unknown field {name}"
        elif not fits(value):
            yield f"{name} is {value!r}"
    code = body.get("code")
    if each.type == "error" and code not in FINAL_CODES:
        yield f"no final has the code {code}"
    if each.type == "refused" and code not in REFUSALS:
        yield f"no refusal has the code {code}"
    if each.type == "result":
        yield from _result_wrong(body)


def _result_wrong(body: Body) -> Iterator[str]:
    if ("answers" in body) == ("text" in body):
        yield "either `text` or `answers`"
        return
    if ("text" in body) != ("finish_reason" in body):
        yield "`finish_reason` belongs to `text`"
    text = "\n".join(a["text"] for a in body["answers"]) if "answers" in body else body["text"]
    if hashlib.sha256(text.encode()).hexdigest() != body.get("sha256"):
        yield "sha256 is wrong"


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
