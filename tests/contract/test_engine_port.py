"""What every engine does, whatever runs the model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from edged.engine.faulty import faulty_command
from edged.engine.host import EngineHost
from edged.errors import Code, JobFailed, JobStopped
from edged.ports import (
    Completed,
    Delta,
    Engine,
    EngineState,
    Planned,
    Progress,
    Task,
    Turn,
    Update,
)
from tests.integration.engine_kit import PHI3, eventually, frames, order, reach, seeing

ENGINES: dict[str, Callable[[Path], Engine]] = {
    "faulty": lambda _: EngineHost(order(), command=faulty_command()),
    "small": lambda _: EngineHost(order(PHI3)),
    "phi3v": lambda fused: EngineHost(order(fused)),
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision model."""
    from tests.kit.vision import fused_folder  # noqa: PLC0415  (what it needs may not be there)

    return fused_folder(tmp_path_factory.mktemp("fused"))


@pytest.fixture(
    params=[
        "faulty",
        pytest.param("small", marks=pytest.mark.engine),
        pytest.param("phi3v", marks=pytest.mark.engine),
    ]
)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    path = PHI3
    if request.param != "faulty":
        pytest.importorskip("onnxruntime_genai")
    if request.param == "phi3v":
        pytest.importorskip("onnx")
        path = request.getfixturevalue("fused")
    made = ENGINES[request.param](path)
    runner = asyncio.create_task(made.run())
    yield made
    await made.close()
    await asyncio.wait_for(runner, 10)


@pytest.fixture
async def eyes(engine: Engine) -> Engine:
    """An engine that sees."""
    info = await engine.wait_ready()
    if not info.vision:
        pytest.skip(str(info.no_vision))
    return engine


def task(prompt: str = "hello there", job: int = 1, max_tokens: int | None = 8) -> Task:
    turn: Turn = {"role": "user", "content": prompt}
    return Task(job=job, client="c", messages=(turn,), max_tokens=max_tokens)


async def everything(engine: Engine, task_: Task) -> list[Update]:
    return [update async for update in engine.execute(task_)]


async def test_before_it_is_loaded_it_says_so(engine: Engine) -> None:
    before = engine.info, engine.status.state, engine.stuck()
    assert before == (None, EngineState.LOADING, None)
    info = await engine.wait_ready()
    status = engine.status
    assert engine.info == info
    assert (status.state, status.restarts) == (EngineState.IDLE, 0)
    assert (status.last_reason, status.trouble, engine.stuck()) == (None, None, None)


async def test_a_task_ends_with_completed_and_its_deltas_are_its_text(engine: Engine) -> None:
    happened = await everything(engine, task())
    last = happened[-1]
    assert isinstance(last, Completed)
    assert not any(isinstance(update, Completed) for update in happened[:-1])
    (answer,) = last.answers
    assert answer.text
    assert "".join(u.text for u in happened if isinstance(u, Delta)) == answer.text
    assert 0 < answer.usage.completion_tokens <= 8
    assert answer.usage.prompt_tokens > 0
    assert all(0 <= u.done <= u.total for u in happened if isinstance(u, Progress))
    assert engine.status.state is EngineState.IDLE


async def test_it_is_busy_while_it_works_and_not_stuck(engine: Engine) -> None:
    await engine.wait_ready()
    reading = asyncio.create_task(everything(engine, task()))
    passes = 0
    while engine.status.state is EngineState.IDLE:
        await asyncio.sleep(0)  # one pass of the loop: it begins at once
        passes += 1
    assert engine.status.state is EngineState.BUSY
    assert passes < 5
    assert engine.stuck() is None
    assert isinstance((await reading)[-1], Completed)


async def test_answers_repeat(engine: Engine) -> None:
    first, second = await everything(engine, task()), await everything(engine, task())
    assert isinstance(first[-1], Completed)
    assert isinstance(second[-1], Completed)
    assert first[-1].answers[0].text == second[-1].answers[0].text


async def test_max_tokens_ends_an_answer(engine: Engine) -> None:
    last = (await everything(engine, task("one two three four", max_tokens=2)))[-1]
    assert isinstance(last, Completed)
    assert last.answers[0].finish_reason == "length"
    assert last.answers[0].usage.completion_tokens == 2


async def test_a_failed_job_leaves_it_usable(engine: Engine) -> None:
    info = await engine.wait_ready()
    with pytest.raises(JobFailed) as caught:
        await everything(engine, task("word " * (info.max_context + 10)))
    assert caught.value.code is Code.TOO_LONG
    assert str(info.max_context) in caught.value.message
    with pytest.raises(JobFailed) as caught:
        await everything(engine, task("a\0b"))
    assert caught.value.code is Code.INVALID
    assert isinstance((await everything(engine, task()))[-1], Completed)
    assert engine.status.restarts == 0


async def test_a_task_stopped_before_its_turn_ends_and_the_other_does_not(engine: Engine) -> None:
    first = asyncio.create_task(everything(engine, task(job=1)))
    second = asyncio.create_task(everything(engine, task(job=2)))
    await asyncio.sleep(0)  # both have asked for the engine, which is not loaded yet
    engine.stop(2)
    with pytest.raises(JobStopped):
        await second
    assert isinstance((await first)[-1], Completed)


async def test_stopping_nothing_is_nothing(engine: Engine) -> None:
    await engine.wait_ready()
    engine.stop(77)
    assert isinstance((await everything(engine, task(job=77)))[-1], Completed)


async def test_leaving_early_makes_room(engine: Engine) -> None:
    for _ in range(3):
        async with aclosing(engine.execute(task("a b c d e f", max_tokens=None))) as stream:  # type: ignore[type-var]
            await anext(stream)
    assert isinstance((await everything(engine, task(job=2)))[-1], Completed)
    assert engine.status.restarts == 0


async def test_tasks_are_done_one_at_a_time(engine: Engine) -> None:
    working: list[int] = []

    async def work(job: int) -> None:
        async for _ in engine.execute(task(job=job)):
            if working[-1:] != [job]:
                working.append(job)

    await asyncio.gather(*(work(job) for job in range(4)))
    assert sorted(working) == [0, 1, 2, 3]


async def test_without_vision_it_says_why_and_fails_what_needs_it(engine: Engine) -> None:
    info = await engine.wait_ready()
    assert info.vision is (info.no_vision is None)
    if not info.vision:
        assert info.no_vision
        with pytest.raises(JobFailed) as caught:
            await everything(engine, seeing("what is this?"))
        assert caught.value.code is Code.UNSUPPORTED
        assert isinstance((await everything(engine, task()))[-1], Completed)


async def test_what_becomes_of_frames_is_told_once_before_the_answer(eyes: Engine) -> None:
    happened = await everything(eyes, seeing("what is this?", frames(3), max_tokens=4))
    kinds = [type(update) for update in happened]
    assert kinds.count(Planned) == 1
    assert kinds.index(Planned) < kinds.index(Delta)
    planned, last = happened[kinds.index(Planned)], happened[-1]
    assert isinstance(planned, Planned)
    assert isinstance(last, Completed)
    assert last.frames == planned.plan
    plan = planned.plan
    indexes = [frame.index for frame in plan.used]
    assert indexes == sorted(indexes)
    assert sorted(indexes + [frame.index for frame in plan.dropped]) == [0, 1, 2]
    usage = last.answers[0].usage
    assert usage.image_tokens == sum(frame.tokens for frame in plan.used)
    assert usage.prompt_tokens > usage.image_tokens > 0
    stages = {update.stage for update in happened if isinstance(update, Progress)}
    assert stages >= {"prepare", "decode_images", "encode", "token"}


async def test_a_plan_is_kept_and_not_told_again(eyes: Engine) -> None:
    first = (await everything(eyes, seeing("what is this?", max_tokens=4)))[-1]
    assert isinstance(first, Completed)
    again = await everything(eyes, seeing("what is this?", plan=first.frames, max_tokens=4))
    assert not any(isinstance(update, Planned) for update in again)
    last = again[-1]
    assert isinstance(last, Completed)
    assert last.frames == first.frames
    assert last.answers[0].text == first.answers[0].text


async def test_a_text_task_has_no_frames(engine: Engine) -> None:
    happened = await everything(engine, task())
    assert not any(isinstance(update, Planned) for update in happened)
    last = happened[-1]
    assert isinstance(last, Completed)
    assert last.frames is None
    assert last.answers[0].usage.image_tokens == 0


async def test_a_frame_seen_again_is_found_again(eyes: Engine) -> None:
    await everything(eyes, seeing("what is this?", frames(2), max_tokens=2))
    held, hits = eyes.status.frame_cache_mb, eyes.status.frame_cache_hits
    assert held > 0
    await everything(eyes, seeing("and this?", frames(2), job=2, max_tokens=2))
    assert (eyes.status.frame_cache_mb, eyes.status.frame_cache_hits > hits) == (held, True)


async def test_each_question_is_answered_in_its_turn(eyes: Engine) -> None:
    asked = ("what is this?", "is it red?", "why?")
    happened = await everything(eyes, seeing("", questions=asked, max_tokens=3))
    last = happened[-1]
    assert isinstance(last, Completed)
    assert len(last.answers) == 3
    deltas = [update for update in happened if isinstance(update, Delta)]
    assert [u.question for u in deltas] == sorted(u.question or 0 for u in deltas)
    for question, answer in enumerate(last.answers):
        assert "".join(u.text for u in deltas if u.question == question) == answer.text
        assert 0 < answer.usage.completion_tokens <= 3
    assert [answer.usage.image_tokens > 0 for answer in last.answers] == [True, False, False]


@pytest.mark.parametrize("stage", ["decode_images", "encode"])
async def test_a_task_ends_between_two_of_its_frames(eyes: Engine, stage: str) -> None:
    slowly = "!decode 50 20 !encode 50 20 what is this?"  # what only one engine understands
    stream = eyes.execute(seeing(slowly, frames(8, size=1200)))
    await reach(stream, stage)
    eyes.stop(1)
    with pytest.raises(JobStopped):
        [update async for update in stream]
    last = (await everything(eyes, seeing("what is this?", job=2, max_tokens=2)))[-1]
    assert isinstance(last, Completed)
    assert eyes.status.restarts == 0


async def test_after_close_nothing_is_taken(engine: Engine) -> None:
    await engine.wait_ready()
    await engine.close()
    with pytest.raises(JobStopped):
        await engine.wait_ready()
    with pytest.raises(JobStopped):
        await everything(engine, task())
    assert engine.stuck() is None
    assert engine.info is not None


async def test_close_ends_what_runs(engine: Engine) -> None:
    reading = asyncio.create_task(everything(engine, task("a b c", max_tokens=None)))
    await eventually(lambda: engine.status.state is not EngineState.LOADING)
    await engine.close()
    try:
        ended = await reading
    except JobStopped:
        return
    assert isinstance(ended[-1], Completed)  # it was quicker


async def test_what_its_stages_cost_can_be_kept_over_a_restart(engine: Engine) -> None:
    await everything(engine, task())
    kept = json.loads(json.dumps(engine.history()))
    fresh = EngineHost(order())
    assert fresh.history() != kept
    fresh.recall(kept)
    assert fresh.history() == kept
