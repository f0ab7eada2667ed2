"""Whether the broker takes the connections that edged makes, as far as it can be seen from here.

Real connections with the real settings and credentials, under a client id of their own. Nothing is
published, and no session of the running daemon is harmed: where a broker makes the user name the
client id, our connection *is* the daemon's session, so it is neither wiped nor left to expire.
"""

from __future__ import annotations

import queue
import secrets
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edged.errors import ConfigError
from edged.findings import Finding, failed, ok, warning
from edged.mqttwire import NoConnection, dial, tls_context
from edged.options import Cameras, Client, Mqtt, Settings
from edged.settings import read_password
from edged.topics import Topics

AREA = "broker"

#: One step with the broker may take this long, seconds; a name lookup cannot be told how long.
STEP_S = 8.0
#: A broker that gives our session to the second connection says so within this, seconds.
TAKEOVER_S = 1.0
#: Certificates that end sooner are worth a warning, seconds.
SOON_S = 21 * 86400
#: Answers are cut at this many bytes by a broker that announces less.
SMALL_PACKET = 64 * 1024

_BAD_USER = {0x86, 0x87, 0x8C}
_BAD_ID = 0x85
_BAD_PROTOCOL = 0x84

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom to connect."""

    name: str  # the group of settings
    username: str | None
    password_file: Path | None
    cert: Path | None
    key: Path | None

    @property
    def anonymous(self) -> bool:
        """Whether the broker cannot know who this is."""
        return self.username is None and self.cert is None

    def may_be(self, other: Identity) -> bool:
        """Return whether a broker, which goes by one or the other, may take both for one user."""
        return (self.username is not None and self.username == other.username) or (
            self.cert is not None and self.cert == other.cert
        )


def identity(name: str, group: Mqtt | Client | Cameras) -> Identity:
    """Return the identity that a group of settings describes."""
    return Identity(name, group.username, group.password_file, group.cert, group.key)


def _camera_identity(settings: Settings) -> Identity:
    """Return as whom the camera connection is made: what cameras lack is taken from mqtt."""
    own, jobs = identity("cameras", settings.cameras), identity("mqtt", settings.mqtt)
    user = own if own.username is not None else jobs
    files = own if own.cert is not None else jobs
    return Identity("cameras", user.username, user.password_file, files.cert, files.key)


def check_broker(settings: Settings, *, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Yield what can be seen of the broker, each thing as soon as it is known.

    Args:
        settings: valid ones.
        now: Unix seconds, for the ends of certificates.
    """
    mqtt = settings.mqtt
    yield from _files(settings, now())
    try:
        peer = _within(STEP_S * 2, lambda: _reach(settings))
    except NoConnection as error:
        address = f"{mqtt.host}:{mqtt.port}"
        yield failed(AREA, "address", f"{address}: {error}", _remedy(str(error), settings))
        return
    except ConfigError as error:
        yield failed(AREA, "address", error.message, "correct that setting")
        return
    yield ok(AREA, "address", f"{mqtt.host}:{mqtt.port} answers")
    if mqtt.tls:
        yield _peer(peer, now())
    taken = yield from _check_daemon(settings, identity("mqtt", mqtt))
    if taken is None:
        return
    topics = Topics(mqtt.base_topic, settings.device)
    others = [(identity("client", settings.client), "")]
    if settings.cameras.max:
        others.insert(0, (_camera_identity(settings), topics.camera_frames))
    for other, topic in others:
        # Where the user name is the client id, the daemon's own must not start clean.
        same = other.may_be(identity("mqtt", mqtt))
        if (topic or not other.anonymous) and not (taken and same):
            yield from _check_other(settings, other, topic)
    yield ok(
        AREA,
        "rights",
        "what this user may read and write cannot be seen from here, a broker grants what it then "
        "does not deliver; the daemon tests it when it runs (its own status must come back), and "
        "`edged selftest` sends a job",
    )


# Address and certificates -----------------------------------------------------------------------


def _reach(settings: Settings) -> dict[str, Any] | None:
    """Connect as far as TLS; return the broker's certificate if there is one."""
    mqtt = settings.mqtt
    context = _tls(settings, identity("mqtt", mqtt))
    sock = dial(mqtt.host, mqtt.port, context, until=time.monotonic() + STEP_S, wait=_wait)
    with sock:
        return dict(sock.getpeercert() or {}) if isinstance(sock, ssl.SSLSocket) else None


def _wait(sock: socket.socket, mask: int, until: float, doing: str) -> bool:  # noqa: ARG001
    poll = select.poll()
    poll.register(sock, mask)
    return bool(poll.poll(max(0.0, until - time.monotonic()) * 1e3))


def _tls(settings: Settings, who: Identity) -> ssl.SSLContext | None:
    if not settings.mqtt.tls:
        return None
    ca, cert, key = (str(path) if path else None for path in (settings.mqtt.ca, who.cert, who.key))
    return tls_context(ca, cert, key)


def _remedy(reason: str, settings: Settings) -> str:
    mqtt = settings.mqtt
    if "not yet valid" in reason:
        return "set the clock; edged tries again by itself once it is set"
    if "expired" in reason:
        return "renew the broker's certificate (or set the clock, if it is wrong)"
    if "not trusted" in reason:
        return "set mqtt.ca to the certificate of the authority that signed the broker's"
    if "another host name" in reason or "another address" in reason:
        return f"set mqtt.host to the name in the broker's certificate, {mqtt.host} is not in it"
    if "does not speak TLS" in reason:
        return "set mqtt.port to the broker's TLS port (mostly 8883), or mqtt.tls = false"
    if "client certificate" in reason:
        return "set mqtt.cert and mqtt.key"
    if "name" in reason:
        return "correct mqtt.host, or the box's name service"
    if "refused" in reason:
        port = 8883 if mqtt.tls else 1883
        return f"start the broker, or correct mqtt.port (mostly {port}); a firewall may refuse too"
    return "look at mqtt.host and mqtt.port, and at the network between"


def _files(settings: Settings, now: float) -> Iterator[Finding]:
    """Look at the ends of our own certificates."""
    files = {
        "mqtt.ca": settings.mqtt.ca,
        "mqtt.cert": settings.mqtt.cert,
        "cameras.cert": settings.cameras.cert,
        "client.cert": settings.client.cert,
    }
    for name, path in files.items():
        ends = _ends(path) if path else None
        if ends is not None:
            yield _validity(name, f"{path}", ends, now)


def _ends(path: Path) -> float | None:
    """Return when the first certificate of a file ends, Unix seconds; None if it cannot be told."""
    try:
        # The only parser in the standard library; it has been there, under this name, since 2.6.
        decode: Any = ssl._ssl._test_decode_cert  # type: ignore[attr-defined]  # noqa: SLF001
        return float(ssl.cert_time_to_seconds(decode(str(path))["notAfter"]))
    except (AttributeError, KeyError, OSError, ValueError):
        return None


def _peer(certificate: dict[str, Any] | None, now: float) -> Finding:
    ends = str((certificate or {}).get("notAfter", ""))
    if not ends:
        return ok(AREA, "certificate", "the broker's certificate is valid")
    return _validity("certificate", "the broker's certificate", ssl.cert_time_to_seconds(ends), now)


def _validity(name: str, what: str, ends: float, now: float) -> Finding:
    day = time.strftime("%Y-%m-%d", time.gmtime(ends))
    if ends <= now:
        return failed(AREA, name, f"{what} ended on {day}", "renew it, or set the clock")
    if ends - now < SOON_S:
        return warning(AREA, name, f"{what} ends on {day}", "renew it before that day")
    return ok(AREA, name, f"{what} is valid until {day}")


# Connections ------------------------------------------------------------------------------------


class _Refused(Exception):
    """The broker did not let us in."""

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class _Probe:
    """One MQTT connection, driven by hand."""

    def __init__(
        self,
        settings: Settings,
        who: Identity,
        *,
        protocol: str,
        keep: bool,
        client_id: str | None = None,
    ) -> None:
        self._settings = settings
        self._who = who
        self._five = protocol == "5"
        self._keep = keep
        self._id = client_id or f"{settings.mqtt.client_id}-check-{secrets.token_hex(4)}"
        self.session_present = False
        self.properties: Properties | None = None
        self._reason: ReasonCode | None = None
        self._granted: list[ReasonCode] | None = None
        self.gone = False
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._id,
            clean_session=None if self._five else not keep,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=True,  # jobs that reach us here are the daemon's, and stay the broker's
        )
        client.suppress_exceptions = True
        client.connect_timeout = STEP_S
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect

    def connect(self) -> None:
        """Connect.

        Raises:
            _Refused: by the broker.
            NoConnection: by the network.
        """
        mqtt, who, client = self._settings.mqtt, self._who, self._client
        password = read_password(who.password_file) if who.password_file else None
        if who.username is not None or password is not None:
            client.username_pw_set(who.username, password)
        context = _tls(self._settings, who)
        if context is not None:
            client.tls_set_context(context)
        try:
            if self._five:
                properties = _properties(PacketTypes.CONNECT)
                properties.SessionExpiryInterval = mqtt.session_expiry_s if self._keep else 0
                properties.ReceiveMaximum = 1
                client.connect(
                    mqtt.host, mqtt.port, mqtt.keepalive_s,
                    clean_start=not self._keep, properties=properties,
                )  # fmt: skip
            else:
                client.connect(mqtt.host, mqtt.port, mqtt.keepalive_s)
        except ssl.SSLError as error:
            raise _Refused(None, f"TLS failed: {error.reason}") from error
        except OSError as error:
            raise NoConnection(error.strerror or type(error).__name__) from error
        self.turn(STEP_S, lambda: self._reason is not None or self.gone)
        if self._reason is None:
            closed = (
                "the broker closed the connection" if self.gone else "the broker did not answer"
            )
            raise _Refused(None, closed)
        if self._reason.is_failure:
            raise _Refused(self._reason.value, str(self._reason).lower())

    def subscribe(self, topic: str) -> str | None:
        """Subscribe at QoS 0; return the broker's objection."""
        self._client.subscribe(topic, 0)
        self.turn(STEP_S, lambda: self._granted is not None or self.gone)
        if self._granted is None:
            return "no answer"
        return next((str(code).lower() for code in self._granted if code.is_failure), None)

    def turn(self, seconds: float, until: Callable[[], bool]) -> None:
        """Let the connection work until something is so, at most this long."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            if self._client.loop(0.05) is not MQTTErrorCode.MQTT_ERR_SUCCESS:
                self.gone = True

    def close(self, *, forget: bool) -> None:
        """Disconnect; `forget`: with what the broker keeps of us."""
        with suppress(OSError, ValueError):
            if self._five and self._keep and forget:
                properties = _properties(PacketTypes.DISCONNECT)
                properties.SessionExpiryInterval = 0
                self._client.disconnect(properties=properties)
            else:
                self._client.disconnect()
            self.turn(STEP_S, lambda: self.gone)
        if forget and self._keep and not self._five:
            # 3.1.1 forgets only at the next connect.
            again = _Probe(
                self._settings, self._who, protocol="3.1.1", keep=False, client_id=self._id
            )
            with suppress(_Refused, NoConnection):
                again.connect()
                again.close(forget=False)

    def _on_connect(
        self,
        _client: paho.Client,
        _userdata: object,
        flags: paho.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._reason = reason
        self.properties = properties
        self.session_present = flags.session_present

    def _on_subscribe(
        self,
        _client: paho.Client,
        _userdata: object,
        _mid: int,
        codes: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        self._granted = codes

    def _on_disconnect(self, *_: object) -> None:
        self.gone = True


def _properties(packet_type: int) -> Properties:
    return Properties(packet_type)  # type: ignore[no-untyped-call]


def _check_daemon(settings: Settings, who: Identity) -> Generator[Finding, None, bool | None]:
    """Check the daemon's own connection.

    Returns:
        Whether a second connection of this user takes the first one's place; None: there is none.
    """
    protocol = settings.mqtt.protocol
    keep = not who.anonymous
    first = _Probe(settings, who, protocol=protocol, keep=keep)
    try:
        _within(STEP_S * 3, first.connect)
    except (NoConnection, _Refused, ConfigError) as error:
        yield _refusal(settings, who, error)
        return None
    name = f"as {who.username}" if who.username else "without a user name"
    if who.username is None and who.cert is not None:
        name = "by a certificate"
    yield ok(AREA, "mqtt", f"the broker takes MQTT {protocol} {name}")
    taken = False
    try:
        yield from _limits(settings, first)
        topics = Topics(settings.mqtt.base_topic, settings.device)
        objection = first.subscribe(topics.status)
        # Where the client id is the user, a running daemon takes its place back at any moment.
        if objection and not (first.session_present and first.gone):
            yield failed(
                AREA,
                "subscribe",
                f"the broker refuses a subscription to {topics.status}: {objection}",
                "let this user read that topic in the broker's access list",
            )
        if keep:
            taken = first.session_present or _is_taken_over(settings, who, first)
            if settings.cameras.max:
                yield _takeover(settings, taken=taken)
    finally:
        first.close(forget=not taken)
    return taken


def _is_taken_over(settings: Settings, who: Identity, first: _Probe) -> bool:
    """Return whether a second client id of this user ends the first one's connection."""
    second = _Probe(settings, who, protocol=settings.mqtt.protocol, keep=True)
    try:
        _within(STEP_S * 3, second.connect)
    except (NoConnection, _Refused, ConfigError):
        return False
    taken = False
    try:
        first.turn(TAKEOVER_S, lambda: first.gone)
        taken = first.gone
    finally:
        second.close(forget=not taken)
    return taken


def _takeover(settings: Settings, *, taken: bool) -> Finding:
    if not taken:
        return ok(AREA, "client id", "the broker keeps the client ids of one user apart")
    cameras, jobs = _camera_identity(settings), identity("mqtt", settings.mqtt)
    if (cameras.username, cameras.cert) != (jobs.username, jobs.cert):
        return ok(
            AREA,
            "client id",
            "the broker makes the user name the client id; cameras have their own",
        )
    return failed(
        AREA,
        "client id",
        "the broker makes the user name the client id: the camera connection takes the job "
        "connection's place, and requests that wait at the broker are lost. This check just did so "
        "for a moment; a running edged connects again",
        "make a user for cameras at the broker and set cameras.username and cameras.password_file, "
        "or set cameras.max = 0",
    )


def _limits(settings: Settings, probe: _Probe) -> Iterator[Finding]:
    properties = probe.properties
    if getattr(properties, "MaximumQoS", 1) == 0:
        yield failed(
            AREA,
            "QoS",
            "the broker allows QoS 0 only: no job could be acknowledged",
            "allow QoS 1 in the broker's settings",
        )
    if not getattr(properties, "RetainAvailable", 1):
        yield warning(
            AREA,
            "retain",
            "the broker keeps no retained messages: status and info are seen only as they are sent",
            "allow retained messages in the broker's settings",
        )
    most = getattr(properties, "MaximumPacketSize", None)
    if most is not None and most < SMALL_PACKET:
        yield warning(
            AREA,
            "packet size",
            f"the broker takes packets of up to {most} bytes: longer answers end as too_large",
            "raise the broker's packet limit (mosquitto: max_packet_size)",
        )
    kept = getattr(properties, "SessionExpiryInterval", None)
    if kept is not None and kept < settings.mqtt.session_expiry_s and not _is_anonymous(settings):
        yield warning(
            AREA,
            "session",
            f"the broker keeps requests for an absent edged for {kept} s only, not "
            f"mqtt.session_expiry_s ({settings.mqtt.session_expiry_s} s)",
            "raise the broker's limit of the session expiry, or lower mqtt.session_expiry_s",
        )


def _is_anonymous(settings: Settings) -> bool:
    return identity("mqtt", settings.mqtt).anonymous


def _check_other(settings: Settings, who: Identity, topic: str) -> Iterator[Finding]:
    """Check another connection, and that it may subscribe to a topic."""
    probe = _Probe(settings, who, protocol=settings.mqtt.protocol, keep=False)
    try:
        _within(STEP_S * 3, probe.connect)
    except (NoConnection, _Refused, ConfigError) as error:
        yield _refusal(settings, who, error)
        return
    objection = probe.subscribe(topic) if topic else None
    probe.close(forget=False)
    if objection:
        yield failed(
            AREA,
            who.name,
            f"the broker refuses a subscription to {topic}: {objection}",
            "let this user read that topic in the broker's access list, or set cameras.max = 0",
        )
        return
    name = who.username or ("the certificate" if who.cert else "a second connection")
    yield ok(AREA, who.name, f"the broker takes {name}")


def _refusal(
    settings: Settings, who: Identity, error: NoConnection | _Refused | ConfigError
) -> Finding:
    """Say why a connection was not made, and what helps."""
    if isinstance(error, ConfigError):
        return failed(AREA, who.name, error.message, "correct that setting")
    if isinstance(error, NoConnection):
        return failed(AREA, who.name, str(error), _remedy(str(error), settings))
    if error.code in _BAD_USER:
        user = f"{who.name}.username and {who.name}.password_file"
        return failed(
            AREA,
            who.name,
            f"the broker refuses {who.username or 'a connection without a user name'}: "
            f"{error.reason}",
            f"correct {user}, or make that user at the broker",
        )
    if error.code == _BAD_ID:
        return warning(
            AREA,
            who.name,
            "the broker takes only client ids it knows, so nothing more can be seen from here",
            f"let it take {settings.mqtt.client_id} and {settings.mqtt.client_id}-cameras",
        )
    if settings.mqtt.protocol == "5" and error.code in {None, 1, _BAD_PROTOCOL}:
        old = _Probe(settings, who, protocol="3.1.1", keep=not who.anonymous)
        with suppress(NoConnection, _Refused, ConfigError):
            _within(STEP_S * 3, old.connect)
            old.close(forget=not old.session_present)
            return failed(
                AREA,
                who.name,
                "the broker does not speak MQTT 5, but 3.1.1",
                'set mqtt.protocol = "3.1.1"',
            )
    return failed(
        AREA,
        who.name,
        f"the broker refuses the connection: {error.reason}",
        "look into the broker's log; is there an MQTT broker (not a web server) on this port?",
    )


# Waiting ----------------------------------------------------------------------------------------


def _within(seconds: float, work: Callable[[], _T]) -> _T:
    """Do something in a thread that is left behind if it hangs: a name lookup cannot be stopped.

    Raises:
        NoConnection: it took too long.
    """
    done: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            done.put((None, error))

    threading.Thread(target=run, name="edged.check", daemon=True).start()
    try:
        value, error = done.get(timeout=seconds)
    except queue.Empty:
        raise NoConnection(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # None is what `work` returned then
