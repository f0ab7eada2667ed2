"""The settings and where they come from.

Sources, highest first: command line (`--set mqtt.host=x`), environment (`EDGED_MQTT__HOST`),
credentials directory (systemd's `LoadCredential=`), a TOML file, defaults. Every value of every
source is checked, also one that a higher source covers, and every mistake is reported by name, with
the place it came from and what to write instead.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

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


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a value came from, and how one is written there."""

    text: str
    form: Literal["toml", "env", "cli", "credential"]
    base: Path  # of relative paths

    def write(self, entry: Entry, value: Any) -> str:
        if self.form == "env":
            return f"{entry.variable}={_plain(value)}"
        if self.form == "cli":
            return f"--set {entry.name}={_plain(value)}"
        where = f" in [{entry.section}]" if entry.section else " before the first [section]"
        return f"{entry.key} = {toml_value(value)}{where}"


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


def load(
    config: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    default_config: Path = DEFAULT_CONFIG,
) -> Settings:
    """Return the settings.

    Args:
        config: the file of `--config`; else `EDGED_CONFIG`, else `default_config` if it is there.
        overrides: dotted names and values of `--set`.
        environ: the environment; None: this process's.
        default_config: the file that is read if none is named.

    Raises:
        ConfigError: with one line for each mistake.
    """
    environ = os.environ if environ is None else environ
    reader = _Reader()
    reader.toml(config, environ, default_config)
    reader.credentials(environ)
    reader.environment(environ)
    reader.command_line(overrides or {})
    return reader.finish(default_state_dir(environ))


class _Reader:
    """Takes the sources, lowest first, and gathers values and mistakes."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []
        self._values: dict[str, Any] = {}
        self._sources: dict[str, _Source] = {}
        self._bad: set[str] = set()

    # one source each

    def toml(self, config: Path | None, environ: Mapping[str, str], default_config: Path) -> None:
        given = "--config"
        if config is None and environ.get("EDGED_CONFIG"):
            config, given = Path(environ["EDGED_CONFIG"]), "EDGED_CONFIG"
        if config is None:
            try:
                default_config.lstat()
            except OSError:
                return
            config, given = default_config, "the settings file"
        try:
            text = config.read_bytes().decode()
            table = tomllib.loads(text)
        except FileNotFoundError:
            self.mistakes.append(
                f"{given} {config}: there is no such file; name an existing file, or leave it out "
                f"to use {default_config} or the defaults"
            )
            return
        except OSError as error:
            self.mistakes.append(
                f"{given} {config}: it cannot be read ({error.strerror}); name a file that this "
                "user may read"
            )
            return
        except UnicodeDecodeError:
            self.mistakes.append(f"{config}: it is not UTF-8 text; save it as UTF-8")
            return
        except tomllib.TOMLDecodeError as error:
            self.mistakes.append(_toml_mistake(config, error))
            return
        lines = _lines(text)
        base = config.absolute().parent
        for name, value in _flatten(table):
            line = next((lines[n] for n in _with_parents(name) if n in lines), None)
            where = f"{config}, line {line}" if line else str(config)
            self._take(name, value, _Source(where, "toml", base))

    def credentials(self, environ: Mapping[str, str]) -> None:
        folder = environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            return
        for name, entry in entries().items():
            if Path not in entry.kinds or entry.section not in {"mqtt", "client", "cameras"}:
                continue
            path = Path(folder) / f"{entry.section}-{entry.key.removesuffix('_file')}"
            if path.is_file():
                self._take(name, str(path), _Source(f"credential {path}", "credential", Path("/")))

    def environment(self, environ: Mapping[str, str]) -> None:
        base = _working_directory()
        for variable in sorted(environ):
            # An empty variable is how a container file leaves a value out.
            if not variable.startswith(ENV_PREFIX) or variable in ENV_OTHER:
                continue
            name = variable.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            if environ[variable] or name not in entries():
                source = _Source(f"environment variable {variable}", "env", base)
                self._take(name, environ[variable], source)

    def command_line(self, overrides: Mapping[str, str]) -> None:
        base = _working_directory()
        for name, value in overrides.items():
            self._take(name, value, _Source("command line", "cli", base))

    # one value

    def _take(self, name: str, value: Any, source: _Source) -> None:
        entry = entries().get(name)
        if entry is None:
            shown = name if name.isprintable() else repr(name)
            self.mistakes.append(f"{shown} ({source.text}): {_unknown(name, source)}")
            return
        try:
            checked = _check(entry, value, source)
        except ValueError as error:
            self._bad.add(name)
            self.mistakes.append(
                f"{name} ({source.text}): {error}; write {source.write(entry, entry.example)}"
            )
            return
        self._values[name] = checked
        self._sources[name] = source

    # together

    def finish(self, state_dir: Path) -> Settings:
        tree: dict[str, Any] = {}
        for name, value in {"state.dir": state_dir, **self._values}.items():
            entry = entries()[name]
            target = tree.setdefault(entry.section, {}) if entry.section else tree
            target[entry.key] = value
        settings = Settings.model_validate(tree)
        for names, text in (*_contradictions(settings), *_file_faults(settings)):
            if self._bad.isdisjoint(names):
                source = self._sources.get(names[0])
                where = f" ({source.text})" if source else ""
                self.mistakes.append(f"{names[0]}{where}: {text}")
        if self.mistakes:
            raise ConfigError(self.mistakes)
        return settings


def _check(entry: Entry, value: Any, source: _Source) -> Any:
    """Return the value as the tree holds it, or raise ValueError with what is wrong with it."""
    if source.form != "toml" and entry.optional and value == "":
        return None
    if source.form != "toml" and typing.get_origin(entry.kinds[0]) is tuple:
        value = _split(value)
    try:
        if isinstance(value, str) and source.form != "toml":
            tree = entry.group.model_validate_strings({entry.key: value})
        else:
            # JSON's strict rules are TOML's types: "1883" and true are no port.
            tree = entry.group.model_validate_json(_strict({entry.key: value}), strict=True)
    except ValidationError as error:
        raise ValueError(_phrase(entry, value, error)) from error
    checked = getattr(tree, entry.key)
    return source.base / checked.expanduser() if isinstance(checked, Path) else checked


def _strict(value: Any) -> str:
    # TOML has dates and times, which no setting takes, and JSON has not: they become objects.
    return json.dumps(value, default=lambda other: {"": str(other)})


def _split(value: str) -> list[str]:
    """Return the items of a list from a command line or variable: JSON, or comma-separated."""
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = None
    if isinstance(parsed, list):
        return parsed
    return [item.strip() for item in value.split(",") if item.strip()]


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


def _unknown(name: str, source: _Source) -> str:
    section, _, key = name.rpartition(".")
    if key in _SECRETS:
        target = f"{section}.password_file" if f"{section}.password_file" in entries() else ""
        target = target or "mqtt.password_file"
        return (
            "a password is not taken from here, others can read it; write it to a file that only "
            f"edged may read and use {target}: {source.write(entries()[target], '/path/to/file')}"
        )
    if name in sections():
        example = next(e for e in entries().values() if e.section == name)
        wrong = "this is a group of settings"
        return f"{wrong}; write {source.write(example, example.example)}"
    near = _nearest(name)
    if near:
        written = {"env": entries()[near].variable}.get(source.form, near)
        return f"there is no such setting; did you mean {written}?"
    return "there is no such setting; `edged schema config` lists them all, remove it"


def _nearest(name: str) -> str:
    """Return what to write instead of an unknown name."""
    known = list(entries())
    name = name.lower()
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not close:
        # Right name in the wrong place, or a '_' where a '.' belongs.
        flat = {each.replace(".", "_"): each for each in known}
        close = [flat[each] for each in difflib.get_close_matches(name.replace(".", "_"), flat, 1)]
    if not close:
        tails = {each.rpartition(".")[2]: each for each in reversed(known)}
        tail = name.rpartition(".")[2]
        close = [tails[each] for each in difflib.get_close_matches(tail, tails, 1, 0.65)]
    return close[0] if close else ""


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


def _toml_mistake(config: Path, error: tomllib.TOMLDecodeError) -> str:
    message = str(error)
    place = re.search(r"\s*\(at (?:line (\d+), column \d+|end of document)\)$", message)
    where = f", line {place[1]}" if place and place[1] else ""
    what = message[: place.start()] if place else message
    return (
        f"{config}{where}: this is not TOML: {what}; write name = value, texts in double quotes, "
        "as `edged schema config` shows"
    )


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


def _file_faults(settings: Settings) -> Iterator[_Fault]:
    for name, entry in entries().items():
        path = _given_file(settings, entry)
        if path is None:
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
    yield from _tls_faults(settings)


def _given_file(settings: Settings, entry: Entry) -> Path | None:
    """Return the file that a setting of an MQTT identity names."""
    if Path not in entry.kinds or entry.section not in {"mqtt", "client", "cameras"}:
        return None
    path: Path | None = getattr(getattr(settings, entry.section), entry.key)
    return path


def _read(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):
        # Reading a pipe or a terminal could wait for ever, and only the first reader gets it.
        raise OSError(errno.EINVAL, "it is no regular file")
    with path.open("rb") as file:
        return file.read(1 << 20)


def _tls_faults(settings: Settings) -> Iterator[_Fault]:
    if settings.mqtt.ca:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(settings.mqtt.ca)
        except FileNotFoundError:
            pass  # said above
        except (ssl.SSLError, OSError):
            yield ("mqtt.ca",), f"{settings.mqtt.ca} holds no certificate; name a PEM file of some"
    for section, group in _identities(settings):
        if not (group.cert and group.key):
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
    if settings.model.max_context is not None and settings.model.max_context > 4096:
        found.append(
            "model.max_context is above 4096: models with LongRoPE (Phi-3.5, Phi-4-mini) compute "
            "everything again when they cross token 4097; set it to 4096 or less"
        )
    for name, entry in entries().items():
        path = _given_file(settings, entry)
        if path is None or entry.key not in {"password_file", "key"}:
            continue
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if mode & stat.S_IROTH:
            found.append(f"{name}: every user of this machine may read {path}; chmod 640 it")
    return found
