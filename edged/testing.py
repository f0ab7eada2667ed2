"""In-memory twins of the outside things, for our tests and for tests of programs around edged.

`MemoryBroker` and `MemoryBus` behave as a broker and `edged.mqtt.MqttBus` do, without a network;
`ManualClock` is a clock that a test moves. `faulty_command` runs an engine process that breaks as
its prompts say (`EngineHost(order, command=faulty_command())`, see `edged.engine.faulty`). The same
contract suite runs against twin and original.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import structlog

from edged.engine.faulty import FaultBackend, faulty_command
from edged.errors import BadPublish, ConnectionLost
from edged.jobs import Stamp
from edged.mqttconfig import Connection
from edged.ports import (
    BusListener,
    BusState,
    Incoming,
    Outgoing,
    PubAck,
    Receipt,
    Session,
    Sink,
)
from edged.topics import validate_publish

__all__ = [
    "FaultBackend",
    "ManualClock",
    "MemoryBroker",
    "MemoryBus",
    "Published",
    "faulty_command",
    "matches",
]

log = structlog.get_logger()

# Clock ------------------------------------------------------------------------------------------


class ManualClock:
    """A clock that stands still until it is moved; see `ports.Clock`.

    Args:
        wall: Unix seconds at the start.
        synced: Whether the wall clock is right, as far as the box knows.
    """

    def __init__(self, *, wall: float = 1_800_000_000.0, synced: bool = True) -> None:
        self.wall = wall
        self.synced = synced
        self._boot_id = str(uuid.uuid4())
        self._boottime = 100.0
        self._monotonic = 1000.0
        self._started = self._boottime
        self._ran_before = 0.0

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start."""
        return self._monotonic

    def stamp(self) -> Stamp:
        """Return this moment in every clock there is."""
        return Stamp(
            boot_id=self._boot_id,
            boottime=self._boottime,
            wall=self.wall,
            synced=self.synced,
            ran=self._ran_before + (self._boottime - self._started),
        )

    def resume(self, ran: float) -> None:
        """Tell how many seconds edged had run on this journal before this start."""
        self._ran_before = ran

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        if seconds < 0:
            raise ValueError("time does not go back; jump_wall does")
        self._monotonic += seconds
        self._boottime += seconds
        self.wall += seconds

    def jump_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back, as a first synchronisation does."""
        self.wall += seconds

    def restart(self) -> None:
        """Begin a new process in the same boot: what it ran before must be resumed."""
        self._started = self._boottime
        self._ran_before = 0.0

    def reboot(self, *, off_s: float = 0.0, wall: float | None = None, synced: bool = True) -> None:
        """Begin a new boot after `off_s` seconds without power.

        Without `wall` the wall clock has kept running; with it, it starts there (no RTC: 1970).
        """
        self.wall = self.wall + off_s if wall is None else wall
        self.synced = synced
        self._boot_id = str(uuid.uuid4())
        self._boottime = 20.0
        self._monotonic = 20.0
        self.restart()


# Broker -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A message that the broker took, as an observer of everything sees it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool = False
    correlation: bytes | None = None
    response_topic: str | None = None
    expiry_s: int | None = None
    #: The user property `ts`.
    ts: str | None = None
    #: Who published it; None: the test itself. A will carries its owner's id.
    client_id: str | None = None


@dataclass(slots=True)
class _Kept:
    """A client's session."""

    filters: dict[str, int] = field(default_factory=dict)
    #: QoS 1 messages not yet sent, then those sent and not acknowledged, by packet id.
    waiting: deque[Published] = field(default_factory=deque)
    unacked: dict[int, Published] = field(default_factory=dict)
    mids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))
    bus: MemoryBus | None = None


class MemoryBroker:
    """A broker in this process: sessions, retained messages, wills, redelivery, its own limits.

    Args:
        receive_maximum: Of the broker, told at connect, as are the other limits.
    """

    def __init__(
        self,
        *,
        receive_maximum: int = 65535,
        maximum_packet_size: int | None = None,
        maximum_qos: int = 1,
        retain_available: bool = True,
    ) -> None:
        self.limits = Session(
            generation=0,
            session_present=False,
            receive_maximum=receive_maximum,
            maximum_packet_size=maximum_packet_size,
            maximum_qos=maximum_qos,
            retain_available=retain_available,
        )
        #: Everything that was taken, in order.
        self.published: list[Published] = []
        self.retained: dict[str, Published] = {}
        #: A reason while connections are refused.
        self.unreachable: str | None = None
        #: While true, publishes are taken and not answered.
        self.mute = False
        self._refused: dict[str, str] = {}
        self._refused_filters: set[str] = set()
        self._sessions: dict[str, _Kept] = {}
        self._news = asyncio.Condition()
        self._told: set[asyncio.Task[None]] = set()
        self._unanswered: list[tuple[MemoryBus, asyncio.Future[PubAck]]] = []

    # What a test does with it.

    def publish(
        self,
        topic: str,
        payload: bytes | str = b"",
        *,
        qos: int = 1,
        retain: bool = False,
        correlation: bytes | None = None,
        response_topic: str | None = None,
        expiry_s: int | None = None,
        ts: str | None = None,
    ) -> None:
        """Publish as some client would."""
        self._take(
            Published(
                topic=topic,
                payload=payload.encode() if isinstance(payload, str) else payload,
                qos=qos,
                retain=retain,
                correlation=correlation,
                response_topic=response_topic,
                expiry_s=expiry_s,
                ts=ts,
            )
        )

    def on(self, pattern: str) -> list[Published]:
        """Return what was published on topics that match a filter, in order."""
        return [message for message in self.published if matches(pattern, message.topic)]

    async def wait_for(
        self, pattern: str, count: int = 1, timeout_s: float = 10.0
    ) -> list[Published]:
        """Wait until so many messages were published on a filter; return all there are."""
        async with asyncio.timeout(timeout_s), self._news:
            await self._news.wait_for(lambda: len(self.on(pattern)) >= count)
        return self.on(pattern)

    def drop_connection(
        self, client_id: str | None = None, reason: str = "the broker closed the connection"
    ) -> None:
        """Cut one client's connection, or all; their wills are published."""
        for name, session in list(self._sessions.items()):
            if client_id in {None, name} and session.bus is not None:
                session.bus.cut(reason)

    def restart(self, *, persistent: bool = True) -> None:
        """End all connections without wills; without persistence all state is gone, too."""
        for session in self._sessions.values():
            if session.bus is not None:
                bus, session.bus = session.bus, None
                bus.cut("the broker closed the connection")
        if not persistent:
            self._sessions.clear()
            self.retained.clear()

    def refuse_publishes(self, pattern: str, reason: str = "not authorized") -> None:
        """Answer publishes on a filter with a failure and do not take them; `allow` ends it."""
        self._refused[pattern] = reason

    def allow(self, pattern: str) -> None:
        """Take publishes on this filter again."""
        self._refused.pop(pattern, None)

    def refuse_subscriptions(self, pattern: str) -> None:
        """Refuse this filter from the next subscription on."""
        self._refused_filters.add(pattern)

    def answer(self) -> None:
        """Answer what came while `mute`, and everything from now on."""
        self.mute = False
        pending, self._unanswered = self._unanswered, []
        for bus, future in pending:
            bus.answered(future, PubAck(failed=False, reason="success"))

    # What a bus does with it.

    def connect(self, bus: MemoryBus) -> Session:
        """Open a connection.

        Raises:
            ConnectionLost: it is refused.
        """
        if self.unreachable is not None:
            raise ConnectionLost(self.unreachable)
        connection = bus.connection
        session = self._sessions.get(connection.client_id)
        if session is not None and session.bus is not None:
            old, session.bus = session.bus, None
            old.cut("the broker ended the connection: client id taken over", taken_over=True)
        if connection.clean_start:
            session = None
        present = session is not None
        if session is None:
            session = self._sessions[connection.client_id] = _Kept()
        session.bus = bus
        return replace(self.limits, session_present=present)

    def subscribe(self, bus: MemoryBus) -> tuple[str, ...]:
        """Take the subscriptions of a connection and return those that are refused."""
        session = self._sessions[bus.connection.client_id]
        refused = []
        for pattern, qos in bus.connection.subscriptions:
            if pattern in self._refused_filters:
                refused.append(pattern)
                continue
            session.filters[pattern] = qos
            if bus.connection.protocol == "3.1.1":  # it has no retain handling
                for message in list(self.retained.values()):
                    if matches(pattern, message.topic):
                        self._give(session, replace(message, qos=min(qos, message.qos)))
        return tuple(refused)

    def redeliver(self, bus: MemoryBus) -> None:
        """Send what a kept session has not acknowledged, then what waits for it."""
        session = self._sessions[bus.connection.client_id]
        for mid, message in session.unacked.items():
            bus.arrived(message, mid, duplicate=True)
        self._fill(session)

    def receive(
        self, bus: MemoryBus, message: Outgoing, future: asyncio.Future[PubAck] | None
    ) -> None:
        """Take a publish of a bus and answer it."""
        for pattern, reason in self._refused.items():
            if matches(pattern, message.topic):
                if future is not None:
                    # A PUBACK of 3.1.1 cannot say no.
                    five = bus.connection.protocol == "5"
                    bus.answered(future, PubAck(five, reason if five else "success"))
                return
        reached = self._take(_published(message, bus.connection.client_id))
        if future is None:
            return
        if self.mute:
            self._unanswered.append((bus, future))
            return
        quiet = not reached and bus.connection.protocol == "5"
        reason = "no matching subscribers" if quiet else "success"
        bus.answered(future, PubAck(failed=False, reason=reason))

    def acknowledge(self, bus: MemoryBus, mid: int) -> None:
        """Take a PUBACK."""
        session = self._sessions.get(bus.connection.client_id)
        if session is not None and session.bus is bus and mid in session.unacked:
            del session.unacked[mid]
            self._fill(session)

    def leave(self, bus: MemoryBus, *, clean: bool) -> None:
        """End a connection; its will is published unless it is clean."""
        session = self._sessions.get(bus.connection.client_id)
        if session is None or session.bus is not bus:
            return
        session.bus = None
        self._unanswered = [(b, f) for b, f in self._unanswered if b is not bus]
        if bus.connection.protocol == "5" and bus.connection.session_expiry_s == 0:
            del self._sessions[bus.connection.client_id]
        if not clean and bus.will is not None:
            self._take(_published(bus.will, bus.connection.client_id))

    def _take(self, message: Published) -> bool:
        self.published.append(message)
        if message.retain:
            if message.payload:
                self.retained[message.topic] = message
            else:
                self.retained.pop(message.topic, None)
        reached = False
        for session in list(self._sessions.values()):
            granted = [q for f, q in session.filters.items() if matches(f, message.topic)]
            if granted:
                reached = True
                five = session.bus is None or session.bus.connection.protocol == "5"
                qos = min(max(granted), message.qos)
                # MQTT 5 retain-as-published; 3.1.1 shows the flag on replayed messages only.
                self._give(session, replace(message, qos=qos, retain=message.retain and five))
        with suppress(RuntimeError):  # called outside of a loop: nobody waits
            task = asyncio.get_running_loop().create_task(self._tell())
            self._told.add(task)
            task.add_done_callback(self._told.discard)
        return reached

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    def _give(self, session: _Kept, message: Published) -> None:
        connection = session.bus.connection if session.bus else None
        if connection is not None and connection.protocol == "5":
            limit = connection.maximum_packet_size
            if limit is not None and len(message.payload) > limit:
                return  # MQTT-3.1.2-25: dropped, as if it had been sent
        if message.qos:
            session.waiting.append(message)
            self._fill(session)
        elif session.bus is not None:
            session.bus.arrived(message, 0, duplicate=False)

    def _fill(self, session: _Kept) -> None:
        bus = session.bus
        while bus and session.waiting and len(session.unacked) < bus.connection.receive_maximum:
            message = session.waiting.popleft()
            mid = next(m for m in session.mids if m not in session.unacked)
            session.unacked[mid] = message
            bus.arrived(message, mid, duplicate=False)


def _published(message: Outgoing, client_id: str) -> Published:
    return Published(
        topic=message.topic,
        payload=message.payload,
        qos=message.qos,
        retain=message.retain,
        correlation=message.correlation,
        expiry_s=message.expiry_s,
        client_id=client_id,
    )


def matches(pattern: str, topic: str) -> bool:
    """Return whether a topic matches a filter (MQTT 5 section 4.7)."""
    wanted, levels = pattern.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in {"+", "#"}:
        return False
    for position, level in enumerate(wanted):
        if level == "#":
            return True
        if position == len(levels) or level not in {"+", levels[position]}:
            return False
    return len(wanted) == len(levels)


class MemoryBus:
    """A connection to a `MemoryBroker`; see `ports.Bus` and `mqtt.MqttBus`.

    Of the `Connection` it heeds the client id, the session's settings, the subscriptions, the will
    and the limits on what comes in. It tries again at once. `sink` is called on the event loop.
    """

    def __init__(
        self, broker: MemoryBroker, connection: Connection, *, sink: Sink | None = None
    ) -> None:
        self.broker = broker
        self.connection = connection
        self._sink = sink
        self.will: Outgoing | None = None
        #: Let `offer` refuse, as on a slow link.
        self.congested = False
        #: What `stuck` says.
        self.stuck_reason: str | None = None
        self._generations = itertools.count(1)
        self._listener: BusListener | None = None
        self._session: Session | None = None
        self._state = BusState(connected=False, reconnects=0, last_reason=None)
        self._connects = self._takeovers = 0
        self._events: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._answers: set[asyncio.Future[PubAck]] = set()
        self._held = 0  # bytes of messages handed over and not consumed or acknowledged
        self._unacked: dict[int, int] = {}
        self._generation = 0
        self._linked = False
        self._closing = False
        self._ended = asyncio.Event()
        self._ended.set()

    @property
    def state(self) -> BusState:
        """How the connection is."""
        return self._state

    @property
    def session(self) -> Session | None:
        """The live connection's limits; None while there is none."""
        return self._session

    async def run(self, listener: BusListener) -> None:
        """Connect, and connect again whenever the connection goes, until `close`."""
        if self._listener is not None:
            raise RuntimeError("a bus is run once")
        self._listener = listener
        self._ended.clear()
        try:
            while not self._closing:
                self._connect()
                while self._linked or not self._events.empty():
                    self._handle(await self._events.get())
                if not self._closing:
                    await asyncio.sleep(0.5 if self._state.stolen else 0.005)
        finally:
            if self._linked:
                self.cut("closed")
            while not self._events.empty():
                self._handle(self._events.get_nowait())
            self._ended.set()

    def _connect(self) -> None:
        try:
            limits = self.broker.connect(self)
        except ConnectionLost as error:
            reason = error.message
            self._events.put_nowait(lambda: self._disconnected(reason))
            return
        self._generation = next(self._generations)
        session = replace(limits, generation=self._generation)
        self._linked = True
        self.will = self.connection.will() if self.connection.will else None
        self._events.put_nowait(lambda: self._connected(session))
        self.broker.redeliver(self)
        refused = self.broker.subscribe(self)
        assert self._listener is not None  # noqa: S101  # set by `run`
        listener = self._listener
        self._events.put_nowait(lambda: listener.on_subscribed(refused))

    def publish(self, message: Outgoing) -> asyncio.Future[PubAck]:
        """Send at QoS 1; see `ports.Bus.publish`."""
        future: asyncio.Future[PubAck] = asyncio.get_running_loop().create_future()
        try:
            message = self._checked(replace(message, qos=1))
            if self._session is None:
                raise ConnectionLost("not connected")
        except (BadPublish, ConnectionLost) as error:
            future.set_exception(error)
            future.exception()
            return future
        self._answers.add(future)
        if self._linked:
            self.broker.receive(self, message, future)
        return future

    def offer(self, message: Outgoing) -> bool:
        """Send at QoS 0 if the connection is up and not congested; return whether it was sent."""
        try:
            message = self._checked(replace(message, qos=0))
        except BadPublish:
            return False
        if self._session is None or self.congested:
            return False
        if self._linked:
            self.broker.receive(self, message, None)
        return True

    def _checked(self, message: Outgoing) -> Outgoing:
        session = self._session
        limit = session.maximum_packet_size if session else None
        validate_publish(message.topic, len(message.payload), message.correlation, limit)
        if session is not None and message.qos > session.maximum_qos:
            raise BadPublish("the broker takes QoS 0 only, edged needs QoS 1")
        if session is not None and not session.retain_available:
            message = replace(message, retain=False)
        if self.connection.protocol == "3.1.1":
            message = replace(message, correlation=None, expiry_s=None)
        return message

    def ack(self, receipt: Receipt) -> None:
        """Acknowledge a QoS 1 message; nothing happens if its connection is gone."""
        if self._session is None or receipt.generation != self._session.generation:
            return
        size = self._unacked.pop(receipt.mid, None)
        if size is None:
            return
        self._held -= size
        if self._linked and self._generation == receipt.generation:
            self.broker.acknowledge(self, receipt.mid)

    def stuck(self) -> str | None:
        """Return `stuck_reason`."""
        return self.stuck_reason

    async def close(self, farewell: Outgoing | None = None, timeout_s: float = 5.0) -> None:
        """Publish `farewell` at QoS 1, wait for its answer, disconnect cleanly, end `run`."""
        self._closing = True
        clean = True
        if farewell is not None:
            try:
                async with asyncio.timeout(timeout_s):
                    clean = not (await self.publish(farewell)).failed
            except (TimeoutError, BadPublish, ConnectionLost):
                clean = False
        if self._linked:
            self.cut("closed", clean=clean)
        await self._ended.wait()

    # What the broker calls.

    def cut(self, reason: str, *, clean: bool = False, taken_over: bool = False) -> None:
        """End the connection."""
        self._linked = False
        if taken_over:
            self._takeovers += 1
        self.broker.leave(self, clean=clean)
        self._events.put_nowait(lambda: self._disconnected(reason))

    def arrived(self, message: Published, mid: int, *, duplicate: bool) -> None:
        """Take a message."""
        size = len(message.payload)
        limit = self.connection.maximum_packet_size
        budget = self.connection.inbound_bytes
        room = (limit is None or size <= limit) and (budget is None or self._held + size <= budget)
        kept = size if room else 0
        self._held += kept
        five = self.connection.protocol == "5"
        incoming = Incoming(
            topic=message.topic,
            payload=message.payload if room else None,
            size=size,
            qos=message.qos,
            retain=message.retain,
            duplicate=duplicate,
            response_topic=message.response_topic if five else None,
            correlation=message.correlation if five else None,
            expiry_s=message.expiry_s if five else None,
            ts=message.ts if five else None,
            receipt=Receipt(self._generation, mid),
        )
        self._events.put_nowait(lambda: self._message(incoming, kept))

    def answered(self, future: asyncio.Future[PubAck], answer: PubAck) -> None:
        """Take the answer to a publish."""
        self._events.put_nowait(lambda: self._answer(future, answer))

    # Events, in order.

    def _handle(self, event: Callable[[], None]) -> None:
        try:
            event()
        except Exception:
            log.exception("mqtt.listener_failed")

    def _connected(self, session: Session) -> None:
        assert self._listener is not None  # noqa: S101  # set by `run`
        self._session = session
        self._connects += 1
        self._state = replace(self._state, connected=True, reconnects=self._connects - 1)
        self._listener.on_connected(session)

    def _message(self, message: Incoming, kept: int) -> None:
        assert self._listener is not None  # noqa: S101  # set by `run`
        if message.qos:
            self._unacked[message.receipt.mid] = kept
            self._listener.on_message(message)
            return
        try:
            (self._sink or self._listener.on_message)(message)
        finally:
            self._held -= kept

    def _answer(self, future: asyncio.Future[PubAck], answer: PubAck) -> None:
        self._answers.discard(future)
        if not future.done():
            future.set_result(answer)

    def _disconnected(self, reason: str) -> None:
        assert self._listener is not None  # noqa: S101  # set by `run`
        self._session = None
        self._state = replace(
            self._state, connected=False, last_reason=reason, stolen=self._takeovers >= 3
        )
        self._held -= sum(self._unacked.values())
        self._unacked.clear()
        lost, self._answers = self._answers, set()
        for future in lost:
            if not future.done():
                future.set_exception(ConnectionLost(reason))
                future.exception()
        self._listener.on_disconnected(reason)
