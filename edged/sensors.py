"""What the box says about itself: load, memory, heat, throttling, disk.

Every probe is optional. One that is missing, fails or says nonsense gives None; one that hangs
gives its last value for a while and then None. No probe runs on the event loop: each has a thread
of its own while it runs, and a thread that hangs is left alone, never joined.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

from edged import payloads
from edged.options import MB

#: All reads of one call together may keep the caller this long, seconds.
PATIENCE_S = 0.05
#: A value older than this is no longer told, seconds.
STALE_S = 60.0
#: `vcgencmd` may take this long, seconds.
VCGENCMD_S = 2.0
#: From here a box is hot, °C: a Pi slows down at 80 to 85, a Jetson Orin stops at about 100.
HOT_C = 85.0
#: It is cool again this far below, °C, so that the state does not flap.
COOL_C = 5.0

#: What is wrong now, by bit, in the Pi's `get_throttled`.
_THROTTLED = {
    0: "under-voltage",
    1: "its clock is capped",
    2: "it is throttled",
    3: "its soft temperature limit is reached",
}
_FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"

_T = TypeVar("_T")


class Sensors:
    """The probes of this box. `read` may be called on the event loop.

    Args:
        state_dir: the folder whose disk is watched.
        root: what stands for `/`, for tests.
        vcgencmd: the Pi's tool; None: the one on PATH, if there is one.
        monotonic: the clock, seconds.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        root: Path = Path("/"),
        vcgencmd: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state_dir = state_dir
        self._root = root
        self._vcgencmd = vcgencmd
        self._ticks: tuple[int, int] | None = None
        self._hot = False
        self._cpu = _Probe("cpu", self._read_cpu, monotonic)
        self._rss = _Probe("rss", self._read_rss, monotonic)
        self._memory = _Probe("memory", self._read_memory, monotonic)
        self._temperature = _Probe("temperature", self._read_temperature, monotonic)
        self._disk = _Probe("disk", self._read_disk, monotonic)
        # Starting a process takes tens of milliseconds: its answer is told at the next reading.
        self._throttle = _Probe("throttle", self._read_throttle, monotonic, waited_for=False)

    def read(self, *, patience_s: float | None = None) -> payloads.Host:
        """Return the heartbeat's `host`, within PATIENCE_S; None where there is no value.

        With `patience_s` it takes that long, if need be, and waits for the slowest probe as well.

        `cpu`: percent of all cores since the last reading. `rss_mb`: memory of this process.
        `mem_available_mb`: what the kernel could give without swapping. `temp_c`: the hottest zone,
        in °C. `throttled`: whether the box is slowed down, or under-voltage, now. `disk_free_mb`:
        what is left on the state folder's disk. MB are 1 000 000 bytes.
        """
        probes = (
            self._cpu, self._rss, self._memory, self._temperature, self._disk, self._throttle,
        )  # fmt: skip
        deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        started = [(probe, probe.start()) for probe in probes]
        for probe, done in started:
            if done is not None and (probe.waited_for or patience_s is not None):
                done.wait(max(0.0, deadline - time.monotonic()))
        reasons = self._throttle.value
        return {
            "cpu": self._cpu.value,
            "rss_mb": self._rss.value,
            "mem_available_mb": self._memory.value,
            "temp_c": self._temperature.value,
            "throttled": None if reasons is None else bool(reasons),
            "disk_free_mb": self._disk.value,
        }

    def trouble(self) -> str | None:
        """Return why the box should be spared now, as of the last reading, or None."""
        temperature = self._temperature.value
        if temperature is not None:
            self._hot = temperature >= (HOT_C - COOL_C if self._hot else HOT_C)
            if self._hot:
                return f"the box is hot: {temperature:.0f} °C"
        reasons = self._throttle.value
        return f"the box is slowed down: {', '.join(reasons)}" if reasons else None

    # The probes; each runs in a thread, and whatever it raises means that there is no value.

    def _read_cpu(self) -> float | None:
        fields = self._text("proc/stat").split("\n", 1)[0].split()
        if fields[0] != "cpu":
            return None
        # user nice system idle iowait irq softirq steal; guest time is in user already.
        ticks = [int(field) for field in fields[1:9]]
        total, idle = sum(ticks), ticks[3] + ticks[4]
        before, self._ticks = self._ticks, (total, idle)
        if before is None or total <= before[0]:
            return None
        busy = 1.0 - (idle - before[1]) / (total - before[0])
        return round(100.0 * min(1.0, max(0.0, busy)), 1)

    def _read_rss(self) -> float:
        pages = int(self._text("proc/self/statm").split()[1])
        return _positive(pages * os.sysconf("SC_PAGE_SIZE") / MB)

    def _read_memory(self) -> float | None:
        for line in self._text("proc/meminfo").splitlines():
            if line.startswith("MemAvailable:"):
                return _positive(int(line.split()[1]) * 1024 / MB)
        return None

    def _read_temperature(self) -> float | None:
        found: list[float] = []
        for zone in (self._root / "sys/class/thermal").glob("thermal_zone*"):
            try:
                degrees = int(_text(zone / "temp")) / 1000
            except (OSError, ValueError):
                continue  # a Jetson's zones of parts that are off cannot be read
            if -40.0 <= degrees <= 150.0:
                found.append(degrees)
        return round(max(found), 1) if found else None

    def _read_disk(self) -> float:
        status = os.statvfs(self._state_dir)
        return round(status.f_bavail * status.f_frsize / MB, 1)

    def _read_throttle(self) -> tuple[str, ...] | None:
        """Return what slows the box down; None if nothing here could tell."""
        for source in (self._firmware, self._ask_vcgencmd):
            bits = source()
            if bits is not None:
                return tuple(text for bit, text in _THROTTLED.items() if bits >> bit & 1)
        return self._kernel()

    def _firmware(self) -> int | None:
        try:
            return _bits(self._text(_FIRMWARE))
        except (OSError, ValueError):
            return None

    def _ask_vcgencmd(self) -> int | None:
        program = self._vcgencmd or shutil.which("vcgencmd")
        if program is None:
            return None
        try:
            done = subprocess.run(
                [program, "get_throttled"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=VCGENCMD_S,
                check=True,
            )
            name, _, value = done.stdout[:100].decode("ascii").strip().partition("=")
            return _bits(value) if name == "throttled" else None
        except (OSError, ValueError, subprocess.SubprocessError):
            return None

    def _kernel(self) -> tuple[str, ...] | None:
        """Return what the kernel's cooling devices and voltage alarms say."""
        found: list[str] = []
        seen = False
        for alarm in (self._root / "sys/class/hwmon").glob("hwmon*/in0_lcrit_alarm"):
            try:
                low = int(_text(alarm))
            except (OSError, ValueError):
                continue
            seen = True
            if low == 1:
                found.append(_THROTTLED[0])
        for device in (self._root / "sys/class/thermal").glob("cooling_device*"):
            try:
                kind, state = _text(device / "type").lower(), int(_text(device / "cur_state"))
            except (OSError, ValueError):
                continue
            # A fan that turns is no throttling.
            if not kind.startswith(("cpu", "thermal-cpu", "devfreq", "processor", "gpu")):
                continue
            seen = True
            if state > 0:
                found.append(_THROTTLED[2])
        return tuple(dict.fromkeys(found)) if seen else None

    def _text(self, path: str) -> str:
        return _text(self._root / path)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(65536).decode("ascii", "replace").strip()


def _bits(text: str) -> int:
    bits = int(text, 16)
    if not 0 <= bits < 1 << 32:
        raise ValueError("no 32 bits")
    return bits


def _positive(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("a size below nothing")
    return round(value, 1)


class _Probe(Generic[_T]):
    """One value, read in a thread that may hang."""

    def __init__(
        self,
        name: str,
        read: Callable[[], _T | None],
        monotonic: Callable[[], float],
        *,
        waited_for: bool = True,
    ) -> None:
        self._name = name
        self._read = read
        self._monotonic = monotonic
        self.waited_for = waited_for
        self._running: threading.Event | None = None
        self._value: tuple[_T | None, float] | None = None

    @property
    def value(self) -> _T | None:
        """The last value, unless it is too old."""
        if self._value is None:
            return None
        value, at = self._value
        return value if self._monotonic() - at <= STALE_S else None

    def start(self) -> threading.Event | None:
        """Begin a reading and return its end; None if one is under way already."""
        if self._running is not None and not self._running.is_set():
            return None
        self._running = done = threading.Event()
        # A daemon thread: the interpreter does not wait for it at its end, as it would for a pool.
        thread = threading.Thread(
            target=self._work, args=(done,), name=f"edged.sensor.{self._name}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads
            done.set()
        return done

    def _work(self, done: threading.Event) -> None:
        value: Any = None
        try:
            value = self._read()
        except Exception:  # noqa: BLE001 - whatever a box's files hold, it is no value
            value = None
        finally:
            self._value = (value, self._monotonic())
            done.set()
