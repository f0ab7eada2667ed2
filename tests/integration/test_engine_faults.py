"""The host against an engine that breaks in every way we know."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edged.engine import messages, wire
from edged.engine.deadlines import Limits
from edged.engine.faulty import NO_VISION, faulty_command
from edged.engine.host import EngineHost, Recycle
from edged.engine.restarts import Backoff
from edged.errors import Code, DeathReason, EngineDied, JobFailed, JobStopped
from edged.ports import (
    Completed,
    Delta,
    DroppedFrame,
    EngineState,
    FramePlan,
    Planned,
    PlannedFrame,
    Progress,
    Task,
    Update,
)
from tests.integration.engine_kit import (
    alive,
    completed,
    eventually,
    frames,
    order,
    reach,
    running,
    seeing,
    task,
    text,
    updates,
)

#: What a process of the tests' own needs to find edged.
SOURCES = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
QUICK = Backoff(first_s=0.01, longest_s=0.02)


def host(*options: str, **changes: Any) -> EngineHost:
    return EngineHost(order(), command=faulty_command(*options), **{"backoff": QUICK, **changes})


async def death(engine: EngineHost, script: str | Task) -> EngineDied:
    with pytest.raises(EngineDied) as caught:
        await updates(engine, task(script) if isinstance(script, str) else script)
    return caught.value


def tight(message: dict[str, Any]) -> str:
    """JSON without blanks."""
    return json.dumps(message, separators=(",", ":"))


USED = [{"index": 0, "crops": 1, "tokens": 313}, {"index": 1, "crops": 1, "tokens": 313}]
PLAN = {"used": USED, "dropped": []}
ANSWER = {"text": "", "finish_reason": "stop", "usage": {}}
DONE = {"t": "done", "job": 1, "answers": [ANSWER], "timings": {}}
STEP = {"stage": "token", "work": 1, "took": 0.1, "next": 1, "done": 1, "total": 2, "text": "x"}


def digests(pictures: tuple[bytes, ...]) -> list[str]:
    return [hashlib.sha256(picture).hexdigest()[:16] for picture in pictures]


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


async def test_what_a_job_took_and_gave_back_does_not_replace_its_engine() -> None:
    async with running(host(recycle=Recycle(share=0.0, mb=40))) as engine:
        await engine.wait_ready()
        first = engine.pid
        large = tuple(bytes([n]) * 8_000_000 for n in range(8))
        for script in ("!peak 200 !say one", "!peak 200 !fail memory", "!peak 200 !say two"):
            with suppress(JobFailed):
                await completed(engine, seeing(script, large))
        assert await text(engine, task("three")) == "three"
        assert (engine.pid, engine.status.restarts) == (first, 0)


async def test_frames_that_are_kept_do_not_replace_their_engine() -> None:
    few = EngineHost(
        order(frame_cache_mb=1000.0),
        command=faulty_command(),
        recycle=Recycle(share=0.0, mb=40),
        backoff=QUICK,
    )
    async with running(few) as engine:
        kept = {"sessions": 1, "cache_mb": 90.0, "cache_hits": 0}
        done = {"t": "failed", "job": 1, "code": "memory", "message": "", **kept}
        script = f"!leak 90 !claim {tight(done)}"
        with pytest.raises(JobFailed):
            await updates(engine, task(script))
        assert engine.status.frame_cache_mb == 90.0
        assert engine.status.state is EngineState.IDLE
        assert engine.status.restarts == 0
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)  # it hangs and would not hear that it should end


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


# Frames -----------------------------------------------------------------------------------------


async def test_frames_arrive_as_they_are_and_in_order() -> None:
    several = (*frames(3), os.urandom(3_000_001), b"", frames(4)[3])
    async with running(host()) as engine:
        assert (await text(engine, seeing("!frames", several))).split() == digests(several)
        assert (await text(engine, seeing("!frames", several[::-1]))).split() == digests(
            several[::-1]
        )
        assert await text(engine, task("!frames !say none")) == "none"


async def test_a_plan_is_told_once_and_before_what_follows_from_it() -> None:
    async with running(host()) as engine:
        happened = await updates(engine, seeing("!drop 1 !say seen", frames(3)))
        plan = FramePlan(
            used=(PlannedFrame(0, 1, 313), PlannedFrame(2, 1, 313)),
            dropped=(DroppedFrame(1, "as the prompt asked"),),
        )
        assert [update for update in happened if isinstance(update, Planned)] == [Planned(plan)]
        stages = [
            update.stage if isinstance(update, Progress) else type(update).__name__
            for update in happened
        ]
        assert list(dict.fromkeys(stages)) == [
            *("prepare", "decode_images", "Planned", "encode", "token", "Delta", "Completed")
        ]
        last = happened[-1]
        assert isinstance(last, Completed)
        assert last.frames == plan
        assert last.answers[0].usage.image_tokens == 626


async def test_the_plan_of_an_earlier_start_is_kept() -> None:
    plan = FramePlan(
        used=(PlannedFrame(2, 4, 757),),
        dropped=(DroppedFrame(0, "no room"), DroppedFrame(1, "no \u201croom\u201d")),
    )
    async with running(host()) as engine:
        happened = await updates(engine, seeing("!drop 2 !plan", frames(3), plan=plan))
    assert not [update for update in happened if isinstance(update, Planned)]
    last = happened[-1]
    assert isinstance(last, Completed)
    assert last.frames == plan
    assert json.loads(last.answers[0].text)["used"] == [{"index": 2, "crops": 4, "tokens": 757}]


async def test_a_plan_that_can_no_longer_be_kept_is_replaced_and_told() -> None:
    new = {"used": USED[:1], "dropped": [{"index": 1, "reason": "small"}]}
    kept = FramePlan((PlannedFrame(0, 1, 313), PlannedFrame(1, 1, 313)))
    claims = {"t": "planned", "job": 1, "plan": new}, DONE | {"frames": new}
    async with running(host()) as engine:
        said = f"!tell {tight(claims[0])} !claim {tight(claims[1])}"
        happened = await updates(engine, seeing(said, plan=kept))
        (planned,) = (update for update in happened if isinstance(update, Planned))
        last = happened[-1]
        assert isinstance(last, Completed)
        assert last.frames == planned.plan != kept
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)  # it hangs, see `!claim`
        await eventually(lambda: engine.status.restarts == 1)
        said = f"!tell {tight(claims[0])} !claim {tight(DONE | {'frames': PLAN})}"
        died = await death(engine, seeing(said, plan=kept))
        assert "other frames than were planned" in died.detail


async def test_frames_that_do_not_fit_are_dropped_the_oldest_first() -> None:
    async with running(host()) as engine:
        plan = (await completed(engine, seeing("look at these", frames(15), max_tokens=20))).frames
    assert plan is not None
    assert [frame.index for frame in plan.used] == list(range(2, 15))
    assert plan.dropped == (DroppedFrame(0, "no room"), DroppedFrame(1, "no room"))


async def test_each_question_has_its_answer() -> None:
    asked = ("!say a b", "!tokens 3 0", "third echoed", "!frames")
    async with running(host()) as engine:
        happened = await updates(engine, seeing("", questions=asked, max_tokens=2))
    last = happened[-1]
    assert isinstance(last, Completed)
    texts = [answer.text for answer in last.answers]
    assert texts == ["a b", "w0 w1", "third echoed", " ".join(digests(frames(2)))]
    assert [answer.finish_reason for answer in last.answers] == ["stop", "length", "stop", "stop"]
    assert [answer.usage.image_tokens for answer in last.answers] == [626, 0, 0, 0]
    for question, said in enumerate(texts):
        deltas = [u for u in happened if isinstance(u, Delta) and u.question == question]
        assert "".join(delta.text for delta in deltas) == said


async def test_what_is_kept_of_frames_is_told_and_forgotten_with_the_process() -> None:
    few = EngineHost(order(frame_cache_mb=3.0), command=faulty_command(), backoff=QUICK)

    def kept() -> tuple[float, int]:
        return few.status.frame_cache_mb, few.status.frame_cache_hits

    async with running(few) as engine:
        await completed(engine, seeing("first", frames(2)))
        assert kept() == (2.0, 0)
        happened = await updates(engine, seeing("again, and one more", frames(3)))
        assert kept() == (3.0, 2)
        encoded = [u for u in happened if isinstance(u, Progress) and u.stage == "encode"]
        assert [(u.done, u.total) for u in encoded] == [(0, 1), (1, 1)]
        with pytest.raises(JobFailed):
            await updates(engine, seeing("!fail memory", frames(5)))
        assert kept() == (3.0, 5)
        await death(engine, "!exit 3")
        await engine.wait_ready()
        assert kept() == (0.0, 0)


async def test_an_engine_without_vision_says_why_and_fails_what_needs_it() -> None:
    async with running(host("--no-vision")) as engine:
        info = await engine.wait_ready()
        assert (info.vision, info.no_vision) == (False, NO_VISION)
        with pytest.raises(JobFailed) as caught:
            await updates(engine, seeing("look"))
        assert (caught.value.code, caught.value.message) == (Code.UNSUPPORTED, NO_VISION)
        assert await text(engine, task("text goes")) == "text goes"
    async with running(host()) as engine:
        info = await engine.wait_ready()
        assert (info.vision, info.no_vision) == (True, None)


@pytest.mark.parametrize("stage", ["decode_images", "encode"])
async def test_a_hung_decoder_or_encoder_is_killed_at_its_deadline(stage: str) -> None:
    limits = Limits(floor_s=0.3, first_s=0.4, first_load_s=30)
    script = f"!{stage.removesuffix('_images')} 4 3600000"
    async with running(host(limits=limits)) as engine:
        await engine.wait_ready()
        began = time.monotonic()
        died = await death(engine, seeing(script))
        assert died.reason is DeathReason.DEADLINE
        assert f"{stage} took longer than" in died.detail
        assert time.monotonic() - began < 10
        assert await text(engine, seeing("seen")) == "seen"


@pytest.mark.parametrize("stage", ["decode_images", "encode"])
async def test_a_stop_is_heard_between_two_frames(stage: str) -> None:
    script = f"!{stage.removesuffix('_images')} 200 20"
    async with running(host()) as engine:
        stream = engine.execute(seeing(script))
        await reach(stream, stage, 1)
        engine.stop(1)
        rest: list[Update] = []
        with pytest.raises(JobStopped):
            await drain(stream, rest)
        assert len([update for update in rest if isinstance(update, Progress)]) <= 2
        assert await text(engine, seeing("after it", job=2)) == "after it"
        assert engine.status.restarts == 0


@pytest.mark.parametrize("stage", ["decode_images", "encode"])
async def test_a_kill_while_frames_are_worked_on_costs_one_attempt(stage: str) -> None:
    script = f"!{stage.removesuffix('_images')} 200 20"
    async with running(host()) as engine:
        stream = engine.execute(seeing(script))
        await reach(stream, stage, 1)
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await drain(stream, [])
        assert await text(engine, seeing("second attempt")) == "second attempt"
        assert engine.status.restarts == 1


async def test_frames_on_their_way_hold_up_nobody() -> None:
    large = tuple(os.urandom(1_000_000) * 10 for _ in range(8))
    async with running(host()) as engine:
        await engine.wait_ready()
        assert engine.pid is not None
        await paused(engine.pid)
        reading = asyncio.ensure_future(drain(engine.execute(seeing("!frames", large)), []))
        await eventually(lambda: engine.status.state is EngineState.BUSY)
        longest = 0.0
        for _ in range(100):
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began)
        assert longest < 0.25
        assert engine._process is not None
        assert engine._process._writer.transport.get_write_buffer_size() < 1_000_000
        engine.stop(1)  # goes after the frames, not between them
        os.kill(engine.pid, signal.SIGCONT)
        with pytest.raises(JobStopped):
            await reading
        assert (await text(engine, seeing("!frames", large))).split() == digests(large)
        assert engine.status.restarts == 0


async def test_an_engine_that_ends_while_frames_are_on_their_way_is_replaced() -> None:
    large = (os.urandom(1_000_000) * 50,)
    async with running(host()) as engine:
        await engine.wait_ready()
        assert engine.pid is not None
        await paused(engine.pid)
        reading = asyncio.ensure_future(drain(engine.execute(seeing("!frames", large)), []))
        await eventually(lambda: engine.status.state is EngineState.BUSY)
        await asyncio.sleep(0.05)
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineDied):
            await reading
        assert (await text(engine, seeing("!frames", large))).split() == digests(large)


async def test_more_frames_than_can_be_sent_fail_their_job_and_not_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running(host()) as engine:
        await engine.wait_ready()
        monkeypatch.setattr(wire, "MAX_BODY", 1_500_000)
        with pytest.raises(JobFailed) as caught:
            await updates(engine, seeing("look", [bytes(800_000)] * 2))
        assert caught.value.code is Code.MEMORY
        assert "1.6 MB, at most 1.5 MB" in caught.value.message
        assert engine.status.state is EngineState.IDLE
        assert await text(engine, seeing("one less", [bytes(800_000)])) == "one less"
        assert engine.status.restarts == 0


async def test_the_time_a_task_waited_is_not_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Task] = []
    run = messages.run

    def watched(task_: Task) -> dict[str, Any]:
        given.append(task_)
        return run(task_)

    monkeypatch.setattr(messages, "run", watched)
    async with running(host()) as engine:
        await engine.wait_ready()
        first = asyncio.create_task(updates(engine, seeing("!encode 1 200", left_s=None)))
        await asyncio.sleep(0)
        await updates(engine, seeing("second", job=2, left_s=60.0))
        await updates(engine, seeing("third", job=3, left_s=0.0))
        await first
    left = [None if task_.look is None else task_.look.left_s for task_ in given]
    assert left[0] is None
    assert left[1] is not None
    assert 30.0 < left[1] < 59.9
    assert left[2] == 0.0


@pytest.mark.parametrize(
    ("claim", "detail"),
    [
        ({"t": "planned", "job": 1, "plan": {"used": "all", "dropped": []}}, "plan.used"),
        (
            {"t": "planned", "job": 1, "plan": {**PLAN, "used": [USED[0] | {"index": "0"}]}},
            "valid integer",
        ),
        ({"t": "planned", "job": 1, "plan": {**PLAN, "used": USED[1:]}}, "not each frame once"),
        ({"t": "planned", "job": 1, "plan": {**PLAN, "used": USED[:1]}}, "than the 2 it was"),
        ({"t": "planned", "job": 1, "plan": PLAN}, "planned, again"),
        ({"t": "planned", "job": 9, "plan": PLAN}, "about job 9"),
        (DONE, "other frames than were planned"),
        (DONE | {"frames": PLAN, "answers": []}, "0 answers"),
        (DONE | {"frames": PLAN, "answers": [ANSWER, ANSWER]}, "2 answers"),
        (DONE | {"frames": PLAN, "cache_hits": -1}, "cache_hits"),
        ({"t": "step", "job": 1, **STEP, "question": 0}, "about question 0 of 0"),
    ],
)
async def test_an_engine_that_says_what_cannot_be_is_replaced(
    claim: dict[str, Any], detail: str
) -> None:
    script = f"!claim {tight(claim)}"
    async with running(host()) as engine:
        died = await death(engine, seeing(script))
        assert died.reason is DeathReason.GARBAGE
        assert detail in died.detail
        assert await text(engine, seeing("the next one is served")) == "the next one is served"
        assert engine.status.restarts == 1


@pytest.mark.parametrize("question", [None, 2, -1])
async def test_text_of_a_question_that_was_not_asked_replaces_the_engine(
    question: int | None,
) -> None:
    claim = {"t": "step", "job": 1, **STEP, "question": question}
    script = f"!claim {tight(claim)}"
    async with running(host()) as engine:
        died = await death(engine, seeing("", questions=(script, "other")))
        assert died.reason is DeathReason.GARBAGE
        assert f"about question {question} of 2" in died.detail


async def test_a_plan_for_a_text_job_replaces_the_engine() -> None:
    claim = {"t": "planned", "job": 1, "plan": {"used": [], "dropped": []}}
    async with running(host()) as engine:
        died = await death(engine, f"!claim {tight(claim)}")
        assert (died.reason, "than the 0" in died.detail) == (DeathReason.GARBAGE, True)


ORPHANS = """
import asyncio, sys
from edged.engine.faulty import NO_VISION, faulty_command
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
