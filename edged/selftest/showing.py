"""Frames as rows of characters, for a terminal that understands 24-bit colours.

A character is two pixels, one above the other.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

#: Characters that a frame is wide, and between two.
WIDTH, GAP = 16, 2
_UPPER_HALF = "▀"


def rows(files: Sequence[bytes]) -> list[str]:
    """Return the rows that show frames, JPEG or PNG of one size, side by side."""
    return [(" " * GAP).join(parts) for parts in zip(*map(_rows, files), strict=True)]


def _rows(file: bytes) -> list[str]:
    with Image.open(io.BytesIO(file)) as opened:
        picture = opened.convert("RGB")
    high = max(1, round(WIDTH * picture.height / picture.width / 2))
    small = picture.resize((WIDTH, 2 * high), Image.Resampling.BOX)
    return ["".join(_cell(small, x, 2 * y) for x in range(WIDTH)) + "\x1b[0m" for y in range(high)]


def _cell(picture: Image.Image, x: int, y: int) -> str:
    front, back = (_rgb(picture, x, each) for each in (y, y + 1))
    return f"\x1b[38;2;{front};48;2;{back}m{_UPPER_HALF}"


def _rgb(picture: Image.Image, x: int, y: int) -> str:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)  # noqa: S101  (it is RGB)
    return ";".join(str(int(each)) for each in pixel)
