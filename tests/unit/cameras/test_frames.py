"""What is a frame and what is none."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.cameras.frames import read_frame
from edged.errors import Code, Refused

JPEG = b"\xff\xd8\xff\xe0 and so on"
PNG = b"\x89PNG\r\n\x1a\n and so on"
IN_2026 = 1_770_000_000.0


def body(image: bytes | str = JPEG, **fields: Any) -> bytes:
    text = image if isinstance(image, str) else base64.b64encode(image).decode()
    return json.dumps({"image": text, **fields}).encode()


@pytest.mark.parametrize("image", [JPEG, PNG])
def test_raw_bytes(image: bytes) -> None:
    assert read_frame(image, None) == (image, None)
    assert read_frame(image, "1770000000.5") == (image, IN_2026 + 0.5)
    assert read_frame(image, "2026-02-02T02:40:00Z") == (image, IN_2026)


@pytest.mark.parametrize("image", [JPEG, PNG])
def test_json(image: bytes) -> None:
    assert read_frame(body(image), None) == (image, None)
    assert read_frame(b" \r\n" + body(image), None) == (image, None)
    assert read_frame(body(image, ts=1770000000), None) == (image, IN_2026)
    assert read_frame(body(image, ts="2026-02-02T03:40:00+01:00"), None) == (image, IN_2026)
    wrapped = base64.encodebytes(image * 20).decode()
    assert "\n" in wrapped
    assert read_frame(body(wrapped), None) == (image * 20, None)


def test_the_property_is_for_raw_frames() -> None:
    assert read_frame(body(ts=5), "7") == (JPEG, 5)
    assert read_frame(body(), "7") == (JPEG, None)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"GIF89a", "neither JPEG nor PNG"),
        (b"RIFF\0\0\0\0WEBP", "neither JPEG nor PNG"),
        (b"\xff\xd8", "neither JPEG nor PNG"),
        (b"[]", "neither JPEG nor PNG"),
        (b" " * 100 + body(), "neither JPEG nor PNG"),
        (b"{", "not JSON"),
        (b"{}", "image"),
        (body(b"GIF89a"), "image: must be JPEG or PNG as base64"),
        (body(b""), "image: must be JPEG or PNG as base64"),
        (body("@@@"), "base64"),
        (body("ü"), "base64"),
        (body("data:image/jpeg;base64," + base64.b64encode(JPEG).decode()), "base64"),
        (body(camera="door"), "unknown field 'camera'"),
        (body(image="")[:-1] + b',"image":""}', "twice"),
        (body(ts=True), "ts"),
        (body(ts="yesterday"), "RFC 3339"),
        (body(ts="2026-02-02T02:40:00"), "RFC 3339"),
        (body(ts=-1), "ts"),
        (body(ts=1e300), "ts"),
        (body(ts=0)[:-2] + b"NaN}", "NaN"),
        (body(ts=1770000000000), "no Unix seconds"),
    ],
)
def test_what_is_no_frame(payload: bytes, words: str) -> None:
    with pytest.raises(Refused, match=words) as refused:
        read_frame(payload, None)
    assert refused.value.code is Code.BAD_FRAME


@pytest.mark.parametrize(
    "ts",
    ["", " 5", "5 ", "nan", "inf", "-inf", "1e999", "0x10", "1_000", "٣", "-5", "1770000000000",
     "yesterday", "2026-02-02", "2026-02-02T02:40:00", "9" * 18, "1" * 65, "ü" * 40, "\ufffd"],
)  # fmt: skip
def test_what_is_no_time(ts: str) -> None:
    with pytest.raises(Refused, match="ts") as refused:
        read_frame(JPEG, ts)
    assert refused.value.code is Code.BAD_FRAME


def test_a_clock_that_is_wrong_is_told_as_it_is() -> None:
    assert read_frame(JPEG, "0")[1] == 0
    assert read_frame(JPEG, "4102444800")[1] == 4102444800  # 2100


@given(payload=st.binary(max_size=200), ts=st.none() | st.text(max_size=80))
def test_any_bytes_are_a_frame_or_refused(payload: bytes, ts: str | None) -> None:
    for data in (payload, JPEG + payload, b"{" + payload, body(payload)):
        try:
            image, moment = read_frame(data, ts)
        except Refused:
            pass
        else:
            assert image.startswith((b"\xff\xd8\xff", b"\x89PNG"))
            assert moment is None or moment >= 0
