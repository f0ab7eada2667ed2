"""Vision jobs in the real engine process, with the small vision model, through the real host."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from edged.engine.host import EngineHost
from edged.errors import Code, EngineDied, JobFailed, JobStopped
from edged.ports import Completed, Delta, FramePlan, Planned, PlannedFrame, Progress, Update
from tests.integration.engine_kit import (
    completed,
    frames,
    order,
    reach,
    running,
    seeing,
    task,
    text,
    updates,
)

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

FRAMES = frames(8)
#: Tokens of a frame of one crop.
FRAME = 313


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(vision_folder: Path) -> AsyncIterator[EngineHost]:
    pytest.importorskip("onnxruntime_genai")
    async with running(EngineHost(order(vision_folder))) as host:
        await host.wait_ready()
        yield host


async def test_a_vision_model_says_what_it_is(engine: EngineHost) -> None:
    info = engine.info
    assert info is not None
    assert info.vision
    assert info.no_vision is None
    parts = [mb for name, mb in info.memory.items() if name not in ("total", "limit")]
    assert info.memory["total"] == pytest.approx(sum(parts), abs=0.5)
    assert engine.status.sessions == 1
    rss = engine.status.rss_mb
    assert rss is not None
    assert 0 < rss < info.memory["total"]


async def test_frames_are_planned_seen_and_answered_about(engine: EngineHost) -> None:
    happened = await updates(engine, seeing("What moves?", FRAMES[:2], detail="low", max_tokens=9))
    plan = FramePlan(used=(PlannedFrame(0, 1, FRAME), PlannedFrame(1, 1, FRAME)))
    assert [u.plan for u in happened if isinstance(u, Planned)] == [plan]
    last = happened[-1]
    assert isinstance(last, Completed)
    assert last.frames == plan
    answer = last.answers[0]
    assert "".join(u.text for u in happened if isinstance(u, Delta)) == answer.text
    assert answer.usage.image_tokens == 2 * FRAME
    stages = [u.stage for u in happened if isinstance(u, Progress)]
    assert list(dict.fromkeys(stages)) == ["prepare", "decode_images", "encode", "prefill", "token"]
    assert engine.status.frame_cache_mb == pytest.approx(2 * FRAME * 64 * 4 / 1e6)
    again = await completed(engine, seeing("What else?", FRAMES[:2], detail="low"))
    assert again.timings.encode_ms == 0
    assert engine.status.frame_cache_hits == 2


async def test_a_growing_camera_window_costs_one_frame_a_tick(engine: EngineHost) -> None:
    before = 0
    for count in range(3, 8):
        done = await completed(
            engine, seeing("What moves?", FRAMES[:count], window_min=3, detail="low", max_tokens=3)
        )
        usage = done.answers[0].usage
        if before:
            assert usage.prompt_tokens - usage.cached_tokens < FRAME + 20
            assert usage.image_tokens == before + FRAME
        before = usage.image_tokens


async def test_text_jobs_share_the_process(engine: EngineHost) -> None:
    cold = await text(engine, task("Name a colour.", max_tokens=9))
    seen = await text(engine, seeing("What moves?", FRAMES[:2], max_tokens=9))
    assert await text(engine, task("Name a colour.", max_tokens=9)) == cold
    assert await text(engine, seeing("What moves?", FRAMES[:2], max_tokens=9)) == seen


async def test_a_damaged_frame_fails_its_job_and_nothing_else(engine: EngineHost) -> None:
    pid = engine.pid
    for bad in (b"", b"\xff\xd8\xff", FRAMES[1][:-20], b"GIF89a" + bytes(50)):
        with pytest.raises(JobFailed, match="frame 1: ") as caught:
            await updates(engine, seeing("What?", [FRAMES[0], bad]))
        assert caught.value.code is Code.BAD_FRAME
    assert engine.pid == pid


@pytest.mark.parametrize("stage", ["decode_images", "encode", "prefill"])
async def test_a_stop_is_heard_in_every_stage(engine: EngineHost, stage: str) -> None:
    many = frames(12, size=400)[4:]
    restarts = engine.status.restarts
    stream = engine.execute(seeing("What?", many, detail="high"))
    await reach(stream, stage)
    engine.stop(1)
    with pytest.raises(JobStopped):
        await _to_the_end(stream)
    assert engine.status.restarts == restarts
    # for the next stage everything is new again
    await text(engine, task("and on", job=2, client=None))


async def test_a_killed_engine_comes_back_and_answers_the_same(engine: EngineHost) -> None:
    look = seeing("What moves?", FRAMES[:3], detail="low", max_tokens=9)
    before = await text(engine, look)
    restarts = engine.status.restarts
    stream = engine.execute(seeing("What?", frames(12, size=300)[6:], detail="high"))
    await reach(stream, "decode_images")
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDied):
        await _to_the_end(stream)
    assert await text(engine, look) == before
    assert engine.status.restarts == restarts + 1


async def test_a_model_that_is_not_fused_still_answers_texts(stock_vision_folder: Path) -> None:
    async with running(EngineHost(order(stock_vision_folder))) as host:
        info = await host.wait_ready()
        assert not info.vision
        assert "edged models fuse" in str(info.no_vision)
        assert await text(host, task("Name a colour.", max_tokens=5))
        with pytest.raises(JobFailed, match="edged models fuse") as caught:
            await updates(host, seeing("What?"))
        assert caught.value.code is Code.UNSUPPORTED


async def _to_the_end(stream: AsyncIterator[Update]) -> None:
    async for _ in stream:
        pass
