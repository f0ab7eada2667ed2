"""F33: probes of the box that are missing, hang, tell nonsense or tell heat."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Observer

ZONE = "sys/class/thermal/thermal_zone0/temp"
PROBES = (ZONE, "proc/stat", "proc/self/statm", "proc/meminfo")
SETTINGS = {"health": {"interval_s": 0.3}, "limits": {"queue": 4}}


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as observer:
        yield observer


class Box:
    """What stands for the box's `/` where its probes look."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def write(self, path: str, text: str) -> None:
        """Put a file there, in one step."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name("new")
        new.write_text(text)
        new.replace(file)

    def tool(self, script: str) -> None:
        """Put a vcgencmd there."""
        self.write("vcgencmd", f"#!/bin/sh\n{script}\n")
        (self.root / "vcgencmd").chmod(0o755)


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path / "box")


def nothing(_box: Box) -> None:
    pass


def nonsense(box: Box) -> None:
    for path in PROBES:
        box.write(path, "\x00 none of your -1 \ufffd\n")
    box.tool("echo throttled=burning; echo and more")


def hang(box: Box) -> None:
    for path in PROBES:  # opened by nobody for writing: whoever opens it to read waits for ever
        file = box.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(file)
    box.tool("exec sleep 600")


@pytest.mark.parametrize("probes", [nothing, nonsense, hang], ids=lambda each: each.__name__)
def test_no_probe_keeps_the_heartbeat_or_the_end_waiting(
    probes: Callable[[Box], None], box: Box, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    probes(box)
    options = ("--box", str(box.root))
    with Daemon(tmp_path, broker.port, settings=SETTINGS, options=options) as daemon:
        daemon.wait_ready()
        name = observer.ask("!say well")
        assert observer.final(name)["text"] == "well"
        for _ in range(6):
            observer.wait_on("health", after=observer.last)
        beat = observer.on("health")[-1].body
        assert {key for key, value in beat["host"].items() if value is not None} == {"disk_free_mb"}
        assert beat["state"] == "ready"
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_a_hot_box_is_degraded_and_takes_half_until_it_has_cooled(
    box: Box, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    box.write(ZONE, "91000\n")
    options = ("--box", str(box.root))
    with Daemon(tmp_path, broker.port, settings=SETTINGS, options=options) as daemon:
        observer.wait_status("degraded")
        assert daemon.wait_state("degraded")["reason"] == "the box is hot: 91 °C"
        running = observer.ask("!tokens 1000 50")
        observer.event(running, "chunk")
        waiting = [observer.ask(f"!say {number}") for number in range(2)]
        for each in waiting:
            observer.event(each, "accepted")
        refusal = observer.refusal(observer.ask("!say too many")).body
        assert (refusal["code"], refusal["retryable"]) == ("queue_full", True)
        assert "the queue takes 2 now, because the box is hot: 91 °C" in refusal["message"]

        box.write(ZONE, "82000\n")  # cooler, but not by much
        beat = observer.wait_on("health", lambda body: body["host"]["temp_c"] == 82.0).body
        assert beat["state"] == "degraded"
        box.write(ZONE, "70000\n")
        daemon.wait_state("ready")
        waiting += [observer.ask(f"!say {number}") for number in range(2, 4)]
        for each in waiting:
            observer.event(each, "accepted")
        observer.cancel(running)
        for number, each in enumerate(waiting):
            assert observer.final(each)["text"] == str(number)
        observer.check()


def test_a_throttled_box_says_what_slows_it_down(
    box: Box, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    box.tool("echo throttled=0x50005")
    options = ("--box", str(box.root))
    with Daemon(tmp_path, broker.port, settings=SETTINGS, options=options) as daemon:
        told = daemon.wait_state("degraded")
        assert told["reason"] == "the box is slowed down: under-voltage, it is throttled"
        beat = observer.wait_on("health", lambda body: body["state"] == "degraded").body
        assert beat["host"]["throttled"] is True
