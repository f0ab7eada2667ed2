"""A scripted MQTT 5 broker: the limits and habits that mosquitto cannot be made to have."""

from __future__ import annotations

import asyncio
import ssl
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self


def variable(value: int) -> bytes:
    """Return a variable byte integer (MQTT 5 section 1.5.5)."""
    out = bytearray()
    while True:
        value, byte = divmod(value, 128)
        out.append(byte | 0x80 if value else byte)
        if not value:
            return bytes(out)


def packet(first: int, body: bytes) -> bytes:
    """Return an MQTT packet."""
    return bytes([first]) + variable(len(body)) + body


def publish(
    topic: str, payload: bytes, mid: int, properties: bytes = b"", *, first: int = 0x32
) -> bytes:
    """Return a PUBLISH, QoS 1 unless `first` says otherwise."""
    head = struct.pack("!H", len(topic.encode())) + topic.encode()
    head += struct.pack("!H", mid) if first & 6 else b""
    return packet(first, head + variable(len(properties)) + properties + payload)


#: CONNACK properties (MQTT 5 section 3.2.2.3).
RECEIVE_MAXIMUM_1 = b"\x21\x00\x01"
MAXIMUM_PACKET_SIZE_4K = b"\x27\x00\x00\x10\x00"
MAXIMUM_QOS_0 = b"\x24\x00"
RETAIN_UNAVAILABLE = b"\x25\x00"


@dataclass
class FakeBroker:
    """Answers CONNECT, SUBSCRIBE, PUBLISH and PINGREQ, and notes every packet of the client."""

    #: The CONNACK's reason code and properties.
    connack: tuple[int, bytes] = (0, b"")
    #: Written right after the SUBACK, in the same write.
    after_suback: bytes = b""
    #: Whether PUBLISH is answered at once; else `answer` does.
    answers: bool = True
    suback: bool = True
    tls: ssl.SSLContext | None = None
    #: (first byte, body) of every packet that came, over all connections.
    packets: list[tuple[int, bytes]] = field(default_factory=list)
    connections: int = 0
    #: How each connection ended: "eof" or "reset".
    ends: list[str] = field(default_factory=list)
    port: int = 0

    async def __aenter__(self) -> Self:
        self._news = asyncio.Condition()
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def of_type(self, kind: int) -> list[tuple[int, bytes]]:
        """Return the packets of a type (MQTT 5 section 2.1.2), e.g. 3 for PUBLISH."""
        return [p for p in self.packets if p[0] >> 4 == kind]

    async def wait_for(self, kind: int, count: int = 1) -> list[tuple[int, bytes]]:
        """Wait until so many packets of a type came."""
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(lambda: len(self.of_type(kind)) >= count)
        return self.of_type(kind)

    def write(self, data: bytes) -> None:
        """Send bytes to the newest client, in one write."""
        self._writers[-1].write(data)

    def answer(self, mid: int, reason: int = 0) -> None:
        """Send a PUBACK."""
        self.write(packet(0x40, struct.pack("!HBB", mid, reason, 0)))

    def drop(self) -> None:
        """Close the newest connection without a word."""
        self._writers[-1].close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.append(writer)
        self.connections += 1
        try:
            while True:
                first = (await reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 0x7F) << shift
                    shift += 7
                    if not byte & 0x80:
                        break
                body = await reader.readexactly(length)
                self._reply(first, body)
                async with self._news:
                    self.packets.append((first, body))
                    self._news.notify_all()
        except asyncio.IncompleteReadError:
            self.ends.append("eof")
        except (ConnectionError, ssl.SSLError):
            self.ends.append("reset")
        finally:
            self._tasks.discard(task)
            writer.close()
            with suppress(ConnectionError, ssl.SSLError, asyncio.CancelledError):
                await writer.wait_closed()

    def _reply(self, first: int, body: bytes) -> None:
        kind = first >> 4
        if kind == 1:
            reason, properties = self.connack
            head = bytes([0, reason]) + variable(len(properties)) + properties
            self.write(packet(0x20, head))
            if reason >= 0x80:
                self.drop()
        elif kind == 8 and self.suback:
            # Count the filters: packet id, properties, then (length, name, options) each.
            at, codes = 3 + body[2], bytearray()
            while at < len(body):
                (size,) = struct.unpack_from("!H", body, at)
                codes.append(body[at + 2 + size] & 3)
                at += 3 + size
            self.write(packet(0x90, body[:2] + b"\0" + bytes(codes)) + self.after_suback)
        elif kind == 3 and first & 6 and self.answers:
            self.answer(self.mid_of(body))
        elif kind == 12:
            self.write(b"\xd0\x00")

    @staticmethod
    def mid_of(body: bytes) -> int:
        """Return the packet id of a PUBLISH at QoS 1."""
        (size,) = struct.unpack_from("!H", body)
        (mid,) = struct.unpack_from("!H", body, 2 + size)
        assert isinstance(mid, int)
        return mid
