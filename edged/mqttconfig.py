"""What a connection to a broker is made of: where, as whom, and how patiently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tenacity import wait_random_exponential
from tenacity.wait import wait_base

from edged.ports import Outgoing


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """Where to connect, as whom, and what to ask of the broker. Bytes and seconds."""

    host: str
    port: int = 1883
    client_id: str
    username: str | None = None
    #: A callable is asked at every connect, on the network thread.
    password: str | Callable[[], str | None] | None = field(default=None, repr=False)
    tls: bool = False
    ca: str | None = None  # None: the system's
    cert: str | None = None
    key: str | None = None
    protocol: Literal["5", "3.1.1"] = "5"
    keepalive_s: int = 30
    #: Wipe the session at every connect; with `session_expiry_s` 0 there is none at all.
    clean_start: bool = False
    #: Be sent what is retained when subscribing. Jobs never want it, whoever asks them does.
    retained: bool = False
    session_expiry_s: int = 7 * 24 * 3600  # MQTT 5; on 3.1.1 the broker decides
    receive_maximum: int = 8
    #: Announced on MQTT 5. A larger packet, on 3.1.1, arrives as a message without payload.
    maximum_packet_size: int | None = None
    #: Filters with the QoS asked for.
    subscriptions: tuple[tuple[str, Literal[0, 1]], ...] = ()
    #: Asked at every connect, on the network thread; sent by the broker when we are lost.
    will: Callable[[], Outgoing] | None = None
    #: Bytes of messages that the event loop has not consumed or, at QoS 1, not acknowledged. A
    #: message beyond it comes without payload. None: `receive_maximum`, at most 4, times
    #: `maximum_packet_size` (or 8 MiB).
    inbound_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long the bus waits for what, in seconds."""

    connect_s: float = 10.0
    connack_s: float = 10.0
    suback_s: float = 30.0
    #: A connection that lasted this long was a good one: the next wait is short again.
    lasting_s: float = 10.0
    #: With a certificate that is not valid yet the clock is about to be set.
    clock_s: float = 15.0
    #: The client id was taken over this often within `stolen_within_s`: somebody else has it.
    stolen_after: int = 3
    stolen_within_s: float = 60.0
    stolen_wait_s: float = 30.0
    #: A broker that closes this soon after connecting, saying nothing, and takes us back at the
    #: next attempt, counts as a takeover.
    soon_s: float = 5.0
    #: What is asked for the wait before the next attempt. Random, so that a broker that comes back
    #: does not meet all devices at once.
    retry: wait_base = field(
        default_factory=lambda: wait_random_exponential(multiplier=1, max=30, min=0.5)
    )
