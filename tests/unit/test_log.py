from __future__ import annotations

import ast
import enum
import io
import json
import logging
import os
import re
import sqlite3
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import BaseModel

import edged
from edged import log
from edged.errors import ConfigError, EdgedError
from edged.settings import Log

Lines = Callable[[], list[dict[str, Any]]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(name="out")
def _out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(name="lines")
def _lines(out: io.StringIO) -> Lines:
    """Configure JSON at level info; the result returns what was written."""
    log.configure(Log(), stream=out, environ={})
    return lambda: [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_line_of_json(lines: Lines) -> None:
    structlog.get_logger().info("job.finished", job="a", tokens=3, ratio=0.5, ok=True, gone=None)
    (line,) = lines()
    when = datetime.fromisoformat(line.pop("ts"))
    assert when.tzinfo == UTC
    assert abs((datetime.now(UTC) - when).total_seconds()) < 60
    assert line == {
        "level": "info",
        "event": "job.finished",
        "job": "a",
        "tokens": 3,
        "ratio": 0.5,
        "ok": True,
        "gone": None,
    }


def test_time_level_and_name_come_first(lines: Lines, out: io.StringIO) -> None:
    structlog.get_logger().warning("job.gone", a=1)
    assert list(lines()[0]) == ["ts", "level", "event", "a"]
    assert out.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("level", "written"),
    [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)],
)
def test_levels(level: Any, written: int, out: io.StringIO) -> None:
    log.configure(Log(level=level), stream=out, environ={})
    logger = structlog.get_logger()
    for name in ("debug", "info", "warning", "error"):
        getattr(logger, name)("job.gone")
    assert len(out.getvalue().splitlines()) == written


def test_configuring_again_replaces_what_was(out: io.StringIO) -> None:
    logger = structlog.get_logger()
    for _ in range(3):
        log.configure(Log(), stream=out, environ={})
    logger.info("job.gone")
    logging.getLogger("paho").warning("once")
    assert len(out.getvalue().splitlines()) == 2
    log.configure(Log(level="error"), stream=out, environ={})
    logger.info("job.gone")
    assert len(out.getvalue().splitlines()) == 2


def test_context_is_bound(lines: Lines) -> None:
    structlog.contextvars.bind_contextvars(job="a")
    structlog.get_logger().bind(b=1).info("job.gone")
    assert lines()[0]["job"] == "a"
    assert lines()[0]["b"] == 1


# Where it goes, and how it looks


def test_standard_output_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure(Log())
    structlog.get_logger().info("job.gone")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["event"] == "job.gone"
    assert captured.err == ""


def test_a_terminal_is_for_people() -> None:
    out = Terminal()
    log.configure(Log(), stream=out, environ={})
    structlog.get_logger().info("job.gone", job="a b", line="x\x1b[2J\ny")
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert re.match(r"\d\d:\d\d:\d\d \[info +\] job\.gone", text)
    assert text.count("\n") == 1
    assert "\x1b[2J" not in out.getvalue()


@pytest.mark.parametrize("format_", ["json", "console"])
def test_the_format_can_be_chosen(format_: Any) -> None:
    out: io.StringIO = Terminal() if format_ == "json" else io.StringIO()
    log.configure(Log(format=format_), stream=out, environ={})
    structlog.get_logger().info("job.gone")
    assert out.getvalue().startswith("{") is (format_ == "json")
    assert "\x1b" not in out.getvalue()


def test_the_journal_gets_priorities(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as out:
        status = os.fstat(out.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        log.configure(Log(level="debug"), stream=out, environ=environ)
        logger = structlog.get_logger()
        for name in ("debug", "info", "warning", "error", "critical"):
            getattr(logger, name)("job.gone")
        out.seek(0)
        lines = out.read().splitlines()
    assert [line[:3] for line in lines] == ["<7>", "<6>", "<4>", "<3>", "<2>"]
    assert all(json.loads(line[3:])["event"] == "job.gone" for line in lines)


@pytest.mark.parametrize("stream", ["1:2", "", "x"])
def test_output_that_is_not_the_journal_gets_none(stream: str, tmp_path: Path) -> None:
    # A unit whose output goes to a file inherits the variable all the same.
    with (tmp_path / "file").open("w+") as out:
        log.configure(Log(), stream=out, environ={"JOURNAL_STREAM": stream})
        structlog.get_logger().info("job.gone")
        out.seek(0)
        assert out.read().startswith("{")


def test_output_that_is_full_or_closed_is_no_error(lines: Lines, out: io.StringIO) -> None:
    out.close()
    structlog.get_logger().info("job.gone")
    with Path("/dev/full").open("w") as full:
        log.configure(Log(), stream=full, environ={})
        structlog.get_logger().info("job.gone")
        structlog.reset_defaults()
        with pytest.raises(OSError, match="No space"):
            full.close()
    assert lines is not None


def test_a_terminal_of_another_encoding() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    log.configure(Log(format="console"), stream=out, environ={})
    structlog.get_logger().info("job.gone", name="ü")
    assert b"\\xfc" in raw.getvalue()


# What must not be written


@pytest.mark.parametrize("key", ["password", "prompt", "messages", "frames", "text", "Prompt"])
def test_private_fields_become_sizes(key: str, lines: Lines) -> None:
    logger = structlog.get_logger()
    logger.info("job.gone", **{key: "hunter2"})
    logger.info("job.gone", **{key: ["hunter2"]})
    logger.info("job.gone", **{key: {"hunter2": 1}})
    logger.info("job.gone", details={"deep": [{key: "hunter2"}]})
    logger.info("job.gone", **{key: 7})
    assert "hunter2" not in json.dumps(lines())
    assert [line.get(key) for line in lines()] == [
        "[7 characters]",
        "[1 items]",
        "[1 fields]",
        None,
        7,
    ]


def test_bytes_are_never_written(lines: Lines) -> None:
    structlog.get_logger().info("job.gone", a=b"secret", b=[bytearray(b"secret")])
    assert "secret" not in json.dumps(lines())
    assert lines()[0]["a"] == "[6 bytes]"


def test_objects_are_never_shown_by_their_repr(lines: Lines, tmp_path: Path) -> None:
    class Job:
        def __repr__(self) -> str:
            return "prompt"

    class Colour(enum.Enum):
        RED = 1

    structlog.get_logger().info("job.gone", job=Job(), path=tmp_path, colour=Colour.RED)
    assert lines()[0]["job"] == "[Job]"
    assert lines()[0]["path"] == str(tmp_path)
    assert lines()[0]["colour"] == "Colour.RED"


def test_long_and_deep_values_are_cut(lines: Lines) -> None:
    deep: Any = "x"
    for _ in range(10_000):
        deep = [deep]
    structlog.get_logger().info("job.gone", long="x" * 100_000, deep=deep)
    assert len(json.dumps(lines())) < 5000


def test_what_cannot_be_written_is_still_told(lines: Lines) -> None:
    structlog.get_logger().info(
        "job.gone", **{"a": float("nan"), "b": {1: {2}}, "\ud800": "\udcff"}
    )
    assert lines()[0]["event"] == "job.gone"


def raises(error: BaseException) -> None:
    raise error


def test_an_exception_is_a_structure(lines: Lines) -> None:
    try:
        try:
            raises(ValueError("what a user sent"))
        except ValueError as error:
            raise EdgedError("the disk is full") from error
    except EdgedError:
        structlog.get_logger().exception("mqtt.failed")
    (line,) = lines()
    outer, inner = line["exception"]
    assert outer["type"] == "EdgedError"
    assert outer["about"] == "the disk is full"
    assert inner["type"] == "ValueError"
    assert inner["about"] is None
    assert inner["at"][-1].startswith("test_log.py:")
    assert inner["at"][-1].endswith(" raises")
    assert line["level"] == "error"
    assert "what a user sent" not in json.dumps(line)


class Strict(BaseModel):
    n: int


@pytest.mark.parametrize(
    ("error", "about"),
    [
        (ValueError("sent"), None),
        (KeyError("sent"), None),
        (RuntimeError("sent"), None),
        (ConfigError(["a", "b"]), "a\nb"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (sqlite3.OperationalError("database is locked"), "database is locked"),
        (
            ExceptionGroup("sent", [ValueError("sent"), OSError(5, "io")]),
            "ValueError; OSError: [Errno 5] io",
        ),
    ],
)
def test_which_messages_are_written(error: Exception, about: str | None, lines: Lines) -> None:
    structlog.get_logger().error("mqtt.failed", exc_info=error)
    assert lines()[0]["exception"][0]["about"] == about
    structlog.get_logger().error("mqtt.failed", why=error)
    assert "sent" not in json.dumps(lines())


def test_the_input_of_a_validation_is_not_written(lines: Lines) -> None:
    try:
        Strict.model_validate({"n": "hunter2"})
    except ValueError:
        structlog.get_logger().exception("mqtt.failed")
    assert "hunter2" not in json.dumps(lines())


def test_an_exception_for_people() -> None:
    out = Terminal()
    log.configure(Log(), stream=out, environ={})
    structlog.get_logger().error("mqtt.failed", exc_info=ValueError("sent"))
    assert "ValueError: (message withheld)" in out.getvalue()
    assert "sent" not in out.getvalue()


def test_no_exception_at_hand(lines: Lines) -> None:
    structlog.get_logger().error("mqtt.failed", exc_info=True)
    structlog.get_logger().error("mqtt.failed", exc_info=None)
    assert all("exception" not in line for line in lines())


def test_an_endless_chain_is_cut(lines: Lines) -> None:
    one, two = EdgedError("one"), EdgedError("two")
    one.__cause__, two.__cause__ = two, one
    structlog.get_logger().error("mqtt.failed", exc_info=one)
    assert len(lines()[0]["exception"]) == 5


# Libraries


def test_libraries_come_as_one_event(lines: Lines) -> None:
    logging.getLogger("paho").warning("lost %s", "it")
    logging.getLogger("paho").info("not at this level")
    (line,) = lines()
    assert line.pop("ts")
    assert line == {"level": "warning", "event": "library", "logger": "paho", "message": "lost it"}


def test_libraries_say_more_at_debug(out: io.StringIO) -> None:
    log.configure(Log(level="debug"), stream=out, environ={})
    logging.getLogger("paho").debug("detail")
    assert json.loads(out.getvalue())["level"] == "debug"


def test_what_asyncio_says_about_a_lost_exception_holds_no_text(lines: Lines) -> None:
    error = ValueError("sent")
    logging.getLogger("asyncio").error(
        "Task exception was never retrieved\nfuture: <Task exception=%r>", error, exc_info=error
    )
    (line,) = lines()
    assert line["message"] == "Task exception was never retrieved"
    assert line["exception"][0]["type"] == "ValueError"
    assert "sent" not in json.dumps(line)


def test_a_record_that_cannot_be_formatted(lines: Lines) -> None:
    record = logging.LogRecord("paho", logging.ERROR, "file", 1, "%d", ("x",), None)
    (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, log._Library)]
    handler.handle(record)  # pytest's own handlers would raise
    assert lines()[0]["message"] == "(not printable)"


def test_warnings_are_logged(lines: Lines) -> None:
    with warnings.catch_warnings():
        # catch_warnings restores what captureWarnings replaces, so it comes first.
        logging.captureWarnings(capture=False)
        logging.captureWarnings(capture=True)
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(capture=False)
    assert lines()[0]["logger"] == "py.warnings"


# The closed set


def logged_events() -> dict[str, str]:
    """Every first argument of a log call in the package, and where it stands."""
    levels = {"debug", "info", "warning", "error", "critical", "exception"}
    found: dict[str, str] = {}
    package = Path(edged.__file__).parent
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            target = node.func.value
            name = target.id if isinstance(target, ast.Name) else ""
            if isinstance(target, ast.Call) and isinstance(target.func, ast.Attribute):
                name = "log" if target.func.attr in {"get_logger", "bind"} else ""
            if node.func.attr in levels and name in {"log", "_log", "logger"} and node.args:
                where = f"{file.relative_to(package)}:{node.lineno}"
                event = node.args[0]
                either = (event.body, event.orelse) if isinstance(event, ast.IfExp) else (event,)
                for each in either:
                    found[str(each.value) if isinstance(each, ast.Constant) else where] = where
    return found


def test_every_event_is_in_the_list() -> None:
    unknown = {event: where for event, where in logged_events().items() if event not in log.EVENTS}
    assert not unknown, "add them to EVENTS in edged/log.py, with a line on what they say"


def test_event_names_and_their_words() -> None:
    for name, words in log.EVENTS.items():
        assert re.fullmatch(r"[a-z]+(\.[a-z_]+)?", name)
        assert words
    assert list(log.EVENTS) == sorted(log.EVENTS)


def test_nothing_is_configured_by_importing() -> None:
    assert "edged.log" in sys.modules
    assert not structlog.is_configured()
