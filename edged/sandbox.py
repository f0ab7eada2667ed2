"""Processes that a program like `edged demo` starts for itself, and takes away again.

Whatever was started and written is gone when it ends, also after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from edged import settings
from edged.errors import EdgedError
from edged.options import ENV_PREFIX
from edged.terminal import one_line

#: A broker must listen within this, and a process must end within this once told to, seconds.
BROKER_S = 15.0
STOP_S = 15.0

_ENGINE = ("onnxruntime_genai", "onnxruntime", "numpy", "llguidance", "jsonschema", "PIL")
#: What systemd tells a service; our processes are none.
_SYSTEMD = frozenset(
    {"CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
)


# What is needed ---------------------------------------------------------------------------------


def need_engine() -> None:
    """Raise EdgedError unless the packages that run a model are installed."""
    missing = [name for name in _ENGINE if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgedError(
            f"the engine's packages are not installed ({', '.join(missing)}): "
            "pip install 'edged[cpu]'"
        )


StartBroker = Callable[[Path, int], "Child"]


def choose_broker(name: str) -> StartBroker:
    """Return what starts a broker: `mosquitto`, `amqtt`, or `auto` for the first that is installed.

    Raises:
        EdgedError: it is not installed.
    """
    mosquitto = find_mosquitto()
    if name != "amqtt" and mosquitto is not None:
        return lambda folder, port: _mosquitto(mosquitto, folder, port)
    if name != "mosquitto" and importlib.util.find_spec("amqtt") is not None:
        return _amqtt
    what = {
        "mosquitto": "mosquitto is not installed: apt install mosquitto",
        "amqtt": "amqtt is not installed: pip install 'edged[demo]'",
    }
    neither = "no broker is installed: apt install mosquitto, or pip install 'edged[demo]'"
    raise EdgedError(what.get(name, neither))


def find_mosquitto() -> str | None:
    """Return where mosquitto is, or None."""
    # Debian puts it where only root's PATH looks.
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    return shutil.which("mosquitto", path=path)


def free_port() -> int:
    """Return a TCP port of the loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# Processes --------------------------------------------------------------------------------------


@dataclass(eq=False)
class Child:
    """A process of ours, in a session of its own: Ctrl-C reaches us alone, and we end it."""

    name: str
    command: list[str]
    log: Path
    #: The version of MQTT that it speaks, if it is a broker.
    protocol: str = "5"
    process: asyncio.subprocess.Process = field(init=False)

    async def start(self) -> None:
        """Start it; what it writes goes to its log."""
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
                start_new_session=True,
            )

    async def stop(self) -> None:
        """End it, by force if it does not end by itself."""
        try:
            if self.process.returncode is None:
                self.process.terminate()
                async with asyncio.timeout(STOP_S):
                    await self.process.wait()
        except TimeoutError:
            pass
        finally:
            # Whatever it left behind in its session goes too.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()

    def must_live(self) -> None:
        """Raise EdgedError if it has ended, and not well."""
        if self.process.returncode not in {None, 0}:
            raise self.failed(f"ended with {self.process.returncode}")

    def last_words(self) -> str:
        """Return the end of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-12:]
        return "\n".join(f"  {one_line(each, 300)}" for each in lines) or "  (it said nothing)"

    def failed(self, what: str) -> EdgedError:
        """Return an error that says what is wrong, with the last lines it wrote."""
        return EdgedError(f"{self.name} {what}; its last words:\n{self.last_words()}")


def environment() -> dict[str, str]:
    """Return our environment without what an installed edged, or systemd, may have put there."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(ENV_PREFIX) and name not in _SYSTEMD
    }


@asynccontextmanager
async def running(child: Child) -> AsyncIterator[Child]:
    """Have the process run inside this context, and not after it."""
    await child.start()
    try:
        yield child
    finally:
        # A cancelled task can still wait here: it was cancelled once.
        await child.stop()


async def until_ended(work: Coroutine[None, None, int]) -> int:
    """Return the exit status of some work.

    The first signal to end cancels it, so that everything is cleaned up on the way.
    """
    with _ended_by_signals() as ended:
        try:
            return await work
        except asyncio.CancelledError:
            if not ended:
                raise
            return 128 + ended[0]


@contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    loop, task, seen = asyncio.get_running_loop(), asyncio.current_task(), list[int]()

    def end(number: int) -> None:
        seen.append(number)
        if task is not None and len(seen) == 1:
            task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, end, int(number))
    try:
        yield seen
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


# A whole edged ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Private:
    """A broker and a daemon that nobody else knows of."""

    settings: settings.Settings
    broker: Child
    daemon: Child


@asynccontextmanager
async def private(device: str, model: Path, start_broker: StartBroker) -> AsyncIterator[Private]:
    """Have a broker and a daemon run inside this context, in a folder that goes with them.

    Args:
        device: its name.
        model: the folder of its model.
        start_broker: as `choose_broker` gives it.
    """
    with tempfile.TemporaryDirectory(prefix=f"edged-{device}-", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_port()
        broker = start_broker(folder, port)
        async with running(broker):
            await listening(broker, port)
            config = folder / "edged.toml"
            config.write_text(_config(folder, port, broker.protocol, device, model))
            command = [sys.executable, "-m", "edged", "run", "--config", str(config)]
            async with running(Child("edged", command, folder / "edged.log")) as daemon:
                yield Private(settings.load(config, environ={}), broker, daemon)


def _config(folder: Path, port: int, version: str, device: str, model: Path) -> str:
    def text(value: object) -> str:
        return settings.toml_value(str(value))

    return (
        f"device = {text(device)}\n"
        f'[mqtt]\nhost = "127.0.0.1"\nport = {port}\nprotocol = {text(version)}\n'
        f'[model]\nname = "selftest"\npath = {text(model)}\n'
        f"[state]\ndir = {text(folder / 'state')}\nstop_s = 5\n"
        "[health]\ninterval_s = 0.5\n"
        "[limits]\nmax_tokens = 4000\n"
        '[log]\nformat = "json"\n'
    )


# Brokers ----------------------------------------------------------------------------------------


def _mosquitto(program: str, folder: Path, port: int) -> Child:
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_dest stderr\n"
    )
    return Child("mosquitto", [program, "-c", str(config)], folder / "broker.log")


def _amqtt(folder: Path, port: int) -> Child:
    code = f"from edged.sandbox import serve_amqtt; serve_amqtt({port})"
    # It speaks MQTT 3.1.1 and refuses MQTT 5.
    return Child("amqtt", [sys.executable, "-c", code], folder / "broker.log", protocol="3.1.1")


def serve_amqtt(port: int) -> None:
    """Be a broker, in a process of its own, until told to end."""
    from amqtt.broker import Broker  # noqa: PLC0415 - only where mosquitto is not installed

    async def serve() -> None:
        ended = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
        broker = Broker(
            {
                "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
                "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {}},
            }
        )
        await broker.start()
        await ended.wait()
        await broker.shutdown()

    asyncio.run(serve())


async def listening(child: Child, port: int) -> None:
    """Wait until the broker takes connections; raise EdgedError if it does not."""
    until = time.monotonic() + BROKER_S
    while time.monotonic() < until:
        if child.process.returncode is not None:
            raise child.failed("ended at once")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return
    raise child.failed(f"did not listen within {BROKER_S:g} s")
