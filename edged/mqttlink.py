"""One MQTT connection over paho, from the name lookup to its end; see `mqtt` for what is around it.

Lives on the network thread. `Host` is what it needs of that thread: time, room, and the two queues.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import structlog
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edged.errors import BadPublish, ConfigError
from edged.mqttconfig import Connection, Patience
from edged.mqttwire import NoConnection, Publish, Splitter, Wire, dial, explain, tls_context
from edged.ports import Incoming, Outgoing, PubAck, Receipt, Session, Sink, Trace
from edged.topics import validate_publish

if TYPE_CHECKING:
    from paho.mqtt.client import SocketLike

log = structlog.get_logger()

_TAKEN_OVER = 0x8E  # MQTT 5 section 3.14.2.1
_QOS_NOT_SUPPORTED = 0x9B
_RETAIN_NOT_SUPPORTED = 0x9A
_NOT_AUTHORIZED = 0x87

#: Bytes given to paho before its queue must have drained: what waits is counted here, not there.
_IN_PAHO_BYTES = 64 * 1024
#: Name lookups take resolv.conf's timeouts times its servers; nothing can interrupt them.
_LOOKUP_S = 90.0


# What the thread tells the event loop, and what it is told.


@dataclass(slots=True)
class Connected:
    """The broker accepted us."""

    session: Session


@dataclass(slots=True)
class Subscribed:
    """The broker answered the subscriptions."""

    refused: tuple[str, ...]


@dataclass(slots=True)
class Disconnected:
    """The connection is gone, or an attempt failed."""

    reason: str
    stolen: bool


@dataclass(slots=True)
class Kept:
    """The connection has lasted: nobody steals our client id."""


@dataclass(slots=True)
class Arrived:
    """A message came, with the room that it takes until it is released."""

    message: Incoming
    reserved: int


@dataclass(slots=True)
class Answered:
    """The broker answered a publish."""

    token: int
    answer: PubAck


Event = Connected | Subscribed | Disconnected | Kept | Arrived | Answered


@dataclass(slots=True)
class Send:
    """Publish this; `token` names the future that waits for the answer, 0 at QoS 0."""

    generation: int
    message: Outgoing
    size: int
    token: int


@dataclass(slots=True)
class Ack:
    """Acknowledge this packet id."""

    generation: int
    mid: int


class Stopped(Exception):
    """The thread is to end now."""


class Host(Protocol):
    """What a link needs of the thread it lives on."""

    connection: Connection
    patience: Patience
    trace: Trace
    sink: Sink | None
    commands: deque[Send | Ack]
    events: deque[Event]
    #: Bytes of commands that were written or dropped, ever.
    written: int
    #: Bytes of inbound messages for which room was taken, ever.
    taken: int
    stopping: Literal["clean", "cut"] | None
    #: What the broker allows a will to be, as far as its refusals have told.
    will_qos: Literal[0, 1]
    will_retain: bool

    def announce(self, what: str, seconds: float) -> None:
        """Say what is done next and for how long at most."""

    def reserve(self, size: int) -> bool:
        """Return whether there is room for a message of so many bytes, and take it."""

    def may_read(self) -> bool:
        """Return whether the event loop keeps up."""

    def wait(self, sock: socket.socket | Wire | None, mask: int, until: float, doing: str) -> int:
        """Wait until `sock` is ready, a command came, or it is `until`; return the ready mask."""

    def wait_connecting(self, sock: socket.socket, mask: int, until: float, doing: str) -> bool:
        """Wait for a socket that is not a connection yet; `mqttwire.Wait`."""

    def note_kept(self) -> None:
        """Take note that a connection has lasted longer than takeovers are counted."""

    def flush(self) -> None:
        """Have the event loop look at the events."""


class _Client(paho.Client):
    """paho's client on a socket of ours: the one place where we reach below its public interface.

    `_create_socket` is there in 2.1 and 2.2 and has the same contract: return what is connected.
    """

    open_wire: Callable[[], Wire]

    def _create_socket(self) -> SocketLike:
        return self.open_wire()


class Link:
    """One connection, from the name lookup to its end. Lives on the network thread."""

    def __init__(self, network: Host, generation: int) -> None:
        self._network = network
        self._connection = network.connection
        self._five = network.connection.protocol == "5"
        self._generation = generation
        self._client: _Client
        self._wire: Wire | None = None
        self._packets: deque[Publish | bytes] = deque()  # read and not looked at
        self._session: Session | None = None
        self._connected_at = 0.0
        self._ended_at = 0.0
        self._deadline: tuple[float, str] | None = None
        self._reason: str | None = None
        self._bug: Exception | None = None
        self._sent: dict[int, int] = {}  # packet id to token
        self._held: deque[Send] = deque()  # QoS 1 beyond the broker's window
        self._in_paho = 0  # bytes given to paho since its queue was empty
        self._foreign: set[int] = set()  # QoS 2 packet ids
        self._leaving = False
        self._said_goodbye = False
        self._kept = False
        #: The broker said that another client took our id.
        self.taken_over = False
        #: The broker closed it in good order and without a word.
        self.dropped = False

    @property
    def connected(self) -> bool:
        """Whether the broker accepted it, at some time."""
        return self._session is not None

    def lasted(self) -> float:
        """Return for how many seconds it was a connection."""
        return self._ended_at - self._connected_at if self.connected else 0.0

    def run(self) -> str:
        """Connect, work until the connection ends, and return why it did.

        Raises:
            NoConnection: it could not be made.
            Stopped: the bus is closed.
        """
        network = self._network
        try:
            self._client = self._made()
            self._connect()
            next_misc = 0.0
            while self._client.socket() is not None:
                self._turn()
                now = time.monotonic()
                if now >= next_misc:
                    next_misc = now + 1.0
                    self._client.loop_misc()
                self._check_callbacks()
                network.flush()
        finally:
            self._ended_at = time.monotonic()
            if self._wire is not None:
                network.taken -= self._wire.reserved + sum(
                    packet.reserved for packet in self._packets if isinstance(packet, Publish)
                )
                self._wire.finish(linger_s=1.0 if self._said_goodbye else 0.0)
            network.written += sum(command.size for command in self._held) + self._in_paho
        if network.stopping:
            raise Stopped
        return self._why()

    def _why(self) -> str:
        assert self._wire is not None  # noqa: S101  # there was a connection
        if self._reason is not None:
            return self._reason
        if self._wire.failure is not None:
            return str(self._wire.failure)
        if not self.connected:
            return "the broker closed the connection before it answered"
        self.dropped = True
        if self.lasted() < self._network.patience.soon_s:
            return "the broker closed the connection at once (another client with our client id?)"
        return "the broker closed the connection"

    # Connecting.

    def _made(self) -> _Client:
        c = self._connection
        client = _Client(
            CallbackAPIVersion.VERSION2,
            client_id=c.client_id,
            clean_session=None if self._five else c.clean_start,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            # paho would otherwise dial again by itself, inside a read, when 3.1.1 is refused.
            reconnect_on_failure=False,
            manual_ack=True,
        )
        # The window is ours. paho's own looks at all messages for every PUBACK.
        client.max_inflight_messages = 0
        client.max_queued_messages = 0
        client.open_wire = self._open_wire
        client.on_connect = self._guarded(self._on_connect)
        client.on_subscribe = self._guarded(self._on_subscribe)
        client.on_publish = self._guarded(self._on_publish)
        client.on_message = self._guarded(self._on_message)
        client.on_disconnect = self._guarded(self._on_disconnect)
        # Having this, paho never writes by itself; we ask `want_write` before every wait.
        client.on_socket_register_write = lambda *_: None
        return client

    def _connect(self) -> None:
        c, client = self._connection, self._client
        try:
            password = c.password() if callable(c.password) else c.password
        except ConfigError as error:
            raise NoConnection(error.message) from None
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise NoConnection(f"cannot read the password file{where}") from None
        if c.username is not None:
            client.username_pw_set(c.username, password)
        if c.will is not None:
            self._set_will(c.will())
        try:
            if self._five:
                properties = _properties(PacketTypes.CONNECT)
                properties.SessionExpiryInterval = c.session_expiry_s
                properties.ReceiveMaximum = c.receive_maximum
                if c.maximum_packet_size is not None:
                    properties.MaximumPacketSize = c.maximum_packet_size
                client.connect(
                    c.host,
                    c.port,
                    keepalive=c.keepalive_s,
                    clean_start=c.clean_start,
                    properties=properties,
                )
            else:
                client.connect(c.host, c.port, keepalive=c.keepalive_s)
        except OSError as error:
            raise explain(error) from None
        self._deadline = (
            time.monotonic() + self._network.patience.connack_s,
            f"no CONNACK within {self._network.patience.connack_s:.0f} s",
        )

    def _set_will(self, will: Outgoing) -> None:
        try:
            validate_publish(will.topic, len(will.payload), None, None)
        except BadPublish as error:
            raise NoConnection(f"the will cannot be: {error.message}") from None
        properties = None
        if self._five and will.expiry_s is not None:
            properties = _properties(PacketTypes.WILLMESSAGE)
            properties.MessageExpiryInterval = will.expiry_s
        self._client.will_set(
            will.topic,
            will.payload,
            qos=min(will.qos, self._network.will_qos),
            retain=will.retain and self._network.will_retain,
            properties=properties,
        )

    def _open_wire(self) -> Wire:
        c, network = self._connection, self._network
        context = tls_context(c.ca, c.cert, c.key) if c.tls else None
        if network.stopping:
            raise Stopped
        network.announce("looking up the broker's name", _LOOKUP_S)
        until = time.monotonic() + network.patience.connect_s
        sock = dial(c.host, c.port, context, until=until, wait=network.wait_connecting)
        splitter = Splitter(five=self._five, maximum=c.maximum_packet_size, reserve=network.reserve)
        self._wire = Wire(sock, splitter)
        return self._wire

    # Working.

    def _turn(self) -> None:
        network, client, wire = self._network, self._client, self._wire
        assert wire is not None  # noqa: S101  # the client has a socket
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline[0]:
            self._leave(self._deadline[1])
        if network.stopping:
            self._say_goodbye(now)
        if not self._kept and self._session is not None:
            self._note_kept(now)
        read = network.may_read()
        if (wire.more and read) or (network.commands and not client.want_write()):
            until = now  # there is work that no socket announces
        else:
            until = min(now + 1.0, self._deadline[0] if self._deadline else now + 1.0)
        mask = wire.mask(read=read, write=client.want_write())
        ready = network.wait(wire, mask, until, "waiting for the network")
        over = ready & (select.POLLERR | select.POLLHUP | select.POLLNVAL)
        if over or (read and (wire.more or ready & wire.mask(read=True, write=False))):
            self._read(wire)
        if client.socket() is None:
            return
        self._obey()
        if client.want_write():
            client.loop_write()
        if not client.want_write():
            network.written += self._in_paho
            self._in_paho = 0

    def _read(self, wire: Wire) -> None:
        packets = self._packets
        packets.extend(wire.fill())
        while packets:
            packet = packets[0]
            if isinstance(packet, Publish):
                self._deliver(packet)
            else:
                wire.pass_on(packet)
                self._let_paho_read(wire)
                if self._client.socket() is None:
                    return
            packets.popleft()
        if wire.ended:
            self._client.loop_read()
        elif self._session is not None and wire.reassure():
            self._let_paho_read(wire)

    def _let_paho_read(self, wire: Wire) -> None:
        while not wire.passed and self._client.socket() is not None:
            self._client.loop_read()
            self._check_callbacks()

    def _check_callbacks(self) -> None:
        if self._bug is not None:
            raise self._bug

    def _obey(self) -> None:
        network = self._network
        commands = network.commands
        for _ in range(len(commands)):
            if self._in_paho >= _IN_PAHO_BYTES:
                break
            command = commands.popleft()
            if isinstance(command, Ack):
                if command.generation == self._generation:
                    qos = 2 if command.mid in self._foreign else 1
                    self._foreign.discard(command.mid)
                    self._client.ack(command.mid, qos)
            elif command.generation != self._generation:
                network.written += command.size
            elif command.token and self._window_full():
                self._held.append(command)
            else:
                self._send(command)
        while self._held and not self._window_full():
            self._send(self._held.popleft())

    def _window_full(self) -> bool:
        return self._session is None or len(self._sent) >= self._session.receive_maximum

    def _send(self, command: Send) -> None:
        message = command.message
        properties = None
        if self._five and (message.correlation is not None or message.expiry_s is not None):
            properties = _properties(PacketTypes.PUBLISH)
            if message.correlation is not None:
                properties.CorrelationData = message.correlation
            if message.expiry_s is not None:
                properties.MessageExpiryInterval = message.expiry_s
        self._in_paho += command.size
        info = self._client.publish(
            message.topic, message.payload, message.qos, message.retain, properties
        )
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._leave(f"paho refused a publish ({paho.error_string(info.rc)})")
        if command.token:
            self._sent[info.mid] = command.token

    def _deliver(self, publish: Publish) -> None:
        if self._session is None:
            self._leave("the broker sent a message before its CONNACK")
        self._network.trace("mqtt.on_message")
        message = Incoming(
            topic=publish.topic,
            payload=publish.payload,
            size=publish.size,
            qos=min(publish.qos, 1),
            retain=publish.retain,
            duplicate=publish.duplicate,
            response_topic=publish.response_topic,
            correlation=publish.correlation,
            expiry_s=publish.expiry_s,
            ts=publish.ts,
            receipt=Receipt(self._generation, publish.mid),
        )
        sink = self._network.sink
        if sink is None or message.qos:
            self._network.events.append(Arrived(message, publish.reserved))
            return
        self._network.taken -= publish.reserved
        try:
            sink(message)
        except Exception:
            # As with a listener: a bug of its own, never the end of the connection.
            log.exception("mqtt.listener_failed", about="sink")

    def _leave(self, reason: str) -> NoReturn:
        raise NoConnection(reason)

    def _say_goodbye(self, now: float) -> None:
        if self._network.stopping == "cut" or self._session is None:
            raise Stopped
        if not self._leaving:
            self._leaving = True
            self._deadline = (now + 2.0, "the broker did not take the DISCONNECT")
            self._said_goodbye = True
            self._client.disconnect()

    def _note_kept(self, now: float) -> None:
        if now - self._connected_at >= self._network.patience.stolen_within_s:
            self._kept = True
            self._network.note_kept()

    # paho's callbacks. They only take notes: what follows from them happens after paho returned.

    def _guarded(self, callback: Callable[..., None]) -> Any:
        def call(*arguments: Any) -> None:
            try:
                self._network.trace(f"mqtt.{callback.__name__.lstrip('_')}")
                callback(*arguments)
            except Exception as error:  # noqa: BLE001  # raised again outside of paho
                self._bug = self._bug or error

        return call

    def _on_connect(
        self,
        client: paho.Client,
        _userdata: object,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._reason = self._refusal(reason, properties)
            return
        self._connected_at = time.monotonic()
        self._session = Session(
            generation=self._generation,
            session_present=flags.session_present,
            receive_maximum=getattr(properties, "ReceiveMaximum", 65535),
            maximum_packet_size=getattr(properties, "MaximumPacketSize", None),
            maximum_qos=getattr(properties, "MaximumQoS", 1),
            retain_available=bool(getattr(properties, "RetainAvailable", 1)),
        )
        log.info(
            "mqtt.connected",
            client_id=self._connection.client_id,
            session_present=flags.session_present,
        )
        self._network.events.append(Connected(self._session))
        self._deadline = None
        if not self._connection.subscriptions:
            self._network.events.append(Subscribed(()))
            return
        patience = self._network.patience.suback_s
        self._deadline = (self._connected_at + patience, f"no SUBACK within {patience:.0f} s")
        if self._five:
            client.subscribe(
                [
                    (
                        topic,
                        SubscribeOptions(
                            qos=qos,
                            retainAsPublished=not self._connection.retained,
                            retainHandling=SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
                            if self._connection.retained
                            else SubscribeOptions.RETAIN_DO_NOT_SEND,
                        ),
                    )
                    for topic, qos in self._connection.subscriptions
                ]
            )
        else:
            client.subscribe([(topic, int(qos)) for topic, qos in self._connection.subscriptions])

    def _refusal(self, reason: ReasonCode, properties: Properties | None) -> str:
        # A broker must refuse a will that is beyond what it supports (MQTT-3.2.2-12, -13): connect
        # without, so that the session's limits are known and can be told.
        if reason.value == _QOS_NOT_SUPPORTED:
            self._network.will_qos = 0
        if reason.value == _RETAIN_NOT_SUPPORTED:
            self._network.will_retain = False
        text = str(reason).lower()
        if reason.value == _NOT_AUTHORIZED:
            text = "not authorized (bad user name or password, or a client id that is not allowed)"
        return _with_reason_string(text, properties)

    def _on_subscribe(
        self,
        _client: paho.Client,
        _userdata: object,
        _mid: int,
        reasons: list[ReasonCode],
        _properties: Properties,
    ) -> None:
        filters = [topic for topic, _ in self._connection.subscriptions]
        refused = tuple(
            topic for topic, reason in zip(filters, reasons, strict=False) if reason.is_failure
        )
        if refused:
            log.error("mqtt.subscription_refused", filters=list(refused))
        if not self._leaving:
            self._deadline = None
        self._network.events.append(Subscribed(refused))

    def _on_publish(
        self,
        _client: paho.Client,
        _userdata: object,
        mid: int,
        reason: ReasonCode,
        properties: Properties,
    ) -> None:
        token = self._sent.pop(mid, None)
        if token is None:
            return  # QoS 0: written
        text = _with_reason_string(str(reason).lower(), properties)
        self._network.events.append(Answered(token, PubAck(reason.is_failure, text)))

    def _on_message(
        self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage
    ) -> None:
        """Take a QoS 2 message, of a session that somebody else left under our client id."""
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = "\ufffd"
        self._foreign.add(message.mid)
        payload = bytes(message.payload)
        self._deliver(
            Publish(
                topic=topic,
                payload=payload,
                size=len(payload),
                qos=2,
                retain=message.retain,
                duplicate=message.dup,
                mid=message.mid,
            )
        )

    def _on_disconnect(
        self,
        _client: paho.Client,
        _userdata: object,
        flags: paho.DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        """Note why it ended. paho may call this twice for one end (its issue 870)."""
        if self._reason is not None:
            return
        if flags.is_disconnect_packet_from_server:
            self.taken_over = reason.value == _TAKEN_OVER
            text = "client id taken over" if self.taken_over else str(reason).lower()
            text = f"the broker ended the connection: {text}"
            self._reason = _with_reason_string(text, properties)
        elif str(reason) == "Keep alive timeout":
            self._reason = "no sign of the broker for the keepalive time"
        elif str(reason) == "Protocol error" and self._wire is not None and not self._wire.ended:
            self._reason = (
                "the broker sent a malformed packet"
                if self.connected
                else "the broker does not speak this version of MQTT"
            )


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]  # paho has no types here


def _with_reason_string(text: str, properties: Properties | None) -> str:
    """Add the broker's own words, if it gave any."""
    words = getattr(properties, "ReasonString", None)
    return f"{text} ({words[:200]})" if isinstance(words, str) and words else text
