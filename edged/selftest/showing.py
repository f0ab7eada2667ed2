"""Frames as rows of characters, for any terminal.

Where 24-bit colours are understood a character is two pixels, one above the other; elsewhere it is
the initial of the colour that stands there.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from edged.selftest.drawings import COLOURS, Rgb

#: Characters that a frame is wide, and between two.
WIDTH, GAP = 16, 2
_UPPER_HALF = "▀"
_GROUND = "·"
#: Squared distance from the ground up to which a pixel is ground.
_NEAR = 90**2


def rows(files: Sequence[bytes], *, colours: bool) -> list[str]:
    """Return the rows that show frames side by side.

    Args:
        files: JPEG or PNG, all of one size.
        colours: the terminal understands 24-bit colours.
    """
    pictures = [_rows(each, colours=colours) for each in files]
    return [(" " * GAP).join(parts) for parts in zip(*pictures, strict=True)]


def _rows(file: bytes, *, colours: bool) -> list[str]:
    with Image.open(io.BytesIO(file)) as opened:
        picture = opened.convert("RGB")
    high = max(1, round(WIDTH * picture.height / picture.width / 2))
    if not colours:
        small, ground = picture.resize((WIDTH, high), Image.Resampling.NEAREST), _rgb(picture, 0, 0)
        return [
            "".join(_letter(_rgb(small, x, y), ground) for x in range(WIDTH)) for y in range(high)
        ]
    small = picture.resize((WIDTH, 2 * high), Image.Resampling.BOX)
    return [
        "".join(_cell(_rgb(small, x, 2 * y), _rgb(small, x, 2 * y + 1)) for x in range(WIDTH))
        + "\x1b[0m"
        for y in range(high)
    ]


def _rgb(picture: Image.Image, x: int, y: int) -> Rgb:
    pixel = picture.getpixel((x, y))
    assert isinstance(pixel, tuple)  # noqa: S101  (it is RGB)
    red, green, blue = pixel
    return int(red), int(green), int(blue)


def _cell(upper: Rgb, lower: Rgb) -> str:
    front, back = (";".join(map(str, each)) for each in (upper, lower))
    return f"\x1b[38;2;{front};48;2;{back}m{_UPPER_HALF}"


def _letter(pixel: Rgb, ground: Rgb) -> str:
    if _distance(pixel, ground) < _NEAR:
        return _GROUND
    return min(COLOURS, key=lambda name: _distance(pixel, COLOURS[name]))[0]


def _distance(one: Rgb, other: Rgb) -> int:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
