"""The clock of the box: what SystemClock reads, and whether its wall time can be believed."""

from __future__ import annotations

import ctypes
import os
import time
import uuid
from pathlib import Path

from edged.jobs import Stamp

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
#: Made by systemd-timesyncd once it has set the clock in this boot.
_TIMESYNC = Path("/run/systemd/timesync/synchronized")

# From <sys/timex.h>: what adjtimex returns, and a bit of `status`, while nobody keeps the clock.
_TIME_ERROR = 5
_STA_UNSYNC = 0x40


class _Timex(ctypes.Structure):
    # adjtimex(2); what follows `status` is not read, and has room here on every platform.
    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 512),
    )


class SystemClock:
    """Linux's clocks: CLOCK_MONOTONIC for timers, CLOCK_BOOTTIME and the boot id for stamps.

    May be used by several threads.

    Args:
        boot_id: The file that holds the kernel's boot id. Without it every start is a boot of its
            own, so that no two boot times are ever compared wrongly.
        timesync: The file whose existence says that the clock has been set.
    """

    def __init__(self, *, boot_id: Path = _BOOT_ID, timesync: Path = _TIMESYNC) -> None:
        self._boot_id_file = boot_id
        self._boot_id: str | None = None
        self._timesync = timesync
        self._started = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._ran_before = 0.0

    def monotonic(self) -> float:
        """Return seconds of CLOCK_MONOTONIC, which stands still during suspend."""
        return time.monotonic()

    def stamp(self) -> Stamp:
        """Return this moment in every clock there is."""
        boottime = time.clock_gettime(time.CLOCK_BOOTTIME)
        return Stamp(
            boot_id=self._boot(),
            boottime=boottime,
            wall=time.time(),
            synced=self._synced(),
            ran=self._ran_before + (boottime - self._started),
        )

    def resume(self, ran: float) -> None:
        """Tell how many seconds edged had run on this journal before this start."""
        self._ran_before = ran

    def _boot(self) -> str:
        if self._boot_id is None:
            try:
                self._boot_id = self._boot_id_file.read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                self._boot_id = f"unknown-{uuid.uuid4()}"
        return self._boot_id

    def _synced(self) -> bool:
        return os.path.exists(self._timesync) or kernel_synced()  # noqa: PTH110 - called often


def kernel_synced() -> bool:
    """Return whether the kernel says that somebody (chrony, ntpd, timesyncd) keeps its clock.

    False where it cannot be asked. Asking is clock_adjtime(2), which systemd's `ProtectClock` and
    `@system-service` do not allow: a unit must answer it with an error (SystemCallErrorNumber).
    """
    timex = _Timex()
    state: int = _libc.adjtimex(ctypes.byref(timex))
    return state not in {-1, _TIME_ERROR} and not timex.status & _STA_UNSYNC


_libc = ctypes.CDLL(None, use_errno=True)
