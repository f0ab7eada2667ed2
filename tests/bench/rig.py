"""What is measured: a real broker, the daemon in its process, and a plain paho client as user."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.bench.child import ROOT
from tests.bench.machine import children
from tests.kit.mosquitto import Mosquitto

DEVICE = "bench"
TOPICS = f"edged/{DEVICE}"
#: The kit's broker logs every packet, for tests; here that would be a part of what is measured.
#: Without `set_tcp_nodelay` Nagle's algorithm in the broker and delayed acknowledgement in the
#: client hold `accepted` back for 40 ms, behind the PUBACK of the request.
BROKER = "log_type none\nlog_type error\nset_tcp_nodelay true\n"

_FINALS = frozenset({"result", "error", "refused"})
_JOB_S = 900.0
_READY_S = 900.0
_STOP_S = 30.0


@contextlib.contextmanager
def broker(folder: Path, config: str = BROKER) -> Iterator[Mosquitto]:
    """Run a broker with its files in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with Mosquitto(folder, config=config) as mosquitto:
        yield mosquitto


class Daemon:
    """edged, in a process of its own: `edged run`, or the same with the engine without a model."""

    def __init__(self, folder: Path, port: int, *, faulty: bool = False, **groups: Any) -> None:
        self.folder = folder
        self._faulty = faulty
        self._settings: dict[str, Any] = {
            "device": DEVICE,
            "mqtt": {"host": "127.0.0.1", "port": port},
            "state": {"dir": str(folder / "state"), "stop_s": 0},
            "log": {"format": "json"},
        } | groups
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def engine_pid(self) -> int | None:
        """The engine process, if there is one."""
        return next(iter(children(self.pid)), None)

    @property
    def log(self) -> str:
        """What it has written."""
        return (self.folder / "daemon.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "edged.toml"
        path.write_text(_toml(self._settings))
        module = "tests.bench.faulty_daemon" if self._faulty else "edged"
        with (self.folder / "daemon.log").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "run", "--config", str(path)],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={k: v for k, v in os.environ.items() if not k.startswith("EDGED_")},
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(signal.SIGTERM)

    def end(self, number: signal.Signals) -> None:
        """End it by this signal, or by SIGKILL if that does not help."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def must_live(self) -> None:
        """Raise if it has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"the daemon has ended:\n{self.log[-4000:]}")


def _toml(settings: dict[str, Any]) -> str:
    """Return settings as TOML, which writes texts, numbers and truth as JSON does."""
    lines = []
    groups = {name: value for name, value in settings.items() if isinstance(value, dict)}
    for name, value in settings.items():
        if name not in groups:
            lines.append(f"{name} = {json.dumps(value)}")
    for name, group in groups.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in group.items()]
    return "\n".join([*lines, ""])


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a job and when it arrived, by `time.perf_counter`."""

    at: float
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trail:
    """A job, as its client saw it."""

    published: float
    events: tuple[Event, ...]

    def first(self, kind: str) -> float:
        """Return the seconds from the publish to the first event of this kind."""
        return next(e.at for e in self.events if e.body["type"] == kind) - self.published

    @property
    def final(self) -> dict[str, Any]:
        """The event that ended it."""
        return self.events[-1].body

    @property
    def final_s(self) -> float:
        """Seconds from the publish to the final."""
        return self.events[-1].at - self.published

    @property
    def last_chunk_s(self) -> float:
        """Seconds from the publish to the last chunk."""
        chunks = [e.at for e in self.events if e.body["type"] == "chunk"]
        return chunks[-1] - self.published


class Asker:
    """A user of edged: plain paho, none of edged's code."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._news = threading.Condition()
        self._subscribed = threading.Event()
        self._numbers = itertools.count(1)
        self._events: dict[str, list[Event]] = {}
        self._retained: dict[str, dict[str, Any]] = {}
        self._cameras: dict[str, dict[str, Any]] = {}
        self.beats: list[Event] = []
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="asker", protocol=MQTTProtocolVersion.MQTTv5
        )
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message

    def __enter__(self) -> Self:
        self._client.connect("127.0.0.1", self._port)
        self._client.loop_start()
        if not self._subscribed.wait(20):
            raise RuntimeError("the asker could not subscribe")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        client.subscribe(
            [
                (f"{TOPICS}/response/#", 1),
                (f"{TOPICS}/status", 1),
                (f"{TOPICS}/info", 1),
                (f"{TOPICS}/health", 0),
                (f"{TOPICS}/camera/+/status", 0),
            ]
        )

    def _on_subscribe(self, *_: Any) -> None:
        self._subscribed.set()

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        now = time.perf_counter()
        kind = message.topic.removeprefix(f"{TOPICS}/").partition("/")[0]
        with self._news:
            if kind == "response":
                body = json.loads(message.payload)
                self._events.setdefault(body["id"], []).append(Event(now, body))
            elif kind == "camera":
                self._cameras[message.topic.split("/")[-2]] = json.loads(message.payload)
            else:
                self._retained[kind] = json.loads(message.payload)
                if kind == "health":
                    self.beats.append(Event(now, self._retained[kind]))
            self._news.notify_all()

    def _wait(self, what: str, true: Callable[[], bool], daemon: Daemon, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._news:
            while not true():
                daemon.must_live()
                if time.monotonic() > until:
                    raise RuntimeError(f"no {what} in {seconds:.0f} s:\n{daemon.log[-4000:]}")
                self._news.wait(1.0)

    def wait_ready(self, daemon: Daemon, capability: str = "text") -> dict[str, Any]:
        """Wait until the daemon says that it is ready and can do this; return its `info`."""

        def ready() -> bool:
            status, info = self._retained.get("status", {}), self._retained.get("info", {})
            return (
                status.get("state") == "ready"
                and info.get("instance") == status.get("instance")
                and bool(info["capabilities"][capability])
            )

        self._wait(f"state ready for {capability}", ready, daemon, _READY_S)
        return self._retained["info"]

    def wait_beats(self, count: int, daemon: Daemon) -> None:
        """Wait for this many more heartbeats."""
        there = len(self.beats)
        self._wait("heartbeat", lambda: len(self.beats) >= there + count, daemon, _JOB_S)

    def send(self, client: str, **body: Any) -> tuple[str, float]:
        """Publish a request, for text or (with frames) for vision; return its id and when."""
        name = f"job-{next(self._numbers)}"
        kind = "vision" if "frames" in body else "text"
        payload = json.dumps({"id": name, **body}).encode()
        published = time.perf_counter()
        self._client.publish(f"{TOPICS}/request/{kind}/{client}", payload, qos=1)
        return name, published

    def show(self, camera: str, frame: bytes) -> None:
        """Publish a camera's frame, as a camera does."""
        self._client.publish(f"{TOPICS}/camera/{camera}/frame", frame, qos=0)

    def wait_frames(self, camera: str, count: int, daemon: Daemon) -> None:
        """Wait until the heartbeat tells of a camera's frames; so many are buffered then."""

        def there() -> bool:
            status = self._cameras.get(camera, {})
            return bool(status.get("buffered", 0) >= count)

        self._wait(f"{count} frames of {camera}", there, daemon, _JOB_S)

    def wait_for(self, name: str, kind: str, daemon: Daemon) -> None:
        """Wait for an event of a job."""

        def seen() -> bool:
            return any(e.body["type"] == kind for e in self._events.get(name, ()))

        self._wait(f"{kind} of {name}", seen, daemon, _JOB_S)

    def ask(self, daemon: Daemon, client: str, **body: Any) -> Trail:
        """Publish a request and wait for its final, which must be a result."""
        name, published = self.send(client, **body)

        def ended() -> bool:
            events = self._events.get(name, [])
            return bool(events) and events[-1].body["type"] in _FINALS

        self._wait(f"final of {name}", ended, daemon, _JOB_S)
        with self._news:
            trail = Trail(published, tuple(self._events.pop(name)))
        if trail.final["type"] != "result":
            raise RuntimeError(f"{name} ended with {trail.final}")
        return trail
