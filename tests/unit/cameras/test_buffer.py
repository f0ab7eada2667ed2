"""The ring buffers: bounded in time, bytes and cameras, and nobody's newest frame goes first."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edged.cameras.buffer import (
    FORGOTTEN_S,
    OVERHEAD,
    RATE_S,
    WINDOWS_SHARE,
    Buffers,
    Full,
    Rate,
    Ring,
)
from edged.cameras.windows import TooFew, Windows, newest
from edged.ports import Choice, Shot

KB = 1000


def shot(size: int = KB, ts: float = 0.0) -> Shot:
    return Shot(data=b"x" * (size - OVERHEAD), ts=ts)


def buffers(*, cameras: int = 4, seconds: float = 30.0, size: int = 10 * KB) -> Buffers:
    windows = Windows()
    windows.buffers = Buffers(
        cameras=cameras,
        seconds=seconds,
        size=size,
        forget_window=windows.forget_one,
        forget_camera=windows.forget_camera,
    )
    return windows.buffers


def numbers(ring: Ring) -> list[float]:
    return [frame.shot.ts for frame in ring.frames]


def test_frames_leave_after_their_time() -> None:
    some = buffers(seconds=10)
    for second in range(5):
        some.put("door", shot(ts=second), 100.0 + second)
    ring = some.find("door", 112.0)
    assert ring is not None
    assert numbers(ring) == [2, 3, 4]
    assert some.bytes == ring.bytes == 3 * KB
    some.expire(200.0)
    assert some.bytes == 0
    assert ring.newest_age_s(200.0) == 96.0


def test_the_oldest_of_one_camera_make_room() -> None:
    some = buffers(size=3 * KB)
    for n in range(10):
        some.put("door", shot(ts=n), float(n))
    assert numbers(some.rings["door"]) == [7, 8, 9]


def test_a_chatty_camera_gets_no_more_than_a_share() -> None:
    some = buffers(size=12 * KB)
    for n in range(4):
        some.put("quiet", shot(ts=n), n / 100)
    for n in range(1000):
        some.put("loud", shot(ts=n), 1 + n / 1000)
    assert numbers(some.rings["quiet"]) == [0, 1, 2, 3], "it asked for less than its share"
    assert numbers(some.rings["loud"]) == list(range(992, 1000))
    for n in range(4, 8):
        some.put("quiet", shot(ts=n), 3 + n / 100)
    assert numbers(some.rings["quiet"]) == list(range(2, 8)), "half of what there is"
    assert len(some.rings["loud"].frames) == 6


def test_a_large_frame_does_not_push_out_the_others_newest() -> None:
    some = buffers(size=10 * KB)
    for camera in "abc":
        some.put(camera, shot(), 0.0)
        some.put(camera, shot(ts=1), 0.0)
    some.put("d", shot(7 * KB), 1.0)
    assert {name: numbers(ring) for name, ring in some.rings.items()} == {
        "a": [1],
        "b": [1],
        "c": [1],
        "d": [0],
    }
    with pytest.raises(Full, match=r"cameras\.buffer_mb"):
        some.put("a", shot(4 * KB), 1.0)
    assert numbers(some.rings["a"]) == [1], "what does not fit costs nothing"
    some.put("d", shot(6 * KB, ts=2), 1.0)
    assert numbers(some.rings["d"]) == [2]


def test_a_frame_that_will_never_fit() -> None:
    some = buffers(size=10 * KB)
    with pytest.raises(Full):
        some.put("door", shot(11 * KB), 0.0)
    assert some.bytes == 0
    assert not some.rings


def test_old_frames_do_not_stand_in_the_way() -> None:
    some = buffers(size=10 * KB)
    some.put("a", shot(6 * KB), 0.0)
    some.put("b", shot(6 * KB, ts=1), 31.0)
    assert some.bytes == 6 * KB


def test_a_further_camera_has_no_place_until_another_is_silent() -> None:
    some = buffers(cameras=2)
    some.put("a", shot(), 0.0)
    some.put("b", shot(), 5.0)
    assert not some.may_come("c", 20.0)
    with pytest.raises(Full, match=r"cameras\.max"):
        some.put("c", shot(), 20.0)
    assert some.may_come("c", 31.0)
    assert some.put("c", shot(), 31.0)
    assert set(some.rings) == {"b", "c"}
    assert not some.put("c", shot(), 31.0), "it is known by then"


def test_one_that_never_sent_a_frame_goes_first() -> None:
    some = buffers(cameras=2)
    some.put("a", shot(), 0.0)
    some.refuse("b", 60.0)
    some.put("c", shot(), 61.0)
    assert set(some.rings) == {"a", "c"}
    some.refuse("d", 62.0)
    assert set(some.rings) == {"a", "c"}, "what sends no frame takes nobody's place"


def test_a_camera_that_is_silent_for_long_is_forgotten() -> None:
    some = buffers()
    some.put("a", shot(), 0.0)
    some.expire(FORGOTTEN_S)
    assert "a" in some.rings
    some.expire(FORGOTTEN_S + 1)
    assert not some.rings


def test_refusals_are_counted() -> None:
    some = buffers()
    for _ in range(3):
        some.refuse("a", 1.0)
    assert some.rings["a"].refused == 3
    assert some.rings["a"].newest_age_s(2.0) is None


# How many a second


def test_the_rate_of_a_camera_that_has_just_begun() -> None:
    rate = Rate()
    assert rate.fps(100.0) == 0
    for n in range(20):
        rate.count(100.0 + n / 20)
    assert rate.fps(101.0) == pytest.approx(20)
    assert rate.fps(100.1) == pytest.approx(20), "never counted over less than a second"


@pytest.mark.parametrize("fps", [0.1, 1, 20, 25])
def test_the_rate_of_a_steady_camera(fps: float) -> None:
    rate = Rate()
    for n in range(int(fps * 60) + 1):
        rate.count(100.3 + n / fps)
    assert rate.fps(160.3) == pytest.approx(fps, rel=0.1, abs=0.1)
    assert rate.fps(160.3 + RATE_S + 1) == 0


# Everything together, against a model


class Machine(RuleBasedStateMachine):
    """Puts, choices and time in any order; bytes are counted right and nothing is lost early."""

    CAMERAS, SECONDS, SIZE = 3, 20.0, 20 * KB

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.counter = itertools.count()
        self.windows = Windows(most=4)
        self.buffers = self.windows.buffers = Buffers(
            cameras=self.CAMERAS,
            seconds=self.SECONDS,
            size=self.SIZE,
            forget_window=self.windows.forget_one,
            forget_camera=self.windows.forget_camera,
        )
        self.newest: dict[str, tuple[float, float]] = {}  # camera: when, number

    @rule(seconds=st.sampled_from([0.0, 0.01, 1.0, 7.0, 25.0, FORGOTTEN_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(camera=st.sampled_from("abcd"), size=st.integers(OVERHEAD, 12 * KB))
    def put(self, camera: str, size: int) -> None:
        number = float(next(self.counter))
        live = {
            name: ring.frames[-1].size
            for name, ring in self.buffers.rings.items()
            if ring.frames and self.now - ring.frames[-1].at <= self.SECONDS
        }
        others = sum(bytes_ for name, bytes_ in live.items() if name != camera)
        is_known = camera in self.buffers.rings
        room = is_known or len(self.buffers.rings) < self.CAMERAS or len(live) < self.CAMERAS
        try:
            self.buffers.put(camera, shot(size, number), self.now)
        except Full:
            assert not room or others + size > self.SIZE
        else:
            assert room
            assert others + size <= self.SIZE
            self.newest[camera] = (self.now, number)

    @rule(camera=st.sampled_from("abcd"))
    def refuse(self, camera: str) -> None:
        self.buffers.refuse(camera, self.now)

    @rule(
        camera=st.sampled_from("abcd"),
        client=st.sampled_from([None, "x", "y"]),
        least=st.integers(1, 3),
        more=st.integers(0, 2),
        max_age_s=st.sampled_from([None, 5.0]),
    )
    def look(
        self, camera: str, client: str | None, least: int, more: int, max_age_s: float | None
    ) -> None:
        ring = self.buffers.find(camera, self.now)
        choice = Choice(camera=camera, window=(least, least + more), max_age_s=max_age_s)
        if ring is None:
            return
        try:
            frames = self.windows.choose(choice, client, ring, self.now)
        except TooFew:
            fresh = sum(self.now - f.at <= (max_age_s or self.now) for f in ring.frames)
            assert fresh < least
        else:
            assert least <= len(frames) <= least + more
            assert frames[-1] is ring.frames[-1]
            order = [frame.number for frame in frames]
            assert order == sorted(set(order))
            assert all(self.now - frame.at <= (max_age_s or self.now) for frame in frames)

    @rule(camera=st.sampled_from("abcd"), count=st.integers(1, 4), span=st.none() | st.just(3.0))
    def choose(self, camera: str, count: int, span: float | None) -> None:
        ring = self.buffers.find(camera, self.now)
        if ring is None:
            return
        choice = Choice(camera=camera, last=count, span_s=span)
        try:
            frames = newest(choice, ring, self.now)
        except TooFew:
            assert span is not None or len(ring.frames) < count
        else:
            assert len(frames) == count
            assert frames[-1] is ring.frames[-1]

    @rule(camera=st.sampled_from("abcd"), client=st.sampled_from([None, "x"]), back=st.integers(0))
    def trim(self, camera: str, client: str | None, back: int) -> None:
        ring = self.buffers.rings.get(camera)
        if ring is not None and ring.frames:
            since = ring.frames[-1 - back % len(ring.frames)].shot.ts
            self.windows.trim(Choice(camera=camera, window=(2, 3)), client, since)

    @rule()
    def tick(self) -> None:
        self.buffers.expire(self.now)
        self.windows.expire(self.now)

    @invariant()
    def bytes_are_counted_right_and_bounded(self) -> None:
        ringed = [frame for ring in self.buffers.rings.values() for frame in ring.frames]
        held = [frame for each in self.windows._windows.values() for frame in each.frames]
        every = {frame.number: frame for frame in (*ringed, *held)}
        assert self.buffers.bytes == sum(frame.size for frame in every.values()) <= self.SIZE
        loose = sum(frame.size for frame in every.values() if not frame.ringed)
        assert self.buffers.loose == loose <= WINDOWS_SHARE * self.SIZE
        for ring in self.buffers.rings.values():
            assert ring.bytes == sum(frame.size for frame in ring.frames)
        for frame in every.values():
            assert frame.windows == sum(frame is each for each in held)
            assert frame.ringed == any(frame is each for each in ringed)
        assert len(self.windows) <= 4
        assert len(self.buffers.rings) <= self.CAMERAS

    @invariant()
    def the_newest_frame_of_each_camera_is_there_for_its_time(self) -> None:
        for camera, (when, number) in self.newest.items():
            if self.now - when <= self.SECONDS:
                assert self.buffers.rings[camera].frames[-1].shot.ts == number


TestMachine: Any = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
