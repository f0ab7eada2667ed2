"""Simple drawings: shapes on a ground, as the small model knows them.

The self-test and the demo draw their frames with it, and so does what the model was trained with.
It needs Pillow, which only the engine's process has; nothing of the daemon imports it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

Shape = Literal["circle", "square", "triangle", "star", "cross"]
Point = tuple[float, float]
#: Red, green, blue, 0 to 255.
Rgb = tuple[int, int, int]

SHAPES: tuple[Shape, ...] = ("circle", "square", "triangle", "star", "cross")
#: The colours that the model names, each as CSS has it.
COLOURS: dict[str, Rgb] = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 128),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One shape as it stands in a frame."""

    shape: Shape
    rgb: Rgb
    #: Of its middle, as a share of the frame's width and height, from its top left.
    at: Point
    #: Its width, as a share of the frame's shorter side.
    size: float
    #: Width of the line, as a share of `size`; None: filled.
    line: float | None = None
    #: Degrees, clockwise.
    turned: float = 0.0


def outline(mark: Mark) -> list[Point]:
    """Return the corners of a shape around (0, 0), its width 1; a circle has many."""
    if mark.shape == "circle":
        corners = [_on_circle(0.5, 360 * n / 48) for n in range(48)]
    elif mark.shape == "square":
        corners = [(-0.45, -0.45), (0.45, -0.45), (0.45, 0.45), (-0.45, 0.45)]
    elif mark.shape == "triangle":
        corners = [(0.0, -0.48), (0.5, 0.42), (-0.5, 0.42)]
    elif mark.shape == "star":
        corners = [_on_circle(0.52 if n % 2 == 0 else 0.21, 36 * n) for n in range(10)]
    else:
        near, far = 0.16, 0.5
        quarter = [(near, -far), (near, -near), (far, -near)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-y, x) for x, y in quarter]
    angle = math.radians(mark.turned)
    sin, cos = math.sin(angle), math.cos(angle)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in corners]


def _on_circle(radius: float, degrees: float) -> Point:
    """Return the point at an angle from the top, clockwise."""
    angle = math.radians(degrees)
    return radius * math.sin(angle), -radius * math.cos(angle)


def paint(ground: Image.Image, marks: Sequence[Mark], *, smooth: bool = True) -> Image.Image:
    """Return the ground with shapes on it.

    Args:
        ground: RGB; it is not changed.
        marks: the later ones cover the earlier.
        smooth: without stairs at the edges.
    """
    factor = 2 if smooth else 1
    wide, high = ground.width * factor, ground.height * factor
    picture = ground.resize((wide, high), Image.Resampling.NEAREST) if smooth else ground.copy()
    draw = ImageDraw.Draw(picture)
    for mark in marks:
        side = mark.size * min(wide, high)
        x, y = mark.at[0] * wide, mark.at[1] * high
        corners = [(x + side * dx, y + side * dy) for dx, dy in outline(mark)]
        if mark.line is None:
            draw.polygon(corners, fill=mark.rgb)
        else:
            width = max(factor, round(mark.line * side))
            draw.line([*corners, *corners[:2]], fill=mark.rgb, width=width, joint="curve")
    return picture.resize(ground.size, Image.Resampling.BOX) if smooth else picture


def frame(
    marks: Sequence[Mark], size: tuple[int, int] = (320, 240), ground: Rgb = (235, 235, 230)
) -> Image.Image:
    """Return a frame of shapes on an even ground.

    Args:
        marks: what is in it.
        size: width and height, pixels.
        ground: its colour.
    """
    return paint(Image.new("RGB", size, ground), marks)


def encoded(picture: Image.Image, kind: Literal["JPEG", "PNG"], quality: int = 90) -> bytes:
    """Return the bytes of a picture's file; `quality` is a JPEG's."""
    file = io.BytesIO()
    if kind == "JPEG":
        picture.save(file, kind, quality=quality)
    else:
        picture.save(file, kind)
    return file.getvalue()
