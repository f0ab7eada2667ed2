"""Every setting: its name, type, bounds, default and description, in one frozen tree.

Made in code it holds what it is given; `edged.settings.load` adds the sources outside. MB is
1 000 000 bytes.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import re
import socket
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from edged.topics import NAME, fault

MB = 1_000_000
ENV_PREFIX = "EDGED_"

_PORT, _PORT_TLS = 1883, 8883
_MODEL_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}\Z")


# Single values ----------------------------------------------------------------------------------


def _device(value: str) -> str:
    if not NAME.match(value):
        raise ValueError("may hold 1 to 64 of the characters A-Z a-z 0-9 _ -")
    if value == "reply":
        raise ValueError('may not be "reply", which is kept for reply topics')
    return value


def _host(value: str) -> str:
    if "://" in value or "@" in value or "/" in value:
        raise ValueError("must be a host name or address alone, without a scheme, user or path")
    try:
        ipaddress.ip_address(value.strip("[]").partition("%")[0])
        return value.strip("[]")
    except ValueError:
        pass
    if ":" in value:
        raise ValueError("must be a host name or address alone; the port stands in mqtt.port")
    try:
        # Python's resolver does the same and raises UnicodeError from inside the network thread.
        encoded = value.encode("idna")
    except UnicodeError as error:
        raise ValueError("is no valid host name") from error
    if not re.fullmatch(rb"[A-Za-z0-9_.-]{1,253}", encoded) or encoded.startswith((b".", b"-")):
        raise ValueError("is no valid host name")
    return value


def _base_topic(value: str) -> str:
    levels = value.split("/")
    if len(levels) > 8 or not all(NAME.match(level) for level in levels):
        raise ValueError(
            "must be 1 to 8 levels joined by /, each of 1 to 64 of the characters A-Z a-z 0-9 _ -"
        )
    if len(value) > 100:
        raise ValueError("may have at most 100 characters")
    return value


def _client_id(value: str) -> str:
    if not re.fullmatch(r"[!-~]{1,100}", value) or "+" in value or "#" in value:
        raise ValueError("may hold 1 to 100 visible ASCII characters, but no + or #")
    return value


def _reply_prefixes(value: tuple[str, ...]) -> tuple[str, ...]:
    for prefix in value:
        wrong = fault(prefix)
        if wrong is not None:
            raise ValueError(f"has a prefix that no topic may begin with: {wrong}")
    return value


def _user(value: str) -> str:
    if not value or len(value.encode(errors="replace")) > 1024 or not value.isprintable():
        raise ValueError("must be 1 to 1024 bytes of printable text")
    return value


def _client_user(value: str) -> str:
    # It is published in a topic: request/text/<client.username>.
    if not NAME.match(value):
        raise ValueError("may hold 1 to 64 of the characters A-Z a-z 0-9 _ - (it names a topic)")
    return value


def _model_name(value: str) -> str:
    if not _MODEL_NAME.match(value):
        raise ValueError("may hold 1 to 64 of the characters A-Z a-z 0-9 . _ : -")
    return value


def _path(value: Path) -> Path:
    if str(value) in {"", "."} or "\0" in str(value):
        raise ValueError("must be a path")
    try:
        return value.expanduser()
    except RuntimeError:
        raise ValueError("begins with a home that is not known here") from None


def _folder_name(path: Path | None) -> str:
    if path is None:
        return "none"
    return re.sub(r"[^A-Za-z0-9._:-]", "-", path.name)[:64] or "model"


File = Annotated[Path, AfterValidator(_path)]
User = Annotated[str, AfterValidator(_user)]


def default_device(hostname: str | None = None) -> str:
    """Return the host name with every character a topic level may not have turned into a '-'."""
    name = re.sub(r"[^A-Za-z0-9_-]", "-", hostname or socket.gethostname())[:64].strip("-")
    if not name:
        return "edged"
    return f"{name}-device" if name == "reply" else name


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Return systemd's state directory, root's /var/lib/edged, or the user's XDG one."""
    if given := environ.get("STATE_DIRECTORY", "").split(":")[0]:
        return Path(given)
    xdg = Path(environ.get("XDG_STATE_HOME", ""))
    if xdg.is_absolute():
        return xdg / "edged"
    home = environ.get("HOME", "")
    if os.geteuid() == 0 or not home.startswith("/"):
        return Path("/var/lib/edged")
    return Path(home) / ".local" / "state" / "edged"


# The tree ---------------------------------------------------------------------------------------


def _setting(
    default: Any = None,
    *,
    doc: str,
    derived: str | None = None,
    example: Any = None,
    factory: Any = None,
    **bounds: Any,
) -> Any:
    """Return a field; `derived` says in words what `factory` makes (from the fields before it)."""
    what: dict[str, Any] = {"default_factory": factory} if factory else {"default": default}
    if derived is not None:
        what["json_schema_extra"] = {"x-default": derived}
    if example is not None:
        what["examples"] = [example]
    return Field(**what, description=doc, **bounds)


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Mqtt(_Group):
    """The broker, and how edged stands towards it."""

    host: Annotated[str, AfterValidator(_host)] = _setting(
        "localhost", doc="The broker's host name or address."
    )
    tls: bool = _setting(
        default=False, doc="Whether to speak TLS. The broker's certificate is always verified."
    )
    port: int = _setting(
        factory=lambda given: _PORT_TLS if given.get("tls") else _PORT,
        derived="1883, or 8883 with mqtt.tls",
        example=_PORT,
        doc="The broker's TCP port.",
        ge=1,
        le=65535,
    )
    username: User | None = _setting(
        doc="The user name for the broker. Absent: none is sent.", example="edged"
    )
    password_file: File | None = _setting(
        doc="The file whose first line is the password. A password itself is never a setting.",
        example="/etc/edged/credentials/mqtt-password",
    )
    ca: File | None = _setting(
        doc="The file (PEM) with the certificates that the broker's is verified against. Absent: "
        "the system's.",
        example="/etc/edged/ca.pem",
    )
    cert: File | None = _setting(
        doc="The file (PEM) with edged's own certificate; needs mqtt.key.",
        example="/etc/edged/edged.pem",
    )
    key: File | None = _setting(
        doc="The file (PEM, not encrypted) with the key of mqtt.cert.",
        example="/etc/edged/edged.key",
    )
    base_topic: Annotated[str, AfterValidator(_base_topic)] = _setting(
        "edged", doc="What every topic begins with, before the device's name."
    )
    client_id: Annotated[str, AfterValidator(_client_id)] = _setting(
        "",
        derived="edged-<device>",
        example="edged-door",
        doc="The MQTT client id of the job connection; that of the camera connection is "
        "<client_id>-cameras. It must stay the same over restarts: the broker keeps waiting "
        "requests under it.",
    )
    protocol: Literal["5", "3.1.1"] = _setting("5", doc="The version of MQTT to speak.")
    keepalive_s: int = _setting(
        30,
        doc="Seconds of silence after which the connection is probed; a dead one is noticed after "
        "about twice this.",
        ge=5,
        le=300,
    )
    session_expiry_s: int = _setting(
        7 * 86400,
        doc="Seconds the broker keeps requests for edged while it is away (MQTT 5; on 3.1.1 the "
        "broker decides).",
        ge=1,
        le=0xFFFFFFFE,
    )
    reply_prefixes: Annotated[tuple[str, ...], AfterValidator(_reply_prefixes)] = _setting(
        factory=lambda given: (f"{given.get('base_topic')}/reply/",),
        derived="<base_topic>/reply/",
        example=["edged/reply/"],
        doc="What a reply topic that a requester names must begin with; an empty list forbids "
        "them all.",
    )


class Client(_Group):
    """What `edged ask` and `edged top` connect with; never the daemon's identity."""

    username: Annotated[str, AfterValidator(_client_user)] | None = _setting(
        doc="The user name of the asking side; requests then go to request/…/<username>. Absent: "
        "none is sent, and requests are anonymous.",
        example="desk",
    )
    password_file: File | None = _setting(
        doc="The file whose first line is that user's password.",
        example="/home/me/.config/edged/password",
    )
    cert: File | None = _setting(
        doc="The file (PEM) with the asking side's certificate; needs client.key.",
        example="/home/me/.config/edged/desk.pem",
    )
    key: File | None = _setting(
        doc="The file (PEM, not encrypted) with the key of client.cert.",
        example="/home/me/.config/edged/desk.key",
    )


class Model(_Group):
    """The model that answers."""

    path: File | None = _setting(
        doc="The folder of the model (genai_config.json and its files). Absent: edged runs, says "
        "that it has no model, and keeps jobs waiting.",
        example="/var/lib/edged/models/phi-3.5-mini",
    )
    name: Annotated[str, AfterValidator(_model_name)] = _setting(
        factory=lambda given: _folder_name(given.get("path")),
        derived="the name of the folder model.path",
        example="phi-3.5-mini",
        doc="The name a request's `model` must have, and that results carry.",
    )
    provider: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", doc="What computes: auto takes CUDA where it works, else the CPU."
    )
    threads: int | None = _setting(
        doc="Threads that compute. Absent: one for each physical core.",
        example=4,
        ge=1,
        le=256,
    )
    max_context: int | None = _setting(
        doc="Tokens of prompt and answer together. Absent: the largest multiple of 256 up to 4096 "
        "that the memory plan has room for.",
        example=2048,
        ge=64,
        le=131072,
    )


class State(_Group):
    """What edged keeps on disk."""

    dir: File = _setting(
        factory=lambda: default_state_dir(os.environ),
        derived="$STATE_DIRECTORY, else $XDG_STATE_HOME/edged, else /var/lib/edged as root, else "
        "~/.local/state/edged",
        example="/var/lib/edged",
        doc="The folder of the journal and the frames of waiting jobs.",
    )
    frames: Literal["durable", "none"] = _setting(
        "durable",
        doc="Whether the frames of a vision job are on disk before it is accepted. With none they "
        "are held in memory and such a job is lost in a crash (`durable` is false in `accepted`).",
    )
    frames_mb: float = _setting(
        256.0,
        doc="Disk (or memory) for the frames of waiting jobs, in MB; when they take it all, vision "
        "requests are refused.",
        ge=0.1,
        le=100_000,
    )
    stop_s: float = _setting(
        20.0,
        doc="Seconds the running job may still take when edged is told to stop; then it goes back "
        "to the queue.",
        ge=0,
        le=3600,
    )


class Health(_Group):
    """What edged says about itself."""

    interval_s: float = _setting(10.0, doc="Seconds between two heartbeats.", ge=0.1, le=3600)


class Limits(_Group):
    """What is refused rather than allowed to grow."""

    queue: int = _setting(256, doc="Jobs that may wait.", ge=1, le=100_000)
    payload_mb: float = _setting(
        8.0,
        doc="The largest request or camera message, in MB (1 000 000 bytes).",
        ge=0.001,
        le=200,
    )
    frames: int = _setting(16, doc="Frames one vision request may have.", ge=1, le=256)
    max_tokens: int = _setting(
        1024, doc="Tokens an answer may have, and the most a request may ask for.", ge=1, le=131072
    )
    journal_mb: float = _setting(
        64.0,
        doc="The largest size of the journal, in MB; when it is full, requests are refused.",
        ge=0.1,
        le=100_000,
    )
    memory_mb: float | None = _setting(
        doc="Memory the engine may plan with, in MB. Absent: 70 % of what is available at start, "
        "or of the control group's limit.",
        example=6000,
        ge=16,
        le=10_000_000,
    )
    results: int = _setting(
        1000,
        doc="Finals kept, to answer a repeated request without running it again.",
        ge=1,
        le=1_000_000,
    )
    results_s: float = _setting(
        86400.0,
        doc="Seconds of running time a final is kept at most.",
        ge=1,
        le=366 * 86400,
    )


class Stream(_Group):
    """How an answer is cut into chunks."""

    interval_ms: float = _setting(
        100.0,
        doc="Milliseconds for which new text is gathered into one chunk; 0: each token.",
        ge=0,
        le=60_000,
    )
    max_bytes: int = _setting(
        512,
        doc="Bytes (UTF-8) of text after which a chunk is sent at once.",
        ge=4,
        le=65536,
    )


class Vision(_Group):
    """How frames are paid for."""

    first_token_s: float = _setting(
        30.0,
        doc="Seconds to the first token that the planner aims at with `detail` auto: it gives "
        "frames fewer crops, or drops some, to keep it.",
        gt=0,
        le=3600,
    )
    cache_mb: float = _setting(
        64.0,
        doc="Memory for the features of frames already encoded, in MB; 0: none are kept.",
        ge=0,
        le=1_000_000,
    )


class Cameras(_Group):
    """The frames that cameras publish, and the connection they come over."""

    max: int = _setting(
        8,
        doc="Cameras that are buffered; further ones are refused. 0: there is no camera "
        "connection.",
        ge=0,
        le=256,
    )
    buffer_s: float = _setting(30.0, doc="Seconds of frames kept for each camera.", gt=0, le=86400)
    buffer_mb: float = _setting(
        64.0,
        doc="Memory for the frames of all cameras together, in MB. When it is full, the oldest "
        "frame of the camera that holds most goes, but never a camera's newest.",
        ge=0.1,
        le=1_000_000,
    )
    username: User | None = _setting(
        doc="The user name of the camera connection. Needed, with its password, where the broker "
        "makes the user name the client id. Absent: that of mqtt.",
        example="edged-cameras",
    )
    password_file: File | None = _setting(
        doc="The file whose first line is that user's password.",
        example="/etc/edged/credentials/cameras-password",
    )
    cert: File | None = _setting(
        doc="The file (PEM) with the certificate of the camera connection; needs cameras.key. "
        "Absent: that of mqtt.",
        example="/etc/edged/cameras.pem",
    )
    key: File | None = _setting(
        doc="The file (PEM, not encrypted) with the key of cameras.cert.",
        example="/etc/edged/cameras.key",
    )


class Log(_Group):
    """What is written to standard output."""

    level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", doc="The least important events that are written."
    )
    format: Literal["auto", "console", "json"] = _setting(
        "auto", doc="How events are written: auto is console on a terminal and json elsewhere."
    )


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    #: What is read besides what the code gives, highest first: nothing, but for those that are
    #: loaded.
    sources: ClassVar[tuple[PydanticBaseSettingsSource, ...]] = ()

    device: Annotated[str, AfterValidator(_device)] = _setting(
        factory=default_device,
        derived="the host name, other characters than A-Z a-z 0-9 _ - replaced by -",
        example="door",
        doc="This device's name, one level of every topic.",
    )
    mqtt: Mqtt = Mqtt()
    client: Client = Client()
    model: Model = Model()
    state: State = Field(default_factory=State)
    health: Health = Health()
    limits: Limits = Limits()
    stream: Stream = Stream()
    vision: Vision = Vision()
    cameras: Cameras = Cameras()
    log: Log = Log()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read our own sources, instead of the environment as it happens to be."""
        return (*cls.sources, init_settings)

    def model_post_init(self, _context: Any) -> None:
        """Name the client after the device, unless it was named."""
        if "client_id" not in self.mqtt.model_fields_set:
            # A copy: a group may be shared between trees. A derived name does not count as given.
            mqtt = self.mqtt.model_copy()
            mqtt.__dict__["client_id"] = f"edged-{self.device}"
            self.__dict__["mqtt"] = mqtt


# Names ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting: where it stands in the tree, and what it takes."""

    group: type[BaseModel]
    section: str  # "" for what stands at the top
    key: str
    info: FieldInfo

    @property
    def name(self) -> str:
        """The dotted name."""
        return f"{self.section}.{self.key}" if self.section else self.key

    @property
    def variable(self) -> str:
        """The environment variable."""
        return ENV_PREFIX + self.name.replace(".", "__").upper()

    @property
    def derived(self) -> str | None:
        """What an absent value becomes, in words, if it is not a fixed default."""
        extra = self.info.json_schema_extra
        return str(extra["x-default"]) if isinstance(extra, dict) and "x-default" in extra else None

    @property
    def default(self) -> Any:
        """The fixed default; None if there is none or it is derived."""
        return None if self.derived else self.info.default

    @property
    def example(self) -> Any:
        """A value that may be written."""
        return self.info.examples[0] if self.info.examples else self.info.default

    @property
    def kind(self) -> Any:
        """The type it takes, None left out."""
        kind = self.info.annotation
        if self.optional:
            kind = next(each for each in typing.get_args(kind) if each is not type(None))
        return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind

    @property
    def optional(self) -> bool:
        """Whether nothing is a value of its own."""
        return type(None) in typing.get_args(self.info.annotation)

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        kind = self.kind
        if typing.get_origin(kind) is Literal:
            return "one of " + ", ".join(f'"{choice}"' for choice in typing.get_args(kind))
        if kind in {int, float}:
            return ("a whole number" if kind is int else "a number") + self._range()
        words = {bool: "true or false", Path: "a path", str: "text"}
        return words.get(kind, "a list of texts")

    def _range(self) -> str:
        words = {"ge": " from {}", "gt": " above {}", "le": " to {}"}
        limits = {
            name: form.format(int(limit) if limit == int(limit) else limit)
            for name, form in words.items()
            for each in self.info.metadata
            if (limit := getattr(each, name, None)) is not None
        }
        return "".join(limits.values()).replace(" to", " up to" if "gt" in limits else " to")


@functools.cache
def entries() -> dict[str, Entry]:
    """Return every setting by its dotted name, in the order of the tree."""
    found: dict[str, Entry] = {}
    for name, info in Settings.model_fields.items():
        group = info.annotation
        if isinstance(group, type) and issubclass(group, _Group):
            for key, inner in group.model_fields.items():
                entry = Entry(group, name, key, inner)
                found[entry.name] = entry
        else:
            found[name] = Entry(Settings, "", name, info)
    return found


def sections() -> dict[str, type[BaseModel]]:
    """Return the groups of the tree by name."""
    return {entry.section: entry.group for entry in entries().values() if entry.section}
