"""What a message of a camera is: JPEG or PNG bytes, or JSON around them. Nothing is decoded."""

from __future__ import annotations

import re

from edged import protocol
from edged.errors import Code, Refused
from edged.mqttwire import MAX_TS_BYTES

#: How the two formats begin (ITU-T T.81 annex B; PNG section 5.2).
_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_NUMBER = re.compile(r"-?\d{1,18}(\.\d{1,18})?([eE][+-]?\d{1,2})?\Z", re.ASCII)
#: The year 10000, Unix seconds: later ones are no seconds (milliseconds, mostly).
_LATEST = 253_402_300_800.0


def read_frame(payload: bytes, ts: str | None) -> tuple[bytes, float | None]:
    """Return a message's frame, and when it says it was taken; None: it does not say.

    Args:
        payload: As received.
        ts: The user property `ts`, for raw frames: Unix seconds, or a time as in RFC 3339.

    Raises:
        Refused: `bad_frame`, it is none, or its time is no time.
    """
    if _is_image(payload):
        return payload, None if ts is None else _moment(ts)
    if payload[:64].lstrip(b" \t\r\n")[:1] != b"{":
        raise Refused(Code.BAD_FRAME, "neither JPEG nor PNG, nor JSON around one")
    try:
        frame = protocol.validate(protocol.InlineFrame, protocol.parse_json(payload))
    except Refused as error:
        raise Refused(Code.BAD_FRAME, error.message) from None
    data = protocol.decoded_image(frame.image)
    if not _is_image(data):
        raise Refused(Code.BAD_FRAME, "image: must be JPEG or PNG as base64")
    return data, None if frame.ts is None else _plausible(frame.ts)


def _is_image(data: bytes) -> bool:
    return data.startswith((_JPEG, _PNG))


def _moment(text: str) -> float:
    if len(text.encode()) > MAX_TS_BYTES:
        raise Refused(Code.BAD_FRAME, f"ts: longer than {MAX_TS_BYTES} bytes")
    if _NUMBER.match(text):
        return _plausible(float(text))
    try:
        return _plausible(protocol.moment(text))
    except ValueError as error:
        raise Refused(Code.BAD_FRAME, f"ts: {error}") from None


def _plausible(ts: float) -> float:
    """Return the time; it may be any that a clock can show, right or wrong."""
    if not 0 <= ts < _LATEST:
        raise Refused(Code.BAD_FRAME, "ts: no Unix seconds")
    return ts
