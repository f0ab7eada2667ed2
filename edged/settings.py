"""Where the settings come from, and what is wrong with them.

Sources, highest first: command line (`--set mqtt.host=x`), environment (`EDGED_MQTT__HOST`),
credentials directory (systemd's `LoadCredential=`), a TOML file, defaults. pydantic-settings lays
them over each other. Every value of every source is checked, also one that a higher source covers,
and every mistake is told by name, with the place it came from and what to write instead.
"""

from __future__ import annotations

import difflib
import errno
import ipaddress
import json
import math
import os
import re
import ssl
import stat
import tomllib
import typing
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import PydanticBaseSettingsSource

from edged.errors import ConfigError
from edged.options import (
    ENV_PREFIX,
    MB,
    Cameras,
    Client,
    Entry,
    Health,
    Limits,
    Log,
    Model,
    Mqtt,
    Settings,
    State,
    Stream,
    Vision,
    default_state_dir,
    entries,
    sections,
)
from edged.topics import MAX_TOPIC_BYTES

__all__ = [
    "MB",
    "Cameras",
    "Client",
    "Health",
    "Limits",
    "Log",
    "Model",
    "Mqtt",
    "Settings",
    "State",
    "Stream",
    "Vision",
    "is_loopback",
    "load",
    "packet_bytes",
    "read_password",
    "toml_value",
    "warnings",
]

DEFAULT_CONFIG = Path("/etc/edged/edged.toml")
#: Variables that begin like a setting's and are none: EDGED_CONFIG names the TOML file.
ENV_OTHER = frozenset({"EDGED_CONFIG"})

#: Characters of <base_topic>/<device> that leave room for /response/<client>/<id>.
_MAX_ROOT = MAX_TOPIC_BYTES - len("/response/") - 64 - 1 - 64

_SECRETS = frozenset({"password", "passwd", "passphrase", "pass", "pwd", "secret", "token"})


# Sources ----------------------------------------------------------------------------------------


def load(
    config: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    default_config: Path = DEFAULT_CONFIG,
    as_client: bool = False,
) -> Settings:
    """Return the settings.

    Args:
        config: the file of `--config`; else `EDGED_CONFIG`, else `default_config` if it is there.
        overrides: dotted names and values of `--set`.
        environ: the environment; None: this process's.
        default_config: the file that is read if none is named.
        as_client: look only at files that a client needs; the daemon's secrets are not for
            everybody who asks it something.

    Raises:
        ConfigError: with one line for each mistake.
    """
    environ = os.environ if environ is None else environ
    places = (
        _CommandLine(overrides or {}),
        _Environment(environ),
        _Credentials(environ),
        _Toml(environ, config, default_config),
    )

    class Loaded(Settings):
        sources: ClassVar[tuple[PydanticBaseSettingsSource, ...]] = places

    loaded = Loaded.model_validate({"state": {"dir": default_state_dir(environ)}})
    settings = Settings(**dict(loaded))  # of the class that others know
    mistakes = [line for place in reversed(places) for line in place.mistakes]
    wrong = {name for place in places for name in place.wrong}
    for names, text in (*_contradictions(settings), *_file_faults(settings, as_client)):
        if wrong.isdisjoint(names):
            found = [place.right[names[0]] for place in places if names[0] in place.right]
            where = f" ({found[0]})" if found else ""
            mistakes.append(f"{names[0]}{where}: {text}")
    if mistakes:
        raise ConfigError(mistakes)
    return settings


class _Source(PydanticBaseSettingsSource):
    """One place that settings stand in."""

    #: Whether values have TOML's types; else they are texts.
    typed = False

    def __init__(self, texts: Mapping[str, str]) -> None:
        super().__init__(Settings)
        self.texts = texts
        self.mistakes: list[str] = []
        self.wrong: set[str] = set()
        self.right: dict[str, str] = {}  # and where they stand
        self.base = _working_directory()  # of relative paths

    @abstractmethod
    def given(self) -> Iterator[tuple[str, Any, str]]:
        """Yield the dotted name, the value and the place of everything that stands here."""

    def written(self, entry: Entry, value: Any) -> str:
        """Return how a setting is written here."""
        where = f" in [{entry.section}]" if entry.section else " before the first [section]"
        return f"{entry.key} = {toml_value(value)}{where}"

    def called(self, entry: Entry) -> str:
        """Return what a setting is called here."""
        return entry.name

    def __call__(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for name, value, place in self.given():
            entry = entries().get(name)
            if entry is None:
                shown = name if name.isprintable() else repr(name)
                self.mistakes.append(f"{shown} ({place}): {self._unknown(name)}")
                continue
            try:
                checked = self._check(entry, value)
            except ValidationError as error:
                self.wrong.add(name)
                text = f"{_phrase(entry, value, error)}; write {self.written(entry, entry.example)}"
                self.mistakes.append(f"{name} ({place}): {text}")
                continue
            self.right[name] = place
            target = tree.setdefault(entry.section, {}) if entry.section else tree
            target[entry.key] = checked
        return tree

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: asked for each field by itself, a source could not tell what it has besides."""
        raise NotImplementedError

    def _check(self, entry: Entry, value: Any) -> Any:
        """Return the value as the tree holds it, or raise ValidationError."""
        if not self.typed and value == "" and entry.optional:
            return None
        if not self.typed and typing.get_origin(entry.kind) is tuple:
            value = _items(value)
        if self.typed or isinstance(value, list):
            # JSON's strict rules are TOML's types: "1883" and true are no port. Dates, which JSON
            # has not and no setting takes, become objects.
            table = json.dumps({entry.key: value}, default=lambda other: {"": str(other)})
            group = entry.group.model_validate_json(table, strict=True)
        else:
            group = entry.group.model_validate_strings({entry.key: value})
        checked = getattr(group, entry.key)
        return self.base / checked if isinstance(checked, Path) else checked

    def _unknown(self, name: str) -> str:
        section, _, key = name.rpartition(".")
        if key in _SECRETS:
            target = entries().get(f"{section}.password_file") or entries()["mqtt.password_file"]
            return (
                "a password is not taken from here, others can read it; write it to a file that "
                f"only edged may read and use {target.name}: "
                f"{self.written(target, '/path/to/file')}"
            )
        if name in sections():
            first = next(entry for entry in entries().values() if entry.section == name)
            return f"this is a group of settings; write {self.written(first, first.example)}"
        if near := _nearest(name):
            return f"there is no such setting; did you mean {self.called(entries()[near])}?"
        return "there is no such setting; `edged schema config` lists them all, remove it"


class _CommandLine(_Source):
    """`--set mqtt.host=x`."""

    def given(self) -> Iterator[tuple[str, Any, str]]:
        for name, value in self.texts.items():
            yield name, value, "command line"

    def written(self, entry: Entry, value: Any) -> str:
        return f"--set {entry.name}={_plain(value)}"


class _Environment(_Source):
    """`EDGED_MQTT__HOST=x`."""

    def given(self) -> Iterator[tuple[str, Any, str]]:
        for variable, value in sorted(self.texts.items()):
            if not variable.startswith(ENV_PREFIX) or variable in ENV_OTHER:
                continue
            name = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            # An empty variable is how a container file leaves a value out.
            if value or name not in entries():
                yield name, value, f"environment variable {variable}"

    def written(self, entry: Entry, value: Any) -> str:
        return f"{entry.variable}={_plain(value)}"

    def called(self, entry: Entry) -> str:
        return entry.variable


class _Credentials(_Source):
    """Files that systemd's `LoadCredential=` lays down, named like `mqtt-password`."""

    def given(self) -> Iterator[tuple[str, Any, str]]:
        folder = self.texts.get("CREDENTIALS_DIRECTORY")
        for entry in _identity_files() if folder else ():
            path = Path(f"{folder}/{entry.section}-{entry.key.removesuffix('_file')}")
            if path.is_file() and not _is_absent(path):
                yield entry.name, str(path), f"credential {path}"


def _is_absent(path: Path) -> bool:
    """Return whether a credential is what the unit falls back to where there is no file: a NUL."""
    with suppress(OSError):  # said later, with what it is for
        return path.read_bytes() == b"\0"
    return False


class _Toml(_Source):
    """The settings file."""

    typed = True

    def __init__(self, environ: Mapping[str, str], config: Path | None, default: Path) -> None:
        super().__init__(environ)
        variable = environ.get("EDGED_CONFIG")
        self._given = "--config" if config else "EDGED_CONFIG" if variable else "the settings file"
        self._config = config or Path(variable or default)
        self._default = default
        self.base = (self.base / self._config).parent

    def given(self) -> Iterator[tuple[str, Any, str]]:
        config = self._config
        if self._given == "the settings file" and not os.path.lexists(config):
            return
        try:
            text = config.read_bytes().decode()
            table = tomllib.loads(text)
        except (OSError, ValueError) as error:
            self.mistakes.append(self._unreadable(error))
            return
        lines = _lines(text)
        for name, value in _flatten(table):
            line = next((lines[n] for n in _with_parents(name) if n in lines), None)
            yield name, value, f"{config}, line {line}" if line else str(config)

    def _unreadable(self, error: OSError | ValueError) -> str:
        config = self._config
        if isinstance(error, FileNotFoundError):
            return (
                f"{self._given} {config}: there is no such file; name an existing file, or leave "
                f"it out to use {self._default} or the defaults"
            )
        if isinstance(error, OSError):
            return (
                f"{self._given} {config}: it cannot be read ({error.strerror}); name a file that "
                "this user may read"
            )
        if isinstance(error, UnicodeDecodeError):
            return f"{config}: it is not UTF-8 text; save it as UTF-8"
        what, _, place = str(error).partition(" (at ")
        line = re.match(r"line \d+", place)
        return (
            f"{config}{f', {line[0]}' if line else ''}: this is not TOML: {what}; write name = "
            "value, texts in double quotes, as `edged schema config --format toml` shows"
        )


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError:  # it was removed under us
        return Path("/")


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _items(text: str) -> list[Any]:
    """Return the items of a list from a command line or variable: JSON, or comma-separated."""
    with suppress(ValueError):
        parsed = json.loads(text)
        if isinstance(parsed, list):
            return parsed
    return [item.strip() for item in text.split(",") if item.strip()]


def _phrase(entry: Entry, value: Any, error: ValidationError) -> str:
    first = error.errors()[0]
    shown = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    if entry.key == "password_file" or (entry.key == "host" and "@" in shown):
        shown = "the value"  # somebody may have put a password there
    elif len(shown) > 60:
        shown = f"{shown[:57]}…"
    if first["type"] == "value_error":
        return f"{shown} is wrong, {entry.name} {first['ctx']['error']}"
    return f"{shown} is not {entry.expected}"


def _nearest(name: str) -> str:
    """Return what to write instead of an unknown name."""
    known: dict[str, str] = {}
    for each in reversed(entries()):
        # Also the right key in the wrong group, and a '_' where a '.' belongs.
        known |= {each.rpartition(".")[2]: each, each.replace(".", "_"): each, each: each}
    for asked in (name.lower(), name.lower().rpartition(".")[2]):
        if close := difflib.get_close_matches(asked, known, 1, 0.75):
            return known[close[0]]
    return ""


# TOML -------------------------------------------------------------------------------------------


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in entries() and (value or name in sections()):
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _with_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


_HEADER = re.compile(r"""\s*\[\[?\s*([A-Za-z0-9_."' -]+?)\s*\]\]?\s*(#.*)?$""")
_KEY = re.compile(r"""\s*([A-Za-z0-9_."' -]+?)\s*=""")


def _lines(text: str) -> dict[str, int]:
    """Return the line on which each dotted name is written, as far as a plain look can tell."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = _bare(header[1])
            found.setdefault(section, number)
        elif key := _KEY.match(line):
            name = _bare(key[1])
            for each in _with_parents(f"{section}.{name}" if section else name):
                found.setdefault(each, number)
    return found


def _bare(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))


# What only shows when settings are looked at together ---------------------------------------------

_Fault = tuple[tuple[str, ...], str]


def _identities(settings: Settings) -> tuple[tuple[str, Mqtt | Client | Cameras], ...]:
    return ("mqtt", settings.mqtt), ("client", settings.client), ("cameras", settings.cameras)


def _contradictions(settings: Settings) -> Iterator[_Fault]:
    for section, group in _identities(settings):
        cert, key = f"{section}.cert", f"{section}.key"
        if group.cert and not group.key:
            yield (cert, key), f"a certificate without its key; set {key} too"
        if group.key and not group.cert:
            yield (key, cert), f"a key without its certificate; set {cert} too"
        if group.cert and group.key and not settings.mqtt.tls:
            yield (cert, "mqtt.tls"), "a certificate needs TLS; set mqtt.tls = true"
        if group.password_file and not group.username:
            user, password = f"{section}.username", f"{section}.password_file"
            yield (password, user), f"a password without its user; set {user} too"
    if settings.mqtt.ca and not settings.mqtt.tls:
        yield ("mqtt.ca", "mqtt.tls"), "it has no effect without TLS; set mqtt.tls = true"
    root = f"{settings.mqtt.base_topic}/{settings.device}"
    if len(root) > _MAX_ROOT:
        text = f"{root} is too long for the topics below it; shorten it to {_MAX_ROOT} characters"
        yield ("mqtt.base_topic", "device"), text
    context, tokens = settings.model.max_context, settings.limits.max_tokens
    given = "max_tokens" in settings.limits.model_fields_set
    if given and context is not None and tokens >= context:
        text = (
            f"{tokens} tokens of answer leave no room for a prompt in model.max_context {context}"
        )
        yield ("limits.max_tokens", "model.max_context"), f"{text}; set it below {context}"


def _file_faults(settings: Settings, as_client: bool) -> Iterator[_Fault]:  # noqa: FBT001 - as load's
    for entry, path in _files(settings):
        name = entry.name
        if as_client and entry.section != "client" and name != "mqtt.ca":
            continue
        # Somebody may have put a password where its file belongs: that value is not printed.
        shown = "the file it names" if entry.key == "password_file" else str(path)
        try:
            content = _read(path)
        except OSError as error:
            why = error.strerror or str(error)
            yield (name,), f"{shown} cannot be read ({why}); name a file that this user may read"
            continue
        if entry.key == "password_file":
            try:
                _first_line(content)
            except ValueError as error:
                yield (name,), f"{error}; write the password into its first line"
        elif b"-----BEGIN " not in content:
            yield (name,), f"{path} is no PEM file; convert it with openssl (-outform PEM)"
    yield from _tls_faults(settings, ("client",) if as_client else ("mqtt", "client", "cameras"))


def _identity_files() -> list[Entry]:
    """Return the settings that name a file of an MQTT identity."""
    groups = {"mqtt", "client", "cameras"}
    return [each for each in entries().values() if each.kind is Path and each.section in groups]


def _files(settings: Settings) -> Iterator[tuple[Entry, Path]]:
    """Yield those that are set, with their files."""
    for entry in _identity_files():
        path = getattr(getattr(settings, entry.section), entry.key)
        if path is not None:
            yield entry, path


def _read(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):
        # Reading a pipe or a terminal could wait for ever, and only the first reader gets it.
        raise OSError(errno.EINVAL, "it is no regular file")
    with path.open("rb") as file:
        return file.read(1 << 20)


def _tls_faults(settings: Settings, identities: tuple[str, ...]) -> Iterator[_Fault]:
    if settings.mqtt.ca:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(settings.mqtt.ca)
        except FileNotFoundError:
            pass  # said above
        except (ssl.SSLError, OSError):
            yield ("mqtt.ca",), f"{settings.mqtt.ca} holds no certificate; name a PEM file of some"
    for section, group in _identities(settings):
        if section not in identities or not (group.cert and group.key):
            continue
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            # A password callback that refuses: without one OpenSSL asks at the terminal.
            context.load_cert_chain(group.cert, group.key, password=_no_passphrase)
        except FileNotFoundError:
            pass  # said above
        except (ssl.SSLError, OSError, ValueError):
            text = f"{group.cert} and {group.key} do not belong together, or the key is encrypted"
            remedy = "name a certificate and its unencrypted key, both PEM"
            yield (f"{section}.cert", f"{section}.key"), f"{text}; {remedy}"


def _no_passphrase() -> str:
    raise ValueError("the key is encrypted")


# Passwords --------------------------------------------------------------------------------------


def _first_line(content: bytes) -> str:
    try:
        line = content.decode().split("\n", 1)[0].rstrip("\r")
    except UnicodeDecodeError:
        raise ValueError("the file it names is not UTF-8 text") from None
    if not line:
        raise ValueError("the file it names is empty")
    if "\0" in line or len(line.encode()) > 65535:
        raise ValueError("the file it names holds no text that could be a password")
    return line


def read_password(path: Path) -> str:
    """Return the first line of a password file, without its line end.

    Raises:
        ConfigError: the file cannot be read or its first line is empty.
    """
    try:
        return _first_line(_read(path))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError([f"password_file: {why}; write the password into its first line"]) from (
            None
        )


# Warnings ---------------------------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Return whether a host name or address can only mean this machine."""
    if host.rstrip(".").lower() in {"localhost", "ip6-localhost", "ip6-loopback"}:
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.rstrip(".").lower().endswith(".localhost")


def packet_bytes(settings: Settings) -> int:
    """Return the maximum packet size to announce, in bytes: `payload_mb` + 25 % + 64 KiB.

    What lies between it and `payload_mb` is answered `too_large`; above, the broker drops silently.
    """
    return math.ceil(settings.limits.payload_mb * MB * 1.25) + 65536


def warnings(settings: Settings) -> list[str]:
    """Return what is allowed and should not stay, each with what to do about it."""
    found: list[str] = []
    mqtt = settings.mqtt
    if not mqtt.tls and not is_loopback(mqtt.host):
        if mqtt.password_file is None:
            found.append(
                f"mqtt.host {mqtt.host} is reached in plain text and without a password: anybody "
                "in that network can send jobs and read answers; set mqtt.tls = true, "
                "mqtt.username and mqtt.password_file"
            )
        else:
            found.append(
                f"mqtt.host {mqtt.host} is reached in plain text: the password and all answers can "
                "be read in that network; set mqtt.tls = true"
            )
    if mqtt.protocol == "3.1.1":
        found.append(
            "mqtt.protocol 3.1.1 cannot announce a packet limit: a request above limits.payload_mb "
            f"({settings.limits.payload_mb:g} MB) is carried here before it is refused; let the "
            "broker limit it (mosquitto: message_size_limit), or use MQTT 5"
        )
    if settings.limits.journal_mb < 2 * settings.limits.payload_mb:
        found.append(
            "limits.journal_mb is less than twice limits.payload_mb: the largest requests are "
            "refused disk_full; raise limits.journal_mb or lower limits.payload_mb"
        )
    if settings.cameras.max and settings.cameras.buffer_mb < settings.limits.payload_mb:
        found.append(
            "cameras.buffer_mb is less than limits.payload_mb: the largest frames are refused; "
            "raise cameras.buffer_mb"
        )
    if settings.model.max_context is not None and settings.model.max_context > 4096:
        found.append(
            "model.max_context is above 4096: models with LongRoPE (Phi-3.5, Phi-4-mini) compute "
            "everything again when they cross token 4097; set it to 4096 or less"
        )
    for entry, path in _files(settings):
        with suppress(OSError):
            if entry.key in {"password_file", "key"} and path.stat().st_mode & stat.S_IROTH:
                text = f"every user of this machine may read {path}; chmod 640 it"
                found.append(f"{entry.name}: {text}")
    return found
