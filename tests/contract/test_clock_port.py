"""What every `ports.Clock` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edged.clock import SystemClock
from edged.ports import Clock
from edged.testing import ManualClock

Pass = Callable[[float], None]


@pytest.fixture(params=["manual", "system"])
def clock_and_pass(request: pytest.FixtureRequest) -> tuple[Clock, Pass]:
    """A clock, and a way to let seconds pass on it."""
    if request.param == "system":
        return SystemClock(), time.sleep
    clock = ManualClock()
    return clock, clock.advance


def test_time_passes_on_all_its_faces(clock_and_pass: tuple[Clock, Pass]) -> None:
    clock, let_pass = clock_and_pass
    before, monotonic = clock.stamp(), clock.monotonic()
    let_pass(0.05)
    after = clock.stamp()
    assert clock.monotonic() - monotonic >= 0.04
    assert after.boot_id == before.boot_id
    assert after.boottime - before.boottime >= 0.04
    assert after.wall - before.wall >= 0.03
    assert after.ran - before.ran == pytest.approx(after.boottime - before.boottime)
    assert after.since(before) == pytest.approx(after.boottime - before.boottime)


def test_what_was_run_before_is_resumed(clock_and_pass: tuple[Clock, Pass]) -> None:
    clock, let_pass = clock_and_pass
    clock.resume(1000.0)
    first = clock.stamp().ran
    assert first == pytest.approx(1000.0, abs=5)
    let_pass(0.05)
    assert clock.stamp().ran > first


def test_two_clocks_of_one_boot_agree(tmp_path: Path) -> None:
    one, two = SystemClock(), SystemClock()
    assert one.stamp().boot_id == two.stamp().boot_id
    assert two.stamp().boottime >= one.stamp().boottime - 0.5


class TestManualClock:
    def test_a_jump_of_the_wall_clock_moves_nothing_else(self) -> None:
        clock = ManualClock()
        before, monotonic = clock.stamp(), clock.monotonic()
        clock.jump_wall(-86_400)
        after = clock.stamp()
        assert after.wall == before.wall - 86_400
        assert clock.monotonic() == monotonic
        assert after.since(before) == 0

    def test_time_does_not_go_back(self) -> None:
        with pytest.raises(ValueError, match="back"):
            ManualClock().advance(-1)

    def test_over_a_reboot_the_wall_clock_counts_if_it_was_right_both_times(self) -> None:
        clock = ManualClock()
        before = clock.stamp()
        clock.reboot(off_s=600)
        after = clock.stamp()
        assert after.boot_id != before.boot_id
        assert after.since(before) == 600

    def test_over_a_reboot_without_a_clock_only_our_own_running_time_counts(self) -> None:
        clock = ManualClock()
        clock.advance(100)
        before = clock.stamp()
        clock.reboot(off_s=600, wall=0.0, synced=False)
        clock.resume(before.ran)
        clock.advance(7)
        assert clock.stamp().since(before) == 7

    def test_a_restart_is_the_same_boot(self) -> None:
        clock = ManualClock()
        clock.advance(50)
        before = clock.stamp()
        clock.restart()
        clock.resume(before.ran)
        clock.advance(5)
        after = clock.stamp()
        assert after.boot_id == before.boot_id
        assert after.ran == before.ran + 5
