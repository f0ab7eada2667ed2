"""What the system's clock says, and what it does not claim to know."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edged import clock
from edged.clock import SystemClock, kernel_synced


def kernel(state: int, status: int = 0) -> SimpleNamespace:
    """A C library whose adjtimex answers this."""

    def adjtimex(reference: Any) -> int:
        reference._obj.status = status
        return state

    return SimpleNamespace(adjtimex=adjtimex)


def test_a_stamp_says_what_the_kernel_says() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME), time.time(), time.monotonic()
    it = SystemClock()
    stamp, monotonic = it.stamp(), it.monotonic()
    after = time.clock_gettime(time.CLOCK_BOOTTIME), time.time(), time.monotonic()
    assert stamp.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert before[0] <= stamp.boottime <= after[0]
    assert before[1] <= stamp.wall <= after[1]
    assert before[2] <= monotonic <= after[2]
    assert 0 <= stamp.ran <= after[0] - before[0]
    assert isinstance(stamp.synced, bool)


def test_running_time_goes_on_from_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    boottime = 500.0
    fake = SimpleNamespace(
        clock_gettime=lambda _clock: boottime, CLOCK_BOOTTIME=7, time=lambda: 0.0
    )
    monkeypatch.setattr(clock, "time", fake)
    it = SystemClock()
    boottime += 3
    assert it.stamp().ran == 3.0
    it.resume(1000.0)
    assert it.stamp().ran == 1003.0
    boottime += 4
    assert it.stamp().ran == 1007.0


def test_two_clocks_of_one_boot_agree() -> None:
    first, second = SystemClock().stamp(), SystemClock().stamp()
    assert first.boot_id == second.boot_id
    assert 0 <= second.since(first) < 60


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_bytes(b"\xff")])
def test_without_a_boot_id_no_two_starts_are_one_boot(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    path = tmp_path / "boot_id"
    make(path)
    first, second = SystemClock(boot_id=path), SystemClock(boot_id=path)
    assert first.stamp().boot_id == first.stamp().boot_id
    assert first.stamp().boot_id != second.stamp().boot_id


def test_the_clock_is_synced_once_timesyncd_has_set_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "_libc", kernel(5))
    flag = tmp_path / "synchronized"
    it = SystemClock(timesync=flag)
    assert not it.stamp().synced
    flag.touch()
    assert it.stamp().synced


@pytest.mark.parametrize(
    ("state", "status", "synced"),
    [
        (0, 0, True),  # TIME_OK
        (1, 0, True),  # TIME_INS: a leap second is coming
        (0, 0x40, False),  # STA_UNSYNC
        (5, 0x40, False),  # TIME_ERROR
        (5, 0, False),
        (-1, 0, False),  # not allowed to ask
    ],
)
def test_the_clock_is_synced_if_the_kernel_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: int, status: int, *, synced: bool
) -> None:
    monkeypatch.setattr(clock, "_libc", kernel(state, status))
    assert SystemClock(timesync=tmp_path / "no").stamp().synced is synced


def test_the_real_kernel_is_only_asked() -> None:
    """Our structure is at least as large as the kernel's, and asking changes nothing."""
    guarded = type("Guarded", (ctypes.Structure,), {"_fields_": [
        ("timex", clock._Timex), ("guard", ctypes.c_ulong),
    ]})()  # fmt: skip
    guarded.guard = 0x1234
    assert clock._libc.adjtimex(ctypes.byref(guarded)) in range(-1, 6)
    assert guarded.guard == 0x1234
    assert kernel_synced() in {True, False}
