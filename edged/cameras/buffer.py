"""Ring buffers of frames, bounded in time, in bytes of all cameras together, and in cameras.

The order in a ring is that of arrival, and ages are counted from arrival, on a clock that does not
jump: what a camera says about its own time is told to whoever looks at the frame, and decides
nothing.

When bytes run out, the oldest frame of the camera that holds most goes, so that all cameras that
want more get equal shares; but never a camera's newest frame, whatever the others send.

No locks and no clock: the caller serialises and says what time it is.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edged.ports import Shot

#: What a frame is counted as beyond its bytes: very many very small ones are bounded as well.
OVERHEAD = 512
#: The part of the bytes that frames may take which only windows hold any more.
WINDOWS_SHARE = 0.5
#: A camera is forgotten when it has been silent for so long, seconds; earlier, once its buffer is
#: empty, if another one needs its place.
FORGOTTEN_S = 3600.0
#: Frames a second are counted over so many seconds.
RATE_S = 10


class Full(Exception):
    """A frame cannot be kept; the message is for people."""


@dataclass(slots=True, eq=False)
class Frame:
    """A frame that is held, in a ring, by windows, or both."""

    shot: Shot
    #: Its place in the order of everything that ever came.
    number: int
    #: When it came, monotonic seconds.
    at: float
    size: int
    ringed: bool = True
    windows: int = 0


class Rate:
    """Counts frames by the second."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._counts: deque[tuple[int, int]] = deque(maxlen=RATE_S + 1)  # second, frames in it

    def count(self, now: float) -> None:
        """Count a frame."""
        second = int(now)
        if self._began is None:
            self._began = now
        if self._counts and self._counts[-1][0] == second:
            self._counts[-1] = (second, self._counts[-1][1] + 1)
        else:
            self._counts.append((second, 1))

    def fps(self, now: float) -> float:
        """Return frames a second over the last whole RATE_S seconds, or since the first frame."""
        if self._began is None:
            return 0.0
        second = int(now)
        counted = sum(count for when, count in self._counts if when >= second - RATE_S)
        return counted / min(max(now - self._began, 1.0), now - (second - RATE_S))


@dataclass(slots=True, eq=False)
class Ring:
    """One camera's frames, oldest first."""

    frames: deque[Frame] = field(default_factory=deque)
    bytes: int = 0
    rate: Rate = field(default_factory=Rate)
    #: Frames that were not taken, ever.
    refused: int = 0
    #: When the newest frame came; None: none ever did.
    newest: float | None = None
    #: When anything came.
    heard: float = 0.0
    #: Something has come since this was last set to false.
    news: bool = True

    def newest_age_s(self, now: float) -> float | None:
        """Return how old the newest frame is, also when it is no longer here."""
        return None if self.newest is None else max(0.0, now - self.newest)


class Buffers:
    """The rings of all cameras.

    Args:
        cameras: How many there may be; above 0.
        seconds: How long a frame stays.
        size: Bytes of all frames together, those held by windows included.
        forget_window: Lets go of the window that was not used for longest; returns whether there
            was one.
        forget_camera: Told that a camera's ring is gone.
    """

    def __init__(
        self,
        *,
        cameras: int,
        seconds: float,
        size: int,
        forget_window: Callable[[], bool] = lambda: False,
        forget_camera: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._cameras = cameras
        self.seconds = seconds
        self._size = size
        self._forget_window = forget_window
        self._forget_camera = forget_camera
        self._numbers = itertools.count(1)
        self.rings: dict[str, Ring] = {}
        #: Bytes of all frames, each counted once.
        self.bytes = 0
        #: Bytes of those that only windows hold.
        self.loose = 0

    # Rings

    def find(self, camera: str, now: float) -> Ring | None:
        """Return a camera's ring, without what is too old."""
        ring = self.rings.get(camera)
        if ring is not None:
            self._expire(ring, now)
            self._bound_loose()
        return ring

    def expire(self, now: float) -> None:
        """Let go of all frames that are too old, and of cameras that were silent for long."""
        for name, ring in list(self.rings.items()):
            self._expire(ring, now)
            if not ring.frames and now - ring.heard > FORGOTTEN_S:
                self._remove(name)
        self._bound_loose()

    def may_come(self, camera: str, now: float) -> bool:
        """Return whether this camera has a place or would get one."""
        if camera in self.rings or len(self.rings) < self._cameras:
            return True
        return any(not ring.frames or self._is_old(ring.frames[-1], now) for ring in self._all())

    def put(self, camera: str, shot: Shot, now: float) -> bool:
        """Take a frame; return whether its camera is new.

        Raises:
            Full: there are too many cameras, or the frame does not fit.
        """
        known = camera in self.rings
        if not known and not self.may_come(camera, now):
            raise Full(f"there are {self._cameras} cameras already, see cameras.max")
        size = len(shot.data) + OVERHEAD
        if self.bytes + size > self._size:
            self.expire(now)
            if size + self._newest_of_others(camera) > self._size:
                raise Full("it does not fit beside the others' newest, see cameras.buffer_mb")
        ring = self._ring(camera, now)
        self._expire(ring, now)
        self._make_room(ring, size)
        ring.frames.append(Frame(shot, next(self._numbers), now, size))
        ring.bytes += size
        self.bytes += size
        ring.newest = ring.heard = now
        ring.news = True
        ring.rate.count(now)
        return not known

    def refuse(self, camera: str, now: float) -> None:
        """Count a frame that is not taken; a new camera has it counted if there is a place free."""
        if camera in self.rings or len(self.rings) < self._cameras:
            ring = self._ring(camera, now)
            ring.refused += 1
            ring.heard = now
            ring.news = True

    def _all(self) -> Iterator[Ring]:
        return iter(self.rings.values())

    def _ring(self, camera: str, now: float) -> Ring:
        ring = self.rings.get(camera)
        if ring is None:
            if len(self.rings) >= self._cameras:
                self.expire(now)
            if len(self.rings) >= self._cameras:
                empty = [name for name, each in self.rings.items() if not each.frames]
                self._remove(min(empty, key=self._worth))
            ring = self.rings[camera] = Ring(heard=now)
        return ring

    def _worth(self, camera: str) -> tuple[bool, float]:
        """Return who is to go: who never sent a frame, then who was silent for longest."""
        ring = self.rings[camera]
        return ring.newest is not None, ring.heard

    def _remove(self, camera: str) -> None:
        ring = self.rings.pop(camera)
        while ring.frames:
            self._pop(ring)
        self._forget_camera(camera)

    # Bytes

    def _is_old(self, frame: Frame, now: float) -> bool:
        return now - frame.at > self.seconds

    def _expire(self, ring: Ring, now: float) -> None:
        while ring.frames and self._is_old(ring.frames[0], now):
            self._pop(ring)

    def _newest_of_others(self, camera: str) -> int:
        rings = self.rings.items()
        return sum(ring.frames[-1].size for name, ring in rings if ring.frames and name != camera)

    def _make_room(self, ring: Ring, size: int) -> None:
        """Let go of frames until one of this size fits into that ring; `put` knows that it will."""
        while self.bytes + size > self._size:
            largest: Ring | None = None
            most = 0
            for each in self._all():
                # What arrives counts as its ring's already, and takes over as the newest there.
                mine = each is ring
                has = each.bytes + (size if mine else 0)
                if len(each.frames) + mine > 1 and has > most:
                    largest, most = each, has
            if largest is not None:
                self._pop(largest)
                self._bound_loose()
            elif not self._forget_window():
                raise AssertionError("bytes are held by nobody")

    def _pop(self, ring: Ring) -> None:
        frame = ring.frames.popleft()
        frame.ringed = False
        ring.bytes -= frame.size
        if frame.windows:
            self.loose += frame.size
        else:
            self.bytes -= frame.size

    def _bound_loose(self) -> None:
        while self.loose > WINDOWS_SHARE * self._size and self._forget_window():
            pass

    def hold(self, frame: Frame) -> None:
        """Take note that a window holds a frame, which is in a ring or held by another window."""
        frame.windows += 1

    def release(self, frame: Frame) -> None:
        """Take note that a window no longer holds a frame."""
        frame.windows -= 1
        if not frame.windows and not frame.ringed:
            self.loose -= frame.size
            self.bytes -= frame.size
