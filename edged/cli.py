"""The command line: reads the arguments, calls what does the work, turns errors into exit codes.

Each command imports what it needs when it runs: `edged --help` answers at once, also on a Pi.
"""

# ruff: noqa: PLC0415 - see above: a command imports what it needs when it runs

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edged import __version__
from edged.errors import ConfigError, EdgedError

if TYPE_CHECKING:
    from edged.settings import Settings

EXIT_USAGE = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; return its exit status."""
    _tolerate_narrow_encodings()
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except ConfigError as error:
        for mistake in error.mistakes:
            _complain(mistake)
        return error.exit_status
    except EdgedError as error:
        _complain(error.message)
        if error.hint:
            _complain(error.hint)
        return error.exit_status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _forget_output()
        return 128 + signal.SIGPIPE
    if status == 128 + signal.SIGPIPE:
        _forget_output()
    return status


def _complain(text: str) -> None:
    print(f"edged: {text}", file=sys.stderr)


def _tolerate_narrow_encodings() -> None:
    """Let a terminal that has no UTF-8 show something else instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _forget_output() -> None:
    """Keep the interpreter from complaining, at its end, that nobody reads standard output."""
    with suppress(OSError, ValueError):  # it is no file: nobody complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Arguments --------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edged",
        description="An agent that answers questions over MQTT with a small Phi model.",
        epilog="Exit codes: 0 done; 1 failed or found wrong; 2 wrong usage; 69 broker not "
        "reachable; 78 the configuration is wrong.",
    )
    parser.add_argument("--version", action="version", version=f"edged {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    run = commands.add_parser("run", help="the daemon: serve until told to stop")
    _add_settings(run)
    run.set_defaults(run=_run)

    check = commands.add_parser("check", help="say all that is wrong here, and what to do about it")
    _add_settings(check)
    _add_json(check, "print the findings as JSON")
    check.set_defaults(run=_check)

    ask = commands.add_parser("ask", help="ask a question and print the answer as it comes")
    _add_settings(ask)
    _add_question(ask)
    _add_json(ask, "print every event as a line of JSON")
    ask.set_defaults(run=_ask)

    top = commands.add_parser("top", help="show how the device is")
    _add_settings(top)
    top.add_argument(
        "--once", action="store_true", help="one heartbeat, then exit: 0 if it says ready, else 1"
    )
    _add_json(top, "print heartbeats as lines of JSON")
    top.set_defaults(run=_top)

    schema = commands.add_parser("schema", help="print what can be set, or sent and received")
    kinds = schema.add_subparsers(title="commands", metavar="WHAT", required=True)
    config = kinds.add_parser("config", help="the settings")
    config.add_argument(
        "--format",
        choices=["json", "toml", "markdown"],
        default="json",
        help="a JSON Schema, a commented settings file, or tables (default: %(default)s)",
    )
    config.set_defaults(run=_config_schema)
    asyncapi = kinds.add_parser("asyncapi", help="the topics, and the schema of every payload")
    asyncapi.add_argument(
        "--format",
        choices=["json", "markdown"],
        default="json",
        help="an AsyncAPI 3.0 document, or a table of the topics (default: %(default)s)",
    )
    asyncapi.set_defaults(run=_asyncapi)

    models = commands.add_parser("models", help="prepare a model's folder")
    steps = models.add_subparsers(title="commands", metavar="COMMAND", required=True)
    fuse = steps.add_parser(
        "fuse",
        help="write the graph that a vision model sees with, beside the published ones",
        description="Joins the embedding and text graphs of a Phi-3-vision or Phi-3.5-vision "
        "folder to one, checks it, and writes it into the folder with a record of what it was made "
        "from. Weights are neither copied nor changed. A folder that is fused is left alone.",
    )
    fuse.add_argument("path", type=Path, metavar="DIR", help="the model's folder")
    fuse.set_defaults(run=_fuse)

    pull = steps.add_parser(
        "pull",
        help="fetch a model's folder from the Hugging Face hub",
        description="Fetches the files that onnxruntime-genai reads, and no code, pinned to one "
        "commit. A fetch that was ended goes on where it was; the folder appears when every file "
        "is there and has the hub's hash. HF_TOKEN and HF_ENDPOINT are obeyed.",
    )
    pull.add_argument("repository", metavar="ID", help="owner/name on the hub")
    pull.add_argument("--folder", metavar="F", help="the model's folder in the repository")
    pull.add_argument(
        "--revision", default="main", metavar="R", help="commit, tag or branch (default: main)"
    )
    pull.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder to make")
    pull.set_defaults(run=_pull)

    demo = commands.add_parser(
        "demo", help="the whole thing on this machine: a broker, a small model, checked answers"
    )
    demo.add_argument(
        "--broker",
        choices=["auto", "mosquitto", "amqtt"],
        default="auto",
        help="which broker to start (default: mosquitto if it is installed, else amqtt)",
    )
    demo.set_defaults(run=_demo)

    selftest = commands.add_parser(
        "selftest",
        help="try a fixed set of jobs end to end, and say which answers are right",
        description="Without settings: the small model that ships, over a broker of its own. With "
        "--config or --set: the device that they name, which must run; if its first answer is not "
        "that of the model that ships, the facts are looked for in its answers, whatever their "
        "words. Exit 0: all was right. With a text model the jobs about frames are left out, and "
        "that is said; a vision model that sees nothing, for whatever reason, is wrong.",
    )
    _add_settings(selftest)
    _add_json(selftest, "print one JSON object")
    selftest.set_defaults(run=_selftest)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="F", help="the settings file (TOML)")
    parser.add_argument(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        dest="overrides",
        metavar="NAME=VALUE",
        help="one setting, such as mqtt.host=broker.lan; may be repeated",
    )


def _add_json(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--json", action="store_true", dest="as_json", help=text)


def _add_question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", type=_text, metavar="TEXT", help="the question; -: standard input")
    look = parser.add_mutually_exclusive_group()
    look.add_argument(
        "--frame", type=_frame, action="append", default=[], dest="frames", metavar="F",
        help="a JPEG or PNG to ask about; may be repeated, the oldest first",
    )  # fmt: skip
    look.add_argument("--camera", metavar="NAME", help="ask about this camera's newest frames")
    parser.add_argument(
        "--last", type=_tokens, default=1, metavar="N",
        help="with --camera: so many frames (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--span", type=_seconds, metavar="S",
        help="with --camera: spread them over the newest S seconds",
    )  # fmt: skip
    parser.add_argument(
        "--detail", choices=["low", "auto", "high"], help="how closely to look at the frames"
    )
    parser.add_argument("--system", metavar="S", help="instructions that come before the question")
    parser.add_argument(
        "--max-tokens", type=_tokens, metavar="N", help="the longest answer, in tokens"
    )
    parser.add_argument(
        "--schema", type=_schema_file, metavar="FILE", help="a JSON schema the answer must satisfy"
    )
    parser.add_argument(
        "--deadline", type=_seconds, metavar="S", help="seconds after which the job is given up"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds_or_ever,
        default=600.0,
        metavar="S",
        help="seconds to wait for the result before cancelling (default: 600; 0: for ever)",
    )


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name.strip(), value


def _text(text: str) -> str:
    if text == "-":
        text = sys.stdin.read()
    if not text.strip():
        raise argparse.ArgumentTypeError("there is no question in it")
    return text


def _tokens(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _seconds_or_ever(text: str) -> float:
    return math.inf if text.strip() == "0" else _seconds(text)


def _frame(text: str) -> bytes:
    try:
        return Path(text).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from None


def _schema_file(text: str) -> dict[str, Any] | bool:
    try:
        schema = json.loads(Path(text).read_bytes())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise argparse.ArgumentTypeError(f"{text} is no JSON schema: it must be an object")
    return schema


# Commands ---------------------------------------------------------------------------------------


def _settings(arguments: argparse.Namespace, *, as_client: bool = False) -> Settings:
    from edged import settings

    return settings.load(arguments.config, dict(arguments.overrides), as_client=as_client)


def _run(arguments: argparse.Namespace) -> int:
    import faulthandler

    from edged import app, log

    settings = _settings(arguments)
    log.configure(settings.log)
    faulthandler.enable()  # the watchdog's SIGABRT then says where each thread was
    return app.main(settings)


def _check(arguments: argparse.Namespace) -> int:
    from edged import check, findings
    from edged.terminal import Screen, width

    _be_silent()
    settings: Settings | ConfigError
    try:
        settings = _settings(arguments)
    except ConfigError as error:
        settings = error
    screen, found = Screen(), []
    screen.status("looking …")
    for finding in check.run_checks(settings):
        found.append(finding)
        screen.status(f"{finding.area}: {finding.name} …")
    if arguments.as_json:
        screen.line(findings.render_json(found))
    else:
        screen.line(findings.render_text(found, width=width(), colour=screen.colours))
    return findings.exit_status(found)


def _ask(arguments: argparse.Namespace) -> int:
    from edged import ask

    _be_silent()
    question = ask.Question(
        text=arguments.text,
        frames=tuple(arguments.frames),
        camera=arguments.camera,
        last=arguments.last,
        span_s=arguments.span,
        detail=arguments.detail,
        system=arguments.system,
        max_tokens=arguments.max_tokens,
        schema=arguments.schema,
        deadline_s=arguments.deadline,
        timeout_s=arguments.timeout,
    )
    return ask.main(_settings(arguments, as_client=True), question, as_json=arguments.as_json)


def _top(arguments: argparse.Namespace) -> int:
    from edged import top

    _be_silent()
    return top.main(
        _settings(arguments, as_client=True), once=arguments.once, as_json=arguments.as_json
    )


def _config_schema(arguments: argparse.Namespace) -> int:
    from edged import schema

    if arguments.format == "json":
        _print_json(schema.config_schema())
    else:
        text = schema.config_toml() if arguments.format == "toml" else schema.config_markdown()
        print(text, end="")
    return 0


def _asyncapi(arguments: argparse.Namespace) -> int:
    from edged import asyncapi

    if arguments.format == "json":
        _print_json(asyncapi.document())
    else:
        print(asyncapi.topics_markdown(), end="")
    return 0


def _print_json(body: dict[str, Any]) -> None:
    print(json.dumps(body, indent=2, ensure_ascii=False))


def _fuse(arguments: argparse.Namespace) -> int:
    try:
        from edged.models import fuse
    except ImportError as error:
        raise EdgedError(
            f"fusing needs a package that is not installed: {error.name or error}",
            hint="pip install 'edged[cpu]', or 'edged[cuda]' on a box with CUDA",
        ) from None
    done = fuse.fuse(arguments.path)
    if not done.changed:
        print(f"{done.graph}: already there and valid, nothing changed")
        return 0
    geometry = done.fused.geometry
    print(f"{done.graph}: {done.graph.stat().st_size / 1000:.0f} kB, its weights where they were")
    print(f"checked against the published graphs, {done.compared} times: the same embeddings")
    print(
        f"a frame of one crop of {geometry.crop} pixels is {geometry.tokens(1, 1)} tokens; "
        f"id {done.fused.placeholder} stands for them"
    )
    print("an edged that runs sees with it from its next start on")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    from edged.models import folder, pull

    done = pull.pull(
        arguments.repository, arguments.to, folder=arguments.folder, revision=arguments.revision
    )
    where = f"{done.source.repository} at {done.source.commit}"
    if not done.changed:
        print(f"{done.model.path}: already there and whole, {where}; nothing changed")
    else:
        print(f"{done.model.path}: {done.size / 1e6:.0f} MB, {where}")
        print(
            f"the files' sha256 stand in {folder.MANIFEST}, where they came from in {pull.SOURCE}"
        )
    if done.left_out:
        print(f"not fetched, the model does without them: {', '.join(done.left_out)}")
    if done.model.unfused:
        print(f"to let it see: edged models fuse {done.model.path}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from edged.sandbox import need_engine

    need_engine()  # Pillow is among it, which the demo imports
    from edged import demo

    _be_silent()
    return demo.main(arguments.broker)


def _selftest(arguments: argparse.Namespace) -> int:
    try:
        from edged.selftest import run
    except ImportError as error:
        raise EdgedError(
            f"drawing the frames needs a package that is not installed: {error.name or error}",
            hint="pip install 'edged[cpu]', or 'edged[cuda]' on a box with CUDA",
        ) from None
    _be_silent()
    configured = arguments.config is not None or arguments.overrides
    settings = _settings(arguments, as_client=True) if configured else None
    return run.main(settings, as_json=arguments.as_json)


def _be_silent() -> None:
    """Keep what the connection logs for the daemon's sake away from a program for people."""
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
