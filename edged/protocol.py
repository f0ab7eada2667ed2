"""What comes in and goes out as JSON: strict parsing of requests, building of events."""

from __future__ import annotations

import binascii
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from difflib import get_close_matches
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from edged.errors import Code, Refused
from edged.jobs import Key
from edged.ports import (
    Answer,
    Choice,
    Detail,
    DroppedFrame,
    FramePlan,
    PlannedFrame,
    Sampling,
    Timings,
    Turn,
    Usage,
)
from edged.topics import JOB_ID, NAME

VERSION: Final = 1

M = TypeVar("M", bound=BaseModel)

#: Nesting, and number of values, above which a body is refused before it is built as objects:
#: ten megabytes of `[],` would hold the event loop for more than a second.
MAX_DEPTH = 32
MAX_VALUES = 10_000
_COUNT_VALUES_ABOVE = 64 * 1024
#: Mistakes of one body that are put into words, to find five that differ.
_EXPLAINED = 20

MAX_DEADLINE_S = 30 * 86400
MAX_STOP_CHARS = 256
MAX_QUESTIONS = 16


# Strict JSON ------------------------------------------------------------------------------------


def parse_json(payload: bytes) -> dict[str, Any]:
    """Parse a request body.

    Beyond RFC 8259 it must be UTF-8 without a byte order mark and an object, and may have neither
    duplicate keys, NaN or Infinity, numbers that overflow, lone surrogates, NUL characters, more
    than MAX_DEPTH levels nor more than MAX_VALUES values.

    Raises:
        Refused: `invalid`, saying what is wrong and where.
    """
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        _invalid(f"the body is not UTF-8 (byte {error.start})")
    if (
        len(payload) > _COUNT_VALUES_ABOVE
        and _separators(payload) > MAX_VALUES  # in texts, too: to leave those out is costly
        and _too_many(payload)
    ):
        _invalid(f"the body has more than {MAX_VALUES} values")
    try:
        body = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer,
            parse_float=_number,
        )  # fmt: skip
        if not isinstance(body, dict):
            _invalid("the body must be a JSON object")
        _check_tree(body)
    except json.JSONDecodeError as error:
        _invalid(f"the body is not JSON: {error.msg} (line {error.lineno} column {error.colno})")
    except RecursionError:
        _invalid(f"the body is nested more than {MAX_DEPTH} levels deep")
    return body


def _separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def _too_many(payload: bytes) -> bool:
    """Tell whether a body has more values than it may, its texts left out.

    In steps that each are quick for any bytes: a pattern for texts takes a second for escapes.
    """
    bare = payload.replace(b"\\\\", b"").replace(b'\\"', b"")
    if bare.count(b'"') > 4 * MAX_VALUES:  # of as many keys, and as many texts
        return True
    return _separators(b"".join(bare.split(b'"')[::2])) > MAX_VALUES


def _invalid(message: str) -> NoReturn:
    raise Refused(Code.INVALID, message) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _invalid(f"the key {shown(key)} stands twice in one object")
            seen.add(key)
    return body


def _no_constant(name: str) -> NoReturn:
    _invalid(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > 19:
        _invalid("an integer is too large for 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in {float("inf"), float("-inf")}:
        _invalid("a number is too large")
    return value


def _check_tree(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    values = 0
    for _ in range(MAX_DEPTH):
        values += len(level)
        if values > MAX_VALUES:
            _invalid(f"the body has more than {MAX_VALUES} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                _check_text(value)
            elif isinstance(value, dict):
                for key in value:
                    _check_text(key)
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        if not below:
            return
        level = below
    _invalid(f"the body is nested more than {MAX_DEPTH} levels deep")


def _check_text(text: str) -> None:
    if text.isascii():
        if "\0" in text:
            _invalid("a text has a NUL character")
        return
    if "\0" in text:
        _invalid("a text has a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        _invalid("a text has half of a surrogate pair (\\ud800 to \\udfff)")


def shown(name: str) -> str:
    """Return a name from a request as it may stand in a message: short, printable, quoted."""
    return ascii(name if len(name) <= 40 else f"{name[:40]}…")


# Requests ---------------------------------------------------------------------------------------

JobId = Annotated[
    str, StringConstraints(pattern=rf"^{JOB_ID.pattern.removesuffix(chr(92) + 'Z')}$")
]
Name = Annotated[str, StringConstraints(pattern=rf"^{NAME.pattern.removesuffix(chr(92) + 'Z')}$")]
Text = Annotated[str, StringConstraints(min_length=1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


def _given(name: str, **properties: Any) -> dict[str, Any]:
    """Return in JSON Schema: this field is there and not null, and other fields are like this."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}} | properties}


def _one_of(*names: str) -> dict[str, Any]:
    """Return in JSON Schema: exactly one of these fields is given."""
    return {"oneOf": [_given(name) for name in names]}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    v: int = Field(VERSION, ge=VERSION, le=VERSION, description="version of this protocol")
    id: JobId | None = Field(
        None, description="names the job within its client; absent: given by edged"
    )
    reply_to: str | None = Field(
        None, description="where the events go instead of the default response topic"
    )


class TextPart(BaseModel):
    """A piece of text in a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation, in OpenAI's shape."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Turn:
        """Return the turn with its text parts joined."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class JsonSchema(BaseModel):
    """The schema that an answer must satisfy, in OpenAI's wrapping."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What the answer must look like."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True,
        json_schema_extra={
            "oneOf": [
                {"properties": {"type": {"const": "text"}, "json_schema": {"type": "null"}}},
                _given("json_schema", type={"const": "json_schema"}),
            ]
        },
    )  # fmt: skip

    type: Literal["text", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('"json_schema" is given exactly with type "json_schema"')
        return self


class JobRequest(_Request):
    """What text and vision requests have in common."""

    system: str | None = Field(None, description="instructions that come before the prompt")
    max_tokens: int | None = Field(None, ge=1, description="most tokens to generate")
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1, le=1_000_000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=4)] | None = Field(
        None, description="texts that end the answer; not part of it"
    )
    response_format: ResponseFormat | None = None
    stream: bool = Field(True, description="false: no chunk and no progress")
    priority: int = Field(5, ge=0, le=9, description="9 first")
    deadline_s: float | None = Field(
        None, gt=0, le=MAX_DEADLINE_S, description="seconds from arrival; then it is expired"
    )
    model: str | None = Field(None, description="must name the configured model")

    def sampling(self) -> Sampling:
        """Return how to choose tokens: greedy unless the request asks for chance."""
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        asked = (self.temperature, self.top_p, self.top_k, self.seed)
        if self.temperature == 0 or all(value is None for value in asked):
            return Sampling(repetition_penalty=penalty)
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            repetition_penalty=penalty,
        )

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def schema_wanted(self) -> dict[str, Any] | bool | None:
        """Return the JSON schema that the answer must satisfy, or None."""
        wanted = self.response_format
        return wanted.json_schema.schema_ if wanted and wanted.json_schema else None


class TextRequest(JobRequest):
    """A request on `request/text`."""

    model_config = ConfigDict(json_schema_extra=_one_of("prompt", "messages"))

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _no_images(cls, messages: Any) -> Any:
        for message in messages if isinstance(messages, list) else ():
            content = message.get("content") if isinstance(message, dict) else None
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict) and part.get("type") == "image_url":
                    raise ValueError("images are taken on request/vision, this is request/text")
        return messages

    @model_validator(mode="after")
    def _one_way_to_ask(self) -> TextRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError('exactly one of "prompt" and "messages" is needed')
        if self.messages is not None:
            _check_turns(self.messages, self.system)
            if not self.messages[-1].plain()["content"]:
                raise ValueError('the last of "messages" has no text')
        return self

    def conversation(self) -> tuple[Turn, ...]:
        """Return the turns, the system text first, the user's last."""
        turns = [message.plain() for message in self.messages or ()]
        if self.prompt is not None:
            turns.append({"role": "user", "content": self.prompt})
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        return tuple(turns)


def _check_turns(messages: Sequence[Message | SeeingMessage], system: str | None) -> None:
    if messages[-1].role != "user":
        raise ValueError('the last of "messages" must be the user\'s')
    systems = [i for i, message in enumerate(messages) if message.role == "system"]
    if systems and (systems != [0] or system is not None):
        raise ValueError('there may be one system text: first in "messages", or "system"')


# Vision requests --------------------------------------------------------------------------------


def moment(value: object) -> float:
    """Return Unix seconds from a number or an RFC 3339 text with its zone.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and len(value) <= 40:
        try:
            time = datetime.fromisoformat(value)
        except ValueError:
            time = None
        if time is not None and time.tzinfo is not None:
            return time.timestamp()
    raise ValueError("must be Unix seconds, or a time as in RFC 3339 (2026-01-31T12:00:00Z)")


class InlineFrame(BaseModel):
    """A frame that comes with its request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    image: str = Field(description="JPEG or PNG, as base64")
    ts: float | None = Field(None, description="when it was taken: Unix seconds or RFC 3339")

    @field_validator("ts", mode="before", json_schema_input_type=float | str | None)
    @classmethod
    def _ts(cls, value: object) -> float | None:
        return None if value is None else moment(value)


class Window(BaseModel):
    """A camera's frames, growing from request to request."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    min: int = Field(ge=1, description="the fewest frames, and how many a new window begins with")
    max: int = Field(ge=1, description="the most frames")

    @model_validator(mode="after")
    def _in_order(self) -> Window:
        if self.min > self.max:
            raise ValueError('"min" is above "max"')
        return self


class CameraFrames(BaseModel):
    """Frames of a camera, chosen when the request is accepted."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra=_one_of("last", "window")
    )

    camera: Name
    last: int | None = Field(None, ge=1, description="the newest so many")
    span_s: float | None = Field(
        None, gt=0, le=86400, description='spread "last" evenly over the newest so many seconds'
    )
    max_age_s: float | None = Field(None, gt=0, le=86400, description="none is older")
    window: Window | None = None

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> CameraFrames:
        if (self.last is None) == (self.window is None):
            raise ValueError('exactly one of "last" and "window" is needed')
        if self.span_s is not None and self.last is None:
            raise ValueError('"span_s" goes with "last"')
        return self

    def choice(self) -> Choice:
        """Return what a camera's buffer is asked."""
        window = self.window
        return Choice(
            camera=self.camera, last=self.last, span_s=self.span_s, max_age_s=self.max_age_s,
            window=None if window is None else (window.min, window.max),
        )  # fmt: skip


class ImageUrl(BaseModel):
    """Where a message's frame is: in the URL itself."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    url: str = Field(json_schema_extra={"pattern": "^data:[^,]*;base64,"})
    #: OpenAI's clients send it; edged has one `detail` for the whole request.
    detail: Detail | None = None

    @field_validator("url")
    @classmethod
    def _data_only(cls, url: str) -> str:
        head, comma, _ = url[:256].partition(",")
        if not head.startswith("data:"):
            raise ValueError("must be a data: URL, edged fetches nothing")
        if not comma or not head.endswith(";base64"):
            raise ValueError("must be data:image/jpeg;base64,… or data:image/png;base64,…")
        return url


class FramePart(BaseModel):
    """A frame in a message's content, at its place in the text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[
    Annotated[str, Tag("Text")]
    | Annotated[list[Annotated[TextPart | FramePart, Field(discriminator="type")]], Tag("Parts")],
    Discriminator(
        lambda value: {str: "Text", list: "Parts"}.get(type(value)),
        custom_error_type="content",
        custom_error_message="must be a text or a list of parts",
    ),
]


class SeeingMessage(BaseModel):
    """One turn of a conversation, frames in the user's turns."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Content

    @model_validator(mode="after")
    def _frames_are_the_users(self) -> SeeingMessage:
        if self.role != "user" and self.frame_parts():
            raise ValueError(f"a frame in a turn of the {self.role}: put it into the user's")
        return self

    def frame_parts(self) -> list[FramePart]:
        """Return the frames among the parts."""
        if isinstance(self.content, str):
            return []
        return [part for part in self.content if isinstance(part, FramePart)]


#: Told apart by JSON's own types, so that mistakes are told of the one that was meant. The tags
#: are no fields and begin with a capital: `_explain` leaves such steps out.
Frames = Annotated[
    Annotated[list[InlineFrame], Field(min_length=1), Tag("Inline")]
    | Annotated[CameraFrames, Tag("Camera")],
    Discriminator(
        lambda value: {list: "Inline", dict: "Camera"}.get(type(value)),
        custom_error_type="frames",
        custom_error_message='must be a list of {"image": …} or one {"camera": …}',
    ),
]


class VisionRequest(JobRequest):
    """A request on `request/vision`."""

    model_config = ConfigDict(
        json_schema_extra=_one_of("prompt", "messages", "questions")
        | {"anyOf": [_given("frames"), _given("messages")]}
    )

    prompt: Text | None = None
    messages: Annotated[list[SeeingMessage], Field(min_length=1)] | None = None
    questions: Annotated[list[Text], Field(min_length=1, max_length=MAX_QUESTIONS)] | None = Field(
        None, description="answered in order, the frames being looked at once"
    )
    frames: Frames | None = None
    detail: Detail = Field("auto", description="how closely to look")

    @model_validator(mode="after")
    def _one_way_to_ask(self) -> VisionRequest:
        if sum(each is not None for each in (self.prompt, self.messages, self.questions)) != 1:
            raise ValueError('exactly one of "prompt", "messages" and "questions" is needed')
        if self.messages is not None:
            _check_turns(self.messages, self.system)
        inline = any(message.frame_parts() for message in self.messages or ())
        if inline and self.frames is not None:
            raise ValueError('frames are either in "frames" or in "messages"')
        if not inline and self.frames is None:
            raise ValueError('there are no frames: "frames" is needed, or images in "messages"')
        return self

    @property
    def camera(self) -> CameraFrames | None:
        """The camera's frames that are asked for, if any."""
        return self.frames if isinstance(self.frames, CameraFrames) else None

    def images(self) -> list[tuple[str, str]]:
        """Return the frames that came with the request: the field's name and the base64 text."""
        if isinstance(self.frames, list):
            return [(f"frames.{n}.image", frame.image) for n, frame in enumerate(self.frames)]
        return [
            (f"messages.{n}", part.image_url.url.partition(",")[2])
            for n, message in enumerate(self.messages or ())
            for part in message.frame_parts()
        ]

    def taken(self) -> list[float | None]:
        """Return when the frames were taken that came with the request."""
        if isinstance(self.frames, list):
            return [frame.ts for frame in self.frames]
        return [None for _ in self.images()]

    def conversation(self, frames: int) -> tuple[Turn, ...]:
        """Return the turns of a request with so many frames, a frame being its index.

        What has no place in the text comes before the last turn's text. Of `questions` the last
        turn has the frames only.
        """
        turns: list[Turn] = []
        index = 0
        for message in self.messages or ():
            if isinstance(message.content, str):
                turns.append({"role": message.role, "content": message.content})
                continue
            parts: list[str | int] = []
            for part in message.content:
                if isinstance(part, FramePart):
                    parts.append(index)
                    index += 1
                else:
                    parts.append(part.text)
            turns.append({"role": message.role, "content": parts})
        if self.messages is None:
            turns.append({"role": "user", "content": self.prompt or ""})
        if index == 0:
            last = turns[-1]["content"]
            text: list[str | int] = [last] if isinstance(last, str) and last else []
            rest = text if isinstance(last, str) else last
            turns[-1] = {"role": "user", "content": [*range(frames), *rest]}
        if self.system:
            turns.insert(0, {"role": "system", "content": self.system})
        return tuple(turns)


class StoredVision(VisionRequest):
    """A vision request as a job keeps it: its frames lie elsewhere."""

    moments: list[float | None]


def decoded_images(request: VisionRequest) -> tuple[bytes, ...]:
    """Return the frames that came with a request; nothing looks inside them here.

    Raises:
        Refused: `invalid`, one is no base64.
    """
    found = []
    for where, text in request.images():
        data = decoded_image(text)
        if not data:
            _invalid(f"{where}: must be JPEG or PNG as base64")
        found.append(data)
    return tuple(found)


def decoded_image(text: str) -> bytes:
    """Return what base64 stands for, b"" if it is none; line ends in it are allowed."""
    try:
        data = text.encode("ascii")
        try:
            return binascii.a2b_base64(data, strict_mode=True)
        except binascii.Error:
            return binascii.a2b_base64(data.translate(None, b" \t\r\n"), strict_mode=True)
    except ValueError:  # also text that is not ASCII
        return b""


def stored(body: dict[str, Any], moments: Sequence[float | None]) -> dict[str, Any]:
    """Return a vision request's body without its images, for the job to keep."""
    kept = {name: value for name, value in body.items() if name != "reply_to"}
    if isinstance(kept.get("frames"), list):
        kept["frames"] = [{"image": ""} for _ in kept["frames"]]
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_without_images(message) for message in kept["messages"]]
    return kept | {"moments": list(moments)}


def _without_images(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts = [
        part | {"image_url": {"url": "data:;base64,"}} if part["type"] == "image_url" else part
        for part in message["content"]
    ]
    return message | {"content": parts}


class CancelRequest(_Request):
    """A request on `request/cancel`."""

    id: JobId = Field(description="the job to cancel, of the same client")


def validate(model: type[M], body: dict[str, Any]) -> M:
    """Return the body as this model.

    Raises:
        Refused: `invalid`; the message names up to five fields and what each must be, and never
            repeats a value.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        told: list[str] = []
        for detail in details[:_EXPLAINED]:  # a body may have tens of thousands of mistakes
            line = _explain(model, detail["loc"], detail["type"], detail["msg"])
            if line not in told:
                told.append(line)
        more = len(told) - 5 + max(0, len(details) - _EXPLAINED)
        tail = f" (and {more} more)" if more > 0 else ""
        raise Refused(Code.INVALID, "; ".join(told[:5]) + tail) from None


def _explain(model: type[BaseModel], loc: tuple[int | str, ...], kind: str, message: str) -> str:
    names = {field.alias or name for name, field in model.model_fields.items()}
    # pydantic puts the tried type's name into the path of a union's errors; only fields are kept
    path = ".".join(str(step) for step in loc if isinstance(step, int) or step[:1].islower())
    path = re.sub(r"\.(str|list\[.*\]|constrained-str|list)(?=\.|$)", "", path)
    path = re.sub(r"(\.content\.\d+)\.(?:text|image_url)(?=\.)", r"\1", path)  # a part's type
    if kind == "extra_forbidden":
        field = str(loc[-1])
        near = get_close_matches(field, names, n=1) if len(loc) == 1 else []
        return f"unknown field {shown(field)}" + (f", did you mean {near[0]}?" if near else "")
    if kind == "string_pattern_mismatch" and loc[-1] == "id":
        return "id: must be 1 to 64 characters out of A-Z a-z 0-9 . _ : -"
    message = message.removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def digest(request: str, body: dict[str, Any]) -> bytes:
    """Return what tells two requests with one id apart: the topic's kind and the parsed body.

    `reply_to` is left out: asking again from elsewhere is not another question.
    """
    same = {name: value for name, value in body.items() if name != "reply_to"}
    text = json.dumps([request, same], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


# Events -----------------------------------------------------------------------------------------


def encode(body: Mapping[str, Any]) -> bytes:
    """Return a payload: UTF-8 JSON, no NaN, no spaces; a dataclass is an object of its fields."""
    return json.dumps(
        body, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=asdict
    ).encode()  # fmt: skip


def event(key: Key, kind: str, **fields: Any) -> bytes:
    """Return an event of a job; fields that are None are left out."""
    body: dict[str, Any] = {"v": VERSION, "id": key.id, "type": kind}
    if key.client is not None:
        body["client"] = key.client
    body.update((name, value) for name, value in fields.items() if value is not None)
    return encode(body)


def error_event(key: Key, code: Code, message: str, retry_after_s: float | None = None) -> bytes:
    """Return the `error` final of an accepted job."""
    return event(
        key, "error", code=str(code), message=message, retryable=code.retryable,
        retry_after_s=retry_after_s,
    )  # fmt: skip


def refused_event(
    request: str | None, key: Key | None, client: str | None, refusal: Refused
) -> bytes:
    """Return a refusal; `key` is None where no usable id could be read."""
    body: dict[str, Any] = {"v": VERSION}
    if key is not None:
        body["id"] = key.id
    body["type"] = "refused"
    if client is not None:
        body["client"] = client
    body |= {
        "request": request,
        "code": str(refusal.code),
        "message": refusal.message,
        "retryable": refusal.code.retryable,
    }
    if refusal.retry_after_s is not None:
        body["retry_after_s"] = refusal.retry_after_s
    return encode(body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a result says about the start that made it."""

    attempt: int
    queue_ms: float
    model: str
    #: What became of the frames, and when each frame of the request was taken; None for text.
    frames: FramePlan | None = None
    moments: Sequence[float | None] = ()
    #: The request had `questions`: the answers stand in a list, be it one.
    several: bool = False


def result_event(key: Key, answers: Sequence[Answer], timings: Timings, run: Run) -> bytes:
    """Return the `result` final of a job."""
    body: dict[str, Any] = {"v": VERSION, "id": key.id, "type": "result"}
    if key.client is not None:
        body["client"] = key.client
    said = [_answer(answer) for answer in answers]
    body |= {"answers": said} if run.several else said[0]
    body |= {
        "usage": asdict(usage_of(answers)),
        "timings": {"queue_ms": round(run.queue_ms, 1)}
        | {name: round(value, 2) for name, value in asdict(timings).items()},
    }
    if run.frames is not None:
        body["frames"] = {
            "used": [
                {
                    "index": frame.index, "ts": run.moments[frame.index],
                    "tokens": frame.tokens, "crops": frame.crops,
                }
                for frame in run.frames.used
            ],
            "dropped": [asdict(frame) for frame in run.frames.dropped],
        }  # fmt: skip
    text = "\n".join(answer.text for answer in answers)
    return encode(
        body
        | {
            "attempt": run.attempt,
            "model": run.model,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    )


def usage_of(answers: Sequence[Answer]) -> Usage:
    """Return what all answers took together."""
    names = [field.name for field in fields(Usage)]
    return Usage(**{name: sum(getattr(each.usage, name) for each in answers) for name in names})


def plan_of(kept: dict[str, Any]) -> FramePlan | None:
    """Return a frame plan from what the journal keeps of it; None if another version wrote it."""
    try:
        return FramePlan(
            used=tuple(PlannedFrame(**frame) for frame in kept["used"]),
            dropped=tuple(DroppedFrame(**frame) for frame in kept["dropped"]),
        )
    except (KeyError, TypeError):
        return None


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        **({"json": answer.json} if answer.has_json else {}),
        "finish_reason": answer.finish_reason,
        "usage": asdict(answer.usage),
    }
