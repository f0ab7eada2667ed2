"""One engine process, as the daemon sees it: started, spoken to, listened to, killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

import edged
from edged.engine import messages, wire
from edged.engine.exits import EXIT_BUG, EXIT_OOM
from edged.errors import DeathReason

#: Environment variables an engine process may have; everything else might be a secret.
_PASSED_ON = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONWARNINGS",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
)
#: Characters of one line of a native library's output, and lines a minute, that go to the log.
_LINE = 500
_LINES_A_MINUTE = 120
_READ = 1 << 16
#: Bytes of a body written at once: more does not fit into a socket's buffer.
_WRITE = 1 << 18

_log = structlog.get_logger(__name__)


def environment(outer: Mapping[str, str]) -> dict[str, str]:
    """Return an engine process's environment: no secrets, no telemetry, no threads of others."""
    inner = {name: outer[name] for name in _PASSED_ON if name in outer}
    inner |= {
        "ORT_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",
        # numpy's and other libraries' own pools; the graphs' threads are set by the model's config
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        # a model is a folder here: nothing may be fetched
        "HF_HUB_OFFLINE": "1",
    }
    root = Path(edged.__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # run from a source tree
        inner["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [inner.get("PYTHONPATH")])])
    return inner


def worker_command() -> tuple[str, ...]:
    """Return the command that runs the real engine."""
    return sys.executable, "-P", "-m", "edged.engine.worker"


class EngineProcess:
    """A started engine process.

    Made by `start`; whoever made it must `kill` and `wait` for it, or see it end.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._unpacker = wire.Unpacker(
            max_header=wire.MAX_ENGINE_HEADER, max_body=wire.MAX_ENGINE_BODY
        )
        #: What could not be written at once, and the task that writes it.
        self._outbox: deque[memoryview] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._output = asyncio.create_task(self._log_output(), name="edged.engine.output")
        self._oom_kills = oom_kills()

    @classmethod
    async def start(cls, command: Sequence[str]) -> EngineProcess:
        """Start an engine process; it gets its own end of a socket pair and nothing else.

        Must be called from the main thread: the kernel ends the process with the thread that made
        it (PR_SET_PDEATHSIG).
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *("--socket", str(theirs.fileno()), "--parent", str(os.getpid())),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                    pass_fds=(theirs.fileno(),),
                    env=environment(os.environ),
                )
        except BaseException:
            ours.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.returncode is not None

    def send(self, header: dict[str, Any], body: Sequence[bytes] = ()) -> None:
        """Send a message; what a dead process does not read is dropped.

        Raises:
            TooLarge: it was not sent.
        """
        head = wire.head(header, sum(map(len, body)))
        if self._writer.is_closing():
            return
        if not body and self._sending is None:
            self._writer.write(head)
            return
        self._outbox.extend(memoryview(part) for part in (head, *body))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name="edged.engine.send")

    async def messages(self) -> AsyncIterator[messages.FromEngine]:
        """Yield what the process says, until it closes its end.

        Raises:
            BadMessage: it says something that is no message.
        """
        while True:
            try:
                data = await self._reader.read(_READ)
            except ConnectionError:
                return
            if not data:
                return
            self._unpacker.feed(data)
            for packet in self._unpacker:
                yield messages.read(packet)

    def rss_mb(self) -> float | None:
        """Return the process's resident memory in MB, None when it cannot be read."""
        return None if self.ended else rss_mb(self.pid)

    def kill(self) -> None:
        """End the process, now."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        """Wait for the process's end, free what it held here, and return its status."""
        status = await self._process.wait()
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})
        self._outbox.clear()
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        # what a grandchild still holds open must not keep us waiting
        done, _ = await asyncio.wait({self._output}, timeout=1.0)
        if not done:
            self._output.cancel()
            await asyncio.wait({self._output})
        return status

    def epitaph(self, status: int) -> tuple[DeathReason, str]:
        """Return why a process that we did not kill ended with this status."""
        if status == EXIT_OOM:
            return DeathReason.OOM, "it could get no more memory"
        if status == -signal.SIGKILL:
            counted = oom_kills() > self._oom_kills
            seen = "the kernel counted one" if counted else "the kernel counted none here"
            return DeathReason.OOM, f"SIGKILL from outside, as for want of memory ({seen})"
        if status < 0:
            return DeathReason.SIGNAL, _signal_name(-status)
        if status == EXIT_BUG:
            return DeathReason.EXIT, f"status {status}, a mistake of ours; the log has it"
        return DeathReason.EXIT, f"status {status}"

    async def _send(self) -> None:
        """Write what waits, piece by piece: a body is large, and the loop has more to do."""
        try:
            while self._outbox:
                part = self._outbox.popleft()
                for at in range(0, len(part), _WRITE):
                    self._writer.write(part[at : at + _WRITE])
                    await self._writer.drain()
                    await asyncio.sleep(0)
        except OSError:  # it has ended
            self._outbox.clear()
        finally:
            self._sending = None

    async def _log_output(self) -> None:
        """Log what native libraries print, line by line and not without bound."""
        stream = self._process.stdout
        if stream is None:
            return
        loop = asyncio.get_running_loop()
        rest, minute, lines = b"", loop.time(), 0
        while data := await stream.read(_READ):
            *complete, rest = (rest + data).split(b"\n")
            rest = rest[:_LINE]
            for line in complete:
                if loop.time() - minute > 60:
                    minute, lines = loop.time(), 0
                lines += 1
                if lines <= _LINES_A_MINUTE:
                    _log_line(self.pid, line)
                elif lines == _LINES_A_MINUTE + 1:
                    _log.warning("engine.output_muted", pid=self.pid, until_s=60)
        if rest:
            _log_line(self.pid, rest)


def _log_line(pid: int, line: bytes) -> None:
    text = line[:_LINE].decode("utf-8", "replace").rstrip()
    if text:
        _log.info("engine.output", pid=pid, line=text)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def rss_mb(pid: int) -> float | None:
    """Return a process's resident memory in MB (10^6 bytes)."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since boot."""
    try:
        for line in Path("/proc/vmstat").read_text("ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0
