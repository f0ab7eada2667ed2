"""Topic names: ours, the requests', and which ones we may publish on.

The rules for topic names are those of MQTT 5 sections 1.5.4 and 4.7, narrowed: a QoS 1 publish that
a broker answers by closing the connection is sent again at every reconnect, so a name that any
broker might choke on never leaves this process.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from edged.errors import BadPublish
from edged.jobs import Key, Kind

MAX_TOPIC_BYTES = 256
MAX_TOPIC_LEVELS = 16
MAX_CORRELATION_BYTES = 1024

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
JOB_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}\Z")

_REQUESTS = frozenset((*Kind, "cancel"))
#: First level below a device's root of every topic that belongs to the device itself.
_OWN = frozenset({"request", "response", "camera", "status", "info", "health", "refused"})


@dataclass(frozen=True, slots=True)
class RequestTopic:
    """A parsed request topic; `client` is None on the anonymous topic."""

    request: str  # "text", "vision" or "cancel"
    client: str | None


class Topics:
    """The names under one device's root, `<base>/<device>`."""

    def __init__(self, base: str, device: str) -> None:
        self.base = base
        self.root = f"{base}/{device}"
        self.status = f"{self.root}/status"
        self.info = f"{self.root}/info"
        self.health = f"{self.root}/health"
        self.refused = f"{self.root}/refused"
        #: The filter that the camera connection subscribes to, at QoS 0.
        self.camera_frames = f"{self.root}/camera/+/frame"
        #: The filter of what is told about cameras.
        self.camera_statuses = f"{self.root}/camera/+/status"

    @property
    def requests(self) -> tuple[str, ...]:
        """The filters that the job connection subscribes to, at QoS 1."""
        kinds = (*Kind, "cancel")
        return tuple(f"{self.root}/request/{kind}{tail}" for kind in kinds for tail in ("", "/+"))

    def request(self, kind: str, client: str | None = None) -> str:
        """Return the topic on which a request of this kind is published."""
        return f"{self.root}/request/{kind}" + (f"/{client}" if client else "")

    def response(self, key: Key) -> str:
        """Return the default topic for a job's events."""
        return f"{self.root}/response/" + (f"{key.client}/{key.id}" if key.client else key.id)

    def parse_request(self, topic: str) -> RequestTopic | None:
        """Return what kind of request a topic carries and for whom; None if it is no request topic.

        A client name outside [A-Za-z0-9_-]{1,64} is returned as it is: intake refuses it.
        """
        prefix = f"{self.root}/request/"
        if not topic.startswith(prefix):
            return None
        kind, slash, client = topic[len(prefix) :].partition("/")
        if kind not in _REQUESTS:
            return None
        return RequestTopic(kind, client if slash else None)

    def camera_status(self, camera: str) -> str:
        """Return the topic on which is told how a camera does."""
        return f"{self.root}/camera/{camera}/status"

    def parse_frame(self, topic: str) -> str | None:
        """Return the camera of a frame's topic as it is written there; None: it is no such topic.

        A name outside [A-Za-z0-9_-]{1,64} is returned as it is.
        """
        prefix, tail = f"{self.root}/camera/", "/frame"
        if not (topic.startswith(prefix) and topic.endswith(tail)):
            return None
        name = topic[len(prefix) : -len(tail)]
        return None if "/" in name else name

    def may_reply(self, topic: str, prefixes: tuple[str, ...]) -> bool:
        """Return whether a requester may have its events sent to this topic."""
        if fault(topic) is not None or self._is_some_devices_own(topic):
            return False
        return any(_under(topic, prefix) for prefix in prefixes)

    def _is_some_devices_own(self, topic: str) -> bool:
        if not topic.startswith(f"{self.base}/"):
            return False
        levels = topic[len(self.base) + 1 :].split("/")
        return len(levels) > 1 and levels[0] != "reply" and levels[1] in _OWN


def _under(topic: str, prefix: str) -> bool:
    if prefix.endswith("/"):
        return len(topic) > len(prefix) and topic.startswith(prefix)
    return topic == prefix or topic.startswith(f"{prefix}/")


def fault(topic: str) -> str | None:
    """Return what is wrong with a topic name that is to be published on, or None."""
    try:
        size = len(topic.encode())
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    if not 1 <= size <= MAX_TOPIC_BYTES:
        return f"it has {size} bytes, allowed are 1 to {MAX_TOPIC_BYTES}"
    if topic.count("/") >= MAX_TOPIC_LEVELS:
        return f"it has more than {MAX_TOPIC_LEVELS} levels"
    if "+" in topic or "#" in topic:
        return "it has a wildcard"
    if topic.startswith("$"):
        return "it starts with $"
    if topic.isascii() and topic.isprintable():  # nearly all are: every publish comes by here
        return None
    if any(unicodedata.category(c) in {"Cc", "Cs"} or ord(c) & 0xFFFE == 0xFFFE for c in topic):
        return "it has a control character or a non-character"
    if any(0xFDD0 <= ord(c) <= 0xFDEF for c in topic):
        return "it has a control character or a non-character"
    return None


def validate_publish(
    topic: str, payload_bytes: int, correlation: bytes | None, maximum_packet_size: int | None
) -> None:
    """Raise BadPublish for anything that could make a broker close the connection.

    Every publish of every connection goes through here. `maximum_packet_size` is the broker's, in
    bytes; the fixed header, topic and properties are counted with room to spare.
    """
    wrong = fault(topic)
    if wrong is not None:
        raise BadPublish(f"refused to publish on a bad topic name: {wrong}")
    if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
        raise BadPublish(f"correlation data over {MAX_CORRELATION_BYTES} bytes")
    size = packet_size(topic, payload_bytes, correlation)
    if maximum_packet_size is not None and size > maximum_packet_size:
        raise BadPublish(f"a packet of {size} bytes, the broker takes {maximum_packet_size}")


def packet_size(topic: str, payload_bytes: int, correlation: bytes | None) -> int:
    """Return an upper bound of the PUBLISH packet's size in bytes."""
    headers = 5 + 2 + 2 + 4 + 5 + 3  # fixed header, topic length, packet id, property headers
    return headers + len(topic.encode()) + len(correlation or b"") + payload_bytes
