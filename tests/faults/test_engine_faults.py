"""F2 to F4, F29, F36: what an engine that dies, hangs or cannot load does to the rest: nothing."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.daemon import MODEL, Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Name, Observer

QUICK = ("--backoff", "0.1")


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as observer:
        yield observer


def wait_stage(observer: Observer, stage: str) -> None:
    """Wait for a heartbeat with a job in this stage."""
    observer.wait_on(
        "health", lambda body: body.get("job", {}).get("stage") == stage, after=observer.last
    )


def connections(daemon: Daemon) -> int:
    return len(daemon.log("mqtt.connected", client_id="edged-box"))


def attempts(observer: Observer, name: Name) -> list[int]:
    return [each.body["attempt"] for each in observer.events(name, "started")]


# F2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "stage"),
    [("!prefill 20 100 !say done", "prefill"), ("!tokens 40 50", "token")],
    ids=["prefill", "decode"],
)
def test_a_killed_engine_costs_one_attempt(
    script: str, stage: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    settings = {"health": {"interval_s": 0.2}}
    with Daemon(tmp_path, broker.port, settings=settings, options=QUICK) as daemon:
        daemon.wait_ready()
        pid, engine = daemon.pid, daemon.engine_pid
        name = observer.ask(script)
        wait_stage(observer, stage)
        os.kill(engine, signal.SIGKILL)
        assert observer.final(name)["attempt"] == 2
        observer.check()
        assert attempts(observer, name) == [1, 2]
        assert len(observer.finals(name)) == 1
        beat = observer.wait_on("health", after=observer.last).body
        assert beat["engine"]["restarts"] == 1
        assert "SIGKILL" in beat["engine"]["last_reason"]
        assert (daemon.pid, connections(daemon)) == (pid, 1)
        assert daemon.engine_pids != [engine]


@pytest.mark.engine
@pytest.mark.parametrize("stage", ["prefill", "token"])
def test_a_killed_engine_with_a_model_costs_one_attempt(
    stage: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    settings = {"model": {"max_context": 4096}, "limits": {"max_tokens": 4000}}
    with Daemon(tmp_path, broker.port, engine="real", settings=settings, options=QUICK) as daemon:
        daemon.wait_ready()
        engine = daemon.engine_pid
        os.kill(engine, signal.SIGSTOP)  # from here on it moves only as far as it is let
        prompt = "word " * 500
        # An answer that cannot be short: the small model says little of its own.
        schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 700, "maxItems": 700}
        wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
        name = observer.ask(prompt if stage == "prefill" else "go on", response_format=wanted)
        observer.event(name, "started")
        kind = "progress" if stage == "prefill" else "chunk"
        until = time.monotonic() + 30
        while not observer.events(name, kind):
            os.kill(engine, signal.SIGCONT)
            os.kill(engine, signal.SIGSTOP)
            assert time.monotonic() < until
        os.kill(engine, signal.SIGKILL)
        assert observer.final(name)["attempt"] == 2
        observer.check()
        assert attempts(observer, name) == [1, 2]
        assert connections(daemon) == 1


# F3 ---------------------------------------------------------------------------------------------


def test_a_job_that_ends_every_engine_is_given_up_and_the_next_is_served(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    options = (*QUICK, "--stage-floor", "0.3")
    with Daemon(tmp_path, broker.port, options=options) as daemon:
        daemon.wait_ready()
        pid = daemon.pid
        for script, reason in (
            ("!segv", "signal: SIGSEGV"),
            ("!exit 1", "exit: status 1"),
            ("!spin", "deadline: prepare took longer"),
        ):
            bad, good = observer.ask(script), observer.ask("!say fine")
            final = observer.final(bad)
            assert (final["type"], final["code"]) == ("error", "dead")
            assert reason in final["message"]
            assert attempts(observer, bad) == [1, 2, 3]
            assert observer.final(good)["text"] == "fine"
        observer.check()
        beat = observer.wait_on("health", after=observer.last).body
        assert beat["totals"]["dead"] == 3
        assert beat["totals"]["completed"] == 3
        assert beat["engine"]["restarts"] == 9
        assert beat["state"] == "degraded"  # more than five deaths in ten minutes
        assert "the engine ended 9 times" in beat["reason"]
        assert (daemon.pid, connections(daemon)) == (pid, 1)


# F4 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (("--engine-option=--segv-on-load",), "SIGSEGV"),
        (("--engine-option=--fail-load=no such model",), "no such model; do something about it"),
    ],
    ids=["it crashes", "it says so"],
)
def test_jobs_wait_for_an_engine_that_cannot_load(
    fault: tuple[str, ...], reason: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, options=fault) as daemon:
        pid = daemon.pid
        degraded = observer.wait_on("health", lambda body: body["state"] == "degraded").body
        assert reason in degraded["reason"]
        assert degraded["engine"]["state"] in {"backoff", "loading"}
        names = [observer.ask("!say at last") for _ in range(3)]
        for name in names:
            observer.event(name, "accepted")
        event = "engine.load_failed" if daemon.log("engine.load_failed") else "engine.died"
        daemon.wait_log(event, count=3)
        pauses = [line["again_in_s"] for line in daemon.log(event)]
        assert all(0.5 * 2**n <= pause <= 2**n for n, pause in enumerate(pauses))
        assert (daemon.pid, connections(daemon)) == (pid, 1)
        assert not observer.finals(names[0])
        daemon.options = ()
        assert daemon.stop() == 0
        daemon.start()
        assert [observer.final(name)["attempt"] for name in names] == [1, 1, 1]
        observer.check(crashed=True)
        assert daemon.faults() == []


# F29 --------------------------------------------------------------------------------------------

_MARKER = """
#include <stdio.h>
__attribute__((constructor)) static void ran(void) {
    FILE *file = fopen("%s", "w");
    if (file) fclose(file);
}
"""


def _custom_library(model: Path, directory: Path) -> None:
    compiler = shutil.which("cc")
    library = model / "ops.so"
    if compiler is None:
        library.write_bytes(b"\x7fELF")
    else:
        source = directory / "ops.c"
        source.write_text(_MARKER % (directory / "ran"))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    config = json.loads((model / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "ops.so"
    (model / "genai_config.json").write_text(json.dumps(config))


def _config_key(model: Path, *path: str, value: object) -> None:
    file = model / "genai_config.json"
    config = json.loads(file.read_text())
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(config))


def _break(how: str, model: Path, directory: Path) -> None:
    """Make a model folder in this way a bad one."""
    if model.exists():
        shutil.rmtree(model)
    shutil.copytree(MODEL, model)
    match how:
        case "custom_ops_library":
            _custom_library(model, directory)
        case "a file outside":
            _config_key(model, "model", "decoder", "filename", value="../model.onnx")
        case "a symlink out":
            (model / "model.onnx").rename(directory / "elsewhere.onnx")
            (model / "model.onnx").symlink_to(directory / "elsewhere.onnx")
        case "a hard link":
            os.link(model / "model.onnx.data", directory / "second")
        case "a huge file":
            (model / "genai_config.json").write_text("[" * 20_000_000)
        case "no graph":
            (model / "model.onnx").unlink()
        case _:
            return


@pytest.mark.engine
def test_a_bad_model_folder_is_named_and_jobs_wait_until_it_is_mended(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    model = tmp_path / "model"
    faults = {
        "custom_ops_library": "custom_ops_library",
        "a file outside": "model.onnx",
        "a symlink out": "model.onnx",
        "a hard link": "model.onnx.data",
        "a huge file": "genai_config.json",
        "no graph": "model.onnx",
    }
    first, *others = faults
    _break(first, model, tmp_path)
    settings = {"model": {"path": str(model)}}
    with Daemon(
        tmp_path, broker.port, engine="real", settings=settings, options=("--backoff", "0.3")
    ) as daemon:
        pid = daemon.pid
        line = daemon.wait_log("engine.load_failed")
        assert faults[first] in line["detail"]
        name = observer.ask("what is this?", max_tokens=5)
        observer.event(name, "accepted")
        for how in others:
            _break(how, model, tmp_path)
            seen = len(daemon.lines)
            wrong = daemon.wait_log("engine.load_failed", since=seen, count=2)
            assert faults[how] in wrong["detail"], how
            beat = observer.wait_on("health", lambda body: body["state"] == "degraded").body
            assert beat["engine"]["state"] in {"backoff", "loading"}
            (tmp_path / "second").unlink(missing_ok=True)
        assert not observer.finals(name)
        assert not (tmp_path / "ran").exists(), "code of the model folder has run"
        _break("not", model, tmp_path)
        assert observer.final(name)["type"] == "result"
        observer.check()
        assert (daemon.pid, connections(daemon)) == (pid, 1)


# F36, in part -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "stage"), [("!spin", "prepare"), ("!prefill 1 60000", "prefill"), (None, "load")]
)
def test_no_engine_outlives_the_daemon(
    script: str | None, stage: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    options = () if script else ("--engine-option=--spin-on-load",)
    with Daemon(tmp_path, broker.port, options=options) as daemon:
        engine = daemon.engine_pid
        if script is not None:
            daemon.wait_ready()
            observer.ask(script)
            wait_stage(observer, stage)
        handle = os.pidfd_open(engine)
        began = time.monotonic()
        daemon.signal(signal.SIGKILL)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(10_000)
        os.close(handle)
        assert time.monotonic() - began < 1.0
        assert daemon.wait_exit() == -9
