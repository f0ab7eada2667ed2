"""Many submitters in one process, each with a connection of its own, as cheap as Python can be.

A client library would be the bottleneck of a machine with two cores, so this speaks just enough
MQTT 3.1.1 over plain sockets: every submitter publishes a job at QoS 1, waits for its `accepted`
on a subscription at QoS 1, acknowledges it, and publishes the next. Lines of JSON on standard
input and output tell it what to do, and what became of it.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass

from tests.bench.child import Child

#: What a job asks: a prompt as long as one that a program would write.
_PROMPT = "Say in one sentence what the sensors of the north gate report, and whether it is well. "
_ENDS_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to do."""

    port: int
    root: str
    submitters: int
    #: Jobs a submitter has under way at once.
    window: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of it. Times by `time.perf_counter`, which all processes share."""

    began: float
    ended: float
    published: int
    accepted: int
    #: Events that were no `accepted`, by their beginning.
    others: dict[str, int]
    #: Seconds from publish to `accepted`, sorted.
    latencies: list[float]
    cpu_s: float


class Flood(Child):
    """The process, as the bench sees it."""

    def __init__(self, order: Order) -> None:
        super().__init__("tests.bench.flood", "the submitters")
        self._order = order

    def greet(self) -> None:
        """Wait until all are connected and subscribed."""
        self.ask(asdict(self._order))

    def run(self) -> Outcome:
        """Let it loose; return when the last job that was published is accepted."""
        return Outcome(**self.ask({}))


# In the process ---------------------------------------------------------------------------------


def packet(first: int, body: bytes) -> bytes:
    """Return an MQTT packet, by its first byte."""
    length, head = len(body), bytearray([first])
    while True:
        length, byte = divmod(length, 128)
        head.append(byte | 0x80 if length else byte)
        if not length:
            return bytes(head) + body


def text(value: str) -> bytes:
    """Return a text as MQTT writes it."""
    return struct.pack("!H", len(value)) + value.encode()


class _Submitter:
    def __init__(self, order: Order, number: int) -> None:
        name = f"s{number}"
        self.socket = socket.create_connection(("127.0.0.1", order.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""
        self.published: dict[bytes, float] = {}
        self._count = 0
        # everything but id and packet id is encoded once
        self._id = f"{name}-".encode()
        blank = self._id + b"%08d" % 0
        body = json.dumps({"id": blank.decode(), "prompt": _PROMPT * 2, "max_tokens": 64}).encode()
        topic = text(f"{order.root}/request/text/{name}")
        whole = packet(0x32, topic + b"\0\1" + body)
        at = whole.index(topic) + len(topic)
        self._before = whole[:at]
        middle, self._after = whole[at + 2 :].split(blank)
        self._middle = middle + self._id
        self._send(packet(0x10, text("MQTT") + b"\x04\x02" + struct.pack("!H", 600) + text(name)))
        self._expect(0x20)
        topics = text(f"{order.root}/response/{name}/+")
        self._send(packet(0x82, b"\0\1" + topics + b"\1"))
        self._expect(0x90)
        self.socket.setblocking(False)

    def _send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def _expect(self, kind: int) -> None:
        while not self.buffer or len(self.buffer) < 2 + self.buffer[1]:
            data = self.socket.recv(4096)
            if not data:
                raise ConnectionError("the broker hung up")
            self.buffer += data
        if self.buffer[0] != kind:
            raise ConnectionError(f"packet {self.buffer[0]:#x}, expected {kind:#x}")
        self.buffer = self.buffer[2 + self.buffer[1] :]

    def publish(self) -> bytes:
        """Return the packet of the next job, and note the time."""
        self._count += 1
        digits = b"%08d" % self._count
        mid = struct.pack("!H", self._count % 0xFFFF + 1)
        self.published[self._id + digits] = time.perf_counter()
        return b"".join((self._before, mid, self._middle, digits, self._after))


def _flood(order: Order) -> Outcome | None:
    """Connect all, wait for the word, publish for a while, wait for what is under way."""
    submitters = [_Submitter(order, number) for number in range(order.submitters)]
    print("{}", flush=True)
    if not sys.stdin.readline():
        return None
    poller = select.epoll()
    by_descriptor = {}
    for each in submitters:
        by_descriptor[each.socket.fileno()] = each
        poller.register(each.socket, select.EPOLLIN)
    latencies: list[float] = []
    others: dict[str, int] = {}
    cpu, began = time.process_time(), time.perf_counter()
    until = began + order.seconds
    published = 0
    for each in submitters:
        each.socket.sendall(b"".join(each.publish() for _ in range(order.window)))
        published += order.window
    ended = began
    while len(latencies) < published and time.perf_counter() < until + _ENDS_WITHIN_S:
        for descriptor, _ in poller.poll(1.0):
            submitter = by_descriptor[descriptor]
            bodies, acks = _read(submitter)
            now = time.perf_counter()
            out = acks
            for body in bodies:
                name = _accepted(body)
                since = submitter.published.pop(name, None) if name else None
                if since is None:
                    kind = body[:80].decode(errors="replace")
                    others[kind] = others.get(kind, 0) + 1
                    continue
                latencies.append(now - since)
                ended = now
                if now < until:
                    out.append(submitter.publish())
                    published += 1
            if out:
                submitter.socket.sendall(b"".join(out))
    latencies.sort()
    return Outcome(
        began=began,
        ended=ended,
        published=published,
        accepted=len(latencies),
        others=dict(list(others.items())[:20]),
        latencies=latencies,
        cpu_s=time.process_time() - cpu,
    )


def _read(submitter: _Submitter) -> tuple[list[bytes], list[bytes]]:
    """Return the payloads that came, and the acks they are owed."""
    data = submitter.buffer + submitter.socket.recv(65536)
    bodies, acks = [], []
    at, size = 0, len(data)
    while at + 2 <= size:
        length, shift, head = 0, 0, at + 1
        while head < size:
            byte = data[head]
            head += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        else:
            break
        end = head + length
        if end > size:
            break
        if data[at] & 0xF0 == 0x30:
            (topic,) = struct.unpack_from("!H", data, head)
            body = head + 2 + topic
            if data[at] & 0x06:
                acks.append(b"\x40\x02" + data[body : body + 2])
                body += 2
            bodies.append(data[body:end])
        at = end
    submitter.buffer = data[at:]
    return bodies, acks


def _accepted(body: bytes) -> bytes | None:
    """Return the id of an `accepted` event; None if it is something else."""
    if b'"type":"accepted"' not in body:
        return None
    at = body.index(b'"id":"') + 6
    return body[at : body.index(b'"', at)]


def main() -> None:
    """Serve the parent."""
    outcome = _flood(Order(**json.loads(sys.stdin.readline())))
    if outcome is not None:
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
