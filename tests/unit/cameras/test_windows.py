"""Which frames a choice gets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.cameras.buffer import OVERHEAD, Buffers, Frame
from edged.cameras.windows import IDLE_S, TooFew, Windows, newest, spread
from edged.ports import Choice, Shot


class World:
    """Buffers and windows, and a clock."""

    def __init__(
        self, *, seconds: float = 30.0, size: int = 1_000_000, most: int = 64, cameras: int = 4
    ) -> None:
        self.now = 1000.0
        self.windows = Windows(most)
        self.buffers = self.windows.buffers = Buffers(
            cameras=cameras,
            seconds=seconds,
            size=size,
            forget_window=self.windows.forget_one,
            forget_camera=self.windows.forget_camera,
        )

    def put(self, *frames: float, camera: str = "door", size: int = 1000) -> None:
        """Let frames come that are told apart by their `ts`."""
        for ts in frames:
            self.buffers.put(camera, Shot(data=b"x" * (size - OVERHEAD), ts=ts), self.now)

    def last(
        self, count: int, *, span_s: float | None = None, max_age_s: float | None = None
    ) -> list[float]:
        ring = self.buffers.find("door", self.now)
        assert ring is not None
        choice = Choice(camera="door", last=count, span_s=span_s, max_age_s=max_age_s)
        return [frame.shot.ts for frame in newest(choice, ring, self.now)]

    def window(
        self,
        least: int = 2,
        most: int = 4,
        *,
        client: str | None = "ada",
        camera: str = "door",
        max_age_s: float | None = None,
    ) -> list[float]:
        ring = self.buffers.find(camera, self.now)
        assert ring is not None
        choice = Choice(camera=camera, window=(least, most), max_age_s=max_age_s)
        frames = self.windows.choose(choice, client, ring, self.now)
        return [frame.shot.ts for frame in frames]

    def trim(self, since: float, least: int = 2, most: int = 4, client: str | None = "ada") -> None:
        self.windows.trim(Choice(camera="door", window=(least, most)), client, since)


def test_the_newest() -> None:
    world = World()
    world.put(1, 2, 3, 4)
    assert world.last(1) == [4]
    assert world.last(3) == [2, 3, 4]
    with pytest.raises(TooFew) as few:
        world.last(5)
    assert (few.value.have, few.value.need) == (4, 5)


def test_none_that_is_too_old() -> None:
    world = World()
    for ts in range(6):
        world.now += 1
        world.put(ts)
    assert world.last(3, max_age_s=2) == [3, 4, 5]
    with pytest.raises(TooFew) as few:
        world.last(4, max_age_s=2)
    assert few.value.have == 3
    world.now += 3
    with pytest.raises(TooFew) as few:
        world.last(1, max_age_s=2)
    assert few.value.have == 0


def test_the_order_is_that_of_arrival_whatever_the_camera_says() -> None:
    world = World()
    world.put(5, 3, 9, 1)
    assert world.last(4) == [5, 3, 9, 1]


def test_spread_over_a_span() -> None:
    world = World()
    for ts in range(21):  # one a second
        world.put(ts)
        world.now += 1
    assert world.last(3, span_s=10) == [10, 15, 20]
    assert world.last(1, span_s=10) == [20]
    assert world.last(2, span_s=1) == [19, 20]
    assert world.last(5, span_s=86400) == [0, 5, 10, 15, 20]
    with pytest.raises(TooFew) as few:
        world.last(4, span_s=2)
    assert few.value.have == 3


def test_spread_over_a_burst_and_a_pause() -> None:
    world = World()
    world.put(0, 1, 2)
    world.now += 10
    world.put(3)
    assert world.last(3, span_s=20)[-1] == 3
    assert world.last(4, span_s=20) == [0, 1, 2, 3]


@given(
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=60),
    count=st.integers(1, 20),
)
def test_a_spread_is_in_order_distinct_and_ends_with_the_newest(
    gaps: list[float], count: int
) -> None:
    at = 0.0
    frames = []
    for number, gap in enumerate(gaps):
        at += gap
        frames.append(Frame(Shot(data=b"", ts=at), number, at, 0))
    count = min(count, len(frames))
    chosen = spread(frames, count)
    assert len(chosen) == count
    assert chosen[-1] is frames[-1]
    assert all(a.number < b.number for a, b in pairwise(chosen))


@given(fps=st.sampled_from([1, 5, 20]), seconds=st.integers(5, 30), count=st.integers(2, 8))
def test_a_spread_over_a_steady_camera_is_even(fps: int, seconds: int, count: int) -> None:
    total = fps * seconds
    frames = [Frame(Shot(data=b"", ts=n), n, n / fps, 0) for n in range(total)]
    if count > total:
        return
    chosen = spread(frames, count)
    even = (total - 1) / fps / (count - 1)
    assert all(abs(b.at - a.at - even) <= 1 / fps + 1e-6 for a, b in pairwise(chosen))
    assert chosen[0] is frames[0]


# Growing windows


def test_a_window_grows_by_the_newest_frame_and_begins_anew() -> None:
    world = World()
    world.put(1, 2, 3)
    assert world.window() == [2, 3]
    assert world.window() == [2, 3], "nothing new came"
    world.put(4, 5)
    assert world.window() == [2, 3, 5], "the newest only"
    world.put(6)
    assert world.window() == [2, 3, 5, 6]
    assert world.window() == [2, 3, 5, 6]
    world.put(7)
    assert world.window() == [6, 7]


def test_windows_of_others_are_others() -> None:
    world = World()
    world.put(1, 2, 3, 4)
    assert world.window() == [3, 4]
    world.put(5)
    assert world.window(client="bob") == [4, 5]
    assert world.window(client=None) == [4, 5]
    assert world.window(2, 5) == [4, 5]
    assert world.window(camera="door") == [3, 4, 5]


def test_a_window_outlives_the_ring() -> None:
    world = World(seconds=30)
    world.put(1, 2)
    assert world.window() == [1, 2]
    for ts in (3, 4):
        world.now += 60
        world.put(ts)
        assert world.window() == [1, 2, *range(3, ts + 1)]
    world.now += 60
    with pytest.raises(TooFew) as few:
        world.window()
    assert few.value.have == 0, "the camera has sent nothing for longer than frames are kept"
    world.put(5)
    with pytest.raises(TooFew):
        world.window(client="new")
    assert world.window() == [4, 5]


def test_frames_that_are_too_old_leave_a_window() -> None:
    world = World()
    for ts in range(1, 5):
        world.now += 1
        world.put(ts)
    assert world.window(2, 9, max_age_s=3) == [3, 4]
    world.now += 1
    world.put(5)
    assert world.window(2, 9, max_age_s=3) == [3, 4, 5]
    world.now += 3
    world.put(6)
    assert world.window(2, 9, max_age_s=3) == [5, 6]
    world.now += 3
    assert world.window(2, 9) == [5, 6]
    world.put(7)
    assert world.window(2, 9, max_age_s=3) == [6, 7]
    world.now += 2
    with pytest.raises(TooFew) as few:
        world.window(2, 9, max_age_s=1)
    assert few.value.have == 0
    world.put(8)
    with pytest.raises(TooFew) as few:
        world.window(2, 9, max_age_s=1)
    assert few.value.have == 1
    assert world.window(2, 9) == [7, 8], "it was forgotten, and begins with the newest"


def test_what_left_a_window_is_filled_up_from_the_ring() -> None:
    world = World()
    world.put(1, 2)
    world.window(2, 9, max_age_s=5)
    world.now += 4
    world.put(3, 4, 5)
    world.now += 2
    assert world.window(2, 9, max_age_s=5) == [4, 5]


def test_a_window_that_the_engine_has_begun_anew() -> None:
    world = World()
    world.put(1, 2, 3)
    assert world.window(3, 9) == [1, 2, 3]
    world.put(4)
    assert world.window(3, 9) == [1, 2, 3, 4]
    world.put(5)
    assert world.window(3, 9) == [1, 2, 3, 4, 5], "a job was accepted before the other ended"
    world.trim(2, 3, 9)
    assert world.window(3, 9) == [2, 3, 4, 5]
    world.trim(1, 3, 9)
    world.trim(3, 3, 9, client="bob")
    world.windows.trim(Choice(camera="door", last=3), "ada", 4)
    assert world.window(3, 9) == [2, 3, 4, 5], "nothing that concerns it"
    world.trim(5, 3, 9)
    assert world.window(3, 9) == [3, 4, 5], "never fewer than the least"


def test_of_equal_times_the_newest_counts() -> None:
    world = World()
    world.put(7, 7, 8)
    assert world.window(3, 9) == [7, 7, 8]
    world.trim(7, 3, 9)
    world.put(9)
    assert world.window(3, 9) == [7, 8, 9]


def test_windows_are_bounded_in_number() -> None:
    world = World(most=2)
    world.put(1, 2)
    for client in ("a", "b", "a", "c"):
        world.window(client=client)
    world.put(3)
    assert len(world.windows) == 2
    assert world.window(client="a") == [1, 2, 3]
    assert world.window(client="b") == [2, 3], "it was not used for longest"


def test_windows_that_nobody_asks_for_are_forgotten() -> None:
    world = World()
    world.put(1, 2)
    world.window()
    world.windows.expire(world.now + IDLE_S)
    assert len(world.windows) == 1
    world.windows.expire(world.now + IDLE_S + 1)
    assert len(world.windows) == 0


def test_windows_take_part_of_the_bytes_at_most() -> None:
    world = World(size=10_000)
    for client in "abcd":
        world.put(1, 2)
        world.window(client=client)
        world.put(*range(10))
    assert world.buffers.loose == 4000
    assert world.buffers.bytes == 10_000
    assert len(world.windows) == 2


def test_bytes_that_windows_hold_are_given_up_for_a_newest_frame() -> None:
    world = World(size=10_000)
    world.put(1, 2)
    world.window()
    world.put(3, size=10_000)
    assert len(world.windows) == 0
    assert world.last(1) == [3]
    assert world.buffers.bytes == 10_000


def test_with_a_camera_go_its_windows() -> None:
    world = World(cameras=1)
    world.put(1, 2)
    world.window()
    world.now += 31
    world.put(3, camera="yard")
    assert len(world.windows) == 0
    assert world.buffers.bytes == 1000
