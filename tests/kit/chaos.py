"""A TCP proxy that does to a connection what networks do, on the test's own event loop."""

from __future__ import annotations

import asyncio
import socket
import struct
from types import TracebackType
from typing import Literal, Self

from tests.kit.mosquitto import free_port

Way = Literal["up", "down"]
_CHUNK = 16 * 1024


class ChaosProxy:
    """Listens on `port` and passes bytes on to another port of the loopback, until told otherwise.

    `up` is from the client to the broker.
    """

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.target = target
        #: Connections accepted, ever.
        self.accepted = 0
        #: Take connections and never pass anything on.
        self.hang = False
        #: Cut new connections, by RST, after this many bytes this way.
        self.cut_after: tuple[Way, int] | None = None
        #: Bytes a second this way; absent: as fast as it goes.
        self.rate: dict[Way, float] = {}
        self._open: dict[Way, asyncio.Event] = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._pairs: dict[asyncio.Task[None], tuple[socket.socket, ...]] = {}
        self._hellos: dict[asyncio.Task[None], bytes] = {}

    async def __aenter__(self) -> Self:
        for event in self._open.values():
            event.set()
        self.listen()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.refuse()
        self.reset()
        await asyncio.gather(*self._pairs, return_exceptions=True)

    def listen(self) -> None:
        """Take connections (again)."""
        assert self._listener is None
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(self._listener), name="chaos.accept")

    async def refuse(self) -> None:
        """Take no more connections: the port is closed."""
        accepting, listener = self._accepting, self._listener
        self._accepting = self._listener = None
        if accepting is not None and listener is not None:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            listener.close()

    def reset(self, only: bytes = b"") -> None:
        """End all connections with an RST, or those that began with a packet in which this is."""
        for task, sockets in list(self._pairs.items()):
            if only not in self._hellos.get(task, b""):
                continue
            for sock in sockets:
                if sock.fileno() >= 0:  # it has not just ended by itself
                    _arm_reset(sock)
            task.cancel()

    def blackhole(self, *ways: Way) -> None:
        """Pass nothing on these ways (default both), silently."""
        for way in ways or ("up", "down"):
            self._open[way].clear()

    def heal(self) -> None:
        """Pass on again, what was held back first."""
        for event in self._open.values():
            event.set()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            client.setblocking(False)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted += 1
            task = asyncio.create_task(self._serve(client), name="chaos.connection")
            self._pairs[task] = (client,)
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._hellos.pop(task, None)
        for sock in self._pairs.pop(task, ()):  # a task that was cancelled before it began
            sock.close()

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        broker = socket.socket()
        broker.setblocking(False)
        broker.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            if self.hang:
                await asyncio.Event().wait()
            await loop.sock_connect(broker, ("127.0.0.1", self.target))
            task = asyncio.current_task()
            assert task is not None
            self._pairs[task] = (client, broker)
            cut = self.cut_after
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump("up", client, broker, cut, task))
                pumps.create_task(self._pump("down", broker, client, cut))
        except* (OSError, _Over):
            pass
        finally:
            client.close()
            broker.close()

    async def _pump(
        self,
        way: Way,
        source: socket.socket,
        sink: socket.socket,
        cut: tuple[Way, int] | None,
        connection: asyncio.Task[None] | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        left = cut[1] if cut and cut[0] == way else None
        due = 0.0  # when what was passed on before is through
        while True:
            await self._open[way].wait()
            data = await loop.sock_recv(source, _CHUNK)
            if connection is not None:
                self._hellos.setdefault(connection, data)
            await self._open[way].wait()
            if not data:
                raise _Over  # an end on one side ends both
            if left is not None and len(data) >= left:
                await loop.sock_sendall(sink, data[:left])
                _arm_reset(source)
                _arm_reset(sink)
                raise _Over
            if left is not None:
                left -= len(data)
            rate = self.rate.get(way)
            if rate is not None:
                due = max(due, loop.time()) + len(data) / rate
                await asyncio.sleep(due - loop.time())
            await loop.sock_sendall(sink, data)


class _Over(Exception):
    """The connection is to end."""


def _arm_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
