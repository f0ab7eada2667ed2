"""The errors edged raises: one root, and the codes that outside programs see."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class Code(StrEnum):
    """Why a request was refused or a job ended in an error, as it stands on the wire."""

    INVALID = "invalid"
    TOO_LARGE = "too_large"
    TOO_LONG = "too_long"
    UNSUPPORTED = "unsupported"
    FORBIDDEN_REPLY = "forbidden_reply"
    QUEUE_FULL = "queue_full"
    DISK_FULL = "disk_full"
    MEMORY = "memory"
    CONFLICT = "conflict"
    UNKNOWN_JOB = "unknown_job"
    RETAINED = "retained"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    BAD_FRAME = "bad_frame"
    NO_FRAMES = "no_frames"
    BAD_OUTPUT = "bad_output"
    DEAD = "dead"
    STOPPING = "stopping"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later, unchanged."""
        return self in _RETRYABLE


_RETRYABLE = frozenset(
    {Code.QUEUE_FULL, Code.DISK_FULL, Code.MEMORY, Code.NO_FRAMES, Code.STOPPING, Code.BAD_OUTPUT}
)


class EdgedError(Exception):
    """The root of everything edged raises on purpose; `hint` says what to do about it."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(EdgedError):
    """The configuration is wrong; one line a mistake in `mistakes`."""

    exit_status = 78

    def __init__(self, mistakes: list[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes


class BrokerUnreachable(EdgedError):
    """No connection to the broker could be made."""

    exit_status = 69


class _Coded(EdgedError):
    def __init__(self, code: Code, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s


class Refused(_Coded):
    """A request is not taken; it never became a job."""


class JobFailed(_Coded):
    """An accepted job ends with an `error` final."""


class JobStopped(EdgedError):
    """The engine stopped working on a job because the daemon told it to."""


class DeathReason(StrEnum):
    """Why an engine process ended."""

    SIGNAL = "signal"
    DEADLINE = "deadline"
    OOM = "oom"
    EXIT = "exit"
    GARBAGE = "garbage"


class EngineDied(EdgedError):
    """The engine process ended while it had work."""

    def __init__(self, reason: DeathReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ConnectionLost(EdgedError):
    """The connection went before the broker answered; whether it has the message is unknown."""


class BadPublish(EdgedError):
    """A message that must not be published: bad topic name, too large, or a foreign topic."""


class JournalUnavailable(EdgedError):
    """The journal cannot be read or written now; it is tried again."""


class JournalFull(JournalUnavailable):
    """The journal's quota or the disk is full."""


class FramesFull(JournalFull):
    """The frames of the jobs that wait take the room they may: `state.frames_mb`."""

    def __init__(self, message: str, *, hint: str | None = None, in_memory: bool) -> None:
        super().__init__(message, hint=hint)
        #: The room is memory; else it is on the disk.
        self.in_memory = in_memory


class Loss(StrEnum):
    """How the frames of a job were lost."""

    MISSING = "missing"
    DAMAGED = "damaged"
    #: They were in memory only, and that was another process.
    MEMORY = "memory"


class FramesLost(EdgedError):
    """The frames of an accepted job are gone for good; the job can only be ended."""

    def __init__(self, reason: Loss, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class JournalTooNew(EdgedError):
    """The journal was written by a newer edged; it has not been touched."""

    exit_status = 78


class JobGone(EdgedError):
    """The journal has no open job of this number: it ended, or the journal was reset."""


class StateDirLocked(EdgedError):
    """Another process uses this state directory."""
