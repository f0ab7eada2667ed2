"""The real daemon as a child process of a test, with the faults that only the inside can make.

    python -m tests.kit.run_daemon --config F --engine faulty [--engine-option OPT]… [FAULT]…

The settings come from the TOML file alone, the wiring is `edged.app`'s. `tests/kit/daemon.py`
starts it. LABEL is a label of the trace (`edged.ports.Trace`; those of edged.mqtt begin with
`mqtt.`, of the cameras' own connection with `cameras.mqtt.`), N the count of its calls at which the
fault happens, from 1, default 1. The options of the first group may be repeated. `--trace-log`
shows which labels there are.

    --crash-at LABEL[:N]           SIGKILL this process
    --raise-at LABEL[:N]           raise RuntimeError out of the trace
    --stall-at LABEL[:N]=SECONDS   block the thread that calls the trace
    --trace-log FILE               append a line `<monotonic seconds> <label>` for each call
    --stage-floor S                deadlines of the engine's stages: at least, and without a past, S
    --backoff S                    wait S seconds at most before the engine is started again
    --recycle-mb N                 an engine process that grew by more than this is recycled
    --ping S                       seconds of silence after which an idle engine is pinged
    --reconnect S                  wait S seconds at most before connecting to the broker again
    --connack S                    wait S seconds at most for the broker's CONNACK
    --stolen-wait S                wait S seconds before connecting where the client id is stolen
    --constant MODULE.NAME=NUMBER  put this number in the place of a module's constant
    --wall-offset FILE             seconds to add to the wall clock, read at each look
    --unsynced                     the wall clock is not to be believed
    --box DIR                      what the probes take for /; DIR/vcgencmd is the tool
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tenacity import wait_random

from edged import app, log
from edged.clock import SystemClock
from edged.engine.deadlines import Limits
from edged.engine.faulty import faulty_command
from edged.engine.host import EngineHost, Recycle
from edged.engine.restarts import Backoff
from edged.errors import EdgedError
from edged.jobs import Stamp
from edged.mqtt import MqttBus, Patience
from edged.mqttconfig import Connection
from edged.ports import Sink
from edged.sensors import Sensors
from edged.settings import load


class Faults:
    """The trace: counts the calls of each label and does what was asked for at one of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._at: dict[tuple[str, int], Callable[[], None]] = {}
        for text in options.crash_at:
            self._at[_place(text)] = _crash
        for text in options.raise_at:
            self._at[_place(text)] = partial(_raise, text)
        for text in options.stall_at:
            place, _, seconds = text.rpartition("=")
            self._at[_place(place)] = partial(time.sleep, float(seconds))
        self._file: int | None = None
        if options.trace_log is not None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.open(options.trace_log, flags, 0o600)

    def __call__(self, label: str) -> None:
        with self._lock:
            self._seen[label] += 1
            number = self._seen[label]
        if self._file is not None:
            os.write(self._file, f"{time.monotonic():.6f} {label}\n".encode())
        fault = self._at.get((label, number))
        if fault is not None:
            fault()


def _place(text: str) -> tuple[str, int]:
    label, _, number = text.partition(":")
    return label, int(number or 1)


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # the signal takes the whole process, but not this very instant


def _raise(text: str) -> None:
    raise RuntimeError(f"asked for at {text}")


class WrongClock(SystemClock):
    """The box's clock with a wall time that a test can move while the daemon runs."""

    def __init__(self, offset: Path | None, *, synced: bool) -> None:
        super().__init__()
        self._offset_file = offset
        self._believed = synced

    def stamp(self) -> Stamp:
        """Return this moment, as wrong as asked for."""
        stamp = super().stamp()
        path = self._offset_file
        if path is not None and path.exists():
            stamp = replace(stamp, wall=stamp.wall + float(path.read_text() or 0))
        return stamp if self._believed else replace(stamp, synced=False)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_daemon")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--engine", choices=("faulty", "real"), default="faulty")
    parser.add_argument("--engine-option", action="append", default=[])
    for name in ("--crash-at", "--raise-at", "--stall-at", "--constant"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--trace-log")
    for name in (
        *("--stage-floor", "--backoff", "--recycle-mb", "--ping"),
        *("--reconnect", "--connack", "--stolen-wait"),
    ):
        parser.add_argument(name, type=float)
    parser.add_argument("--wall-offset", type=Path)
    parser.add_argument("--unsynced", action="store_true")
    parser.add_argument("--box", type=Path)
    return parser.parse_args(argv)


def _engine_options(options: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if (floor := options.stage_floor) is not None:
        given["limits"] = Limits(floor_s=floor, first_load_s=floor + 10, first_s=floor)
    if (longest := options.backoff) is not None:
        given["backoff"] = Backoff(first_s=min(longest, 1.0), longest_s=longest)
    if options.recycle_mb is not None:
        given["recycle"] = Recycle(share=0.0, mb=options.recycle_mb)
    if options.ping is not None:
        given["ping_s"] = options.ping
    return given


def _patience(options: argparse.Namespace) -> Patience:
    given: dict[str, Any] = {}
    if options.reconnect is not None:
        given["retry"] = wait_random(min(0.05, options.reconnect), options.reconnect)
    if options.connack is not None:
        given["connack_s"] = options.connack
    if options.stolen_wait is not None:
        given["stolen_wait_s"] = options.stolen_wait
    return Patience(**given)


def _bus(
    trace: Faults, patience: Patience, connection: Connection, sink: Sink | None = None
) -> MqttBus:
    """Make one of the two connections; the labels of the cameras' say that they are theirs."""
    if sink is None:
        return MqttBus(connection, patience=patience, trace=trace)
    theirs = partial(_under, "cameras", trace)
    return MqttBus(connection, patience=patience, trace=theirs, sink=sink)


def _under(name: str, trace: Faults, label: str) -> None:
    trace(f"{name}.{label}")


def _constants(options: argparse.Namespace, patches: ExitStack) -> None:
    for text in options.constant:
        place, _, number = text.partition("=")
        module, _, name = place.rpartition(".")
        where = importlib.import_module(module)
        patches.enter_context(mock.patch.object(where, name, float(number)))


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; return its exit status."""
    options = _parse(argv)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where does it hang?
    trace = Faults(options)
    parts: dict[str, Any] = {"trace": trace}
    if options.engine == "faulty":
        parts["engine_command"] = faulty_command(*options.engine_option)
    if options.wall_offset is not None or options.unsynced:
        parts["clock"] = WrongClock(options.wall_offset, synced=not options.unsynced)
    sensors: Callable[..., Sensors] = Sensors
    if (box := options.box) is not None:
        sensors = partial(Sensors, root=box, vcgencmd=str(box / "vcgencmd"))
    try:
        settings = load(options.config, environ={})
        log.configure(settings.log)
        with (
            ExitStack() as patches,
            mock.patch.object(app, "EngineHost", partial(EngineHost, **_engine_options(options))),
            mock.patch.object(app, "MqttBus", partial(_bus, trace, _patience(options))),
            mock.patch.object(app, "Sensors", sensors),
        ):
            _constants(options, patches)
            return app.main(settings, **parts)
    except EdgedError as error:  # as the command line does it
        sys.stderr.write(f"edged: {error.message}\n")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
