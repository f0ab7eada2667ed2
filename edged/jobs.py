"""What a job is, and how its time is counted across restarts and wrong clocks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Self


class Kind(StrEnum):
    """The two kinds of job, named as their request topics are."""

    TEXT = "text"
    VISION = "vision"


class State(StrEnum):
    """Where a job stands in the journal."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


class Outcome(StrEnum):
    """How a job ended, as the heartbeat's totals count it."""

    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    DEAD = "dead"


@dataclass(slots=True)
class Totals:
    """Counts since this instance began; the five outcomes are disjoint."""

    accepted: int = 0
    completed: int = 0
    failed: int = 0
    refused: int = 0
    expired: int = 0
    cancelled: int = 0
    dead: int = 0
    duplicates: int = 0

    def ended(self, outcome: Outcome) -> None:
        """Count a job's end."""
        setattr(self, outcome, getattr(self, outcome) + 1)

    def replaced(self) -> None:
        """Count a result anew as the error that was put in its place: nobody could be sent it."""
        self.completed = max(0, self.completed - 1)  # it may be an earlier instance's
        self.failed += 1


#: Engine deaths on one job (or daemon starts that find it running) after which it is given up.
MAX_DEATHS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """A moment, in every clock that may still mean something later.

    `boottime` (seconds, CLOCK_BOOTTIME) is exact within one `boot_id`. `wall` (Unix seconds) counts
    only while `synced`. `ran` is the time edged itself has run on this journal, over all starts.
    """

    boot_id: str
    boottime: float
    wall: float
    synced: bool
    ran: float

    def since(self, then: Stamp) -> float:
        """Return the seconds from `then` to this moment, never negative, never by a wrong clock."""
        if then.boot_id == self.boot_id:
            return max(0.0, self.boottime - then.boottime)
        if then.synced and self.synced:
            return max(0.0, self.wall - then.wall)
        return max(0.0, self.ran - then.ran)


@dataclass(frozen=True, slots=True)
class Reply:
    """Where a job's events go, with the correlation data that this requester wants echoed."""

    topic: str
    correlation: bytes | None = None


#: Topics that one job's events go to, at most: each repetition of a request may name another.
MAX_REPLIES = 8


def joined(replies: tuple[Reply, ...], reply: Reply) -> tuple[Reply, ...]:
    """Return the replies with another one: the newest of a topic; of too many, the first stays."""
    every = (*(each for each in replies if each.topic != reply.topic), reply)
    return every if len(every) <= MAX_REPLIES else (every[0], *every[2:])


@dataclass(frozen=True, slots=True)
class Key:
    """A job's name: ids are unique within a client; `client` is None for anonymous requests."""

    client: str | None
    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A request that has passed intake and is to become a job."""

    key: Key
    kind: Kind
    #: The request as parsed JSON, without `reply_to` and without the bytes of frames; erased from
    #: the journal at the end.
    request: dict[str, Any]
    #: SHA-256 of kind and request; tells a redelivery from a conflict.
    digest: bytes
    reply: Reply
    priority: int
    arrived: Stamp
    #: Seconds from arrival after which the job is expired; None: never.
    deadline_s: float | None
    #: The frames as received, oldest first.
    frames: tuple[bytes, ...] = field(default=(), repr=False)
    #: How many answers its result may have.
    answers: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An accepted job that has not ended."""

    seq: int
    key: Key
    kind: Kind
    request: dict[str, Any] = field(repr=False)
    digest: bytes = field(repr=False)
    replies: tuple[Reply, ...]
    priority: int
    arrived: Stamp
    deadline_s: float | None
    #: Starts so far; the `attempt` of its events.
    starts: int = 0
    #: Engine deaths and crashed daemons on this job so far; see MAX_DEATHS.
    deaths: int = 0
    #: How many frames it has; the journal keeps them.
    frames: int = 0
    answers: int = 1
    #: What was decided about its frames at its first start, as JSON.
    plan: dict[str, Any] | None = field(default=None, repr=False)
    #: Whether it survives a crash: False while its frames are in memory only.
    durable: bool = True

    def evolve(self, **changes: Any) -> Self:
        """Return a copy with these fields changed."""
        return replace(self, **changes)

    def left_s(self, now: Stamp) -> float | None:
        """Return the seconds to this job's deadline (negative: past it); None without one."""
        if self.deadline_s is None:
            return None
        return self.deadline_s - now.since(self.arrived)

    def log_context(self) -> dict[str, Any]:
        """Return the fields that name this job in a log line."""
        context: dict[str, Any] = {"job": self.key.id, "kind": str(self.kind)}
        if self.key.client is not None:
            context["client"] = self.key.client
        return context
