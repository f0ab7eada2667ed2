"""systemd's part: the ear that a service speaks to, and what systemd does about what it hears."""

from __future__ import annotations

import math
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests.kit.daemon import PATIENCE_S, Daemon
from tests.kit.unit import SERVICE, last, read, seconds

_CREDENTIALS = struct.Struct("3i")  # process, user, group


class NotifySocket:
    """The end of NOTIFY_SOCKET where systemd would listen."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        #: When, and what.
        self.said: list[tuple[float, str]] = []
        #: NotifyAccess=main: who is heard; None: everybody. And what others said.
        self.main: int | None = None
        self.unheard: list[str] = []
        self.news = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(str(self.path))
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._socket.close()
        if kind is not None:
            print(*self.said, sep="\n")  # noqa: T201

    def _listen(self) -> None:
        space = socket.CMSG_SPACE(_CREDENTIALS.size)
        while True:
            data, extra, _, _ = self._socket.recvmsg(4096, space)
            if not data:
                return
            (pid, _, _) = _CREDENTIALS.unpack(extra[0][2])
            lines = data.decode().splitlines()
            with self.news:
                if self.main in {None, pid}:
                    self.said += [(time.monotonic(), line) for line in lines]
                else:
                    self.unheard += lines
                self.news.notify_all()

    def env(self, watchdog_s: float | None = None) -> dict[str, str]:
        """Return what systemd puts into the environment of a service."""
        given = {"NOTIFY_SOCKET": str(self.path)}
        if watchdog_s is not None:
            given["WATCHDOG_USEC"] = str(int(watchdog_s * 1e6))
        return given

    def lines(self, since: float = 0.0) -> list[str]:
        """Return what was said."""
        with self.news:
            return [line for at, line in self.said if at >= since]

    def wait(self, look: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
        """Wait until something holds, looking at every new line."""
        with self.news:
            assert self.news.wait_for(look, timeout_s), f"{what}: {self.said}"

    def wait_silence(self, watchdog_s: float, timeout_s: float = 20.0) -> None:
        """Wait as systemd does: until no WATCHDOG=1 has come for so long."""
        until = time.monotonic() + timeout_s
        with self.news:
            while True:
                fed = max((at for at, line in self.said if line == "WATCHDOG=1"), default=0.0)
                left = fed + watchdog_s - time.monotonic()
                if fed and left <= 0:
                    return
                assert time.monotonic() < until, "the watchdog is fed all the same"
                self.news.wait(max(0.01, left))


State = Literal["inactive", "activating", "active", "deactivating", "auto-restart", "failed"]


@dataclass
class Life:
    """One process of the service, from its start to its end."""

    pid: int
    began: float
    #: Since when it is on its way down.
    stopping: float | None = None
    #: Since when it should be dead of its watchdog.
    aborted: float | None = None
    #: Which of systemd's times it exceeded last.
    killed: str | None = None
    status: int | None = None


class Supervisor:
    """Keeps a daemon running as systemd does, by the directives of `systemd/edged.service`.

    with Supervisor(Daemon(tmp, broker.port), RestartSec="0.1") as systemd:
        systemd.wait_state("active")

    Of the unit this obeys NotifyAccess=main, TimeoutStartSec with EXTEND_TIMEOUT_USEC, WatchdogSec,
    TimeoutAbortSec, TimeoutStopSec with EXTEND_TIMEOUT_USEC, KillMode=mixed, Restart=always,
    RestartPreventExitStatus, RestartSec, StartLimitBurst and StartLimitIntervalSec.

    Args:
        daemon: not started.
        first: options for its first start alone.
        directives: in the place of the unit's; times are shorter in a test.
    """

    def __init__(self, daemon: Daemon, first: Sequence[str] = (), **directives: str) -> None:
        unit = read(SERVICE)
        self._unit, self._directives = unit, directives
        for name, value in (("Type", "notify"), ("NotifyAccess", "main"), ("Restart", "always")):
            assert last(unit, name) == value, f"the supervisor knows no other {name}"
        assert last(unit, "KillMode") == "mixed"
        self.daemon = daemon
        self.socket = NotifySocket(daemon.directory)
        self.lives: list[Life] = []
        self.state: State = "inactive"
        self._first = tuple(first)
        self._asked_to_stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def _directive(self, name: str) -> str:
        return self._directives.get(name) or last(self._unit, name)

    def _seconds(self, directive: str) -> float:
        return seconds(self._directive(directive))

    def __enter__(self) -> Self:
        self.socket.__enter__()
        self.daemon.env |= self.socket.env(self._seconds("WatchdogSec"))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._asked_to_stop.set()
        while self._thread.is_alive():
            self._send(signal.SIGKILL)
            self._thread.join(0.1)
        self.daemon.__exit__(kind, error, trace)
        self.socket.__exit__(kind, error, trace)
        if kind is not None:
            print(self.state, *self.lives, sep="\n")  # noqa: T201

    # What a test does and asks

    def stop(self) -> int:
        """Do as `systemctl stop`; return the service's exit status."""
        self._asked_to_stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "it does not stop"
        status = self.lives[-1].status
        assert status is not None
        return status

    def wait_state(self, state: State, lives: int = 1) -> Life:
        """Wait until the service is in this state after so many starts; return its newest life."""

        def look() -> bool:
            return self.state == state and len(self.lives) >= lives

        self.socket.wait(look, f"state {state} after {lives} starts", 2 * PATIENCE_S)
        return self.lives[-1]

    # What systemd does

    def _enter(self, state: State) -> None:
        with self.socket.news:
            self.state = state
            self.socket.news.notify_all()

    def _run(self) -> None:
        options, starts = self._first, list[float]()
        prevent = {int(status) for status in self._directive("RestartPreventExitStatus").split()}
        while True:
            now = time.monotonic()
            starts = [at for at in starts if now - at < self._seconds("StartLimitIntervalSec")]
            if len(starts) >= int(self._directive("StartLimitBurst")):
                self._enter("failed")
                return
            starts.append(now)
            life, options = self._live(options), ()
            if self._asked_to_stop.is_set():
                self._enter("inactive" if (life.status, life.killed) == (0, None) else "failed")
                return
            if life.killed is None and life.status in prevent:
                self._enter("failed")
                return
            self._enter("auto-restart")
            if self._asked_to_stop.wait(self._seconds("RestartSec")):
                self._enter("inactive")
                return

    def _live(self, options: Sequence[str]) -> Life:
        self.socket.main = None
        began = time.monotonic()
        self.daemon.start(*options)
        life = Life(self.daemon.pid, began)
        self.socket.main = life.pid
        self.lives.append(life)
        self._enter("activating")
        while self.daemon.running:
            self._look_after(life)
            with self.socket.news:
                self.socket.news.wait(0.02)
        life.status = self.daemon.wait_exit()
        return life

    def _look_after(self, life: Life) -> None:
        now, said = time.monotonic(), self.socket.lines(life.began)
        if life.stopping is None:
            if self._asked_to_stop.is_set():
                self._end(life)
            elif "STOPPING=1" in said:  # by itself
                life.stopping = now
                self._enter("deactivating")
            elif self.state == "activating" and "READY=1" in said:
                self._enter("active")
        if life.aborted is not None:
            if now >= life.aborted + self._seconds("TimeoutAbortSec"):
                self._kill(life, "TimeoutAbortSec", signal.SIGKILL)
        elif life.stopping is not None:
            if now >= self._extended(life.stopping, "TimeoutStopSec"):
                self._kill(life, "TimeoutStopSec", signal.SIGKILL)
        elif now >= self._fed(life) + self._seconds("WatchdogSec"):
            life.aborted = now
            self._kill(life, "WatchdogSec", signal.SIGABRT)
        elif self.state == "activating" and now >= self._extended(life.began, "TimeoutStartSec"):
            life.killed = "TimeoutStartSec"
            self._end(life)

    def _end(self, life: Life) -> None:
        life.stopping = time.monotonic()
        self._enter("deactivating")
        self._send(signal.SIGTERM)  # KillMode=mixed: to the main process alone

    def _kill(self, life: Life, exceeded: str, number: signal.Signals) -> None:
        life.killed = exceeded
        self._send(number)

    def _send(self, number: signal.Signals) -> None:
        if self.daemon.running:
            os.kill(self.daemon.pid, number)
            os.kill(self.daemon.pid, signal.SIGCONT)  # or a stopped one would not hear of it

    def _fed(self, life: Life) -> float:
        """Return when the watchdog, which the first of these words wakes, was last fed."""
        with self.socket.news:
            fed = [at for at, line in self.socket.said if line in {"WATCHDOG=1", "READY=1"}]
        return max((at for at in fed if at >= life.began), default=math.inf)

    def _extended(self, since: float, directive: str) -> float:
        """Return when a time is over that began then, and that the service may extend."""
        given, asked = since + self._seconds(directive), 0.0
        with self.socket.news:
            for at, line in self.socket.said:
                name, _, value = line.partition("=")
                if at >= since and name == "EXTEND_TIMEOUT_USEC" and at <= max(given, asked):
                    asked = at + int(value) / 1e6
        return max(given, asked)
