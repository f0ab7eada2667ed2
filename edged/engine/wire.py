"""How daemon and engine process talk: length-prefixed messages, a JSON header and raw bytes.

There is no pickle: whatever a broken engine process writes, the worst it can be is not a message.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edged.errors import EdgedError

#: Begins every message, so that stray bytes are seen at once and not taken for a length.
MAGIC = b"edg1"
_PREFIX = struct.Struct("!4sII")

#: Bytes. A header holds a whole prompt or a whole answer, a body the frames of a job.
MAX_HEADER = 64 << 20
MAX_BODY = 256 << 20
#: Bytes. What an engine process may say at once: its answer is bounded by the context.
MAX_ENGINE_HEADER = 16 << 20
MAX_ENGINE_BODY = 0

_READ = 1 << 16


class BadMessage(EdgedError):
    """What came over the socket is no message."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One message as it lies on the wire: JSON text, not yet parsed, and raw bytes."""

    header: bytes
    body: bytes = b""

    def parse(self) -> dict[str, Any]:
        """Return the header as a JSON object."""
        try:
            value = json.loads(self.header, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BadMessage(f"a header that is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadMessage("a header that is no JSON object")
        return value


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Return a message's bytes."""
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    return b"".join((_PREFIX.pack(MAGIC, len(text), len(body)), text, body))


class Unpacker:
    """Cuts a stream of bytes into packets."""

    def __init__(self, *, max_header: int = MAX_HEADER, max_body: int = MAX_BODY) -> None:
        self._max_header = max_header
        self._max_body = max_body
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add bytes as they came."""
        self._buffer += data

    def __iter__(self) -> Iterator[Packet]:
        """Yield the packets that are whole.

        Raises:
            BadMessage: the stream is not ours or claims an impossible length; nothing after it
                can be trusted.
        """
        while len(self._buffer) >= _PREFIX.size:
            magic, header, body = _PREFIX.unpack_from(self._buffer)
            if magic != MAGIC:
                raise BadMessage("stray bytes between messages")
            if header > self._max_header or body > self._max_body:
                raise BadMessage(f"an impossible length: {header} + {body} bytes")
            end = _PREFIX.size + header + body
            if len(self._buffer) < end:
                return
            view = bytes(self._buffer[_PREFIX.size : end])
            del self._buffer[:end]
            yield Packet(view[:header], view[header:])

    @property
    def waiting(self) -> int:
        """Bytes of a packet that is not whole yet."""
        return len(self._buffer)


class Pipe:
    """The engine process's end: plain blocking calls, because it has one thread and no loop."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(True)
        self._unpacker = Unpacker()
        self._packets: list[Packet] = []

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Send a message; blocks while the daemon does not read."""
        self.send_raw(pack(header, body))

    def send_raw(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._socket.sendall(data)

    def receive(self) -> Packet:
        """Wait for a message.

        Raises:
            EOFError: the daemon has closed its end, or is gone.
        """
        while not self._packets:
            self._read()
        return self._packets.pop(0)

    def poll(self) -> Packet | None:
        """Return a message if one is there; never waits.

        Raises:
            EOFError: the daemon has closed its end, or is gone.
        """
        while not self._packets and select.select([self._socket], [], [], 0)[0]:
            self._read()
        return self._packets.pop(0) if self._packets else None

    def close(self) -> None:
        """Close the socket."""
        with contextlib.suppress(OSError):
            self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError("the daemon has closed the engine's socket")
        self._unpacker.feed(data)
        self._packets.extend(self._unpacker)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
