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
from dataclasses import dataclass, field
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


class TooLarge(EdgedError):
    """A message that the other end would not take."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One message as it lies on the wire: JSON text, not yet parsed, and raw bytes."""

    header: bytes
    body: bytes | bytearray = field(default=b"", repr=False)

    def parse(self) -> dict[str, Any]:
        """Return the header as a JSON object."""
        try:
            value = json.loads(self.header, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BadMessage(f"a header that is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadMessage("a header that is no JSON object")
        return value


def head(header: dict[str, Any], size: int = 0) -> bytes:
    """Return what a message begins with: all of it but its body of `size` bytes.

    Raises:
        TooLarge: the other end would take it for stray bytes.
    """
    if size > MAX_BODY:
        raise TooLarge(f"a message of {size / 1e6:.1f} MB, at most {MAX_BODY / 1e6:.1f} MB go")
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(text) > MAX_HEADER:
        raise TooLarge(f"{len(text) / 1e6:.1f} MB of text, at most {MAX_HEADER / 1e6:.1f} MB go")
    return _PREFIX.pack(MAGIC, len(text), size) + text


def pack(header: dict[str, Any], body: bytes = b"") -> bytes:
    """Return a message's bytes."""
    return head(header, len(body)) + body


class Unpacker:
    """Cuts a stream of bytes into packets.

    The bytes are given to `feed`; those of a body may also be read straight to where they belong,
    which `room` tells, and counted with `filled`: a body can be a good part of the memory.
    """

    def __init__(self, *, max_header: int = MAX_HEADER, max_body: int = MAX_BODY) -> None:
        self._max_header = max_header
        self._max_body = max_body
        #: What is not cut yet.
        self._buffer = bytearray()
        #: Of the packet whose body is on its way: its header, its body, and how much is there.
        self._header: bytes | None = None
        self._body = bytearray()
        self._there = 0

    def feed(self, data: bytes) -> None:
        """Add bytes as they came."""
        self._buffer += data

    def room(self) -> memoryview | None:
        """Return the part of a body that is still to come; None while no body is on its way."""
        if self._header is None or self._buffer:
            return None
        return memoryview(self._body)[self._there :]

    def filled(self, count: int) -> None:
        """Take note that so many bytes were read into `room`."""
        self._there += count

    def __iter__(self) -> Iterator[Packet]:
        """Yield the packets that are whole.

        Raises:
            BadMessage: the stream is not ours or claims an impossible length; nothing after it
                can be trusted.
        """
        while self._header is not None or self._begin():
            missing = len(self._body) - self._there
            if missing and self._buffer:
                data = self._cut(min(missing, len(self._buffer)))
                self._body[self._there : self._there + len(data)] = data
                self._there += len(data)
            if self._there < len(self._body):
                return
            packet = Packet(self._header or b"", self._body)
            self._header, self._body, self._there = None, bytearray(), 0
            yield packet

    @property
    def waiting(self) -> int:
        """Bytes of a packet that is not whole yet."""
        return len(self._buffer) + len(self._header or b"") + self._there

    def _begin(self) -> bool:
        """Cut off the next packet's header, if it is all there."""
        if len(self._buffer) < _PREFIX.size:
            return False
        magic, header, body = _PREFIX.unpack_from(self._buffer)
        if magic != MAGIC:
            raise BadMessage("stray bytes between messages")
        if header > self._max_header or body > self._max_body:
            raise BadMessage(f"an impossible length: {header} + {body} bytes")
        if len(self._buffer) < _PREFIX.size + header:
            return False
        self._header = self._cut(_PREFIX.size + header)[_PREFIX.size :]
        self._body, self._there = bytearray(body), 0
        return True

    def _cut(self, size: int) -> bytes:
        with memoryview(self._buffer) as view:
            data = bytes(view[:size])
        del self._buffer[:size]
        return data


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
        room = self._unpacker.room()
        try:
            if room is not None:
                count = self._socket.recv_into(room)
                self._unpacker.filled(count)
            else:
                data = self._socket.recv(_READ)
                count = len(data)
                self._unpacker.feed(data)
        except ConnectionError:
            count = 0
        if not count:
            raise EOFError("the daemon has closed the engine's socket")
        self._packets.extend(self._unpacker)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
