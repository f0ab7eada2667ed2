from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edged import sensors
from edged.payloads import Host
from edged.sensors import Sensors

STAT = "cpu  {user} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
ABSENT = dict.fromkeys(("cpu", "rss_mb", "mem_available_mb", "temp_c", "throttled", "disk_free_mb"))


class Box:
    """A box made of files, and a clock set by hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 0.0
        self.tool = str(root / "bin" / "vcgencmd")
        self.sensors = Sensors(
            root / "state", root=root, vcgencmd=self.tool, monotonic=lambda: self.now
        )

    def write(self, path: str, content: str | bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def program(self, script: str) -> None:
        self.write("bin/vcgencmd", f"#!/bin/sh\n{script}\n")
        (self.root / "bin/vcgencmd").chmod(0o755)

    def read(self) -> Host:
        """Read, then wait for the probe that is not waited for, and read again."""
        self.sensors.read()
        self.settle()
        value = self.sensors.read()
        self.settle()
        return value

    def settle(self) -> None:
        for probe in vars(self.sensors).values():
            if isinstance(probe, sensors._Probe) and probe._running is not None:
                assert probe._running.wait(10)


@pytest.fixture(name="box")
def _box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture(name="patient")
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a loaded test machine take its time."""
    monkeypatch.setattr(sensors, "PATIENCE_S", 10.0)


def test_this_machine() -> None:
    here = Sensors(Path("/"))
    here.read()
    value = here.read()
    assert set(value) == set(ABSENT)
    assert value["rss_mb"] is not None
    assert 1 < value["rss_mb"] < 10_000
    assert value["mem_available_mb"] is not None
    assert value["disk_free_mb"] is not None


@pytest.mark.usefixtures("patient")
def test_a_box_without_anything(box: Box) -> None:
    assert box.read() == ABSENT
    assert box.sensors.trouble() is None


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "garbage", [b"", b"\n", b"\xff\xfe\x00", b"cpu", b"nonsense here", b"-1 -1 -1", b"9" * 5000]
)
def test_a_box_full_of_garbage(box: Box, garbage: bytes) -> None:
    for path in (
        "proc/stat",
        "proc/self/statm",
        "sys/class/thermal/thermal_zone0/temp",
        "sys/class/thermal/cooling_device0/type",
        "sys/class/thermal/cooling_device0/cur_state",
        "sys/class/hwmon/hwmon0/in0_lcrit_alarm",
        "sys/devices/platform/soc/soc:firmware/get_throttled",
    ):
        box.write(path, garbage)
    box.write("proc/meminfo", b"MemAvailable: " + garbage)
    box.program("cat " + str(box.root / "proc/stat"))
    assert box.read() == ABSENT


@pytest.mark.usefixtures("patient")
def test_load_is_counted_between_two_readings(box: Box) -> None:
    box.write("proc/stat", STAT.format(user=100, idle=900))
    assert box.sensors.read()["cpu"] is None
    box.write("proc/stat", STAT.format(user=125, idle=975))
    assert box.sensors.read()["cpu"] == 25.0
    box.write("proc/stat", STAT.format(user=225, idle=975))
    assert box.sensors.read()["cpu"] == 100.0
    assert box.sensors.read()["cpu"] is None  # no time has passed
    box.write("proc/stat", STAT.format(user=1, idle=1))
    assert box.sensors.read()["cpu"] is None  # the counters began again


@pytest.mark.usefixtures("patient")
def test_sizes_are_in_millions_of_bytes(box: Box) -> None:
    box.write("proc/self/statm", "5000 1000 0 0 0 0 0")
    box.write("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:    2000000 kB\n")
    (box.root / "state").mkdir()
    value = box.read()
    assert value["rss_mb"] == round(1000 * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)
    assert value["mem_available_mb"] == 2048.0
    status = os.statvfs(box.root)
    assert value["disk_free_mb"] == pytest.approx(status.f_bavail * status.f_frsize / 1e6, rel=0.1)


# Heat


@pytest.mark.usefixtures("patient")
def test_the_hottest_zone_counts(box: Box) -> None:
    for zone, text in enumerate(("41234", "55000", "junk", "255000", "-274000")):
        box.write(f"sys/class/thermal/thermal_zone{zone}/temp", f"{text}\n")
    assert box.read()["temp_c"] == 55.0
    assert box.sensors.trouble() is None


@pytest.mark.usefixtures("patient")
def test_a_hot_box_says_so_until_it_is_well_cooled(box: Box) -> None:
    said = []
    for degrees in (84, 85, 84, 81, 79, 84):
        box.write("sys/class/thermal/thermal_zone0/temp", str(degrees * 1000))
        box.sensors.read()
        said.append(box.sensors.trouble() is not None)
    assert said == [False, True, True, True, False, False]


# Throttling


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("bits", "throttled", "words"),
    [
        ("0x0", False, None),
        ("0x50000", False, None),  # it happened since the start, not now
        ("0x1", True, "under-voltage"),
        ("0x50005", True, "under-voltage, it is throttled"),
        ("0x8", True, "soft temperature limit"),
    ],
)
@pytest.mark.parametrize("source", ["program", "file"])
def test_the_throttling_of_a_pi(
    box: Box, source: str, bits: str, throttled: bool, words: str | None
) -> None:
    if source == "program":
        box.program(f"echo throttled={bits}")
    else:
        box.write("sys/devices/platform/soc/soc:firmware/get_throttled", bits[2:] + "\n")
    assert box.read()["throttled"] is throttled
    trouble = box.sensors.trouble()
    assert (trouble is None) if words is None else (trouble is not None and words in trouble)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "script",
    ["exit 1", "echo", "echo throttled=", "echo throttled=zz", "echo error=0x1", "kill -9 $$"],
)
def test_a_tool_that_fails_leaves_it_to_the_kernel(box: Box, script: str) -> None:
    box.program(script)
    assert box.read()["throttled"] is None
    box.write("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "0")
    assert box.read()["throttled"] is False
    box.write("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1")
    assert box.read()["throttled"] is True


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("kind", "state", "throttled"),
    [
        ("cpufreq-cpu0", "0", False),
        ("cpufreq-cpu0", "2", True),
        ("Processor", "1", True),
        ("devfreq-17000000.gpu", "1", True),
        ("pwm-fan", "3", None),
        ("intel_powerclamp", "-1", None),
    ],
)
def test_cooling_devices(box: Box, kind: str, state: str, throttled: bool | None) -> None:
    box.write("sys/class/thermal/cooling_device0/type", kind)
    box.write("sys/class/thermal/cooling_device0/cur_state", state)
    assert box.read()["throttled"] is throttled


@pytest.mark.usefixtures("patient")
def test_a_tool_that_hangs_is_ended(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensors, "VCGENCMD_S", 0.05)
    box.program("exec sleep 600")
    assert box.read()["throttled"] is None


# Probes that hang


@pytest.fixture(name="stuck")
def _stuck(box: Box) -> Iterator[Callable[[], None]]:
    """Make the temperature hang, as a broken bus does, until the test ends."""
    release = threading.Event()
    read = box.sensors._temperature._read

    def hang() -> float | None:
        release.wait(60)
        return read()

    def stick() -> None:
        box.sensors._temperature._read = hang

    yield stick
    release.set()


def test_a_probe_that_hangs_delays_one_reading_and_no_other(
    box: Box, stuck: Callable[[], None]
) -> None:
    box.write("sys/class/thermal/thermal_zone0/temp", "50000")
    box.write("proc/self/statm", "5000 1000 0 0 0 0 0")
    assert box.sensors.read()["temp_c"] == 50.0
    stuck()
    started = time.monotonic()
    value = box.sensors.read()
    assert time.monotonic() - started < 5  # PATIENCE_S, on a loaded machine
    assert value["temp_c"] == 50.0
    assert value["rss_mb"] is not None
    threads = threading.active_count()
    box.now = sensors.STALE_S
    assert box.sensors.read()["temp_c"] == 50.0
    box.now = sensors.STALE_S + 1
    value = box.sensors.read()
    assert value["temp_c"] is None
    assert box.sensors.trouble() is None
    assert value["rss_mb"] is not None
    # Threads do not pile up behind a hanging one.
    assert threading.active_count() <= threads + 5
    assert sum(t.name == "edged.sensor.temperature" for t in threading.enumerate()) == 1


def test_a_probe_that_comes_back_is_read_again(box: Box) -> None:
    release = threading.Event()
    read = box.sensors._temperature._read
    box.sensors._temperature._read = lambda: 42.0 if release.wait(60) else None
    assert box.sensors.read()["temp_c"] is None
    release.set()
    box.settle()
    box.sensors._temperature._read = read
    box.write("sys/class/thermal/thermal_zone0/temp", "50000")
    box.read()
    assert box.sensors.read()["temp_c"] == 50.0


def test_no_more_threads(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert box.sensors.read() == ABSENT
