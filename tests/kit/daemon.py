"""The real daemon as a child process: started, waited for, hurt, read and started again.

    with Mosquitto(tmp) as broker, Daemon(tmp, broker.port) as daemon:
        daemon.wait_ready()
        ...
        daemon.kill()
        daemon.start()          # on the same state directory
        assert daemon.stop() == 0

Every wait is on a log line or on the process itself; none is a sleep. All methods block: in a test
whose own event loop must go on meanwhile (it runs a `ChaosProxy`, say) call them through
`asyncio.to_thread`; `async with Daemon(…)` does that for start and end.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

ROOT = Path(__file__).resolve().parents[2]
#: A text model with random weights: its answers are long and mean nothing.
MODEL = ROOT / "tests" / "models" / "phi3"
#: The model that ships with edged: it sees, and what it says is right or wrong.
SHIPPED = ROOT / "edged" / "selftest" / "model"

#: Seconds a wait lasts before it fails the test; a busy machine is slow, not wrong.
PATIENCE_S = 30.0

Line = dict[str, Any]
Tree = Mapping[str, Mapping[str, Any] | Any]


class Daemon:
    """`python -m tests.kit.run_daemon`, with its log.

    Args:
        directory: for the settings file, the state directory and the log.
        port: the broker's (or a proxy's).
        engine: "faulty" runs `edged.engine.faulty`, "real" a small text model with random weights.
        settings: over the defaults here, `{"limits": {"queue": 3}}`.
        options: of `run_daemon` (see there), for every start.
        env: more environment variables, e.g. NOTIFY_SOCKET.
    """

    def __init__(
        self,
        directory: Path,
        port: int,
        *,
        engine: Literal["faulty", "real"] = "faulty",
        settings: Tree | None = None,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.engine = engine
        self.options = tuple(options)
        self.env = dict(env or {})
        self.state_dir = directory / "state"
        model: dict[str, Any] = {"name": "small"}
        if engine == "real":
            model |= {"path": str(MODEL), "threads": 1, "max_context": 512}
        self.settings: dict[str, Any] = _merged(
            {
                "device": "box",
                "mqtt": {"host": "127.0.0.1", "port": port, "client_id": "edged-box"},
                "model": model,
                "state": {"dir": str(self.state_dir), "stop_s": 5},
                "health": {"interval_s": 1},
                "log": {"format": "json"},
            },
            settings or {},
        )
        #: Log lines of every start, in order.
        self.lines: list[Line] = []
        #: What came out that is no log line: tracebacks, a library's words.
        self.noise: list[str] = []
        #: Where the lines of the newest start begin in `lines`.
        self.begin = 0
        self._news = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def base(self) -> str:
        """`mqtt.base_topic`."""
        return str(self.settings["mqtt"].get("base_topic", "edged"))

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.settings["device"])

    @property
    def root(self) -> str:
        """What all its topics begin with."""
        return f"{self.base}/{self.device}"

    # Start and end

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        if kind is not None:
            self.tell()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.start)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def start(self, *options: str) -> None:
        """Start it (again), with these options for this start alone; does not wait."""
        assert self._process is None, "it runs"
        config = self.directory / "edged.toml"
        config.write_text(_toml(self.settings))
        self.begin = len(self.lines)
        command = [sys.executable, "-W", "error", "-m", "tests.kit.run_daemon"]
        command += ["--config", str(config), "--engine", self.engine, *self.options, *options]
        env = {name: value for name, value in os.environ.items() if not name.startswith("EDGED_")}
        env |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **self.env}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(
            target=self._read, args=(self._process,), name="daemon.log", daemon=True
        )
        self._reader.start()

    def restart(self, *options: str) -> None:
        """SIGKILL it, start it again and wait until it is ready."""
        self.kill()
        self.start(*options)
        self.wait_ready()

    def stop(self, timeout_s: float = PATIENCE_S) -> int:
        """SIGTERM it and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait_exit(timeout_s)

    def kill(self) -> None:
        """SIGKILL it, if it runs; nothing is left of it afterwards, its engine included."""
        process = self._process
        if process is None:
            return
        engines = self.engine_pids
        process.kill()
        process.wait(PATIENCE_S)
        self._over()
        for pid in engines:
            _wait_gone(pid)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGTERM, SIGSTOP, SIGCONT, SIGHUP."""
        assert self._process is not None, "it does not run"
        self._process.send_signal(number)

    def wait_exit(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait until it ends by itself; return its exit status (negative: the signal)."""
        process = self._process
        assert process is not None, "it does not run"
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end within {timeout_s} s") from None
        self._over()
        return status

    def _over(self) -> None:
        process, reader = self._process, self._reader
        assert process is not None
        assert reader is not None
        reader.join(PATIENCE_S)  # ends with the last process that holds the pipe
        assert not reader.is_alive(), "something still holds the daemon's output"
        self._process = self._reader = None

    # Processes

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    @property
    def engine_pids(self) -> list[int]:
        """The live child processes: normally the one engine, none while it is down."""
        if self._process is None:
            return []
        found: list[int] = []
        for path in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
            try:
                found += [int(pid) for pid in path.read_text().split()]
            except OSError:  # a thread that has just ended
                continue
        return found

    @property
    def engine_pid(self) -> int:
        """The engine's process id, once it has been started."""
        self.wait_log("engine.started")
        return int(self.log("engine.started")[-1]["pid"])

    # Log

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as pipe, (self.directory / "edged.log").open("ab") as copy:
            for raw in pipe:
                copy.write(raw)
                copy.flush()
                with self._news:
                    self._take(raw.decode(errors="replace").rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def _take(self, text: str) -> None:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and "event" in line:
            self.lines.append(line)
        else:
            self.noise.append(text)

    def log(
        self, event: str | None = None, *, since: int | None = None, **fields: Any
    ) -> list[Line]:
        """Return the lines of this event with these fields, of the newest start unless `since`."""
        with self._news:
            lines = self.lines[self.begin if since is None else since :]
        return [line for line in lines if _is(line, event, fields)]

    def wait_log(
        self,
        event: str,
        *,
        since: int | None = None,
        timeout_s: float = PATIENCE_S,
        count: int = 1,
        **fields: Any,
    ) -> Line:
        """Wait for the `count`-th such line (see `log`) and return it."""
        return self.wait_until(
            lambda: (
                found[count - 1]
                if len(found := self.log(event, since=since, **fields)) >= count
                else None
            ),
            f"{event} {fields or ''}",
            timeout_s,
        )

    def wait_until(
        self, look: Callable[[], Line | None], what: str, timeout_s: float = PATIENCE_S
    ) -> Line:
        """Wait until `look`, called at every new line, returns something."""
        until = time.monotonic() + timeout_s
        process, reader = self._process, self._reader
        with self._news:
            while (found := look()) is None:
                left = until - time.monotonic()
                ended = reader is None or not reader.is_alive()
                if left <= 0 or ended:
                    status = process.poll() if process is not None else "it does not run"
                    why = f"the daemon ended ({status})" if ended else f"not within {timeout_s} s"
                    raise AssertionError(f"waited for {what}: {why}; it said:\n{self._tail()}")
                self._news.wait(min(left, 1.0))  # a pipe that closes without a line wakes nobody
            return found

    def wait_ready(self, timeout_s: float = PATIENCE_S) -> Line:
        """Wait until it is `ready`, and return that line."""
        return self.wait_log("health.state", state="ready", timeout_s=timeout_s)

    def wait_state(self, state: str, timeout_s: float = PATIENCE_S) -> Line:
        """Wait until the newest state that it logged is this one."""

        def look() -> Line | None:
            told = self.log("health.state")
            return told[-1] if told and told[-1]["state"] == state else None

        return self.wait_until(look, f"state {state}", timeout_s)

    def faults(self) -> list[str]:
        """Return everything it said that a healthy run never says: noise, exceptions."""
        with self._news:
            bad = [json.dumps(line) for line in self.lines if "exception" in line]
            bad += [json.dumps(line) for line in self.lines if line["event"] == "library"]
            return [*self.noise, *bad]

    def _tail(self) -> str:
        shown = [json.dumps(line) for line in self.lines[-40:]] + self.noise[-40:]
        return "\n".join(shown)

    def tell(self) -> None:
        """Print the end of its log: pytest shows it beside a failure."""
        print(f"--- the daemon's log, {self.directory / 'edged.log'} ---\n{self._tail()}")  # noqa: T201


def _is(line: Line, event: str | None, fields: Mapping[str, Any]) -> bool:
    return (event is None or line["event"] == event) and all(
        name in line and line[name] == value for name, value in fields.items()
    )


def _wait_gone(pid: int) -> None:
    """Wait until a process that is not our child has ended: the kernel ends an engine by itself."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(PATIENCE_S * 1000), f"process {pid} outlives its daemon"
    finally:
        os.close(handle)


# Settings ---------------------------------------------------------------------------------------


def _merged(base: dict[str, Any], over: Tree) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = dict(value) if isinstance(value, Mapping) else value
    return merged


def _toml(tree: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for name, value in tree.items():
        if not isinstance(value, Mapping):
            lines.append(f"{name} = {json.dumps(value)}")
    for name, value in tree.items():
        if isinstance(value, Mapping):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(each)}" for key, each in value.items())]
    return "\n".join([*lines, ""])
