"""What this box has for us: cores and memory, from /proc, /sys and the control group we are in.

Every reader takes the roots it reads from, so that a test can give it another box.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_SYS = Path("/sys")


def cores(allowed: Iterable[int] | None = None, *, proc: Path = _PROC, sys: Path = _SYS) -> int:
    """Return how many physical cores we may use: affinity, hyper-threads and CPU quota counted.

    A thread for each hyper-thread makes the matrix products slower, not faster.
    """
    ids = set(os.sched_getaffinity(0) if allowed is None else allowed)
    siblings = set()
    for cpu in ids:
        topology = sys / "devices/system/cpu" / f"cpu{cpu}" / "topology/thread_siblings_list"
        siblings.add(_text(topology) or str(cpu))
    quota = _cpu_quota(proc, sys)
    count = len(siblings) if quota is None else min(len(siblings), int(quota))
    return max(1, count)


def memory_mb(*, proc: Path = _PROC, sys: Path = _SYS) -> float:
    """Return the MB (10^6 bytes) that are to be had: what is available, within our control group.

    Raises:
        OSError: /proc/meminfo cannot be read.
    """
    available = None
    for line in (proc / "meminfo").read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if available is None:
        raise OSError(f"{proc}/meminfo has no MemAvailable")
    limit = _memory_limit(proc, sys)
    return (available if limit is None else min(available, limit)) / 1e6


def _memory_limit(proc: Path, sys: Path) -> int | None:
    """Return the bytes that our control group may have, the tightest of it and its parents."""
    limits = []
    for folder in _group_folders(proc, sys, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            text = _text(folder / name)
            # version 1 writes "no limit" as a number near 2^63
            if text is not None and text.isdigit() and int(text) < 1 << 60:
                limits.append(int(text))
    return min(limits, default=None)


def _cpu_quota(proc: Path, sys: Path) -> float | None:
    """Return the cores that our control group may use at a time, None without a limit."""
    quotas = []
    for folder in _group_folders(proc, sys, "cpu"):
        both = (_text(folder / "cpu.max") or "").split()
        if not both:
            both = [
                _text(folder / "cpu.cfs_quota_us") or "",
                _text(folder / "cpu.cfs_period_us") or "",
            ]
        if len(both) == 2 and both[0].isdigit() and both[1].isdigit() and int(both[1]) > 0:
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def _group_folders(proc: Path, sys: Path, controller: str) -> list[Path]:
    """Return the folders of our control group and its parents, of version 2 or 1."""
    folders = []
    for line in (_text(proc / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = sys / "fs/cgroup"
        elif controller in controllers.split(","):
            root = sys / "fs/cgroup" / controller
        else:
            continue
        folder = root / path.lstrip("/")
        # inside a container the path is often that of the outside: then only the root is there
        while folder != root and root in folder.parents:
            folders.append(folder)
            folder = folder.parent
        folders.append(root)
    return folders


def _text(path: Path) -> str | None:
    try:
        return path.read_text("ascii").strip()
    except (OSError, ValueError):
        return None
