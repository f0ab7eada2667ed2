"""What clients share: a connection, a job's text, a device's presence.

A client is somebody else than the daemon: it connects with the `[client]` settings and a client id
of its own, keeps no session, and asks again after a lost connection. That is safe, because a job's
id names it.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from edged.errors import BadPublish, BrokerUnreachable, EdgedError
from edged.mqtt import Connection, MqttBus
from edged.ports import Bus, Incoming, Outgoing, PubAck, Session
from edged.settings import Settings, read_password

#: A broker that has not answered after this long is not reachable, seconds.
CONNECT_S = 8.0
#: Leaving may take this long, seconds.
CLOSE_S = 1.0
#: What a device retains is believed for this many of its beats.
FRESH_BEATS = 3

_RECEIVE_MAXIMUM = 64

Filter = tuple[str, Literal[0, 1]]


# The connection ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Up:
    """The connection is there (again), and subscribed."""


@dataclass(frozen=True, slots=True)
class Down:
    """The connection is gone; it comes back by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class Denied:
    """The broker, or our own check, did not take what `Client.send` was given."""

    reason: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Somebody wants the program to end."""

    signal: int


Note = Up | Down | Denied | Interrupted | Incoming


class Client:
    """A connection as a client, for `async with`; what happens on it comes as notes, in order.

    Args:
        settings: where the broker is, and the `[client]` to connect as.
        purpose: stands in the client id.
        filters: what to subscribe to; what is retained there comes first.
        bus: instead of a connection of its own, for tests.
    """

    def __init__(
        self, settings: Settings, purpose: str, *filters: Filter, bus: Bus | None = None
    ) -> None:
        self._settings = settings
        self._bus = bus or MqttBus(connection(settings, purpose, filters))
        self._notes: asyncio.Queue[Note] = asyncio.Queue()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._run: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            BrokerUnreachable: with the reason.
            EdgedError: the broker refuses a subscription.
        """
        self._run = asyncio.create_task(self._bus.run(self), name="mqtt")
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._first
        except TimeoutError:
            await self._leave()
            raise self._unreachable(
                self._bus.state.last_reason or f"no answer within {CONNECT_S:g} s"
            ) from None
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say goodbye to the broker."""
        await self._leave()

    async def _leave(self) -> None:
        if not self._first.done():
            self._first.cancel()
        await self._bus.close(timeout_s=CLOSE_S)
        if self._run is not None:
            self._run.cancel()
            with suppress(asyncio.CancelledError):
                await self._run

    def _unreachable(self, reason: str) -> BrokerUnreachable:
        mqtt = self._settings.mqtt
        return BrokerUnreachable(
            f"the broker at {mqtt.host}:{mqtt.port} cannot be reached: {reason}",
            hint="look at mqtt.host, mqtt.port, mqtt.tls and [client]; `edged check` tells more",
        )

    async def next(self, timeout_s: float) -> Note | None:
        """Return the next note; None if there is none within this time (inf: wait for ever)."""
        if not self._notes.empty():
            return self._notes.get_nowait()
        try:
            async with asyncio.timeout(None if math.isinf(timeout_s) else max(0.0, timeout_s)):
                return await self._notes.get()
        except TimeoutError:
            return None

    def interrupt(self, signal: int) -> None:
        """Put a note that somebody wants the program to end."""
        self._notes.put_nowait(Interrupted(signal))

    def send(self, topic: str, payload: bytes, expiry_s: float | None = None) -> None:
        """Publish at QoS 1.

        A broker that refuses comes as `Denied`. What a lost connection swallows is not sent again:
        the next `Up` is the time for that.
        """
        expiry = None if expiry_s is None or math.isinf(expiry_s) else max(1, math.ceil(expiry_s))
        message = Outgoing(topic=topic, payload=payload, qos=1, expiry_s=expiry)
        self._bus.publish(message).add_done_callback(self._sent)

    def _sent(self, answer: asyncio.Future[PubAck]) -> None:
        error = None if answer.cancelled() else answer.exception()
        if isinstance(error, BadPublish):
            self._notes.put_nowait(Denied(error.message))
        elif error is None and not answer.cancelled() and answer.result().failed:
            self._notes.put_nowait(Denied(answer.result().reason))

    # The bus's listener

    def on_connected(self, _session: Session) -> None:
        """Wait on: without subscriptions a connection is of no use."""

    def on_subscribed(self, refused: tuple[str, ...]) -> None:
        """Note that the connection is up."""
        if not self._first.done():
            if refused:
                user = self._settings.client.username
                who = f"the user {user}" if user else "a client without a user name"
                self._first.set_exception(
                    EdgedError(
                        f"the broker does not let {who} read {', '.join(refused)}",
                        hint="set client.username to one that may, or allow it in the broker's ACL",
                    )
                )
                return
            self._first.set_result(None)
        self._notes.put_nowait(Up())

    def on_disconnected(self, reason: str) -> None:
        """Note that the connection is gone, or give up if there never was one."""
        if not self._first.done():
            self._first.set_exception(self._unreachable(reason))
        self._notes.put_nowait(Down(reason))

    def on_message(self, message: Incoming) -> None:
        """Note a message."""
        self._notes.put_nowait(message)
        if message.qos:
            self._bus.ack(message.receipt)


def connection(settings: Settings, purpose: str, filters: tuple[Filter, ...]) -> Connection:
    """Return how a client connects: as `[client]`, never with the daemon's client id.

    Raises:
        ConfigError: the password file cannot be read.
    """
    mqtt, client = settings.mqtt, settings.client
    return Connection(
        host=mqtt.host,
        port=mqtt.port,
        # MQTT 3.1.1 promises 23 characters.
        client_id=f"edged-{purpose}-{uuid.uuid4().hex[:8]}",
        username=client.username,
        password=read_password(client.password_file) if client.password_file else None,
        tls=mqtt.tls,
        ca=_text(mqtt.ca),
        cert=_text(client.cert),
        key=_text(client.key),
        protocol=mqtt.protocol,
        keepalive_s=mqtt.keepalive_s,
        clean_start=True,
        session_expiry_s=0,
        receive_maximum=_RECEIVE_MAXIMUM,
        subscriptions=filters,
        retained=True,
    )


def _text(path: object | None) -> str | None:
    return None if path is None else str(path)


# What comes in ----------------------------------------------------------------------------------


def read_object(payload: bytes | None) -> dict[str, Any] | None:
    """Return a payload's JSON object, or None: anybody may publish anything."""
    try:
        body = json.loads(payload or b"")
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


_FIELDS: dict[str, dict[str, type[Any] | tuple[type[Any], ...]]] = {
    "accepted": {"position": int},
    "started": {"attempt": int},
    "progress": {"attempt": int, "stage": str, "done": (int, float), "total": (int, float)},
    "chunk": {"attempt": int, "seq": int, "delta": str},
    "result": {"attempt": int},
    "error": {"code": str, "message": str},
    "refused": {"code": str, "message": str},
}


def read_event(payload: bytes | None, job: str) -> dict[str, Any] | None:
    """Return an event of this job, its fields as the contract has them; else None."""
    event = read_object(payload)
    if event is None or event.get("id") != job or not isinstance(event.get("type"), str):
        return None
    fields = _FIELDS.get(event["type"])
    if fields is None or not all(isinstance(event.get(n), kind) for n, kind in fields.items()):
        return None
    if event["type"] == "result" and not _has_text(event):
        return None
    return event


def _has_text(result: dict[str, Any]) -> bool:
    """Return whether a result has its text, or that of the answer to each question."""
    answers = result.get("answers", [result])
    return isinstance(answers, list) and all(
        isinstance(each, dict) and isinstance(each.get("text"), str) for each in answers
    )


class Transcript:
    """A job's text, put together from chunks that may be late, doubled or lost.

    It holds the newest attempt. `shown` is its text as far as no chunk is missing, so that what has
    been shown never needs to be taken back within an attempt.
    """

    def __init__(self) -> None:
        self.attempt = 0
        self.shown = ""
        #: Chunks of this attempt that are part of `shown`.
        self.chunks = 0
        self._ahead: dict[int, str] = {}

    def begin(self, attempt: int) -> bool:
        """Take note that this attempt runs; return whether it replaces an earlier one."""
        if attempt <= self.attempt:
            return False
        replaced = self.attempt > 0
        self.attempt, self.shown, self.chunks = attempt, "", 0
        self._ahead.clear()
        return replaced

    def add(self, attempt: int, seq: int, delta: str) -> str:
        """Take a chunk; return the text that can be shown now."""
        if attempt != self.attempt or seq < self.chunks:
            return ""
        self._ahead[seq] = delta
        new = ""
        while (following := self._ahead.pop(self.chunks, None)) is not None:
            new += following
            self.chunks += 1
        self.shown += new
        return new

    @property
    def gap(self) -> bool:
        """Whether a chunk is missing before one that came."""
        return bool(self._ahead)

    def rest(self, text: str) -> str | None:
        """Return what of the final's text was not shown; None if what was shown is not of it."""
        return text[len(self.shown) :] if text.startswith(self.shown) else None


class Presence:
    """Whether a device is there, by its `status`."""

    def __init__(self) -> None:
        #: The state it gave last; None before any.
        self.state: str | None = None
        self.reason = ""
        self.instance: str | None = None
        self.interval_s: float | None = None
        #: Seconds since it was said, if that is more than the device would be silent; else None.
        self.stale_s: float | None = None

    @property
    def live(self) -> bool:
        """Whether it says that it runs, and has said so lately."""
        return self.state not in {None, "offline"} and self.stale_s is None

    def take(self, message: Incoming) -> bool:
        """Read a status; return whether it says something new.

        An `offline` of another instance than the one that lives is the late will of an earlier one.
        """
        body = read_object(message.payload)
        if body is None or not isinstance(body.get("state"), str):
            return False
        before = (self.state, self.reason, self.instance, self.stale_s is None)
        state, instance = body["state"], body.get("instance")
        if state == "offline" and self.live and instance != self.instance:
            return False
        interval = body.get("interval_s")
        self.state, self.instance = state, instance if isinstance(instance, str) else None
        self.reason = str(body.get("reason") or "")
        self.interval_s = float(interval) if isinstance(interval, int | float) else None
        self.stale_s = None
        if message.retain and state != "offline":
            self.stale_s = stale_s(body.get("ts"), self.interval_s)
        return before != (self.state, self.reason, self.instance, self.stale_s is None)


def stale_s(ts: object, interval_s: float | None) -> float | None:
    """Return how old something retained is, if that is too old to be believed; else None.

    MQTT 5 lets such a message expire, 3.1.1 cannot. Where the clocks differ this errs to the safe
    side: what is not believed is said again within a beat.
    """
    if not isinstance(ts, int | float) or interval_s is None:
        return None
    age = time.time() - ts
    return age if abs(age) > FRESH_BEATS * interval_s else None
