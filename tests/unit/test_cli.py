"""The command line itself: arguments, exit codes, what is imported when."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from edged import __version__, app, ask, asyncapi, check, cli, demo, findings, log, top
from edged.errors import BrokerUnreachable, ConfigError, EdgedError
from edged.options import entries
from edged.selftest import run as selftest
from edged.settings import Settings


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("EDGED_CONFIG", str(tmp_path / "edged.toml"))
    (tmp_path / "edged.toml").write_text('device = "box"\n')
    yield
    structlog.reset_defaults()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was called instead of the commands' own work."""
    seen: list[tuple[Any, ...]] = []

    def instead(*arguments: Any, **named: Any) -> int:
        seen.append((*arguments, named))
        return 7

    for module in (app, ask, demo, top, selftest):
        monkeypatch.setattr(module, "main", instead)
    monkeypatch.setattr(log, "configure", lambda settings: seen.append((settings, {})))
    return seen


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, check=False, text=True, timeout=30
    )


def usage_error(*arguments: str) -> int:
    with pytest.raises(SystemExit) as error:
        cli.main(list(arguments))
    assert isinstance(error.value.code, int)
    return error.value.code


def test_help_imports_neither_paho_nor_the_engine_nor_pydantic() -> None:
    code = (
        "import sys; from edged import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'paho', 'onnxruntime', 'onnxruntime_genai', 'numpy', 'pydantic', 'structlog'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = run("-c", code)
    assert done.stderr == "[]\n"
    for command in ("run", "check", "ask", "top", "schema", "demo", "selftest"):
        assert command in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert usage_error("--version") == 0
    assert capsys.readouterr().out == f"edged {__version__}\n"


def test_runs_as_a_module() -> None:
    done = run("-m", "edged", "--version")
    assert (done.returncode, done.stdout) == (0, f"edged {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("sleep",), "invalid choice"),
        (("run", "--set", "mqtt.port"), "NAME=VALUE"),
        (("run", "--set", "=1"), "NAME=VALUE"),
        (("ask",), "TEXT"),
        (("ask", " "), "no question"),
        (("ask", "What?", "--max-tokens", "0"), "whole number from 1"),
        (("ask", "What?", "--max-tokens", "many"), "whole number from 1"),
        (("ask", "What?", "--deadline", "0"), "above 0"),
        (("ask", "What?", "--timeout", "nan"), "above 0"),
        (("ask", "What?", "--timeout", "soon"), "above 0"),
        (("ask", "What?", "--schema", "/nowhere"), "cannot be read"),
        (("schema",), "WHAT"),
        (("schema", "mqtt"), "invalid choice"),
        (("schema", "asyncapi", "--format", "toml"), "invalid choice"),
        (("demo", "--broker", "hive"), "invalid choice"),
    ],
)
def test_wrong_usage_exits_with_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert usage_error(*arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_schema_file_must_hold_a_schema(tmp_path: Path, content: str) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content)
    assert usage_error("ask", "What?", "--schema", str(path)) == 2


def test_run_configures_the_log_and_serves(calls: list[tuple[Any, ...]]) -> None:
    assert cli.main(["run", "--set", "log.level=error", "--set", "mqtt.port=1884"]) == 7
    (logged, _), (settings, _) = calls
    assert logged == settings.log
    assert (settings.device, settings.mqtt.port, settings.log.level) == ("box", 1884, "error")


def test_ask_passes_the_question_on(
    calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "integer"}')
    options = ["--system", "s", "--max-tokens", "5", "--deadline", "1.5", "--timeout", "0"]
    assert cli.main(["ask", "What?", *options, "--schema", str(schema), "--json"]) == 7
    settings, question, named = calls[0]
    assert isinstance(settings, Settings)
    assert named == {"as_json": True}
    assert question == ask.Question(
        text="What?", system="s", max_tokens=5, schema={"type": "integer"}, deadline_s=1.5,
        timeout_s=float("inf"),
    )  # fmt: skip
    assert ask.Question(text="What?").timeout_s == 600

    monkeypatch.setattr(sys, "stdin", type("In", (), {"read": lambda _: "from a pipe\n"})())
    cli.main(["ask", "-"])
    assert calls[1][1].text == "from a pipe\n"


def test_top_and_demo_pass_their_options_on(calls: list[tuple[Any, ...]]) -> None:
    cli.main(["top", "--once"])
    cli.main(["demo", "--broker", "amqtt"])
    assert calls[0][-1] == {"once": True, "as_json": False}
    assert calls[1] == ("amqtt", {})


def test_selftest_takes_settings_only_if_some_are_named(calls: list[tuple[Any, ...]]) -> None:
    cli.main(["selftest"])
    cli.main(["selftest", "--json", "--set", "device=other"])
    assert calls[0] == (None, {"as_json": False})
    assert isinstance(calls[1][0], Settings)
    assert (calls[1][0].device, calls[1][1]) == ("other", {"as_json": True})


@pytest.mark.parametrize("command", ["run", "ask What?", "top"])
def test_each_mistake_of_the_configuration_is_a_line(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    settings = ["--set", "mqtt.port=0", "--set", "nothing=1"]
    assert cli.main([*command.split(), *settings]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("edged: mqtt.port (command line): ")
    assert lines[1].startswith("edged: nothing (command line): ")


def test_check_shows_findings_and_takes_wrong_settings_as_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings | ConfigError] = []
    found = [findings.ok("box", "clock", "kept"), findings.failed("model", "m", "wrong", "mend")]

    def run_checks(settings: Settings | ConfigError) -> Iterator[findings.Finding]:
        given.append(settings)
        yield from found

    monkeypatch.setattr(check, "run_checks", run_checks)
    assert cli.main(["check"]) == 1
    assert "-> mend" in capsys.readouterr().out
    assert cli.main(["check", "--json", "--set", "mqtt.port=0"]) == 1
    assert json.loads(capsys.readouterr().out)["exit_status"] == 1
    assert isinstance(given[0], Settings)
    assert isinstance(given[1], ConfigError)


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (BrokerUnreachable("no broker", hint="start it"), 69, ["no broker", "start it"]),
        (EdgedError("it failed"), 1, ["it failed"]),
        (KeyboardInterrupt(), 130, []),
        (BrokenPipeError(), 141, []),
    ],
)
def test_expected_errors_have_no_traceback(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    lines: list[str],
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise error

    monkeypatch.setattr(top, "main", fail)
    # The real one would take pytest's own standard output away.
    monkeypatch.setattr(cli, "_forget_output", lambda: None)
    assert cli.main(["top"]) == status
    assert capsys.readouterr().err.splitlines() == [f"edged: {line}" for line in lines]


def test_schema_config_in_three_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "config"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "edged settings"
    assert cli.main(["schema", "config", "--format", "toml"]) == 0
    tomllib.loads(capsys.readouterr().out)
    assert cli.main(["schema", "config", "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert all(f"`{name}`" in shown for name in entries())


def test_schema_asyncapi_in_two_forms(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema", "asyncapi"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asyncapi.document()))
    assert cli.main(["schema", "asyncapi", "--format", "markdown"]) == 0
    assert capsys.readouterr().out == asyncapi.topics_markdown()
