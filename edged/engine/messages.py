"""What daemon and engine process say to each other, over `edged.engine.wire`.

Daemon to engine: `load` (an Order), `run` (a Task, its frames as the body), `stop`, `ping`, `quit`.
Engine to daemon: the classes below, told apart by `t`. The daemon checks each strictly: an engine
process that has gone wrong must be noticed, not believed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from edged.engine.wire import BadMessage, Packet
from edged.errors import Code
from edged.ports import (
    Answer,
    DroppedFrame,
    EngineInfo,
    FramePlan,
    Look,
    PlannedFrame,
    Sampling,
    Task,
    Timings,
)

#: `prepare` to `token` are a job's; `load` is a process's first, `ping` an idle one's.
Stage = Literal["load", "prepare", "decode_images", "encode", "prefill", "token", "ping"]
JobStage = Literal["prepare", "decode_images", "encode", "prefill", "token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What an engine process is to load, and within which bounds."""

    #: The model's name, as requests and heartbeats say it.
    model: str
    #: The model's folder.
    path: str
    provider: Literal["auto", "cpu", "cuda"] = "auto"
    #: None: one for each physical core that we may use.
    threads: int | None = None
    #: Tokens, prompt and answer together. None: what fits, at most 4096.
    max_context: int | None = None
    #: Tokens of an answer.
    max_tokens: int = 1024
    #: None: 70 % of what is available.
    memory_mb: float | None = None
    #: What the first answer about new frames should come within; auto detail is chosen by it.
    first_token_s: float = 30.0
    #: What encoded frames may take, so that one seen again is not paid for again.
    frame_cache_mb: float = 256.0


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

#: Frames in a plan, and characters of the reason why one was dropped.
MAX_FRAMES = 4096
MAX_REASON = 200


def _possible(plan: FramePlan) -> FramePlan:
    """Return a plan that can be one, whatever the task."""
    if len(plan.used) + len(plan.dropped) > MAX_FRAMES:
        raise ValueError(f"more than {MAX_FRAMES} frames")
    for used in plan.used:
        if min(used.crops, used.tokens) < 1 or max(used.crops, used.tokens) >= _MANY:
            raise ValueError(f"{used.crops} crops and {used.tokens} tokens")
    for dropped in plan.dropped:
        if not 0 < len(dropped.reason) <= MAX_REASON:
            raise ValueError(f"a reason of {len(dropped.reason)} characters")
    indexes = [frame.index for frame in plan.used] + [frame.index for frame in plan.dropped]
    if sorted(indexes) != list(range(len(indexes))):
        raise ValueError("not each frame once")
    return plan


_MANY = 1 << 24
_Count = Annotated[int, Field(ge=0, lt=_MANY)]
_Plan = Annotated[FramePlan, AfterValidator(_possible)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What an engine process keeps from one job to the next."""

    sessions: _Count = 0
    #: MB of encoded frames, and how often one of them was used again.
    cache_mb: Annotated[float, Field(ge=0)] = 0.0
    cache_hits: Annotated[int, Field(ge=0)] = 0

    def kept(self) -> Kept:
        """Return these numbers alone, without the answers that came with them."""
        return Kept(sessions=self.sessions, cache_mb=self.cache_mb, cache_hits=self.cache_hits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Kept):
    """The model is loaded and its warm-up has passed."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["loaded"] = "loaded"
    info: EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """The model cannot be loaded, for a reason that can be told; the process ends."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["load_failed"] = "load_failed"
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """A stage of a job begins; `work` is the size of its first step, see `Desk.begin`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["begin"] = "begin"
    job: int
    stage: JobStage
    work: _Count
    done: _Count = 0
    total: _Count = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of the running stage is done; the next one is as large as `next`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["step"] = "step"
    job: int
    stage: JobStage
    work: _Count
    #: Seconds the step took, by the engine process's own clock.
    took: float
    next: _Count
    done: _Count
    total: _Count
    #: New text of the answer.
    text: str = ""
    question: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """It is decided what becomes of the job's frames."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["planned"] = "planned"
    job: int
    plan: _Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Done(Kept):
    """A job is finished."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["done"] = "done"
    job: int
    answers: tuple[Answer, ...]
    timings: Timings
    frames: _Plan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(Kept):
    """A job cannot be done; the engine lives on."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["failed"] = "failed"
    job: int
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Kept):
    """A job was ended because the daemon asked for it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["stopped"] = "stopped"
    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to a ping."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["pong"] = "pong"
    n: int


FromEngine = Loaded | LoadFailed | Begin | Step | Planned | Done | Failed | Stopped | Pong
_ADAPTER: TypeAdapter[FromEngine] = TypeAdapter(Annotated[FromEngine, Field(discriminator="t")])
_CODES = frozenset(Code)


def read(packet: Packet) -> FromEngine:
    """Return what the engine process said.

    Raises:
        BadMessage: it is not one of the messages above.
    """
    try:
        message = _ADAPTER.validate_json(packet.header)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadMessage(f"not a message of ours: {where}: {first['msg']}"[:300]) from None
    if isinstance(message, Failed) and message.code not in _CODES:
        raise BadMessage(f"an unknown code: {message.code[:40]!r}")
    return message


def load(order: Order) -> dict[str, Any]:
    """Return the message that makes an engine process load a model."""
    return {"t": "load", "order": asdict(order)}


def run(task: Task) -> dict[str, Any]:
    """Return the message that makes an engine process work on a task; see `body`."""
    fields = asdict(replace(task, look=None))
    if task.look is not None:
        look = asdict(replace(task.look, frames=()))
        fields["look"] = look | {"frames": [len(frame) for frame in task.look.frames]}
    return {"t": "run", "task": fields}


def body(task: Task) -> tuple[bytes, ...]:
    """Return what goes with `run`, one after the other: the frames."""
    return () if task.look is None else task.look.frames


def order_from(header: dict[str, Any]) -> Order:
    """Return the order of a `load` message."""
    return Order(**header["order"])


def task_from(header: dict[str, Any], body: bytes | bytearray = b"") -> Task:
    """Return the task of a `run` message."""
    fields = dict(header["task"])
    for name in ("messages", "questions", "stop"):
        fields[name] = tuple(fields[name])
    fields["sampling"] = Sampling(**fields["sampling"])
    if fields["look"] is not None:
        fields["look"] = _look_from(fields["look"], body)
    return Task(**fields)


def _look_from(fields: dict[str, Any], body: bytes | bytearray) -> Look:
    frames: list[bytes] = []
    at = 0
    with memoryview(body) as view:
        for size in fields["frames"]:
            frames.append(bytes(view[at : at + size]))
            at += size
    if at != len(body):
        raise BadMessage(f"frames of {at} bytes in a body of {len(body)}")
    plan = fields["plan"]
    if plan is not None:
        plan = FramePlan(
            tuple(PlannedFrame(**frame) for frame in plan["used"]),
            tuple(DroppedFrame(**frame) for frame in plan["dropped"]),
        )
    return Look(**{**fields, "frames": tuple(frames), "plan": plan})
