"""The three outside things the core talks to: a clock, a broker, an engine.

Each port has a real adapter and an in-memory twin in `edged.testing`; one contract suite runs
against both (tests/contract).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypedDict

from edged.jobs import Stamp

#: Called with a label at every step whose interruption a test may want to force; see
#: `edged.testing`. In production it does nothing.
Trace = Callable[[str], None]


def no_trace(_label: str) -> None:
    """Do nothing: the production trace."""


# Clock ------------------------------------------------------------------------------------------


class Clock(Protocol):
    """Time. Timers use `monotonic`; `stamp` is what may be stored."""

    def monotonic(self) -> float:
        """Return seconds from an arbitrary start, never going back; stops during suspend or not."""
        ...

    def stamp(self) -> Stamp:
        """Return this moment in every clock there is."""
        ...

    def resume(self, ran: float) -> None:
        """Tell how long edged had run on this journal before this start, in seconds."""
        ...


# Broker -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an ack needs: a packet id, and the connection within which it means this message."""

    generation: int
    mid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """A message from the broker."""

    topic: str
    #: None: the inbound byte budget was full and the bytes were let go; `size` tells how many.
    payload: bytes | None = field(repr=False)
    size: int
    qos: int
    retain: bool = False
    duplicate: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    #: The MQTT 5 user property `ts`, as it came.
    ts: str | None = None
    receipt: Receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A message for the broker."""

    topic: str
    payload: bytes = field(repr=False)
    qos: Literal[0, 1] = 0
    retain: bool = False
    correlation: bytes | None = None
    #: MQTT 5 message expiry, seconds; left out on 3.1.1.
    expiry_s: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One connection that the broker has accepted, with the limits it set in its CONNACK."""

    generation: int
    session_present: bool
    #: How many QoS 1 messages may be unacknowledged at once.
    receive_maximum: int = 65535
    maximum_packet_size: int | None = None
    maximum_qos: int = 1
    retain_available: bool = True


@dataclass(frozen=True, slots=True)
class PubAck:
    """The broker's answer to a QoS 1 publish. `failed`: it did not take the message."""

    failed: bool
    reason: str


class BusListener(Protocol):
    """What a bus calls, on the event loop, in the order things happened. Must not block."""

    def on_connected(self, session: Session) -> None:
        """Take note of a new connection; a kept session's messages may come before the grants."""
        ...

    def on_subscribed(self, refused: tuple[str, ...]) -> None:
        """Take note that the broker answered the subscriptions; `refused` names the failed ones."""
        ...

    def on_disconnected(self, reason: str) -> None:
        """Take note that the connection is gone: its receipts and unanswered publishes are void.

        Also called, with the reason, for an attempt that never became a connection.
        """
        ...

    def on_message(self, message: Incoming) -> None:
        """Take a message."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BusState:
    """How the connection is; a snapshot."""

    connected: bool
    reconnects: int
    last_reason: str | None
    #: The client id was taken over repeatedly: somebody else uses it.
    stolen: bool = False


#: Takes a message where it arrives, on whatever thread that is; must be quick.
Sink = Callable[[Incoming], None]


class Bus(Protocol):
    """A connection to a broker that comes back by itself."""

    async def run(self, listener: BusListener) -> None:
        """Connect, and connect again whenever the connection goes, until `close`.

        Cancelled, it drops the connection without a goodbye: the broker publishes the will. A
        listener that raises is logged and called again at the next event.
        """
        ...

    @property
    def state(self) -> BusState:
        """How the connection is."""
        ...

    @property
    def session(self) -> Session | None:
        """The live connection's limits; None while there is none."""
        ...

    def publish(self, message: Outgoing) -> asyncio.Future[PubAck]:
        """Send at QoS 1. The future gets the broker's answer.

        It fails with ConnectionLost when the connection goes first (or there is none), and with
        BadPublish, at once, for what `topics.validate_publish` forbids. The caller keeps within
        `session.receive_maximum`.
        """
        ...

    def offer(self, message: Outgoing) -> bool:
        """Send at QoS 0 if the connection is up and not congested; return whether it was sent.

        What `topics.validate_publish` forbids is not sent either; it is logged.
        """
        ...

    def ack(self, receipt: Receipt) -> None:
        """Acknowledge a QoS 1 message; nothing happens if its connection is gone."""
        ...

    def stuck(self) -> str | None:
        """Return why the network thread seems to be stuck past its own announced wait, or None."""
        ...

    async def close(self, farewell: Outgoing | None = None, timeout_s: float = 5.0) -> None:
        """Publish `farewell` at QoS 1, wait for its answer, disconnect cleanly, end `run`.

        A farewell that the broker does not take in `timeout_s` seconds leaves the word to the will.
        """
        ...


# Cameras ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """A frame that a camera sent: JPEG or PNG bytes, and when it was taken (Unix seconds)."""

    data: bytes = field(repr=False)
    ts: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which of a camera's frames a job wants: the newest `last`, or those of a growing window."""

    camera: str
    last: int | None = None
    #: With `last`: spread evenly over the newest so many seconds.
    span_s: float | None = None
    max_age_s: float | None = None
    #: The fewest and the most frames of the window.
    window: tuple[int, int] | None = None


class FrameSource(Protocol):
    """What cameras have sent lately."""

    def choose(self, choice: Choice, client: str | None) -> tuple[Shot, ...]:
        """Return the frames, oldest first.

        Raises:
            Refused: `no_frames`; it says how many there are and how old the newest is.
        """
        ...

    def trim(self, choice: Choice, client: str | None, since: float) -> None:
        """Take note that the engine looks at a growing window only from this frame on.

        The window of that choice begins with it from now on: what comes is put behind it.

        Args:
            choice: As given to `choose`; without a window nothing happens.
            client: As given to `choose`.
            since: The `ts` of the first frame that the engine used.
        """
        ...


# Engine -----------------------------------------------------------------------------------------


class EngineState(StrEnum):
    """What the engine process does, as the heartbeat says it."""

    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"
    BACKOFF = "backoff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Greedy unless `temperature` is given and above 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    seed: int | None = None  # None: a fresh one each run
    repetition_penalty: float = 1.0


class Turn(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    #: Text; or text and frames in their order, a frame being its index.
    content: str | list[str | int]


Detail = Literal["low", "auto", "high"]


@dataclass(frozen=True, slots=True)
class PlannedFrame:
    """A frame that the model gets to see. `crops` leaves out the global view, `tokens` does not."""

    index: int
    crops: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DroppedFrame:
    """A frame that the model does not get to see, and why."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class FramePlan:
    """What becomes of a job's frames; made at its first start and kept from then on."""

    used: tuple[PlannedFrame, ...]
    dropped: tuple[DroppedFrame, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The frames of a task, and how closely to look at them."""

    #: JPEG or PNG as received, oldest first; nothing has looked inside.
    frames: tuple[bytes, ...] = field(repr=False)
    detail: Detail = "auto"
    #: The frames are a camera's growing window: where it begins anew, so many of the newest stay.
    window_min: int | None = None
    #: Seconds left to the job's deadline.
    left_s: float | None = None
    #: The plan of an earlier start.
    plan: FramePlan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the engine is asked to do for one start of a job."""

    job: int
    #: Prefixes of the KV cache are shared within one client only.
    client: str | None
    #: In order; the last is the user's.
    messages: tuple[Turn, ...] = field(repr=False)
    #: Each is put at the end of the last message and answered, one after the other. Empty: the
    #: messages are the one question.
    questions: tuple[str, ...] = field(default=(), repr=False)
    look: Look | None = None
    sampling: Sampling = Sampling()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    #: A JSON schema that the answer must satisfy.
    schema: dict[str, Any] | bool | None = None


Stage = Literal["prepare", "decode_images", "encode", "prefill", "token"]


@dataclass(frozen=True, slots=True)
class Progress:
    """A stage moved: `done` of `total` (tokens or frames)."""

    stage: Stage
    done: int
    total: int
    question: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of the answer; whole UTF-8 characters, never part of a stop string."""

    text: str
    question: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts; `image_tokens` and `cached_tokens` are parts of `prompt_tokens`."""

    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A finished text. `json` is the parsed value when a schema was asked for."""

    text: str
    finish_reason: Literal["stop", "length", "stop_string"]
    usage: Usage
    json: Any = None
    has_json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Milliseconds by stage, of one start; `ttft_ms` runs from the start of the engine's work."""

    decode_images_ms: float = 0.0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    generate_ms: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """The last update of a run that succeeded."""

    answers: tuple[Answer, ...]
    timings: Timings
    #: What became of the frames; None for a text task.
    frames: FramePlan | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """It is decided what becomes of the job's frames."""

    plan: FramePlan


Update = Progress | Delta | Planned | Completed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """The loaded model and what it can do on this box."""

    model: str
    provider: Literal["cpu", "cuda"]
    threads: int
    max_context: int
    vision: bool
    json_schema: bool
    #: The memory plan in MB, by its parts, and their total and limit; see `engine.memory`.
    memory: dict[str, float]
    versions: dict[str, str]
    #: Why there is no vision, with what to do about it; None if there is.
    no_vision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """A snapshot for the heartbeat. `trouble`: why it cannot work now, None if it can."""

    state: EngineState
    restarts: int
    last_reason: str | None
    trouble: str | None
    rss_mb: float | None = None
    sessions: int = 0
    frame_cache_mb: float = 0.0
    frame_cache_hits: int = 0


class Engine(Protocol):
    """A model that works on one task at a time, in a process that may end at any moment."""

    async def run(self) -> None:
        """Keep an engine loaded, starting it again with backoff when it ends, until `close`."""
        ...

    @property
    def status(self) -> EngineStatus:
        """How the engine is."""
        ...

    @property
    def info(self) -> EngineInfo | None:
        """What is loaded; the last loaded one while it restarts, None before the first load."""
        ...

    async def wait_ready(self) -> EngineInfo:
        """Wait until a task can be executed."""
        ...

    def execute(self, task: Task) -> AsyncIterator[Update]:
        """Work on a task and yield what happens; the last update is `Completed`.

        Raises:
            JobFailed: the job cannot be done (too_long, memory, invalid, bad_output, …); the engine
                lives on.
            JobStopped: `stop` was called.
            EngineDied: the process ended, for whatever reason.
        """
        ...

    def stop(self, job: int) -> None:
        """Ask for this task's end, between two chunks of prefill or two tokens."""
        ...

    def stuck(self) -> str | None:
        """Return why the watchdog should no longer be fed on the engine's account, or None."""
        ...

    def history(self) -> dict[str, Any]:
        """Return what its stages have cost on this box, as small JSON, to be kept over restarts."""
        ...

    def recall(self, history: Mapping[str, Any]) -> None:
        """Take in what `history` returned in an earlier start; called before `run`."""
        ...

    async def close(self) -> None:
        """End the process and `run`."""
        ...
