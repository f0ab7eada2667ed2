"""An independent MQTT client for tests: plain paho with its own thread, none of edged's code."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Seen:
    """A message that the observer got."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: Any


class Peer:
    """Publishes and observes, over a session that survives its own disconnects.

    `publish` returns after the broker's PUBACK; `seen` holds what arrived on `filters`, in order.
    """

    def __init__(
        self,
        port: int,
        *filters: str,
        host: str = "127.0.0.1",
        client_id: str | None = None,
        username: str | None = None,
        password: str | None = None,
        ca: str | None = None,
        qos: int = 1,
    ) -> None:
        self.seen: list[Seen] = []
        self._news = threading.Condition()
        self._subscribed = threading.Event()
        self._filters = filters
        self._qos = qos
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or f"peer-{uuid.uuid4().hex}",
            protocol=MQTTProtocolVersion.MQTTv5,
        )
        self._client.max_inflight_messages = 100
        self._client.reconnect_delay_set(1, 1)
        if ca is not None:
            self._client.tls_set(ca)
        if username is not None:
            self._client.username_pw_set(username, password)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._host, self._port = host, port

    def __enter__(self) -> Self:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600
        self._client.connect(
            self._host, self._port, keepalive=60, clean_start=False, properties=properties
        )
        self._client.loop_start()
        self.wait_connected()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        if self._filters:
            client.subscribe([(name, self._qos) for name in self._filters])
        else:
            self._subscribed.set()

    def _on_disconnect(self, *_: Any) -> None:
        self._subscribed.clear()

    def wait_connected(self) -> None:
        """Wait until it is back after the broker was away."""
        assert self._subscribed.wait(PATIENCE_S), "the observer could not come back"

    def _on_subscribe(self, *_: Any) -> None:
        self._subscribed.set()

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        with self._news:
            self.seen.append(
                Seen(
                    message.topic,
                    bytes(message.payload),
                    message.qos,
                    message.retain,
                    message.properties,
                )
            )
            self._news.notify_all()

    def publish(
        self,
        topic: str,
        payload: bytes | str = b"",
        *,
        qos: int = 1,
        retain: bool = False,
        **properties: Any,
    ) -> None:
        """Publish and wait for the answer; `properties` are named as in paho."""
        self.send(topic, payload, qos=qos, retain=retain, **properties).wait_for_publish(PATIENCE_S)

    def send(
        self,
        topic: str,
        payload: bytes | str = b"",
        *,
        qos: int = 1,
        retain: bool = False,
        **properties: Any,
    ) -> paho.MQTTMessageInfo:
        """Publish without waiting."""
        given = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        for name, value in properties.items():
            setattr(given, name, value)
        return self._client.publish(topic, payload, qos, retain, given)

    def wait(self, enough: Callable[[list[Seen]], bool], timeout_s: float = PATIENCE_S) -> None:
        """Wait until `enough(seen)`."""
        until = time.monotonic() + timeout_s
        with self._news:
            while not enough(self.seen):
                left = until - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"not seen in {timeout_s} s, but {self.seen[-20:]}")
                self._news.wait(left)

    def wait_for(self, count: int, timeout_s: float = PATIENCE_S) -> list[Seen]:
        """Wait for this many messages and return them."""
        self.wait(lambda seen: len(seen) >= count, timeout_s)
        return self.seen
