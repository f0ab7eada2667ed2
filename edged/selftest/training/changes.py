"""What becomes of a scene from one frame to the next: what a decoder is to make of its frames."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from edged.selftest.drawings import Point
from edged.selftest.training.scenes import Scene, Thing

#: What may have become of a cell of the frame since the frame before.
CHANGES = ("empty", "first", "stays", "left", "right", "up", "down", "appeared", "vanished")
#: What may have happened in a scene since its first frame.
EVENTS = ("still", "left", "right", "up", "down", "two ways", "appear", "vanish", "jumble")


@dataclass(frozen=True, slots=True, kw_only=True)
class SoFar:
    """What has happened up to a frame."""

    #: One of `EVENTS`.
    event: str
    #: What it happened to, the first by name; None: nothing happened.
    thing: Thing | None
    #: The frame, from 0, since when something is there or gone; 0: nothing is.
    since: int


def cells(scene: Scene, frame: int, side: int) -> list[str]:
    """Return what has become of each cell, one of `CHANGES`.

    Args:
        scene: what there is to see.
        frame: from 0.
        side: cells a side of the square that the frame is seen in, its middle in the middle.
    """
    found, moved = ["empty"] * (side * side), {}
    for thing in scene.things:
        at, before = thing.path[frame], thing.path[frame - 1] if frame else None
        if at is None:
            if before is not None:
                found[_cell(before, scene, side)] = "vanished"
        elif not frame:
            found[_cell(at, scene, side)] = "first"
        elif before is None:
            moved[_cell(at, scene, side)] = "appeared"
        elif at == before:
            found[_cell(at, scene, side)] = "stays"
        else:
            moved[_cell(at, scene, side)] = _way(before, at)
    for cell, change in moved.items():  # of two in one cell, the one that does something
        found[cell] = change
    return found


def so_far(scene: Scene, frame: int) -> SoFar:
    """Return what has happened since the first frame."""
    movers = sorted(scene.movers, key=lambda each: each[0].name)
    since = scene.since if scene.since is not None and scene.since <= frame else 0
    event: str
    if scene.happening in ("appear", "vanish"):
        event = scene.happening if since else "still"
    else:
        events = {_steps(thing, way, frame) for thing, way in movers} or {"still"}
        event = "two ways" if len(events) > 1 else events.pop()
    return SoFar(event=event, thing=None if event == "still" else movers[0][0], since=since)


def _cell(at: Point, scene: Scene, side: int) -> int:
    size = scene.ground.size
    column, row = (
        min(int((0.5 + (share - 0.5) * length / max(size)) * side), side - 1)
        for share, length in zip(at, size, strict=True)
    )
    return row * side + column


def _way(before: Point, after: Point) -> str:
    right, down = after[0] - before[0], after[1] - before[1]
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def _steps(thing: Thing, way: str | None, frame: int) -> str:
    """Return which way all steps went; with a way of its own it may drift aside in one of them."""
    ways = {_way(a, b) for a, b in pairwise(thing.path[: frame + 1]) if a and b and a != b}
    if not ways:
        return "still"
    return way or (ways.pop() if len(ways) == 1 else "jumble")
