"""The host against an engine that breaks in every way we know."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from edged.engine.deadlines import Limits
from edged.engine.faulty import faulty_command
from edged.engine.host import EngineHost, Recycle
from edged.engine.restarts import Backoff
from edged.errors import Code, DeathReason, EngineDied, JobFailed, JobStopped
from edged.ports import Completed, Delta, EngineState, Progress, Update
from tests.integration.engine_kit import (
    alive,
    completed,
    eventually,
    order,
    reach,
    running,
    task,
    text,
    updates,
)

#: What a process of the tests' own needs to find edged.
SOURCES = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
QUICK = Backoff(first_s=0.01, longest_s=0.02)


def host(*options: str, **changes: Any) -> EngineHost:
    return EngineHost(order(), command=faulty_command(*options), **{"backoff": QUICK, **changes})


async def death(engine: EngineHost, script: str) -> EngineDied:
    with pytest.raises(EngineDied) as caught:
        await updates(engine, task(script))
    return caught.value


async def drain(stream: AsyncIterator[Update], into: list[Update]) -> None:
    """Read a task's updates to the end."""
    async for update in stream:
        into.append(update)  # noqa: PERF401  (what came before an exception counts)


async def paused(pid: int) -> None:
    """Stop a process and see that it stands."""
    os.kill(pid, signal.SIGSTOP)
    await eventually(lambda: Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "T")


@pytest.mark.parametrize(
    ("script", "reason", "detail"),
    [
        ("!segv", DeathReason.SIGNAL, "SIGSEGV"),
        ("!abort", DeathReason.SIGNAL, "SIGABRT"),
        ("!exit 1", DeathReason.EXIT, "status 1"),
        ("!exit 0", DeathReason.EXIT, "status 0"),
        ("!garbage", DeathReason.GARBAGE, "stray bytes"),
        ("!lie", DeathReason.GARBAGE, "job 2, which it does not have"),
        ("!oom", DeathReason.OOM, "no more memory"),
    ],
)
async def test_a_job_that_breaks_its_engine_breaks_nothing_else(
    script: str, reason: DeathReason, detail: str
) -> None:
    async with running(host()) as engine:
        for attempt in range(1, 4):
            died = await death(engine, script)
            assert (died.reason, detail in died.detail) == (reason, True), died
            assert engine.status.restarts == attempt
            assert engine.status.last_reason == str(died)
        assert engine.stuck() is None
        assert await text(engine, task("the next one is served")) == "the next one is served"
        assert engine.status.state is EngineState.IDLE
        assert engine.status.trouble is None


@pytest.mark.parametrize("script", ["!spin", "!prefill 5 3600000", "!tokens 5 3600000"])
async def test_a_stage_that_hangs_is_killed_at_its_deadline(script: str) -> None:
    limits = Limits(floor_s=0.3, first_s=0.4, first_load_s=30)
    async with running(host(limits=limits)) as engine:
        began = time.monotonic()
        await engine.wait_ready()
        died = await death(engine, script)
        assert died.reason is DeathReason.DEADLINE
        assert "took longer than 0 s" in died.detail
        assert time.monotonic() - began < 10
        assert await text(engine, task("still here")) == "still here"


@pytest.mark.parametrize("stage", ["prefill", "token"])
async def test_a_kill_from_outside_costs_one_attempt(stage: str) -> None:
    async with running(host()) as engine:
        stream = engine.execute(task("!prefill 3 20 !tokens 500 20"))
        await reach(stream, stage, 1)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied) as caught:
            await drain(stream, [])
        assert caught.value.reason is DeathReason.OOM
        assert "SIGKILL from outside" in caught.value.detail
        assert await text(engine, task("!prefill 1 0 !say second attempt")) == "second attempt"
        assert engine.status.restarts == 1


@pytest.mark.parametrize(
    ("options", "trouble"),
    [
        (("--fail-load", "model.path /x: no such folder"), "no such folder; do something about it"),
        (("--segv-on-load",), "signal: SIGSEGV"),
        (("--spin-on-load",), "deadline: load took longer than"),
        (("--garbage-on-load",), "garbage: stray bytes"),
    ],
)
async def test_a_load_that_always_fails_is_tried_again_and_says_why(
    options: tuple[str, ...], trouble: str
) -> None:
    limits = Limits(floor_s=0.5, first_load_s=2.0)
    async with running(host(*options, limits=limits)) as engine:
        waiting = asyncio.create_task(engine.wait_ready())
        await eventually(lambda: engine.status.restarts >= 2)
        assert engine.info is None
        assert not waiting.done()
        assert trouble in str(engine.status.trouble)
        assert engine.stuck() is None
        waiting.cancel()


async def test_waiting_between_tries_is_backoff_and_grows() -> None:
    backoff = Backoff(first_s=30.0, longest_s=60.0)
    async with running(host("--fail-load", "no", backoff=backoff)) as engine:
        await eventually(lambda: engine.status.state is EngineState.BACKOFF)
        assert engine.status.trouble == "no; do something about it"
        assert engine.pid is None
        assert engine.stuck() is None


async def test_a_program_that_cannot_be_started_is_trouble_and_not_an_end() -> None:
    engine = EngineHost(order(), command=["/no/such/program"], backoff=QUICK)
    async with running(engine):
        await eventually(lambda: engine.status.restarts >= 2)
        assert "cannot be started" in str(engine.status.trouble)


async def test_many_deaths_are_degraded_and_it_goes_on() -> None:
    async with running(host(backoff=Backoff(first_s=0.01, longest_s=0.02, many=2))) as engine:
        for _ in range(3):
            await death(engine, "!exit 3")
        assert await text(engine, task("working")) == "working"
        assert engine.status.state is EngineState.IDLE
        trouble = engine.status.trouble
        assert trouble == "the engine ended 3 times in 10 minutes, at last: exit: status 3"


async def test_an_engine_that_grew_is_replaced_between_jobs_and_no_job_pays() -> None:
    async with running(host(recycle=Recycle(share=0.0, mb=120))) as engine:
        await engine.wait_ready()
        first = engine.pid
        assert (await completed(engine, task("!leak 50 !say one"))).answers[0].text == "one"
        assert (await completed(engine, task("!leak 50 !say two"))).answers[0].text == "two"
        assert engine.pid == first
        assert (await completed(engine, task("!leak 50 !say three"))).answers[0].text == "three"
        assert await text(engine, task("four")) == "four"
        assert engine.pid != first
        assert engine.status.restarts == 1
        assert str(engine.status.last_reason).startswith("recycled: ")
        assert engine.status.trouble is None
        rss = engine.status.rss_mb
        assert rss is not None
        assert rss < 120


@pytest.mark.parametrize("stage", ["prefill", "token"])
async def test_a_stop_is_heard_at_the_next_step(stage: str) -> None:
    script = "!prefill 200 20" if stage == "prefill" else "!tokens 200 20"
    async with running(host()) as engine:
        stream = engine.execute(task(script))
        await reach(stream, stage, 1)
        engine.stop(1)
        engine.stop(1)
        rest: list[Update] = []
        with pytest.raises(JobStopped):
            await drain(stream, rest)
        assert len([update for update in rest if isinstance(update, Progress)]) <= 2
        assert await text(engine, task("after it", job=2)) == "after it"
        assert engine.status.restarts == 0


async def test_a_stop_for_a_job_that_is_not_there_does_nothing() -> None:
    async with running(host()) as engine:
        await engine.wait_ready()
        engine.stop(99)
        assert await text(engine, task("as ever", job=99)) == "as ever"


async def test_a_stop_while_the_engine_is_away_ends_the_waiting() -> None:
    async with running(host("--fail-load", "no")) as engine:
        stream = engine.execute(task("never begun"))
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: engine.status.restarts >= 1)
        assert not first.done()
        engine.stop(1)
        with pytest.raises(JobStopped):
            await first


async def test_a_task_given_while_the_engine_restarts_waits_and_is_not_harmed() -> None:
    async with running(host(backoff=Backoff(first_s=0.2, longest_s=0.4))) as engine:
        await death(engine, "!exit 1")
        assert engine.status.state is EngineState.BACKOFF
        assert await text(engine, task("patience")) == "patience"


@pytest.mark.parametrize("how", ["aclose", "cancel"])
async def test_leaving_a_task_early_stops_it_and_leaves_the_engine_usable(how: str) -> None:
    async with running(host()) as engine:
        stream = engine.execute(task("!tokens 2000 5"))
        if how == "aclose":
            await reach(stream, "token", 1)
            await stream.aclose()
        else:
            seen = asyncio.Event()

            async def read() -> None:
                async for update in stream:
                    if isinstance(update, Delta):
                        seen.set()

            reader = asyncio.create_task(read())
            await seen.wait()
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        began = time.monotonic()
        assert await text(engine, task("free again", job=2)) == "free again"
        assert time.monotonic() - began < 5
        assert engine.status.restarts == 0


async def test_two_tasks_at_once_are_done_one_after_the_other() -> None:
    async with running(host()) as engine:
        first, second = await asyncio.gather(
            text(engine, task("!tokens 3 10", job=1)), text(engine, task("two", job=2))
        )
        assert (first, second) == ("w0 w1 w2", "two")


async def test_an_engine_that_hears_no_stop_ends_in_its_own_time() -> None:
    async with running(host()) as engine:
        stream = engine.execute(task("!deaf 5 10"))
        await reach(stream, "token", 1)
        engine.stop(1)
        *_, last = [update async for update in stream]
        assert isinstance(last, Completed)


async def test_an_idle_engine_that_does_not_answer_is_killed() -> None:
    limits = Limits(floor_s=0.3, first_load_s=30)
    async with running(host(limits=limits, ping_s=0.05)) as engine:
        await engine.wait_ready()
        assert engine.pid is not None
        await paused(engine.pid)
        await eventually(lambda: engine.status.restarts == 1)
        assert "deadline: ping" in str(engine.status.last_reason)
        assert await text(engine, task("back")) == "back"


async def test_an_idle_engine_that_answers_lives_on() -> None:
    limits = Limits(floor_s=0.4, first_load_s=30)
    async with running(host(limits=limits, ping_s=0.02)) as engine:
        await engine.wait_ready()
        pid = engine.pid
        await eventually(lambda: engine._pings > 10)
        assert await text(engine, task("well")) == "well"
        assert engine.pid == pid


async def test_our_own_stalls_are_not_the_engines_fault() -> None:
    limits = Limits(floor_s=0.6, first_s=0.6, first_load_s=30)
    async with running(host(limits=limits)) as engine:
        stream = engine.execute(task("!sleep 0.3 !say done in time"))
        await reach(stream, "prepare")
        time.sleep(1.5)  # noqa: ASYNC251  (the stall itself)
        *_, last = [update async for update in stream]
        assert isinstance(last, Completed)
        assert engine.status.restarts == 0


async def test_signals_to_the_whole_group_do_not_end_the_engine() -> None:
    async with running(host()) as engine:
        await engine.wait_ready()
        pid = engine.pid
        assert pid is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        assert await text(engine, task("unmoved")) == "unmoved"
        assert engine.pid == pid


async def test_an_engine_process_has_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_SECRET", "secret")
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    try:
        async with running(host()) as engine:
            await engine.wait_ready()
            proc = Path(f"/proc/{engine.pid}")
            environ = (proc / "environ").read_bytes()
            assert b"EDGED_SECRET" not in environ
            assert b"ORT_DISABLE_TELEMETRY=1" in environ
            targets = sorted(str(link.readlink()) for link in (proc / "fd").iterdir())
            kinds = [target.split(":")[0] for target in targets]
            assert kinds == ["/dev/null", "pipe", "pipe", "socket"]
            assert (proc / "oom_score_adj").read_text().strip() == "500"
            limits = (proc / "limits").read_text()
            assert "Max core file size        0" in limits
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("when", ["loading", "idle", "busy", "spinning", "backoff", "never"])
async def test_close_ends_everything_at_any_time(when: str) -> None:
    options = {"loading": ("--slow-load", "60"), "backoff": ("--fail-load", "x")}.get(when, ())
    engine = host(*options, backoff=Backoff(first_s=60, longest_s=60))
    if when == "never":
        await engine.close()
        return
    runner = asyncio.create_task(engine.run())
    reading: asyncio.Task[Any] | None = None
    if when == "backoff":
        await eventually(lambda: engine.status.state is EngineState.BACKOFF)
    elif when == "loading":
        await eventually(lambda: engine.pid)
    else:
        await engine.wait_ready()
    pid = engine.pid
    if when in ("busy", "spinning"):
        script = "!spin" if when == "spinning" else "!tokens 5000 20"
        reading = asyncio.create_task(updates(engine, task(script)))
        await eventually(lambda: engine.status.state is EngineState.BUSY)
    began = time.monotonic()
    await engine.close()
    await runner
    assert time.monotonic() - began < 5
    assert not alive(pid)
    if reading is not None:
        with pytest.raises(JobStopped):
            await reading
    with pytest.raises(JobStopped):
        await engine.wait_ready()
    with pytest.raises(JobStopped):
        await updates(engine, task("too late"))
    assert engine.stuck() is None


async def test_cancelling_run_ends_the_process() -> None:
    engine = host()
    runner = asyncio.create_task(engine.run())
    await engine.wait_ready()
    pid = engine.pid
    runner.cancel()
    with pytest.raises(asyncio.CancelledError):
        await runner
    await eventually(lambda: not alive(pid))


async def test_restarts_leave_nothing_behind() -> None:
    async with running(host()) as engine:
        await engine.wait_ready()

        def held() -> int:
            gc.collect()
            return len(list(Path("/proc/self/fd").iterdir()))

        await death(engine, "!exit 1")
        await engine.wait_ready()
        before, tasks = held(), len(asyncio.all_tasks())
        for _ in range(5):
            await death(engine, "!exit 1")
        await engine.wait_ready()
        assert held() == before
        assert len(asyncio.all_tasks()) == tasks


async def test_what_stages_cost_is_kept_for_the_next_start() -> None:
    async with running(host()) as engine:
        await text(engine, task("!prefill 2 10 !tokens 2 10"))
        history = json.loads(json.dumps(engine.history()))
    (stages,) = history.values()
    assert set(stages) == {"load", "prepare", "prefill", "token"}
    assert stages["prefill"]["slowest"][0] >= 10 / 1000 / 64
    again = host(history=history)
    assert again.history() == history


async def test_failures_of_a_job_leave_the_engine_as_it_was() -> None:
    async with running(host()) as engine:
        await engine.wait_ready()
        pid = engine.pid
        for script, code in (
            ("!fail memory", Code.MEMORY),
            ("!schema-bad", Code.BAD_OUTPUT),
            ("!nonsense", Code.INVALID),
            ("word " * 5000, Code.TOO_LONG),
        ):
            with pytest.raises(JobFailed) as caught:
                await updates(engine, task(script))
            assert caught.value.code is code
        assert engine.pid == pid
        assert await text(engine, task("fine")) == "fine"


async def test_what_a_native_library_prints_is_logged_in_bounded_lines(
    events: list[dict[str, Any]],
) -> None:
    script = (
        "import sys; sys.stdout.write('x' * 5000 + '\\n' + 'line\\n' * 1000 + 'bye'); sys.exit(9)"
    )
    engine = EngineHost(
        order(), command=[sys.executable, "-c", script], backoff=Backoff(first_s=60, longest_s=60)
    )
    async with running(engine):
        await eventually(lambda: engine.status.state is EngineState.BACKOFF)
    lines = [event["line"] for event in events if event["event"] == "engine.output"]
    assert len(lines) <= 121
    assert max(map(len, lines)) <= 500
    assert any(event["event"] == "engine.output_muted" for event in events)
    assert engine.status.last_reason == "exit: status 9"


ORPHANS = """
import asyncio, sys
from edged.engine.faulty import faulty_command
from edged.engine.host import EngineHost
from edged.engine.messages import Order
from edged.ports import Task

async def main():
    engine = EngineHost(Order(model="m", path="/none"), command=faulty_command(*sys.argv[2:]))
    asyncio.create_task(engine.run())
    if sys.argv[1] == "load":
        while engine.pid is None:
            await asyncio.sleep(0.001)
        print(engine.pid, flush=True)
        await asyncio.sleep(3600)
    await engine.wait_ready()
    task = Task(job=1, client=None, messages=({"role": "user", "content": sys.argv[1]},))
    async for update in engine.execute(task):
        print(engine.pid, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    "arguments",
    [("!spin",), ("!sleep 60",), ("!tokens 9999 10",), ("load", "--spin-on-load"), ("load",)],
    ids=lambda arguments: arguments[0],
)
async def test_no_engine_outlives_a_killed_daemon_by_a_second(arguments: tuple[str, ...]) -> None:
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ORPHANS, *arguments),
        stdout=asyncio.subprocess.PIPE,
        env=SOURCES,
    )
    assert daemon.stdout is not None
    pid = 0
    while not pid:
        line = (await daemon.stdout.readline()).strip()
        pid = int(line) if line.isdigit() else 0
    daemon.kill()
    killed = time.monotonic()
    await eventually(lambda: _gone(pid), timeout_s=5)
    assert time.monotonic() - killed < 1.0
    await daemon.stdout.read()
    await daemon.wait()


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]
    except OSError:
        return True
    return state == "Z"  # dead, and not yet collected by whoever inherits it


async def test_an_engine_whose_daemon_died_before_it_looked_ends_at_once() -> None:
    process = await asyncio.create_subprocess_exec(
        *(*faulty_command(), "--socket", "0", "--parent", "1"),
        stdin=asyncio.subprocess.DEVNULL,
        env=SOURCES,
    )
    assert await asyncio.wait_for(process.wait(), 10) == 81
