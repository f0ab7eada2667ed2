"""The broker: `MqttBus`, a connection over paho-mqtt that comes back by itself.

One network thread owns the paho client completely. No call into paho is made from anywhere else, so
there are no lock orders to get wrong (two threads, one in `publish` and one in a callback, can
deadlock in paho 2.2) and nothing is written to a socket that is just being replaced. The thread
turns its own poll loop over paho's interface for external loops. The event loop hands commands over
and gets events back, in batches.

Every connection has a fresh paho client and a number, its generation. The session lives at the
broker, under the client id; what paho would keep across a connection (publishes to resend, packet
ids, half-read packets) is what must not survive here: an outbox on disk sends again what was not
answered, and an ack that crosses a reconnect would acknowledge another message.

Logged as `mqtt.` connected, disconnected, closed, stolen, subscription_refused, unsendable,
no_retain, farewell_failed, and, where the fault is ours, failed, thread_ended, listener_failed.
"""

from __future__ import annotations

import asyncio
import itertools
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Literal

import structlog
from tenacity import RetryCallState, Retrying

from edged.errors import BadPublish, ConnectionLost
from edged.mqttconfig import Connection, Patience
from edged.mqttlink import (
    Ack,
    Answered,
    Arrived,
    Connected,
    Disconnected,
    Event,
    Kept,
    Link,
    Send,
    Stopped,
    Subscribed,
)
from edged.mqttwire import NoConnection, Wire
from edged.ports import (
    BusListener,
    BusState,
    Outgoing,
    PubAck,
    Receipt,
    Session,
    Sink,
    Trace,
    no_trace,
)
from edged.topics import packet_size, validate_publish

__all__ = ["Connection", "MqttBus", "Patience"]

log = structlog.get_logger()

#: QoS 0 is refused while this many bytes wait to be written.
CONGESTED_BYTES = 256 * 1024
#: Publishes that may wait for the broker's window before the caller is told that it went too far.
MAX_HELD = 4096

#: Events that may wait for the event loop before nothing more is read.
_MAX_EVENTS = 8192
#: Events handled in one turn of the event loop.
_EVENTS_A_TURN = 256
#: Added to every announced wait: a box under load is late, not stuck.
_SLACK_S = 15.0


class MqttBus:
    """A connection to an MQTT broker; see `ports.Bus`.

    Made and used on one event loop. One object is run once.

    Args:
        connection: Where to connect, and as whom.
        patience: How long to wait for what.
        sink: Takes messages of QoS 0 on the network thread, instead of the listener: none of them
            waits for the event loop or costs it time.
        trace: For tests.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        patience: Patience | None = None,
        sink: Sink | None = None,
        trace: Trace = no_trace,
    ) -> None:
        self._connection = connection
        self._patience = patience or Patience()
        self._sink = sink
        self._trace = trace
        self._generations = itertools.count(1)
        self._tokens = itertools.count(1)
        self._network: _Network | None = None
        self._listener: BusListener | None = None
        self._session: Session | None = None
        self._state = BusState(connected=False, reconnects=0, last_reason=None)
        self._connects = 0
        self._answers: dict[int, asyncio.Future[PubAck]] = {}
        self._unacked: dict[int, int] = {}  # packet id to reserved bytes, this generation's
        self._offered = 0  # bytes of commands, ever
        self._closing = False
        self._ended = asyncio.Event()
        self._ended.set()
        self._retain_told = self._unsendable_told = False

    def __repr__(self) -> str:
        c = self._connection
        return f"<MqttBus {c.client_id} at {c.host}:{c.port}>"

    @property
    def state(self) -> BusState:
        """How the connection is."""
        return self._state

    @property
    def session(self) -> Session | None:
        """The live connection's limits; None while there is none."""
        return self._session

    async def run(self, listener: BusListener) -> None:
        """Connect, and connect again whenever the connection goes, until `close`.

        Cancelled, it drops the connection without a DISCONNECT, so that the broker sends the will.
        """
        if self._listener is not None:
            raise RuntimeError("a bus is run once")
        self._listener = listener
        self._ended.clear()
        try:
            while not self._closing:
                await self._run_thread()
                if not self._closing:
                    # Cannot happen, so it must not be the end of the service if it does.
                    log.error("mqtt.thread_ended")
                    await asyncio.sleep(2.0)
        finally:
            self._ended.set()

    async def _run_thread(self) -> None:
        loop = asyncio.get_running_loop()
        network = _Network(
            self._connection, self._patience, self._trace, self._generations, loop, self._drain,
            self._sink,
        )  # fmt: skip
        self._network = network
        self._offered = 0
        network.start()
        try:
            while not network.ended.is_set() and network.is_alive():
                with suppress(TimeoutError):
                    await asyncio.wait_for(network.ended.wait(), 1.0)
        except asyncio.CancelledError:
            network.stop("cut")
            # It looks up at once, unless a name lookup holds it; then it ends after that.
            with suppress(TimeoutError):
                await asyncio.wait_for(network.ended.wait(), 2.0)
            raise
        finally:
            while network.events:
                self._handle(network.events.popleft())
            if self._session is not None:
                self._handle(Disconnected("the network thread ended", self._state.stolen))

    def publish(self, message: Outgoing) -> asyncio.Future[PubAck]:
        """Send at QoS 1; see `ports.Bus.publish`.

        A caller that goes more than MAX_HELD messages beyond the broker's Receive Maximum gets
        ConnectionLost as well; up to there messages wait for the window, in order.
        """
        future: asyncio.Future[PubAck] = asyncio.get_running_loop().create_future()
        session, network = self._session, self._network
        try:
            message = self._checked(replace(message, qos=1), session)
            if session is None or network is None:
                raise ConnectionLost("not connected")
            if len(self._answers) >= session.receive_maximum + MAX_HELD:
                raise ConnectionLost("too many unanswered publishes")
        except (BadPublish, ConnectionLost) as error:
            future.set_exception(error)
            future.exception()  # so that one who does not look is not shouted at
            return future
        token = next(self._tokens)
        self._answers[token] = future
        self._hand_over(network, session, message, token)
        return future

    def offer(self, message: Outgoing) -> bool:
        """Send at QoS 0 if the connection is up and not congested; return whether it was sent.

        What `topics.validate_publish` forbids is not sent either, and logged once a connection.
        """
        session, network = self._session, self._network
        try:
            message = self._checked(replace(message, qos=0), session)
        except BadPublish as error:
            if not self._unsendable_told:
                self._unsendable_told = True
                log.error("mqtt.unsendable", reason=error.message)
            return False
        if session is None or network is None:
            return False
        if self._offered - network.written > CONGESTED_BYTES:
            return False
        self._hand_over(network, session, message, 0)
        return True

    def _checked(self, message: Outgoing, session: Session | None) -> Outgoing:
        limit = session.maximum_packet_size if session else None
        validate_publish(message.topic, len(message.payload), message.correlation, limit)
        if session is None:
            return message
        if message.qos > session.maximum_qos:
            raise BadPublish("the broker takes QoS 0 only, edged needs QoS 1")
        if message.retain and not session.retain_available:
            if not self._retain_told:
                self._retain_told = True
                log.warning("mqtt.no_retain", topic=message.topic)
            return replace(message, retain=False)
        return message

    def _hand_over(
        self, network: _Network, session: Session, message: Outgoing, token: int
    ) -> None:
        size = packet_size(message.topic, len(message.payload), message.correlation)
        self._offered += size
        network.command(Send(session.generation, message, size, token))

    def ack(self, receipt: Receipt) -> None:
        """Acknowledge a QoS 1 message; nothing happens if its connection is gone."""
        session, network = self._session, self._network
        if session is None or network is None or receipt.generation != session.generation:
            return
        reserved = self._unacked.pop(receipt.mid, None)
        if reserved is None:
            return  # acknowledged before: a second PUBACK could hit the next message of this id
        network.released += reserved
        network.command(Ack(receipt.generation, receipt.mid))

    def stuck(self) -> str | None:
        """Return why the network thread seems to be stuck past its own announced wait, or None."""
        return self._network.stuck() if self._network is not None else None

    async def close(self, farewell: Outgoing | None = None, timeout_s: float = 5.0) -> None:
        """Publish `farewell` at QoS 1, wait for its answer, disconnect cleanly, end `run`.

        A farewell that the broker does not take within `timeout_s` seconds leaves without a
        DISCONNECT: then the will says what the farewell could not.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        self._closing = True
        how: Literal["clean", "cut"] = "clean"
        if farewell is not None:
            try:
                answer = await asyncio.wait_for(self.publish(farewell), timeout_s)
                if answer.failed:
                    raise BadPublish(answer.reason)
            except (TimeoutError, BadPublish, ConnectionLost) as error:
                how = "cut"
                if self._session is not None:
                    log.warning("mqtt.farewell_failed", reason=str(error) or "no answer in time")
        if self._network is not None:
            self._network.stop(how)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), max(0.0, until - loop.time()) + 1.0)

    # Events.

    def _drain(self, network: _Network) -> None:
        network.scheduled = False
        events = network.events
        for _ in range(min(len(events), _EVENTS_A_TURN)):
            self._handle(events.popleft())
        if events:
            network.flush()
        network.unblock()

    def _handle(self, event: Event) -> None:
        """Act on an event. A listener that fails is a bug of its own, never the end of ours."""
        try:
            self._dispatch(event)
        except Exception:
            log.exception("mqtt.listener_failed", about=type(event).__name__)

    def _dispatch(self, event: Event) -> None:
        listener, network = self._listener, self._network
        assert listener is not None and network is not None  # noqa: S101, PT018  # set by `run`
        match event:
            case Arrived(message, reserved):
                if message.qos:
                    self._unacked[message.receipt.mid] = reserved
                    listener.on_message(message)
                else:
                    try:
                        listener.on_message(message)
                    finally:
                        network.released += reserved
            case Answered(token, answer):
                future = self._answers.pop(token, None)
                if future is not None and not future.done():
                    future.set_result(answer)
            case Connected(session):
                self._session = session
                self._unsendable_told = False
                self._connects += 1
                self._state = replace(
                    self._state, connected=True, reconnects=max(0, self._connects - 1)
                )
                listener.on_connected(session)
            case Subscribed(refused):
                listener.on_subscribed(refused)
            case Disconnected(reason, stolen):
                self._session = None
                self._state = replace(
                    self._state, connected=False, last_reason=reason, stolen=stolen
                )
                network.released += sum(self._unacked.values())
                self._unacked.clear()
                lost, self._answers = self._answers, {}
                for future in lost.values():
                    if not future.done():
                        future.set_exception(ConnectionLost(reason))
                        future.exception()  # as in `publish`
                listener.on_disconnected(reason)
            case Kept():
                self._state = replace(self._state, stolen=False)


class _Network:
    """The network thread: connects, and connects again. Shared fields say who writes them."""

    def __init__(
        self,
        connection: Connection,
        patience: Patience,
        trace: Trace,
        generations: Iterator[int],
        loop: asyncio.AbstractEventLoop,
        drain: Callable[[_Network], None],
        sink: Sink | None = None,
    ) -> None:
        self.connection = connection
        self.patience = patience
        self.sink = sink
        self.trace = trace
        self.commands: deque[Send | Ack] = deque()
        self.events: deque[Event] = deque()
        self.ended = asyncio.Event()
        #: Bytes of commands that were written or dropped, ever; written by the thread.
        self.written = 0
        #: Bytes of inbound messages, ever: taken by the thread, released by the event loop.
        self.taken = 0
        self.released = 0
        self.scheduled = False
        self.stopping: Literal["clean", "cut"] | None = None
        self.will_qos: Literal[0, 1] = 1
        self.will_retain = True
        self._inbound = connection.inbound_bytes or (
            min(connection.receive_maximum, 4) * (connection.maximum_packet_size or 8 * 1024 * 1024)
        )
        self._generations = generations
        self._loop = loop
        self._drain = drain
        self._announced: tuple[str, float] | None = None
        self._blocked = False
        self._stolen = False
        self._takeovers: deque[float] = deque(maxlen=patience.stolen_after)
        self._suspected: float | None = None
        self._woken = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._thread = threading.Thread(
            target=self._main, name=f"mqtt[{connection.client_id}]", daemon=True
        )

    # Called on the event loop.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether the thread lives."""
        return self._thread.is_alive()

    def command(self, command: Send | Ack) -> None:
        """Hand a command over."""
        self.commands.append(command)
        self.wake()

    def stop(self, how: Literal["clean", "cut"]) -> None:
        """Make the thread end, with a DISCONNECT or without."""
        self.stopping = how
        self.wake()

    def wake(self) -> None:
        """Interrupt the thread's wait."""
        if self._woken:
            return
        self._woken = True
        with suppress(OSError):  # full: it is awake; closed: it has ended
            self._wake_out.send(b"\0")

    def unblock(self) -> None:
        """Make the thread read again if it stopped because of us."""
        if self._blocked and len(self.events) < _MAX_EVENTS // 2:
            self._blocked = False
            self.wake()

    def stuck(self) -> str | None:
        """Return what the thread does for longer than it said it would, or None."""
        announced = self._announced
        if announced is None:
            return None
        what, until = announced
        late = time.monotonic() - until
        return f"the MQTT thread is {late:.0f} s late from {what}" if late > 0 else None

    # Called on either.

    def flush(self) -> None:
        """Have the event loop look at the events."""
        if self.events and not self.scheduled:
            self.scheduled = True
            with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(self._drain, self)

    # Called on the thread.

    def announce(self, what: str, seconds: float) -> None:
        """Say what is done next and for how long at most."""
        self._announced = (what, time.monotonic() + seconds + _SLACK_S)

    def reserve(self, size: int) -> bool:
        """Return whether there is room for a message of so many bytes, and take it."""
        if self.taken - self.released + size > self._inbound:
            return False
        self.taken += size
        return True

    def may_read(self) -> bool:
        """Return whether the event loop keeps up."""
        if len(self.events) < _MAX_EVENTS:
            return True
        self._blocked = True
        return False

    def wait(self, sock: socket.socket | Wire | None, mask: int, until: float, doing: str) -> int:
        """Wait until `sock` is ready, a command came, or it is `until`; return the ready mask."""
        poller = select.poll()
        poller.register(self._wake_in, select.POLLIN)
        if sock is not None:
            poller.register(sock, mask)
        left = max(0.0, until - time.monotonic())
        self.announce(doing, left)
        ready = 0
        for number, flags in poller.poll(left * 1000):
            if sock is not None and number == sock.fileno():
                ready = flags
            else:
                with suppress(BlockingIOError):
                    self._wake_in.recv(4096)
                # After the read: a wake in between finds it set, and what it announces is seen
                # below all the same. The other way round one could be lost.
                self._woken = False
        self.announce("its own work", 0.0)
        return ready

    def wait_connecting(self, sock: socket.socket, mask: int, until: float, doing: str) -> bool:
        """Wait for a socket that is not a connection yet; `mqttwire.Wait`."""
        while not self.wait(sock, mask, until, doing):
            if self.stopping:
                raise Stopped
            if time.monotonic() >= until:
                return False
        return True

    def _main(self) -> None:
        try:
            self._connect_for_ever()
        finally:
            self._announced = None
            self._wake_in.close()
            self._wake_out.close()
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.ended.set)

    def _connect_for_ever(self) -> None:
        attempt = 0
        last_reason = None
        while not self.is_stopping():
            link = Link(self, next(self._generations))
            suspect_clock = False
            try:
                reason = link.run()
            except Stopped:
                reason = "closed"
            except NoConnection as error:
                reason, suspect_clock = str(error), error.clock_suspect
            except Exception as error:
                # Ours or paho's bug: the next connection starts from nothing.
                log.exception("mqtt.failed")
                reason = f"internal error ({type(error).__name__})"
            lasted = link.lasted()
            if lasted >= self.patience.lasting_s:
                attempt = 0
            attempt += 1
            self._note_takeover(link, lasted)
            if self.is_stopping():
                log.info("mqtt.closed", client_id=self.connection.client_id)
            elif link.connected or reason != last_reason:
                log.warning("mqtt.disconnected", reason=reason, client_id=self.connection.client_id)
            last_reason = reason
            self.drop_commands()
            self.events.append(Disconnected(reason, self._stolen))
            self.flush()
            self._pause(self._wait_s(attempt, clock=suspect_clock))

    def _note_takeover(self, link: Link, lasted: float) -> None:
        now = time.monotonic()
        # Few brokers say so: mosquitto 2.0.11 just closes the old connection, on MQTT 5, too. One
        # that is going down does the same; but it does not take us back at once.
        if self._suspected is not None and link.connected:
            self._takeovers.append(self._suspected)
        soon = link.dropped and lasted < self.patience.soon_s
        self._suspected = now if soon else None
        if link.taken_over:
            self._takeovers.append(now)
        recent = [t for t in self._takeovers if now - t <= self.patience.stolen_within_s]
        if len(recent) >= self.patience.stolen_after and not self._stolen:
            self._stolen = True
            log.error("mqtt.stolen", client_id=self.connection.client_id)

    def note_kept(self) -> None:
        """Take note that a connection has lasted longer than takeovers are counted."""
        if self._stolen:
            self._stolen = False
            self.events.append(Kept())

    def _wait_s(self, attempt: int, *, clock: bool) -> float:
        asked = RetryCallState(Retrying(), None, (), {})
        asked.attempt_number = attempt
        seconds = float(self.patience.retry(asked))
        if self._stolen:
            return self.patience.stolen_wait_s + seconds
        if clock:
            return min(seconds, self.patience.clock_s)
        return seconds

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.is_stopping() and time.monotonic() < until:
            self.wait(None, 0, until, "waiting before the next attempt")
            self.drop_commands()

    def is_stopping(self) -> bool:
        """Return whether to end; the event loop may have said so since the last look."""
        return self.stopping is not None

    def drop_commands(self) -> None:
        """Let go of commands whose connection is gone; the event loop knows or will soon."""
        while self.commands:
            command = self.commands.popleft()
            if isinstance(command, Send):
                self.written += command.size
