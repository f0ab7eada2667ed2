"""What daemon and engine process say to each other, over `edged.engine.wire`.

Daemon to engine: `load` (an Order), `run` (a Task), `stop`, `ping`, `quit`. Engine to daemon: the
classes below, told apart by `t`. The daemon checks each strictly: an engine process that has gone
wrong must be noticed, not believed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from edged.engine.wire import BadMessage, Packet
from edged.errors import Code
from edged.ports import Answer, EngineInfo, Sampling, Task, Timings

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


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The model is loaded and its warm-up has passed."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["loaded"] = "loaded"
    info: EngineInfo
    sessions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """The model cannot be loaded, for a reason that can be told; the process ends."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["load_failed"] = "load_failed"
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """A stage of a job begins; `work` is the size of its first step (tokens, frames, or 1)."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["begin"] = "begin"
    job: int
    stage: JobStage
    work: int
    done: int = 0
    total: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of the running stage is done; the next one is as large as `next`."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["step"] = "step"
    job: int
    stage: JobStage
    work: int
    #: Seconds the step took, by the engine process's own clock.
    took: float
    next: int
    done: int
    total: int
    #: New text of the answer.
    text: str = ""
    question: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A job is finished."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["done"] = "done"
    job: int
    answers: tuple[Answer, ...]
    timings: Timings
    sessions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A job cannot be done; the engine lives on."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["failed"] = "failed"
    job: int
    code: str
    message: str
    sessions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A job was ended because the daemon asked for it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["stopped"] = "stopped"
    job: int
    sessions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """The answer to a ping."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT
    t: Literal["pong"] = "pong"
    n: int


FromEngine = Loaded | LoadFailed | Begin | Step | Done | Failed | Stopped | Pong
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
    """Return the message that makes an engine process work on a task."""
    return {"t": "run", "task": asdict(task)}


def order_from(header: dict[str, Any]) -> Order:
    """Return the order of a `load` message."""
    return Order(**header["order"])


def task_from(header: dict[str, Any]) -> Task:
    """Return the task of a `run` message."""
    fields = dict(header["task"])
    fields["messages"] = tuple(fields["messages"])
    fields["stop"] = tuple(fields["stop"])
    fields["sampling"] = Sampling(**fields["sampling"])
    return Task(**fields)
