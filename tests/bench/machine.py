"""The machine: what it is, what its processes use, how fast its disk syncs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sqlite3
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.kit.mosquitto import PROGRAM

_TICK = os.sysconf("SC_CLK_TCK")
_DISTRIBUTIONS = ("onnxruntime-genai", "onnxruntime", "paho-mqtt", "numpy", "pydantic")


def facts() -> dict[str, Any]:
    """Return what a reader of the numbers has to know of this machine."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_mb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_at_start": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), "mosquitto": _mosquitto_version()}
        | {"sqlite": sqlite3.sqlite_version}
        | {name: _version(name) for name in _DISTRIBUTIONS},
    }


def _cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _mosquitto_version() -> str | None:
    if PROGRAM is None:
        return None
    done = subprocess.run([PROGRAM, "-h"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\S+)", done.stdout)
    return found[1] if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# Processes --------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used, all threads, in seconds.

    Finer than the ticks of /proc/PID/stat where the kernel counts it; threads that have ended are
    in the ticks only.
    """
    total = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        total = 0
    return max(total / 1e9, _ticks_s(pid))


def _ticks_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def threads_cpu_s(pid: int) -> dict[int, float]:
    """Return the processor time of each thread that lives, by thread id, in seconds."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
    return found


def memory_mb(pid: int) -> dict[str, float]:
    """Return a process's resident memory by kind, in MB (10^6 bytes)."""
    text = Path(f"/proc/{pid}/status").read_text()
    kinds = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "file", "VmHWM": "peak"}
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
    return {name: int(found[key]) * 1024 / 1e6 for key, name in kinds.items() if key in found}


def available_mb() -> float:
    """Return the memory that programs can still have, in MB (10^6 bytes)."""
    found = re.search(
        r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE
    )
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@dataclass(slots=True)
class Use:
    """What processes used in a while, as shares of one core, and what others did meanwhile."""

    wall_s: float
    cores: dict[str, float]
    #: Of all cores together, used by nobody named here: the noise.
    others: float

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "wall_s": round(self.wall_s, 3),
            "cores": {name: round(share, 4) for name, share in self.cores.items()},
            "others": round(self.others, 4),
        }


class Meter:
    """Measures what named processes use inside a `with`; `use` is there after it."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = {**pids, "bench": os.getpid()}
        self._began = 0.0
        self._before: dict[str, float] = {}
        self._busy = 0.0
        self.use = Use(0.0, {}, 0.0)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._busy = _busy_s()
        self._before = {name: cpu_s(pid) for name, pid in self._pids.items()}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        used = {}
        for name, pid in self._pids.items():
            try:
                used[name] = cpu_s(pid) - self._before[name]
            except OSError:  # it has ended
                used[name] = 0.0
        wall = time.perf_counter() - self._began
        busy = _busy_s() - self._busy
        others = max(0.0, busy - sum(used.values())) / (wall * (os.cpu_count() or 1))
        self.use = Use(wall, {name: seconds / wall for name, seconds in used.items()}, others)


def _busy_s() -> float:
    """Return the time all cores together were not idle, theft by a hypervisor included."""
    with Path("/proc/stat").open() as file:
        fields = [int(n) for n in file.readline().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / _TICK


class Peak:
    """The most memory that a process has inside a `with`, from its start on if it lets it stand.

    The kernel's own mark (VmHWM) is looked at many times a second, because a process may put it
    back.
    """

    def __init__(self, pid: int, every_s: float = 0.02) -> None:
        self._pid = pid
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="peak")
        self.mb = 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while True:
            try:
                self.mb = max(self.mb, memory_mb(self._pid).get("peak", 0.0))
            except OSError:  # it has ended
                return
            if self._stop.wait(self._every_s):
                return


# Disk -------------------------------------------------------------------------------------------


def fdatasyncs(folder: Path, seconds: float) -> float:
    """Return how many times a second 4 KiB can be appended and synced, one after the other."""
    path = folder / "fdatasync.bench"
    block = bytes(4096)
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            os.write(descriptor, block)
            os.fdatasync(descriptor)
            count += 1
        return count / (time.perf_counter() - began)
    finally:
        os.close(descriptor)
        path.unlink()


def commits(folder: Path, seconds: float, size: int = 1000) -> float:
    """Return how many times a second SQLite commits one row of `size` bytes (WAL, FULL)."""
    path = folder / "commits.bench"
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE job (content BLOB)")
        row = bytes(size)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            database.execute("INSERT INTO job VALUES (?)", (row,))
            count += 1
        return count / (time.perf_counter() - began)
    finally:
        database.close()
        for each in folder.glob("commits.bench*"):
            each.unlink()
