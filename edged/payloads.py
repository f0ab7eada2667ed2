"""What edged publishes, payload by payload and field by field.

Whoever builds a payload gives it its type from here, so that mypy holds the one to the other; the
schemas that `edged schema asyncapi` prints are made from the same types. Nothing is checked while
edged runs: these types are dictionaries.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict  # pydantic reads no other before Python 3.12

from edged.errors import Code
from edged.jobs import Totals
from edged.ports import DroppedFrame, EngineState, Stage, Usage
from edged.protocol import JobId, Name

Count = Annotated[int, Field(ge=0)]
From1 = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Said = Annotated[str, Field(min_length=1)]
Instance = Annotated[
    str, Field(pattern="^[0-9a-f]{32}$", description="new at every start of the process")
]
Time = Annotated[float, Field(description="Unix seconds")]
Synced = Annotated[bool, Field(description="whether that clock was set by any other")]
Provider = Literal["cpu", "cuda"]


# How edged is -----------------------------------------------------------------------------------


class Condition(StrEnum):
    """The state in `status` and the heartbeat."""

    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"
    STOPPING = "stopping"
    OFFLINE = "offline"


class Status(TypedDict):
    """How edged is, and why."""

    v: Literal[1]
    state: Condition
    instance: Instance
    reason: Said
    ts: Time
    clock_synced: Synced
    interval_s: Annotated[float, Field(gt=0, description="seconds between two beats")]


class Capabilities(TypedDict):
    """What the loaded model can do here."""

    text: bool
    vision: bool
    json_schema: bool


class Limits(TypedDict):
    """The settings of the group `limits`, and what follows from them."""

    queue: From1
    payload_mb: Amount
    frames: From1
    max_tokens: From1
    journal_mb: Amount
    memory_mb: Amount | None
    results: From1
    results_s: Amount
    packet_bytes: Annotated[
        int, Field(ge=1, description="above it the broker drops a request, silently")
    ]
    max_context: NotRequired[Annotated[int, Field(ge=1, description="once a model is loaded")]]
    threads: NotRequired[Annotated[int, Field(ge=1, description="once a model is loaded")]]


class InfoTopics(TypedDict):
    """Where this device listens, and where it may answer."""

    root: str
    requests: list[str]
    cameras: NotRequired[str]
    reply_prefixes: list[str]


class Info(TypedDict):
    """What this edged is: versions, model, memory plan, capabilities, limits, warnings."""

    v: Literal[1]
    instance: Instance
    versions: dict[str, str]
    model: str | None
    provider: Provider | None
    memory: Annotated[
        dict[str, Amount] | None, Field(description="the memory plan, in MB, by its parts")
    ]
    capabilities: Capabilities
    limits: Limits
    topics: InfoTopics
    warnings: list[Said]
    ts: Time


class Line(TypedDict):
    """How many wait in a line, and how long the first of them."""

    depth: Count
    oldest_s: Amount


class RunningJob(TypedDict):
    """The job that the engine works on."""

    id: JobId
    client: NotRequired[Name]
    stage: Stage
    progress_age_s: Annotated[float, Field(ge=0, description="since it last moved")]


class CameraRate(TypedDict):
    """What comes from a camera."""

    fps: Amount
    newest_age_s: Amount | None


class EngineHealth(TypedDict):
    """How the engine process is."""

    state: EngineState
    restarts: Count
    last_reason: str | None
    rss_mb: Amount | None
    sessions: Count
    frame_cache_mb: Amount
    frame_cache_hits: Count


class Speed(TypedDict):
    """What recent jobs took; null before there were any."""

    ttft_ms_p50: Amount | None
    prefill_tokens_per_second: Amount | None
    tokens_per_second_p50: Amount | None


class Host(TypedDict):
    """What the box says of itself; null where it cannot."""

    cpu: Annotated[float | None, Field(ge=0, description="percent of all cores")]
    rss_mb: Amount | None
    mem_available_mb: Amount | None
    temp_c: float | None
    throttled: bool | None
    disk_free_mb: Amount | None


class MqttHealth(TypedDict):
    """How the job connection is."""

    connected: bool
    reconnects: Count
    last_reason: str | None


class Heartbeat(TypedDict):
    """The heartbeat."""

    v: Literal[1]
    seq: From1
    instance: Instance
    state: Condition
    reason: Said
    ts: Time
    clock_synced: Synced
    uptime_s: Amount
    model: str | None
    provider: Provider | None
    threads: From1 | None
    queue: Line
    job: NotRequired[RunningJob]
    cameras: NotRequired[dict[str, CameraRate]]
    outbox: Line
    totals: Totals
    engine: EngineHealth
    speed: Speed
    host: Host
    mqtt: MqttHealth


class CameraStatus(CameraRate):
    """What has come from a camera."""

    v: Literal[1]
    buffered: Count
    refused: Annotated[
        int, Field(ge=0, description="messages that were no frame, too large, or retained")
    ]
    ts: Time


# The events of a job ----------------------------------------------------------------------------

#: What a refusal may say, and what the `error` final of an accepted job.
RefusalCode = Literal[
    Code.INVALID, Code.TOO_LARGE, Code.UNSUPPORTED, Code.FORBIDDEN_REPLY, Code.QUEUE_FULL,
    Code.DISK_FULL, Code.MEMORY, Code.CONFLICT, Code.UNKNOWN_JOB, Code.RETAINED, Code.NO_FRAMES,
    Code.STOPPING,
]  # fmt: skip
FinalCode = Literal[
    Code.INVALID, Code.TOO_LARGE, Code.TOO_LONG, Code.UNSUPPORTED, Code.MEMORY, Code.EXPIRED,
    Code.CANCELLED, Code.BAD_FRAME, Code.BAD_OUTPUT, Code.DEAD,
]  # fmt: skip


class _Event(TypedDict):
    v: Literal[1]
    id: JobId
    client: NotRequired[Name]


class Accepted(_Event):
    """The job is kept, and waits."""

    type: Literal["accepted"]
    position: Annotated[int, Field(ge=0, description="jobs ahead, the running one included")]
    eta_s: NotRequired[Annotated[float, Field(ge=0, description="seconds to its likely end")]]
    durable: Annotated[bool, Field(description="whether it survives a restart")]


class Started(_Event):
    """The engine begins with the job."""

    type: Literal["started"]
    attempt: From1
    queue_ms: Amount


class Progress(_Event):
    """A stage before the first token has moved."""

    type: Literal["progress"]
    attempt: From1
    stage: Literal["decode_images", "encode", "prefill"]
    done: Count
    total: Count
    question: NotRequired[Count]


class Chunk(_Event):
    """A piece of the answer."""

    type: Literal["chunk"]
    attempt: From1
    seq: Annotated[int, Field(ge=0, description="from 0 in each attempt")]
    delta: str
    question: NotRequired[Annotated[int, Field(ge=0, description="index from 0")]]


class Timings(TypedDict):
    """Of the final's attempt; milliseconds, `ttft_ms` from its start."""

    queue_ms: Amount
    decode_images_ms: Amount
    encode_ms: Amount
    prefill_ms: Amount
    ttft_ms: Amount
    generate_ms: Amount
    tokens_per_second: Amount


class UsedFrame(TypedDict):
    """A frame that the model was shown."""

    index: Annotated[int, Field(ge=0, description="of the request's frames, from 0")]
    ts: float | None
    tokens: From1
    crops: Annotated[int, Field(ge=1, description="the small whole left out")]


class Frames(TypedDict):
    """What became of the frames."""

    used: Annotated[list[UsedFrame], Field(min_length=1)]
    dropped: list[DroppedFrame]


Parsed = Annotated[Any, Field(description="with a schema: the text, parsed")]
FinishReason = Literal["stop", "length", "stop_string"]


class OneAnswer(TypedDict):
    """The answer to one of `questions`."""

    text: str
    json: NotRequired[Parsed]
    finish_reason: FinishReason
    usage: Usage


@with_config(
    ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["text", "finish_reason"]}, {"required": ["answers"]}],
            "dependencies": {"json": ["text"]},
        }
    )
)
class Result(_Event):
    """The final of a job that succeeded: `text`, or of `questions` the `answers`."""

    type: Literal["result"]
    text: NotRequired[str]
    json: NotRequired[Parsed]
    finish_reason: NotRequired[FinishReason]
    answers: NotRequired[Annotated[list[OneAnswer], Field(min_length=1)]]
    usage: Usage
    timings: Timings
    frames: NotRequired[Frames]
    attempt: From1
    model: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="of the text, in UTF-8")]


class Error(_Event):
    """The final of a job that failed."""

    type: Literal["error"]
    code: FinalCode
    message: Said
    retryable: bool
    retry_after_s: NotRequired[Amount]


class Refused(TypedDict):
    """A request that is not taken, and is no job; `id` if it could be read."""

    v: Literal[1]
    id: NotRequired[JobId]
    type: Literal["refused"]
    client: NotRequired[Name]
    request: Literal["text", "vision", "cancel"]
    code: RefusalCode
    message: Said
    retryable: bool
    retry_after_s: NotRequired[Amount]
