"""How much memory this process has, now and at its highest, as the kernel counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_PROC = Path("/proc")


def resident_mb(*, proc: Path = _PROC) -> float:
    """Return the MB (10^6 bytes) that are resident now."""
    return _status(proc, "VmRSS")


def begin_peak(*, proc: Path = _PROC) -> bool:
    """Let the peak begin anew at what is resident now; return whether the kernel allows it.

    Writing 5 does it; see proc_pid_clear_refs(5).
    """
    try:
        (proc / "self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mb(*, proc: Path = _PROC) -> float:
    """Return the MB that were resident at the peak."""
    return _status(proc, "VmHWM")


def give_back() -> None:
    """Have the C library return its free memory to the system, as far as it knows how to.

    What it keeps is resident, and an allocation that is served from it does not show in the peak.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(proc: Path, name: str) -> float:
    """Return a line of /proc/self/status in MB; 0 where the kernel does not tell."""
    try:
        lines = (proc / "self/status").read_text("utf-8").splitlines()
    except OSError:
        return 0.0
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0
