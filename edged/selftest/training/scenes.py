"""Scenes: a few shapes over one or more frames, with one thing that happens, or nothing.

Everything is drawn from the `random.Random` that is handed in, so that a seed is a scene.
"""

from __future__ import annotations

import colorsys
import io
import math
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter

from edged.selftest.drawings import (
    COLOURS,
    SHAPES,
    Mark,
    Point,
    Rgb,
    Shape,
    encoded,
    paint,
)

Happening = Literal["still", "move", "appear", "vanish", "jumble"]
Direction = Literal["left", "right", "up", "down"]

DIRECTIONS: dict[Direction, Point] = {
    "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
}  # fmt: skip
#: Rows and columns of places, by their names; None: the middle one's.
ROWS, COLUMNS = ("top", None, "bottom"), ("left", None, "right")
#: Of degrees of hue, of saturation and of value; what a colour may look like and keep its name.
_SHADES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-9, 9), (0.75, 1), (0.65, 1)),
    "orange": ((24, 39), (0.85, 1), (0.88, 1)),
    "yellow": ((51, 61), (0.7, 1), (0.85, 1)),
    "green": ((92, 150), (0.55, 1), (0.38, 1)),
    "blue": ((208, 242), (0.65, 1), (0.5, 1)),
    "purple": ((268, 302), (0.5, 1), (0.42, 0.88)),
    "black": ((0, 360), (0, 1), (0, 0.1)),
    "white": ((0, 360), (0, 0.04), (0.94, 1)),
}
_ASPECTS = ((4, 3), (4, 3), (4, 3), (16, 9), (16, 9), (1, 1), (1, 1), (3, 2), (3, 4), (9, 16))
#: Least distance of a shape's colour from what is behind it.
_CONTRAST = 110.0
#: A scene that cannot be laid out is drawn anew; so often a part of it is tried before.
_TRIES = 60


class NoRoomError(Exception):
    """Chance has put things so that they do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One shape through all frames."""

    shape: Shape
    colour: str
    rgb: Rgb
    size: float
    line: float | None
    turned: float
    #: Where its middle is in each frame; None: it is not there.
    path: tuple[Point | None, ...]

    @property
    def name(self) -> str:
        """Its colour and shape."""
        return f"{self.colour} {self.shape}"

    def place(self, frame: int) -> tuple[str, ...] | None:
        """Return the words of its place in a frame, row first; None if it stands between two."""
        at = self.path[frame]
        if at is None:
            return None
        words = []
        for share, names in ((at[1], ROWS), (at[0], COLUMNS)):
            third = min(int(3 * share), 2)
            if min(abs(share - 1 / 3), abs(share - 2 / 3)) < 0.035:
                return None
            words.append(names[third])
        return tuple(word for word in words if word is not None) or ("centre",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Things over frames, what happens to them, and what the pictures look like."""

    things: tuple[Thing, ...]
    frames: int
    happening: Happening
    #: What it happens to; each with where it goes, if it moves.
    movers: tuple[tuple[Thing, Direction | None], ...] = ()
    #: The frame, from 0, at which it appears, or is gone.
    since: int | None = None
    ground: Image.Image = field(repr=False)
    #: Sizes of what disturbs: gain, noise (levels), blur (pixels), JPEG quality (None: lossless).
    gain: float = 1.0
    noise: float = 0.0
    blur: float = 0.0
    quality: int | None = None
    smooth: bool = True

    def marks(self, frame: int) -> list[Mark]:
        """Return what is to be drawn in a frame."""
        return [
            Mark(
                shape=thing.shape, rgb=thing.rgb, at=at, size=thing.size,
                line=thing.line, turned=thing.turned,
            )
            for thing in self.things
            if (at := thing.path[frame]) is not None
        ]  # fmt: skip

    def file(self, frame: int, random: Random) -> bytes:
        """Return a frame's file as a camera might send it; each call disturbs the frame anew."""
        picture = self._disturbed(frame, random)
        if self.quality is None:
            return encoded(picture, "PNG")
        return encoded(picture, "JPEG", self.quality)

    def picture(self, frame: int, random: Random) -> Image.Image:
        """Return what is in such a file."""
        if self.quality is None:
            return self._disturbed(frame, random)
        picture = Image.open(io.BytesIO(self.file(frame, random)))
        picture.load()
        return picture

    def _disturbed(self, frame: int, random: Random) -> Image.Image:
        picture = paint(self.ground, self.marks(frame), smooth=self.smooth)
        if self.blur:
            picture = picture.filter(ImageFilter.GaussianBlur(self.blur))
        gain = self.gain * random.uniform(0.97, 1.03)
        if self.noise or abs(gain - 1) > 0.04:
            levels = np.asarray(picture, np.float32) * gain
            if self.noise:
                draw = np.random.default_rng(random.getrandbits(32))
                levels += draw.standard_normal(levels.shape, np.float32) * self.noise
            picture = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
        return picture


def scene(random: Random, frames: int) -> Scene:
    """Return a scene of so many frames."""
    while True:
        try:
            return _scene(random, frames)
        except NoRoomError:
            continue


def _scene(random: Random, frames: int) -> Scene:
    ground, colours = _ground(random)
    if frames == 1:
        count = random.choices(range(5), (3, 48, 28, 14, 7))[0]
        happening: Happening = "still"
    else:
        count = random.choices((1, 2, 3), (55, 32, 13))[0]
        kinds: tuple[Happening, ...] = ("still", "move", "appear", "vanish", "jumble")
        happening = random.choices(kinds, (15, 40, 17, 17, 11 if frames > 2 else 0))[0]
        if happening == "still" and random.random() < 0.1:
            count = 0
    names = _names(random, count, colours, alike=frames == 1)
    two = happening == "move" and count > 1 and random.random() < 0.3
    movers = 0 if happening in ("still", "appear", "vanish") else 2 if two else min(count, 1)
    things: list[Thing] = []
    directions: list[Direction | None] = []
    cells = [(row, column) for row in range(3) for column in range(3)]
    random.shuffle(cells)
    size_all = random.uniform(0.2, 0.32)
    for n, (colour, shape, rgb) in enumerate(names):
        size = size_all * random.uniform(0.85, 1.15)
        if count == 1 and random.random() < 0.35:
            size = random.uniform(0.25, 0.6)
        size = min(max(size, 0.19), 0.6)
        line = random.uniform(0.12, 0.22) if size > 0.22 and random.random() < 0.25 else None
        direction: Direction | None = None
        path: tuple[Point | None, ...]
        if n < movers:
            way = random.choice(list(DIRECTIONS))
            direction, path = way, _way(random, frames, size, way)
        else:
            path = (_spot(random, cells, size, ground.size),) * frames
        path = _clear(random, path, things, size, ground, cells, moving=n < movers)
        things.append(
            Thing(
                shape=shape, colour=colour, rgb=rgb, size=size, line=line,
                turned=_turn(random, shape), path=path,
            )
        )  # fmt: skip
        directions.append(direction)
    moved: list[tuple[Thing, Direction | None]] = []
    since = None
    if happening == "move":
        moved = list(zip(things[:movers], directions, strict=False))
    elif happening == "jumble":
        path = things[0].path
        order = list(range(frames))
        while _steady(order):
            random.shuffle(order)
        things[0] = _with_path(things[0], tuple(path[n] for n in order))
        moved = [(things[0], None)]
    elif happening in ("appear", "vanish"):
        since = random.randrange(1, frames)
        at = things[0].path[0]
        seen = [(n >= since) == (happening == "appear") for n in range(frames)]
        things[0] = _with_path(things[0], tuple(at if there else None for there in seen))
        moved = [(things[0], None)]
    random.shuffle(things)
    sharp = random.random() < 0.25
    return Scene(
        things=tuple(things),
        frames=frames,
        happening=happening,
        movers=tuple(moved),
        since=since,
        ground=ground,
        gain=1.0 if sharp else random.choice((1.0, random.uniform(0.65, 1.08))),
        noise=0.0 if sharp or random.random() < 0.4 else random.uniform(1, 9),
        blur=0.0
        if sharp or random.random() < 0.8
        else random.uniform(0.3, 0.8) * ground.width / 128,
        quality=None if random.random() < 0.35 else random.randint(50, 95),
        smooth=random.random() < 0.75,
    )


def _steady(order: list[int]) -> bool:
    return order == sorted(order) or order == sorted(order, reverse=True)


def _with_path(thing: Thing, path: tuple[Point | None, ...]) -> Thing:
    return Thing(
        shape=thing.shape, colour=thing.colour, rgb=thing.rgb, size=thing.size, line=thing.line,
        turned=thing.turned, path=path,
    )  # fmt: skip


# Where things are --------------------------------------------------------------------------------


def _spot(
    random: Random, cells: list[tuple[int, int]], size: float, ground: tuple[int, int]
) -> Point:
    """Return a point well inside a free cell, where a thing of this size is not cut off."""
    if not cells:
        raise NoRoomError
    cell = cells.pop()
    share = []
    for third, side in ((cell[1], ground[0]), (cell[0], ground[1])):
        # the encoder sees the frame in a square: there as well it shall be the same third
        narrow = side / max(ground)
        least = max(0.05, size * min(ground) / side / 2 + 0.01)
        edge = min(0.28, 0.5 - 0.19 / narrow)
        low, high = ((least, edge), (0.4, 0.6), (1 - edge, 1 - least))[third]
        if low > high:
            raise NoRoomError
        share.append(random.uniform(low, high))
    return share[0], share[1]


def _way(random: Random, frames: int, size: float, direction: Direction) -> tuple[Point, ...]:
    """Return the points of a steady move, one a frame."""
    dx, dy = DIRECTIONS[direction]
    least = max(0.06, size / 2 + 0.005)
    room = 1 - 2 * least
    length = random.uniform(min(0.22 + 0.03 * frames, 0.4), 0.85)
    length = min(length, room)
    if length < 0.2 or length / (frames - 1) < 0.045:
        raise NoRoomError
    begin = random.uniform(least, 1 - least - length)
    steps = [random.uniform(0.6, 1.4) for _ in range(frames - 1)]
    done, shares = 0.0, [0.0]
    for step in steps:
        done += step / sum(steps)
        shares.append(done)
    across = random.uniform(least, 1 - least)
    drift = random.uniform(-0.06, 0.06) if random.random() < 0.5 else 0.0
    points = []
    for share in shares:
        along = begin + length * (share if dx + dy > 0 else 1 - share)
        beside = min(max(across + drift * share, least), 1 - least)
        points.append((along, beside) if dx else (beside, along))
    return tuple(points)


def _clear(
    random: Random,
    path: tuple[Point | None, ...],
    others: list[Thing],
    size: float,
    ground: Image.Image,
    cells: list[tuple[int, int]],
    *,
    moving: bool,
) -> tuple[Point | None, ...]:
    """Return the path if nothing stands in it, else another one for what does not move."""
    shorter = min(ground.size)
    wide, high = ground.width / shorter, ground.height / shorter

    def meets(way: tuple[Point | None, ...]) -> bool:
        return any(
            math.hypot((a[0] - b[0]) * wide, (a[1] - b[1]) * high) < (size + other.size) * 0.56
            for other in others
            for a, b in zip(way, other.path, strict=True)
            if a is not None and b is not None
        )

    for _ in range(_TRIES):
        if not meets(path):
            return path
        if moving:
            break
        path = (_spot(random, cells, size, ground.size),) * len(path)
    raise NoRoomError


# What things look like ---------------------------------------------------------------------------


def _names(
    random: Random, count: int, colours: list[str], *, alike: bool
) -> list[tuple[str, Shape, Rgb]]:
    """Return colours and shapes, no two things having both alike unless that is allowed."""
    if not colours:
        raise NoRoomError
    found: list[tuple[str, Shape, Rgb]] = []
    one_colour = random.choice(colours) if random.random() < 0.15 else None
    shapes = (random.choice(SHAPES),) if random.random() < 0.25 else SHAPES
    for _ in range(_TRIES):
        if len(found) == count:
            return found
        colour = one_colour or random.choice(colours)
        shape = random.choice(shapes)
        twice = any(colour == c and shape == s for c, s, _ in found)
        if not twice or (alike and random.random() < 0.1):
            found.append((colour, shape, _rgb(random, colour)))
    raise NoRoomError


def _rgb(random: Random, colour: str) -> Rgb:
    if random.random() < 0.4:
        return COLOURS[colour]
    hue, saturation, value = (random.uniform(*each) for each in _SHADES[colour])
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _turn(random: Random, shape: Shape) -> float:
    if random.random() < 0.5 or shape == "circle":
        return 0.0
    most = 180 if shape in ("triangle", "star") else 14
    return random.uniform(-most, most)


def _ground(random: Random) -> tuple[Image.Image, list[str]]:
    """Return what is behind the things, and the colours that can be told from it."""
    wide, high = random.choice(_ASPECTS)
    longer = random.choices((96, 128, 160, 224, 320, 640), (10, 30, 30, 20, 8, 2))[0]
    scale = longer / max(wide, high)
    size = (round(wide * scale), round(high * scale))
    first = _ground_rgb(random)
    kind = random.choices(("even", "fade", "noise", "stripes", "floor"), (50, 18, 12, 10, 10))[0]
    second = first
    if kind != "even":
        spread = 60 if kind in ("fade", "floor") else 22
        second = tuple(  # type: ignore[assignment]
            min(max(each + random.randint(-spread, spread), 0), 255) for each in first
        )
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    ys, xs = np.mgrid[0 : size[1], 0 : size[0]].astype(np.float32)
    if kind == "even":
        share = np.zeros_like(xs)
    elif kind == "fade":
        angle = random.uniform(0, 2 * math.pi)
        share = xs / size[0] * math.cos(angle) + ys / size[1] * math.sin(angle)
        share = (share - share.min()) / max(float(np.ptp(share)), 1e-6)
    elif kind == "noise":
        coarse = np.random.default_rng(random.getrandbits(32)).random(
            (max(2, size[1] // random.choice((2, 6, 16))), max(2, size[0] // 8)), np.float32
        )
        share = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))
    elif kind == "stripes":
        period = random.uniform(0.05, 0.25) * size[0]
        angle = random.choice((0.0, math.pi / 2, random.uniform(0, math.pi)))
        share = (
            np.sin((xs * math.cos(angle) + ys * math.sin(angle)) * 2 * math.pi / period) > 0
        ) * 1.0
    else:
        share = (ys > size[1] * random.uniform(0.3, 0.8)) * 1.0
    levels = a + (b - a) * np.asarray(share, np.float32)[:, :, None]
    picture = Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8))
    seen = [
        colour
        for colour in COLOURS
        if all(_apart(shade, each) for each in (first, second) for shade in _EXTREMES[colour])
    ]
    return picture, seen


def _ground_rgb(random: Random) -> Rgb:
    kind = random.random()
    if kind < 0.22:
        return random.choice(((255, 255, 255), (255, 255, 255), (250, 250, 250), (240, 240, 240)))
    if kind < 0.32:
        return random.choice(((0, 0, 0), (0, 0, 0), (16, 16, 16), (32, 32, 32)))
    if kind < 0.5:
        grey = random.randint(40, 235)
        return grey, grey, grey
    strong = kind > 0.93
    saturation = random.uniform(0.4, 0.8) if strong else random.uniform(0.03, 0.35)
    red, green, blue = colorsys.hsv_to_rgb(random.random(), saturation, random.uniform(0.15, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def _extremes(colour: str) -> list[Rgb]:
    """Return the corners of what a colour may look like."""
    found = []
    for hue in _SHADES[colour][0]:
        for saturation in _SHADES[colour][1]:
            for value in _SHADES[colour][2]:
                red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
                found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


_EXTREMES = {colour: _extremes(colour) for colour in COLOURS}


def _apart(one: Rgb, other: Rgb) -> bool:
    """Tell whether two colours can be told from each other ("redmean", a cheap perceptual one)."""
    mean = (one[0] + other[0]) / 2
    red, green, blue = (a - b for a, b in zip(one, other, strict=True))
    return (
        math.sqrt((2 + mean / 256) * red**2 + 4 * green**2 + (2 + (255 - mean) / 256) * blue**2)
        > _CONTRAST
    )
