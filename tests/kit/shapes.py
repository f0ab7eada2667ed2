"""What the retained topics must hold: `status`, `info` and `health`, field by field.

Each function yields what is wrong; nothing means that it is as the contract says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Check = Callable[[Any], bool]

STATES = ("starting", "ready", "degraded", "stopping", "offline")
TOTALS = (
    "accepted",
    "completed",
    "failed",
    "refused",
    "expired",
    "cancelled",
    "dead",
    "duplicates",
)


def whole(value: Any) -> bool:
    """Return whether this is an integer of at least 0."""
    return type(value) is int and value >= 0


def number(value: Any) -> bool:
    """Return whether this is a number of at least 0."""
    return type(value) in {int, float} and value >= 0


def text(value: Any) -> bool:
    """Return whether this is a string that is not empty."""
    return isinstance(value, str) and value != ""


def flag(value: Any) -> bool:
    """Return whether this is a truth value."""
    return isinstance(value, bool)


def unix(value: Any) -> bool:
    """Return whether this is a plausible time in Unix seconds."""
    return type(value) in {int, float} and 1.6e9 < value < 4e9


def maybe(check: Check) -> Check:
    """Allow null as well: a probe that a box lacks."""
    return lambda value: value is None or check(value)


def table(must: Mapping[str, Check], may: Mapping[str, Check] | None = None) -> Check:
    """Return a check for an object with these fields."""
    return lambda value: isinstance(value, dict) and not list(_table(value, must, may or {}))


def each(check: Check) -> Check:
    """Return a check for a list of such values."""
    return lambda value: isinstance(value, list) and all(map(check, value))


def _table(
    body: Mapping[str, Any], must: Mapping[str, Check], may: Mapping[str, Check]
) -> Iterator[str]:
    yield from (f"{name} is missing" for name in must if name not in body)
    for name, value in body.items():
        check = must.get(name) or may.get(name)
        if check is None:
            yield f"unknown field {name}"
        elif not check(value):
            yield f"{name} is {value!r}"


def _instance(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None


def _version(value: Any) -> bool:
    return type(value) is int and value == 1


_STATUS: dict[str, Check] = {
    "v": _version,
    "state": lambda value: value in STATES,
    "instance": _instance,
    "reason": text,
    "ts": unix,
    "clock_synced": flag,
    "interval_s": number,
}
_LIMITS = (
    "queue",
    "payload_mb",
    "frames",
    "max_tokens",
    "journal_mb",
    "memory_mb",
    "results",
    "results_s",
    "packet_bytes",
)
_INFO: dict[str, Check] = {
    "v": _version,
    "instance": _instance,
    "ts": unix,
    "versions": lambda value: isinstance(value, dict) and text(value.get("edged")),
    "model": maybe(text),
    "provider": lambda value: value in {None, "cpu", "cuda"},
    "memory": maybe(lambda value: isinstance(value, dict) and all(map(number, value.values()))),
    "capabilities": table({"text": flag, "vision": flag, "json_schema": flag}),
    "limits": lambda value: (
        isinstance(value, dict)
        and all(name in value and maybe(number)(value[name]) for name in _LIMITS)
    ),
    "topics": lambda value: isinstance(value, dict) and bool(value),
    "warnings": each(text),
}
_JOB: dict[str, Check] = {
    "id": text,
    "stage": lambda value: value in {"prepare", "decode_images", "encode", "prefill", "token"},
    "progress_age_s": number,
}
_HEALTH: dict[str, Check] = {
    **{name: check for name, check in _STATUS.items() if name != "interval_s"},
    "seq": whole,
    "uptime_s": number,
    "model": maybe(text),
    "provider": lambda value: value in {None, "cpu", "cuda"},
    "threads": maybe(whole),
    "queue": table({"depth": whole, "oldest_s": number}),
    "outbox": table({"depth": whole, "oldest_s": number}),
    "totals": table(dict.fromkeys(TOTALS, whole)),
    "engine": table(
        {
            "state": lambda value: value in {"loading", "idle", "busy", "backoff"},
            "restarts": whole,
            "last_reason": maybe(text),
            "rss_mb": maybe(number),
            "sessions": whole,
            "frame_cache_mb": number,
            "frame_cache_hits": whole,
        }
    ),
    "speed": table(
        {
            "ttft_ms_p50": maybe(number),
            "prefill_tokens_per_second": maybe(number),
            "tokens_per_second_p50": maybe(number),
        }
    ),
    "host": table(
        {
            "cpu": maybe(number),
            "rss_mb": maybe(number),
            "mem_available_mb": maybe(number),
            "temp_c": maybe(lambda value: type(value) in {int, float}),
            "throttled": lambda _: True,
            "disk_free_mb": maybe(number),
        }
    ),
    "mqtt": table({"connected": flag, "reconnects": whole, "last_reason": maybe(text)}),
}


def status_wrong(body: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a `status`."""
    return list(_table(body, _STATUS, {}))


def info_wrong(body: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with an `info`."""
    return list(_table(body, _INFO, {}))


def heartbeat_wrong(body: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a heartbeat."""
    may: dict[str, Check] = {
        "job": table(_JOB, {"client": text}),
        "cameras": lambda value: isinstance(value, dict),
    }
    return list(_table(body, _HEALTH, may))
