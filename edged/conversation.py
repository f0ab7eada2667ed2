"""A client's talk with one device: jobs sent, what comes back put together, and judged.

`edged demo` and `edged selftest` share it; what they show of it is theirs (`Audience`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edged import protocol
from edged.client import (
    Client,
    Denied,
    Filter,
    Presence,
    Transcript,
    Up,
    read_event,
    read_object,
)
from edged.errors import EdgedError
from edged.jobs import Key, Kind
from edged.ports import Incoming
from edged.sandbox import Child
from edged.settings import Settings
from edged.topics import Topics

#: A device that has given no sign of life for so long is not there, seconds; and, if its beats are
#: known to be further apart, for so many of them.
ABSENT_S = 5.0
ABSENT_BEATS = 3
#: The retained `info` of a device that is ready comes within this, seconds.
INFO_S = 5.0
#: Chunks are QoS 0: a last one may come after the final, within this.
LATE_S = 1.0
#: After a lost interest in a job its cancel gets this long to leave, seconds.
CANCEL_S = 0.5
_STEP_S = 0.25


@dataclass(eq=False)
class Job:
    """What came back for one job."""

    id: str
    kind: Kind
    payload: bytes = field(repr=False)
    transcript: Transcript = field(default_factory=Transcript)
    #: The different finals that came; one is right.
    finals: list[bytes] = field(default_factory=list)
    final: dict[str, Any] | None = None
    refused: dict[str, Any] | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more is to be waited for."""
        return self.final is not None or self.refused is not None

    @property
    def texts(self) -> list[str]:
        """The texts of its result: one, or one for each question."""
        final = self.final or {}
        answers = final.get("answers", [final])
        return [str(each.get("text", "")) for each in answers]

    def fault(self) -> str | None:
        """Return what is wrong with it as a job that had to have a result, whatever that says."""
        fault = self._not_one_final()
        if fault is not None or self.final is None:
            return fault
        if self.final["type"] != "result":
            return f"no result but the error {self.final['code']}: {self.final['message']}"
        if hashlib.sha256("\n".join(self.texts).encode()).hexdigest() != self.final.get("sha256"):
            return "the SHA-256 is not that of the text"
        return None

    def stream_fault(self) -> str | None:
        """Return whether its chunks are something else than the text of its result."""
        final = self.final or {}
        same = self.transcript.shown == "".join(self.texts)
        if same and final.get("attempt") == self.transcript.attempt:
            return None
        return "the chunks are not the text of the result"

    def cancel_fault(self) -> str | None:
        """Return what is wrong with it as a job that was cancelled."""
        fault = self._not_one_final()
        if fault is not None or self.final is None:
            return fault
        if self.final["type"] == "result":
            return "it ended with a result although it was cancelled"
        code = self.final["code"]
        return None if code == "cancelled" else f"its error is {code}, not cancelled"

    def _not_one_final(self) -> str | None:
        if self.refused is not None:
            return f"it was refused, {self.refused['code']}: {self.refused['message']}"
        if self.final is None:
            return "there is no final yet"
        return f"{len(self.finals)} different finals" if len(self.finals) != 1 else None


class Audience:
    """Is told what happens, as it happens; this one lets it pass."""

    def status(self, presence: Presence) -> None:
        """Take note of the device's new state."""

    def beat(self, beat: dict[str, Any]) -> None:
        """Take note of a heartbeat."""

    def event(self, event: dict[str, Any]) -> None:
        """Take note of an event of the job, before `text`."""

    def text(self, text: str) -> None:
        """Take note of the text that a chunk adds to what was shown."""


def filters(settings: Settings) -> tuple[Filter, ...]:
    """Return what a conversation's client must be subscribed to."""
    topics = Topics(settings.mqtt.base_topic, settings.device)
    answers = topics.response(Key(settings.client.username, "+"))
    return ((topics.status, 1), (topics.info, 1), (topics.health, 0), (answers, 1))


class Conversation:
    """One job after the other, over a connection that is there.

    Args:
        settings: of the device, and `[client]`.
        client: connected, with `filters`.
        audience: is told what happens.
        daemon: the device's process, if it is ours: it must live.
    """

    def __init__(
        self,
        settings: Settings,
        client: Client,
        audience: Audience | None = None,
        daemon: Child | None = None,
    ) -> None:
        self._settings = settings
        self._client = client
        self._audience = audience or Audience()
        self._daemon = daemon
        self._topics = Topics(settings.mqtt.base_topic, settings.device)
        self._job: Job | None = None
        self.presence = Presence()
        #: The device's `info`; empty before it came.
        self.info: dict[str, Any] = {}

    async def until(self, enough: Callable[[], bool], seconds: float) -> bool:
        """Take what comes until there is enough of it; return whether that was in time."""
        end = time.monotonic() + seconds
        while not enough():
            left = end - time.monotonic()
            if left <= 0:
                return False
            note = await self._client.next(min(left, _STEP_S))
            if isinstance(note, Incoming):
                self._take(note)
            elif isinstance(note, Denied):
                raise EdgedError(f"the broker does not take what we publish: {note.reason}")
            elif isinstance(note, Up) and self._job is not None and not self._job.ended:
                self._publish(self._job)  # again: its id names it
            elif note is None and self._daemon is not None:
                self._daemon.must_live()
        return True

    async def ready(self, seconds: float) -> None:
        """Wait until the device says that it is ready.

        Raises:
            EdgedError: there is no sign of it, or it is not ready in time.
        """
        presence, device = self.presence, self._settings.device
        silence = max(ABSENT_S, ABSENT_BEATS * self._settings.health.interval_s)
        if self._daemon is None and not await self.until(lambda: presence.live, silence):
            said = f"; its last status: {presence.state}" if presence.state else ""
            raise EdgedError(
                f"no sign of a device {device} under {self._topics.root}{said}",
                hint="is `edged run` running there, and is `device` right (--set device=NAME)?",
            )
        if not await self.until(lambda: presence.live and presence.state == "ready", seconds):
            what = f"is not ready after {seconds:g} s ({presence.state}: {presence.reason})"
            raise self._daemon.failed(what) if self._daemon else EdgedError(f"{device} {what}")
        # What it says of itself may come a moment later; before it was ready it was not all known.
        await self.until(self._is_known, INFO_S)

    def _is_known(self) -> bool:
        return self.info.get("instance") == self.presence.instance and bool(
            (self.info.get("capabilities") or {}).get("text")
        )

    def ask(self, job: str, kind: Kind, request: Mapping[str, Any]) -> Job:
        """Send a job; what comes back for the one before is no longer listened to."""
        payload = protocol.encode({"v": protocol.VERSION, "id": job, **request})
        self._job = asked = Job(job, kind, payload)
        self._publish(asked)
        return asked

    def _publish(self, job: Job) -> None:
        topic = self._topics.request(job.kind, self._settings.client.username)
        self._client.send(topic, job.payload)

    def cancel(self, job: Job) -> None:
        """Send a cancel."""
        body = protocol.encode({"v": protocol.VERSION, "id": job.id})
        self._client.send(self._topics.request("cancel", self._settings.client.username), body)

    async def finish(self, job: Job, seconds: float) -> None:
        """Wait for a job's end; if nobody waits for it any more, cancel it."""
        try:
            await self.until(lambda: job.ended, seconds)
        except asyncio.CancelledError:
            self.cancel(job)
            await self.until(lambda: job.ended, CANCEL_S)
            raise

    async def late(self, job: Job) -> None:
        """Wait for chunks that come after a result: nothing holds them in order."""
        if job.final is not None and job.final["type"] == "result":
            await self.until(lambda: job.stream_fault() is None, LATE_S)

    # What comes

    def _take(self, message: Incoming) -> None:
        if message.topic == self._topics.status:
            if self.presence.take(message):
                self._audience.status(self.presence)
        elif message.topic == self._topics.info:
            self.info = read_object(message.payload) or self.info
        elif message.topic == self._topics.health:
            beat = read_object(message.payload)
            if beat is not None and not message.retain:
                self._audience.beat(beat)
        elif self._job is not None:
            event = read_event(message.payload, self._job.id)
            if event is not None:
                self._event(self._job, event, message.payload or b"")

    def _event(self, job: Job, event: dict[str, Any], payload: bytes) -> None:
        kind = event["type"]
        if kind in {"started", "chunk"}:
            job.transcript.begin(event["attempt"])
        elif kind in {"result", "error"}:
            if payload not in job.finals:
                job.finals.append(payload)
            job.final = job.final or event
        elif kind == "refused":
            job.refused = event
        self._audience.event(event)
        if kind == "chunk":
            new = job.transcript.add(event["attempt"], event["seq"], event["delta"])
            self._audience.text(new)
