"""Which of a camera's frames a job gets: the newest, a spread, or those of a growing window.

A window is remembered for one client, camera, least and most, because what makes it cheap is kept
for these, too: the engine has seen its frames in this order already, and a new frame behind them
costs one frame. Windows are bounded in number, in idle time and, with the rings, in bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

from edged.cameras.buffer import Buffers, Frame, Ring
from edged.ports import Choice

#: Windows remembered; then the one that was not used for longest is forgotten.
MAX_WINDOWS = 64
#: A window that nobody asks for is forgotten after so many seconds.
IDLE_S = 3600.0


class TooFew(Exception):
    """There are not as many frames as a choice needs."""

    def __init__(self, *, have: int, need: int) -> None:
        super().__init__(f"{have} of {need}")
        self.have = have
        self.need = need


@dataclass(frozen=True, slots=True)
class _Name:
    client: str | None
    camera: str
    least: int
    most: int


@dataclass(slots=True)
class _Window:
    frames: list[Frame]
    used: float


class Windows:
    """The growing windows on some buffers; the caller serialises."""

    def __init__(self, most: int = MAX_WINDOWS) -> None:
        self._most = most
        self._windows: OrderedDict[_Name, _Window] = OrderedDict()
        #: Set once, by who makes both.
        self.buffers: Buffers

    def __len__(self) -> int:
        return len(self._windows)

    def choose(
        self, choice: Choice, client: str | None, ring: Ring, now: float
    ) -> tuple[Frame, ...]:
        """Return the frames of the choice's window, moved on to the camera's newest.

        Raises:
            TooFew: fewer than the least; an old window is forgotten then.
        """
        assert choice.window is not None  # noqa: S101 - the caller looked
        least, most = choice.window
        name = _Name(client, choice.camera, least, most)
        window = self._windows.get(name)
        old = window.frames if window is not None else []
        frames = [frame for frame in old if not _is_stale(frame, choice, now)]
        # A camera that has sent nothing for long has nothing to look at, whatever is remembered.
        newest = ring.frames[-1] if ring.frames else None
        if newest is None or _is_stale(newest, choice, now):
            raise TooFew(have=0, need=least)
        if frames and newest.number > frames[-1].number:
            frames.append(newest)
        if len(frames) > most:
            frames = frames[-least:]
        if len(frames) < least:
            ringed = islice(_fresh(ring, choice, now), least)
            every = {frame.number: frame for frame in (*frames, *ringed)}
            frames = [every[number] for number in sorted(every)][-least:]
        if len(frames) < least:
            self._forget(name)
            raise TooFew(have=len(frames), need=least)
        self._keep(name, frames, now)
        return tuple(frames)

    def trim(self, choice: Choice, client: str | None, since: float) -> None:
        """Let a window begin with the newest of its frames that has this `ts`, if one has."""
        if choice.window is None:
            return
        name = _Name(client, choice.camera, *choice.window)
        window = self._windows.get(name)
        if window is None:
            return
        for index in reversed(range(len(window.frames))):
            if window.frames[index].shot.ts == since:
                self._keep(name, window.frames[index:], window.used)
                return

    def _keep(self, name: _Name, frames: list[Frame], now: float) -> None:
        window = self._windows.get(name)
        # The new ones first: what both hold must not be let go in between.
        for frame in frames:
            self.buffers.hold(frame)
        if window is None:
            self._windows[name] = _Window(frames, now)
        else:
            for frame in window.frames:
                self.buffers.release(frame)
            window.frames, window.used = frames, now
        self._windows.move_to_end(name)
        if len(self._windows) > self._most:
            self.forget_one()

    def _forget(self, name: _Name) -> None:
        window = self._windows.pop(name, None)
        for frame in window.frames if window is not None else ():
            self.buffers.release(frame)

    def forget_one(self) -> bool:
        """Let go of the window that was not used for longest; return whether there was one."""
        name = next(iter(self._windows), None)
        if name is None:
            return False
        self._forget(name)
        return True

    def forget_camera(self, camera: str) -> None:
        """Let go of all windows on a camera."""
        for name in [name for name in self._windows if name.camera == camera]:
            self._forget(name)

    def expire(self, now: float) -> None:
        """Let go of windows that nobody has asked for in a while."""
        idle = (name for name, each in self._windows.items() if now - each.used > IDLE_S)
        for name in list(idle):
            self._forget(name)


def _is_stale(frame: Frame, choice: Choice, now: float) -> bool:
    return choice.max_age_s is not None and now - frame.at > choice.max_age_s


def _fresh(ring: Ring, choice: Choice, now: float) -> Iterator[Frame]:
    """Yield a ring's frames, newest first, as far as the choice takes them."""
    return takewhile(lambda frame: not _is_stale(frame, choice, now), reversed(ring.frames))


def newest(choice: Choice, ring: Ring, now: float) -> tuple[Frame, ...]:
    """Return the newest frames, or frames spread over a span, oldest first.

    Raises:
        TooFew: there are fewer, or fewer within the span.
    """
    count = choice.last or 1
    fresh = _fresh(ring, choice, now)
    if choice.span_s is None:
        frames = list(islice(fresh, count))[::-1]
    else:
        begin = ring.frames[-1].at - choice.span_s if ring.frames else 0.0
        frames = list(takewhile(lambda frame: frame.at >= begin, fresh))[::-1]
    if len(frames) < count:
        raise TooFew(have=len(frames), need=count)
    return tuple(spread(frames, count))


def spread(frames: Sequence[Frame], count: int) -> list[Frame]:
    """Return so many of the frames, as evenly in time as they allow, the newest always."""
    if count == len(frames):
        return list(frames)
    times = [frame.at for frame in frames]
    last = len(frames) - 1
    step = (times[-1] - times[0]) / (count - 1) if count > 1 else 0.0
    chosen = [last]
    for left in range(count - 2, -1, -1):  # frames that are still to be found after this one
        wanted = times[0] + left * step
        index = bisect_left(times, wanted)
        if index > 0 and (index > last or wanted - times[index - 1] < times[index] - wanted):
            index -= 1
        chosen.append(max(left, min(index, chosen[-1] - 1)))
    return [frames[index] for index in reversed(chosen)]
