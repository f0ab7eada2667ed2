"""What edged writes to standard output: one event a line, fields beside it.

On a terminal events are written for people; else as JSON, with systemd's `<N>` priority before it
when standard output is the journal. Prompts, answers, frames and passwords are not logged; should a
caller pass one all the same, `redact` takes it out, and of a foreign exception only its type and
place are written, because its message may quote what a user sent.

Event names are a closed set, EVENTS. What libraries log through `logging` comes as `library`.
"""

from __future__ import annotations

import enum
import json
import logging
import math
import os
import sqlite3
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import PurePath
from types import TracebackType
from typing import Any, Final, Protocol, TextIO

import structlog

from edged.errors import EdgedError

#: Every event there is, and what it says. A test compares it with the code.
EVENTS: Final[Mapping[str, str]] = {
    "camera.conflict": "the broker takes the camera connection for that of jobs; it is closed",
    "camera.forgotten": "a camera has been silent for long",
    "camera.new": "a camera has sent its first frame",
    "camera.refused": "frames were not taken, how many and why; at most once a minute a kind",
    "edged.failed": "a bug ended the daemon; where it is stands beside it",
    "edged.killed": "a second signal to stop came; the daemon ends at once",
    "edged.signal": "a signal came",
    "edged.starting": "the daemon begins; version, device and instance stand beside it",
    "edged.stopped": "the daemon has ended cleanly",
    "edged.stopping": "a stop was asked for; nothing new is taken",
    "engine.died": "the engine process has ended, why, and when it is tried again",
    "engine.load_failed": "the model could not be loaded, and when it is tried again",
    "engine.loaded": "the model is loaded and warmed up",
    "engine.output": "a line the engine process wrote",
    "engine.output_muted": "the engine process writes too much; the rest is dropped for a while",
    "engine.recycled": "the engine process was ended between jobs and starts anew",
    "engine.started": "an engine process was started",
    "frames.swept": "files of frames that belong to no waiting job were removed",
    "health.foreign_status": "another instance publishes on this device's status topic",
    "health.state": "the state changed, and why",
    "job.engine_died": "the engine process ended while it worked on this job",
    "job.finished": "the one line of a job that has ended: outcome, tokens, times",
    "job.gone": "a job was no longer in the journal when its turn came",
    "journal.recovered": "jobs and finals of an earlier start were found",
    "journal.reset": "the journal could not be read; it was set aside and a new one begun",
    "journal.unavailable": "the journal cannot be read or written; it is tried again",
    "library": "a library logged `message` through `logging`",
    "mqtt.closed": "the connection to the broker was ended cleanly by this side",
    "mqtt.connected": "the broker accepted the connection",
    "mqtt.disconnected": "the connection to the broker is gone or was not made, and why",
    "mqtt.failed": "an error in the network thread; it connects again",
    "mqtt.farewell_failed": "the broker did not answer the last status before disconnecting",
    "mqtt.listener_failed": "an error while a message or an event of the connection was handled",
    "mqtt.no_retain": "the broker keeps no retained messages",
    "mqtt.stolen": "somebody else uses this client id",
    "mqtt.subscription_refused": "the broker refused subscriptions",
    "mqtt.thread_ended": "the network thread has ended; the daemon starts it again",
    "mqtt.unsendable": "a message that must not be published was not sent",
    "outbox.dropped": "an event was dropped before it was sent",
    "outbox.parked": "sending a final failed several times; it is tried again later",
    "outbox.refused": "the broker refused to take a message",
    "outbox.unsendable": "an event cannot be published as it is",
    "request.failed": "an error of ours while a request was taken in",
    "request.refused": "a request was not taken, and why",
    "request.retained_dropped": "a retained request was dropped",
    "settings.warning": "a setting that is allowed and should not stay",
    "systemd.unreachable": "the service manager could not be told something",
    "task.failed": "a task in the background failed",
    "watchdog.starved": "a part no longer turns; systemd is no longer told that all is well",
}

#: Fields that hold what users sent, what was answered, or a secret.
_PRIVATE = frozenset(
    {
        "answer",
        "answers",
        "body",
        "content",
        "correlation",
        "delta",
        "frames",
        "image",
        "images",
        "messages",
        "passphrase",
        "password",
        "payload",
        "prompt",
        "question",
        "questions",
        "secret",
        "system",
        "text",
    }
)
#: syslog's numbers, which journald takes from `<N>` at the start of a line.
_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
#: Exceptions whose messages are made by edged, the system or SQLite, not from a user's text.
_OPEN = (EdgedError, OSError, sqlite3.Error, MemoryError)
_MAX_TEXT = 2000
_MAX_DEPTH = 4
_MAX_CHAIN = 5
_MAX_STACK = 30

_Event = MutableMapping[str, Any]


class LogSettings(Protocol):
    """The part of the settings that logging needs."""

    @property
    def level(self) -> str:
        """debug, info, warning or error."""
        ...

    @property
    def format(self) -> str:
        """auto, console or json."""
        ...


def configure(
    settings: LogSettings,
    *,
    stream: TextIO | None = None,
    environ: Mapping[str, str] | None = None,
) -> None:
    """Send all logging to standard output; may be called again with other settings.

    Args:
        settings: level and format.
        stream: instead of standard output, for tests.
        environ: instead of this process's environment, for tests.
    """
    out = sys.stdout if stream is None else stream
    journal = _is_journal(out, os.environ if environ is None else environ)
    console = settings.format == "console" or (settings.format == "auto" and _is_terminal(out))
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        _exceptions,
        redact,
    ]
    if console:
        final: list[structlog.typing.Processor] = [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False, key="ts"),
            _flat_exception,
            structlog.dev.ConsoleRenderer(colors=_is_terminal(out), timestamp_key="ts"),
        ]
    else:
        final = [
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            _Json(priority=journal),
        ]
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(settings.level),
        logger_factory=_Lines(out),
        # A cached logger would keep the settings of the first call.
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, _Library)]:
        root.removeHandler(handler)
    root.addHandler(_Library())
    root.setLevel(logging.DEBUG if settings.level == "debug" else logging.WARNING)
    logging.captureWarnings(capture=True)


# Where lines go ---------------------------------------------------------------------------------


class _Lines:
    """Writes lines; a standard output that is full or closed must not end the daemon."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, *_args: Any) -> _Lines:
        return self

    def msg(self, message: str) -> None:
        with suppress(OSError, ValueError):
            line = message + "\n"
            # One call a line: several threads write to the same stream.
            try:
                self._out.write(line)
            except UnicodeEncodeError:  # a terminal of another encoding
                self._out.write(ascii(message)[1:-1] + "\n")
            self._out.flush()

    debug = info = warning = warn = error = critical = exception = fatal = log = failure = msg


class _Library(logging.Handler):
    """Turns what libraries log into `library` events."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # One line: asyncio puts the repr of a task, and with it its exception's text, below.
            message = record.getMessage().split("\n", 1)[0][:_MAX_TEXT]
            level = next(n for n, number in _LEVELS if record.levelno >= number)
            structlog.get_logger().log(
                logging.getLevelNamesMapping()[level.upper()],
                "library",
                logger=record.name,
                message=message,
                **({"exc_info": record.exc_info} if record.exc_info else {}),
            )
        except Exception:  # noqa: BLE001 - logging must not raise into a library
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say which logger's record it was; the record itself may be what cannot be printed."""
        structlog.get_logger().error("library", logger=record.name, message="(not printable)")


_LEVELS = (("critical", 50), ("error", 40), ("warning", 30), ("info", 20), ("debug", 0))


def _is_terminal(out: TextIO) -> bool:
    try:
        return out.isatty()
    except (AttributeError, ValueError):
        return False


def _is_journal(out: TextIO, environ: Mapping[str, str]) -> bool:
    """Return whether `out` is the journal's socket, which JOURNAL_STREAM names by its inode."""
    try:
        status = os.fstat(out.fileno())
    except (AttributeError, OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


# What is written --------------------------------------------------------------------------------


class _Json:
    """Renders an event as one line of JSON that begins with time, level and name."""

    def __init__(self, *, priority: bool) -> None:
        self._priority = priority

    def __call__(self, _logger: Any, _method: str, event: _Event) -> str:
        level = str(event.get("level", "info"))
        first = {key: event.pop(key) for key in ("ts", "level", "event") if key in event}
        try:
            line = json.dumps(first | dict(event), ensure_ascii=True, default=_plain)
        except (TypeError, ValueError, RecursionError):
            line = json.dumps(first | {"unprintable": sorted(map(str, event))}, default=_plain)
        return f"<{_PRIORITY.get(level, 6)}>{line}" if self._priority else line


def _plain(value: Any) -> Any:
    """Return what stands for a value that JSON has not: never its repr, which may hold anything."""
    if isinstance(value, PurePath | enum.Enum):
        return str(value)
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return f"[{type(value).__name__}]"


def redact(_logger: Any, _method: str, event: _Event) -> _Event:
    """Replace what users sent and secrets by their sizes, at any depth."""
    for key, value in event.items():
        if key != "event":
            event[key] = _redacted(key, value, 0)
    return event


def _redacted(key: str, value: Any, depth: int) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    private = key.lower() in _PRIVATE
    if isinstance(value, str):
        if private:
            return f"[{len(value)} characters]"
        return value if len(value) <= _MAX_TEXT else f"{value[:_MAX_TEXT]}…"
    if isinstance(value, Mapping):
        if private or depth >= _MAX_DEPTH:
            return f"[{len(value)} fields]"
        return {str(k): _redacted(str(k), v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        if private or depth >= _MAX_DEPTH:
            return f"[{len(value)} items]"
        return [_redacted(key, each, depth + 1) for each in value]
    if isinstance(value, BaseException):
        return _describe(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value


def _exceptions(_logger: Any, _method: str, event: _Event) -> _Event:
    """Replace `exc_info` by a structure: the chain of exceptions, each with its place."""
    info = event.pop("exc_info", None)
    if not info:
        return event
    if isinstance(info, BaseException):
        error: BaseException | None = info
    else:
        error = info[1] if isinstance(info, tuple) else sys.exc_info()[1]
    chain: list[dict[str, Any]] = []
    while error is not None and len(chain) < _MAX_CHAIN:
        chain.append(
            {
                "type": type(error).__name__,
                "about": _about(error),
                "at": _stack(error.__traceback__),
            }
        )
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if chain:
        event["exception"] = chain
    return event


def _about(error: BaseException) -> str | None:
    """Return an exception's message if it cannot quote a user's text."""
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_describe(each) for each in error.exceptions[:_MAX_CHAIN])
    return str(error)[:_MAX_TEXT] if isinstance(error, _OPEN) else None


def _describe(error: BaseException) -> str:
    about = _about(error)
    return f"{type(error).__name__}: {about}" if about else type(error).__name__


def _stack(trace: TracebackType | None) -> list[str]:
    frames = traceback.extract_tb(trace)[-_MAX_STACK:]
    return [f"{PurePath(each.filename).name}:{each.lineno} {each.name}" for each in frames]


def _flat_exception(_logger: Any, _method: str, event: _Event) -> _Event:
    """For people: the exception as one text, innermost place last."""
    chain = event.pop("exception", None)
    if chain:
        event["exception"] = "\n".join(
            f"  {each['type']}: {each['about'] or '(message withheld)'}\n    "
            + "\n    ".join(each["at"])
            for each in chain
        )
    # What a library or a peer wrote must not steer the terminal or begin a line of its own.
    for key, value in event.items():
        if isinstance(value, str) and key != "exception" and not value.isprintable():
            event[key] = ascii(value)[1:-1]
    return event
