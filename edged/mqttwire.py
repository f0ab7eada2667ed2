"""The socket under the MQTT client: connecting, reading frames, and saying why it did not work.

paho reads a packet byte by byte into memory whatever its size, and its decoder copies the rest of
the packet several times for each property: one PUBLISH with a megabyte of user properties keeps
paho 2.2 busy for minutes, at every redelivery again. So PUBLISH packets never reach paho. `Wire` is
the socket that paho is given: it cuts the stream into packets (MQTT 5 section 2.1), decodes PUBLISH
itself in linear time, lets go of bytes there is no room for while they still arrive, and passes all
other packets on.

Nothing here starts a thread or knows of asyncio; everything is called on the network thread.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

#: Of a PUBLISH whose payload is let go, this much is kept: topic name, packet id and properties.
HEAD_BYTES = 192 * 1024
#: Properties above this are not looked at; the message counts as too large. MQTT sets no limit.
MAX_PROPERTIES_BYTES = 64 * 1024
#: Of the user property `ts` one byte more is kept, so that a longer one is seen to be too long.
MAX_TS_BYTES = 64
#: Any other packet from a broker is far smaller than this.
MAX_CONTROL_BYTES = 1024 * 1024

_READ_BYTES = 64 * 1024
#: Read at most this much before anything else gets its turn.
_READ_TURN_BYTES = 256 * 1024

_PUBLISH = 0x30
_PINGRESP = b"\xd0\x00"


class ProtocolError(Exception):
    """The broker sent something that MQTT does not allow."""


class NoConnection(Exception):
    """A connection could not be made, or ended; the message is for people."""

    def __init__(self, reason: str, *, clock_suspect: bool = False) -> None:
        super().__init__(reason)
        #: A certificate is not valid yet: probably this box's clock is not set (no RTC).
        self.clock_suspect = clock_suspect


# Frames -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Publish:
    """A PUBLISH from the broker. `payload` is None if its bytes were let go."""

    topic: str
    payload: bytes | None = field(repr=False)
    size: int
    qos: int
    retain: bool
    duplicate: bool
    mid: int
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    #: The first user property of this name.
    ts: str | None = None
    #: What `Splitter` reserved for it, to be released by whoever consumes the message.
    reserved: int = 0


class Splitter:
    """Cuts a stream of bytes into MQTT packets; the one place where inbound bytes pile up.

    `reserve` is asked for room when a PUBLISH of so many bytes begins; without it the payload is
    let go as it arrives. `maximum` (bytes) is the largest packet that is kept at all: a broker that
    honours our Maximum Packet Size never sends a larger one, an MQTT 3.1.1 broker may.
    """

    def __init__(self, *, five: bool, maximum: int | None, reserve: Callable[[int], bool]) -> None:
        self._five = five
        self._maximum = maximum
        self._reserve = reserve
        self._start = bytearray()  # fixed header, while it is incomplete
        self._body = bytearray()
        self._first = 0
        self._left = 0  # bytes of the packet still to come
        self._length = 0
        self._keep = 0  # bytes of the packet to keep
        #: Reserved for the packet that is arriving.
        self.reserved = 0

    def feed(self, data: bytes) -> list[Publish | bytes]:
        """Return the packets that are complete now: PUBLISH decoded, any other as its bytes.

        Raises:
            ProtocolError: the stream is no MQTT.
        """
        done: list[Publish | bytes] = []
        view = memoryview(data)
        while view:
            if not self._left:
                view = self._begin(view, done)
                continue
            taken = view[: self._left]
            view = view[len(taken) :]
            self._left -= len(taken)
            room = self._keep - len(self._body)
            if room > 0:
                self._body += taken[:room]
            if not self._left:
                self._finish(done)
        return done

    def _begin(self, view: memoryview, done: list[Publish | bytes]) -> memoryview:
        start = self._start
        at = 0
        for byte in view:
            at += 1
            start.append(byte)
            if len(start) > 1 and not byte & 0x80:
                break
            if len(start) == 5:
                raise ProtocolError("a packet length of more than four bytes")
        else:
            return view[:0]
        self._first = start[0]
        length = 0
        for shift, byte in enumerate(start[1:]):
            length |= (byte & 0x7F) << (7 * shift)
        self._length = self._left = self._keep = length
        if self._ours():
            # Overhead so that very many very small messages are bounded as well.
            if (self._maximum is None or length <= self._maximum) and self._reserve(length + 512):
                self.reserved = length + 512
            else:
                self._keep = min(length, HEAD_BYTES)
        elif length > (self._maximum or MAX_CONTROL_BYTES):
            raise ProtocolError(f"a packet of {length} bytes")
        if not length:
            self._finish(done)
        return view[at:]

    def _ours(self) -> bool:
        """Return whether this packet is decoded here and not by paho.

        QoS 2 cannot come from our own subscriptions, only from a session that somebody else left
        under our client id: paho knows its four-way handshake.
        """
        return self._first & 0xF0 == _PUBLISH and self._first & 0x06 != 0x04

    def _finish(self, done: list[Publish | bytes]) -> None:
        body, self._body = self._body, bytearray()
        start, self._start = self._start, bytearray()
        if not self._ours():
            done.append(bytes(start + body))
            return
        message = decode_publish(
            self._first, body, five=self._five, length=self._length, whole=bool(self.reserved)
        )
        message.reserved, self.reserved = self.reserved, 0
        done.append(message)


def decode_publish(
    first: int, body: bytes | bytearray, *, five: bool, length: int, whole: bool
) -> Publish:
    """Decode a PUBLISH (MQTT 5 section 3.3) from its first byte and what follows the length.

    `length` is the packet's remaining length; `body` may be only the head of it, then `whole` is
    false and so it is when the payload is to be let go.

    Raises:
        ProtocolError: the packet is malformed.
    """
    qos = (first >> 1) & 3
    if qos == 3:
        raise ProtocolError("a PUBLISH with QoS 3")
    try:
        (topic_bytes,) = struct.unpack_from("!H", body)
        at = 2 + topic_bytes
        name = bytes(body[2:at])
        mid = 0
        if qos:
            (mid,) = struct.unpack_from("!H", body, at)
            at += 2
        end = at
        if five:
            size, at = _variable(body, at)
            end = at + size
    except (struct.error, IndexError):
        raise ProtocolError("a malformed PUBLISH") from None
    if end > length or len(name) < topic_bytes or (qos and not mid):
        raise ProtocolError("a malformed PUBLISH")
    message = Publish(
        # A broker checks this (MQTT-1.5.4-1); if not, the name is for reading and fits no topic.
        topic=name.decode(errors="replace"),
        payload=None,
        size=length - end,
        qos=qos,
        retain=bool(first & 1),
        duplicate=bool(first & 8),
        mid=mid,
    )
    if end - at > MAX_PROPERTIES_BYTES:
        message.size = length
        return message
    if end > at:
        _properties(body, at, end, message)
    if whole:
        message.payload = bytes(memoryview(body)[end:])
    return message


def _properties(body: bytes | bytearray, at: int, end: int, message: Publish) -> None:
    """Read the properties of a PUBLISH (MQTT 5 section 3.3.2.3) that edged has a use for."""
    try:
        while at < end:
            name = body[at]
            at += 1
            if name == 0x01:  # payload format indicator
                at += 1
            elif name == 0x02:
                (message.expiry_s,) = struct.unpack_from("!I", body, at)
                at += 4
            elif name in {0x03, 0x08, 0x09, 0x26}:  # also content type, user property
                value, at = _binary(body, at)
                if name == 0x08:
                    # What is no UTF-8 must not become another, valid name: it stays invalid.
                    message.response_topic = value.decode(errors="surrogateescape")
                elif name == 0x09:
                    message.correlation = value
                elif name == 0x26:
                    text, at = _binary(body, at)
                    if value == b"ts" and message.ts is None:
                        message.ts = text[: MAX_TS_BYTES + 1].decode(errors="replace")
            elif name == 0x0B:  # subscription identifier
                _, at = _variable(body, at)
            elif name == 0x23:  # topic alias, which we do not allow
                at += 2
            else:
                raise ProtocolError(f"a PUBLISH with the unknown property {name}")
    except (struct.error, IndexError):
        raise ProtocolError("a PUBLISH with malformed properties") from None
    if at != end:
        raise ProtocolError("a PUBLISH with malformed properties")


def _binary(body: bytes | bytearray, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("!H", body, at)
    value = bytes(body[at + 2 : at + 2 + size])
    if len(value) < size:
        raise IndexError
    return value, at + 2 + size


def _variable(body: bytes | bytearray, at: int) -> tuple[int, int]:
    """Return a variable byte integer (MQTT 5 section 1.5.5) and the position after it."""
    value = 0
    for shift in range(4):
        byte = body[at + shift]
        value |= (byte & 0x7F) << (7 * shift)
        if not byte & 0x80:
            return value, at + shift + 1
    raise IndexError


# Connecting -------------------------------------------------------------------------------------


class Wait(Protocol):
    """Waits until a socket is readable or writable; see `dial`."""

    def __call__(self, sock: socket.socket, mask: int, until: float, doing: str) -> bool:
        """Return whether it is before `until` (monotonic). May raise to give up early."""
        ...


def dial(
    host: str, port: int, tls: ssl.SSLContext | None, *, until: float, wait: Wait
) -> socket.socket:
    """Return a connected, non-blocking socket, its TLS handshake done.

    `wait` is called for everything that takes time, but not for the name lookup, which nothing can
    interrupt. `until` (monotonic) bounds the rest.

    Raises:
        NoConnection: with the reason.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        # `from None` here and below: a reason is for people, the chain would only repeat it.
        if error.errno == socket.EAI_AGAIN:
            raise NoConnection("host name lookup failed (is there a network?)") from None
        raise NoConnection("host name not found") from None
    except (UnicodeError, ValueError):  # "a..b" fails in the idna codec, a NUL in getaddrinfo
        raise NoConnection("bad host name") from None
    problem: Exception | None = None
    for index, (family, kind, proto, _, address) in enumerate(addresses):
        now = time.monotonic()
        share = now + max(1.0, (until - now) / (len(addresses) - index))
        try:
            sock = _connected(family, kind, proto, address, until=share, wait=wait)
        except OSError as error:
            problem = error
            continue
        if tls is None:
            return sock
        return _handshaken(sock, host, tls, until=until, wait=wait)
    raise explain(problem or OSError(errno.EHOSTUNREACH, "no address")) from None


def _connected(
    family: int, kind: int, proto: int, address: object, *, until: float, wait: Wait
) -> socket.socket:
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        failed = sock.connect_ex(address)  # type: ignore[arg-type]  # as getaddrinfo gave it
        if failed == errno.EINPROGRESS:
            if not wait(sock, select.POLLOUT, until, "connecting"):
                raise TimeoutError
            failed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed:
            raise OSError(failed, "connect")
        # Packets are small and each is written when it is ready: Nagle would hold tokens back.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


def _handshaken(
    sock: socket.socket, host: str, tls: ssl.SSLContext, *, until: float, wait: Wait
) -> ssl.SSLSocket:
    try:
        secured = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    except BaseException as error:
        sock.close()
        if isinstance(error, (OSError, ValueError)):
            raise explain(error) from None
        raise
    try:
        while True:
            try:
                secured.do_handshake()
            except ssl.SSLWantReadError:
                mask = select.POLLIN
            except ssl.SSLWantWriteError:
                mask = select.POLLOUT
            else:
                return secured
            if not wait(secured, mask, until, "the TLS handshake"):
                raise NoConnection("no answer to the TLS handshake")
    except BaseException as error:
        secured.close()
        if isinstance(error, OSError):
            raise explain(error) from None
        raise


def tls_context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    """Return a context that checks the broker's certificate and name, TLS 1.2 or later.

    Raises:
        NoConnection: a file cannot be read or is not what it should be.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if cert is not None:
            # Without a password callback OpenSSL asks on the terminal.
            context.load_cert_chain(cert, key, password=lambda: "")
    except ssl.SSLError:
        raise NoConnection("the CA, certificate or key file is not usable") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise NoConnection(f"cannot read the CA, certificate or key file{where}") from None
    return context


#: OpenSSL's X509_V_ERR_* numbers (openssl-verification-options(1)).
_CERTIFICATE = {
    9: "certificate not yet valid (is the clock right?)",
    10: "certificate expired",
    18: "certificate not trusted (self-signed)",
    19: "certificate not trusted (its CA is not ours)",
    20: "certificate not trusted (its CA is not ours)",
    21: "certificate not trusted (its CA is not ours)",
    62: "certificate is for another host name",
    64: "certificate is for another address",
}


def explain(error: Exception) -> NoConnection:
    """Return what a failed socket operation means, in words for people."""
    if isinstance(error, NoConnection):
        return error
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = _CERTIFICATE.get(error.verify_code, f"certificate refused: {error.verify_message}")
        return NoConnection(reason, clock_suspect=error.verify_code == 9)
    if isinstance(error, ssl.SSLEOFError):
        return NoConnection("the broker closed the connection during TLS")
    if isinstance(error, ssl.SSLError):
        code = error.reason or "unknown error"
        if code == "WRONG_VERSION_NUMBER":
            return NoConnection("the broker does not speak TLS on this port")
        if "CERTIFICATE_REQUIRED" in code:
            return NoConnection("the broker wants a client certificate")
        return NoConnection(f"TLS failed: {code.lower().replace('_', ' ')}")
    if isinstance(error, ConnectionRefusedError):
        return NoConnection("connection refused")
    if isinstance(error, (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)):
        return NoConnection("connection reset")
    if isinstance(error, TimeoutError):
        return NoConnection("no answer from the broker's address")
    if isinstance(error, OSError) and error.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}:
        return NoConnection("network unreachable")
    if isinstance(error, OSError) and error.errno is not None:
        return NoConnection(f"network error {errno.errorcode.get(error.errno, error.errno)}")
    return NoConnection(f"{type(error).__name__}")


# The socket that paho sees ----------------------------------------------------------------------


class Wire:
    """A connected socket that keeps PUBLISH packets from paho; paho's `SocketLike`.

    The owner calls `fill` when the socket is readable, handles what it returns in order, and hands
    packets that are not PUBLISH to paho: `pass_on`, then `client.loop_read()` until `passed`.
    """

    def __init__(self, sock: socket.socket, splitter: Splitter) -> None:
        self._sock = sock
        self._splitter = splitter
        self._for_paho = bytearray()
        self._closed = False
        self._last_passed = time.monotonic()
        #: Whether paho will read an end of file: the peer closed, or `failure` says what happened.
        self.ended = False
        self.failure: NoConnection | None = None
        #: There is more to read at once: the turn was over before the socket was drained. Bytes
        #: that TLS has decrypted already do not make a socket readable, so this counts.
        self.more = False
        self._read_wants_write = False
        self._write_wants_read = False

    @property
    def reserved(self) -> int:
        """Bytes reserved for a PUBLISH that has not fully arrived."""
        return self._splitter.reserved

    def mask(self, *, read: bool, write: bool) -> int:
        """Return what to poll for, TLS's own needs included."""
        mask = 0
        if read or self._write_wants_read:
            mask |= select.POLLIN
        if (write and not self._write_wants_read) or (read and self._read_wants_write):
            mask |= select.POLLOUT
        return mask

    def fill(self) -> list[Publish | bytes]:
        """Read what there is and return the packets that are complete."""
        packets: list[Publish | bytes] = []
        self.more = self._read_wants_write = self._write_wants_read = False
        budget = _READ_TURN_BYTES
        try:
            while budget > 0:
                data = self._sock.recv(_READ_BYTES)
                if not data:
                    self.ended = True
                    return packets
                budget -= len(data)
                packets += self._splitter.feed(data)
        except (BlockingIOError, ssl.SSLWantReadError):
            return packets
        except ssl.SSLWantWriteError:
            self._read_wants_write = True
            return packets
        except ProtocolError as error:
            self.failure = NoConnection(f"the broker sent {error}")
            self.ended = True
            return packets
        except OSError as error:
            self.failure = explain(error)
            self.ended = True
            return packets
        self.more = True
        return packets

    def pass_on(self, packet: bytes) -> None:
        """Give paho a packet to read."""
        self._for_paho += packet
        self._last_passed = time.monotonic()

    def reassure(self) -> bool:
        """Tell paho that the broker is alive if it has not been told for a second.

        paho measures the link by what it reads itself, and it does not see PUBLISH packets. While
        a large one trickles in, the answer to a PINGREQ is stuck behind it.
        """
        if time.monotonic() - self._last_passed < 1.0:
            return False
        self.pass_on(_PINGRESP)
        return True

    @property
    def passed(self) -> bool:
        """Whether paho has read all that was passed on."""
        return not self._for_paho

    def finish(self, *, linger_s: float) -> None:
        """Close the socket; with `linger_s` above 0 only after the broker has read everything.

        Closing while there is unread input resets the connection, and then the broker may never
        read the DISCONNECT before it: it would publish the will of a client that said goodbye.
        """
        self._closed = True
        if linger_s > 0 and not self.ended:
            until = time.monotonic() + linger_s
            poller = select.poll()
            poller.register(self._sock, select.POLLIN)
            try:
                self._sock.shutdown(socket.SHUT_WR)
                while (left := until - time.monotonic()) > 0 and poller.poll(left * 1000):
                    # Below TLS, so that nothing is decrypted only to be thrown away.
                    if not socket.socket.recv(self._sock, _READ_BYTES):
                        break
            except OSError:
                pass  # it is gone: so be it
        self._sock.close()

    # What paho calls.

    def recv(self, buffer_size: int) -> bytes:
        """Return bytes that were passed on; an end of file once the connection has ended."""
        if self._for_paho:
            data = bytes(self._for_paho[:buffer_size])
            del self._for_paho[:buffer_size]
            return data
        if self.ended or self._closed:
            return b""
        raise BlockingIOError

    def send(self, buffer: bytes | bytearray) -> int:
        """Write to the broker."""
        if self._closed:
            raise ConnectionResetError
        try:
            return self._sock.send(buffer)
        except ssl.SSLWantReadError:
            self._write_wants_read = True
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            raise BlockingIOError from None
        except BlockingIOError:
            raise
        except OSError as error:
            self.failure = self.failure or explain(error)
            raise

    def close(self) -> None:
        """Note that paho is done with it; `finish` closes."""
        self._closed = True

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:  # noqa: FBT001  # paho's call
        """Do nothing: the socket never blocks."""

    def pending(self) -> int:
        """Return how many bytes can be read at once."""
        return len(self._for_paho)
