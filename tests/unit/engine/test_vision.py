"""Vision jobs with the real small vision model, in this process."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edged.engine import footprint
from edged.engine.genai import GenaiBackend
from edged.engine.messages import JobStage, Order
from edged.engine.vision import run as vision_run
from edged.engine.vision.decode import Picture, decode
from edged.engine.vision.plan import Conditions, plan
from edged.engine.vision.run import Vision
from edged.engine.vision.transform import Crops
from edged.errors import Code, JobFailed, JobStopped
from edged.models.folder import ModelError, inspect
from edged.models.record import FUSED_RECORD
from edged.ports import Answer, Completed, FramePlan, Look, PlannedFrame, Task, Turn
from tests.kit.vision import STOCK_FP16, fused_folder

pytestmark = pytest.mark.engine

#: Tokens of a frame of one crop, and of the newline after it.
FRAME, NEWLINE = 313, 2


@cache
def frame(seed: int, width: int = 400, height: int = 400) -> bytes:
    """A JPEG of coloured fields, another for each seed."""
    fields = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(fields).resize((width, height), Image.Resampling.NEAREST).save(data, "JPEG")
    return data.getvalue()


FRAMES = tuple(frame(seed) for seed in range(6))


class Desk:
    """Takes note, and says stop after a number of steps of a stage."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stages: list[str] = []
        self.begun: list[tuple[str, int, int, int]] = []
        self.steps: list[tuple[str, int, int, int]] = []
        self.texts: list[tuple[int | None, str]] = []
        self.plans: list[FramePlan] = []
        self._stop = stop

    def begin(self, stage: JobStage, *, work: int = 1, done: int = 0, total: int = 1) -> None:
        self.stages.append(stage)
        self.begun.append((stage, work, done, total))

    def step(
        self,
        *,
        work: int,
        done: int,
        total: int,
        text: str = "",
        question: int | None = None,
        **_: Any,
    ) -> None:
        self.steps.append((self.stages[-1], work, done, total))
        self.texts.append((question, text))

    def planned(self, plan: FramePlan) -> None:
        self.plans.append(plan)

    def check(self) -> None:
        if self._stop is not None and self.count(self._stop[0]) >= self._stop[1]:
            raise JobStopped("stop")

    def count(self, stage: str) -> int:
        return len([1 for step in self.steps if step[0] == stage])


class Seeing:
    """A loaded vision model, as the engine process has it."""

    def __init__(self, path: Path, **order: Any) -> None:
        pytest.importorskip("onnxruntime_genai")
        self.backend = GenaiBackend()
        self.info = self.backend.load(Order(model="small", path=str(path), **order))
        assert self.backend._vision is not None
        assert self.backend._session is not None
        assert self.backend._text is not None
        self.vision: Vision = self.backend._vision
        self.session = self.backend._session
        self.text = self.backend._text
        self.desk = Desk()

    def forget(self) -> None:
        self.session.drop()
        self.vision.cache.clear()

    def run(self, task: Task, desk: Desk | None = None) -> Completed:
        self.desk = desk or Desk()
        return self.backend.run(task, self.desk)

    def look(
        self,
        frames: Sequence[bytes],
        question: str = "What moves?",
        desk: Desk | None = None,
        *,
        detail: Any = "low",
        **fields: Any,
    ) -> Completed:
        of_look = {n: fields.pop(n) for n in ("window_min", "left_s", "plan") if n in fields}
        turn: Turn = {"role": "user", "content": [*range(len(frames)), question]}
        task = Task(
            job=1,
            client=fields.pop("client", "c"),
            messages=fields.pop("messages", (turn,)),
            look=Look(frames=tuple(frames), detail=detail, **of_look),
            max_tokens=fields.pop("max_tokens", 12),
            **fields,
        )
        return self.run(task, desk)

    def ask(self, frames: Sequence[bytes], *given: Any, **fields: Any) -> Answer:
        return self.look(frames, *given, **fields).answers[0]

    def logits(self, frames: Sequence[bytes], question: str = "What moves?") -> Any:
        """The logits after a prompt."""
        self.look(frames, question, max_tokens=1)
        return self.session.logits()

    @property
    def features(self) -> Any:
        return self.session._features


@pytest.fixture(scope="module")
def loaded(vision_folder: Path) -> Seeing:
    return Seeing(vision_folder)


@pytest.fixture
def seeing(loaded: Seeing) -> Seeing:
    loaded.forget()
    return loaded


def test_a_vision_model_says_so_and_counts_its_memory(seeing: Seeing) -> None:
    info = seeing.info
    assert info.vision
    assert info.no_vision is None
    assert info.memory["feature_buffer"] == pytest.approx(4 * 64 * 4096 / 1e6, abs=0.1)
    assert info.memory["encoder"] > 100  # what a frame is encoded in, beside the weights
    assert info.memory["frame_cache"] == 256
    assert info.memory["total"] > sum(info.memory[n] for n in ("encoder", "frame_cache"))
    assert seeing.backend.frame_cache == (0, 0)


def test_a_job_goes_through_its_stages_and_tells_what_they_cost(seeing: Seeing) -> None:
    done = seeing.look(FRAMES[:2])
    assert seeing.desk.stages == [
        "prepare",
        *("decode_images", "encode", "decode_images", "encode"),
        "prefill",
        "token",
    ]
    assert [b for b in seeing.desk.begun if b[0] == "encode"] == [
        ("encode", 2, 0, 2),
        ("encode", 2, 1, 2),
    ]
    plan = FramePlan(used=(PlannedFrame(0, 1, FRAME), PlannedFrame(1, 1, FRAME)))
    assert done.frames == plan
    assert seeing.desk.plans == [plan]
    usage = done.answers[0].usage
    assert usage.image_tokens == 2 * FRAME
    assert usage.prompt_tokens == len(seeing.session._ids) - usage.completion_tokens + 1
    timings = done.timings
    assert min(timings.decode_images_ms, timings.encode_ms, timings.prefill_ms) > 0
    stages = timings.decode_images_ms + timings.encode_ms + timings.prefill_ms
    assert stages < timings.ttft_ms
    assert "".join(text for _, text in seeing.desk.texts) == done.answers[0].text


def test_answers_are_the_same_cold_and_reused(seeing: Seeing) -> None:
    jobs = [
        (FRAMES[:2], "What moves?"),
        (FRAMES[:3], "What moves?"),
        (FRAMES[:3], "Is it red?"),
        (FRAMES[1:3], "Is it red?"),
        (FRAMES[:1], "What moves?"),
    ]
    cold = []
    for frames, question in jobs:
        seeing.forget()
        cold.append(seeing.ask(frames, question).text)
    assert len(set(cold)) > 3
    seeing.forget()
    for n in [*range(len(jobs)), *reversed(range(len(jobs)))]:
        assert seeing.ask(*jobs[n]).text == cold[n]


def test_the_order_of_frames_matters(seeing: Seeing) -> None:
    forward = seeing.logits(FRAMES[:3])
    assert np.abs(seeing.logits(FRAMES[2::-1]) - forward).max() > 0.1
    assert np.array_equal(seeing.logits(FRAMES[:3]), forward)


def test_a_growing_window_costs_its_new_frame_only(seeing: Seeing) -> None:
    before = seeing.ask(FRAMES[:2]).usage
    for count in range(3, 6):
        usage = seeing.ask(FRAMES[:count]).usage
        # all but the question
        assert usage.cached_tokens == 1 + (count - 1) * (FRAME + NEWLINE)
        assert usage.prompt_tokens == before.prompt_tokens + FRAME + NEWLINE
        assert seeing.desk.count("encode") == seeing.desk.count("decode_images") == 1
        assert seeing.backend.frame_cache[1] == sum(range(2, count))
        before = usage


def test_another_question_about_the_same_frames_costs_its_text_only(seeing: Seeing) -> None:
    seeing.ask(FRAMES[:3])
    usage = seeing.ask(FRAMES[:3], "Is it red?").usage
    assert usage.cached_tokens >= 1 + 3 * (FRAME + NEWLINE)
    assert usage.image_tokens == 3 * FRAME
    assert seeing.desk.stages == ["prepare", "prefill", "token"]


def test_a_frame_in_the_session_needs_no_cache(vision_folder: Path) -> None:
    seeing = Seeing(vision_folder, frame_cache_mb=0.0)
    seeing.ask(FRAMES[:2])
    assert seeing.ask(FRAMES[:3]).usage.cached_tokens == 1 + 2 * (FRAME + NEWLINE)
    assert seeing.desk.count("encode") == 1
    _, hits = seeing.backend.frame_cache
    assert hits == 2
    text = seeing.ask(FRAMES[1:3]).text
    assert seeing.desk.count("encode") == 2
    seeing.forget()
    assert seeing.ask(FRAMES[1:3]).text == text


def test_a_text_job_between_two_vision_jobs_changes_nothing(seeing: Seeing) -> None:
    def text() -> str:
        task = Task(
            job=2,
            client="c",
            messages=({"role": "user", "content": "Name a colour."},),
            max_tokens=9,
        )
        return seeing.run(task).answers[0].text

    cold = text()
    seen = seeing.ask(FRAMES[:2]).text
    assert text() == cold
    assert not seeing.features.any()
    assert seeing.ask(FRAMES[:2]).text == seen
    assert seeing.desk.count("encode") == 0  # their features were kept
    assert text() == cold


def test_what_lies_in_the_buffer_beyond_the_frames_is_never_read(seeing: Seeing) -> None:
    clean = seeing.logits(FRAMES[:2])
    seeing.forget()
    seeing.look(FRAMES[:6])
    seeing.logits(FRAMES[:2])
    ends = [sight.end for sight in seeing.session.seen([seeing.session._ids[0]], "c")]
    assert len(ends) == 2
    assert not seeing.features[ends[-1] :].any()
    seeing.forget()
    assert not seeing.features.any()
    seeing.features[:] = np.nan  # poison
    try:
        assert np.array_equal(seeing.logits(FRAMES[:2]), clean)
    finally:
        seeing.features[:] = 0


def test_the_same_frame_twice_is_encoded_once(seeing: Seeing) -> None:
    done = seeing.look([FRAMES[0], FRAMES[1], FRAMES[0]])
    assert seeing.desk.count("encode") == 2
    assert done.frames is not None
    assert [f.index for f in done.frames.used] == [0, 1, 2]
    assert done.answers[0].usage.image_tokens == 3 * FRAME


@pytest.mark.parametrize(
    ("stage", "count"), [("decode_images", 1), ("encode", 1), ("prefill", 1), ("token", 3)]
)
def test_a_stop_is_heard_within_one_step(seeing: Seeing, stage: str, count: int) -> None:
    seeing.session.chunks.size = 64
    desk = Desk(stop=(stage, count))
    with pytest.raises(JobStopped):
        seeing.look(FRAMES[:3], desk=desk, max_tokens=50)
    assert desk.count(stage) == count
    text = seeing.ask(FRAMES[:3]).text
    seeing.forget()
    assert seeing.ask(FRAMES[:3]).text == text


def test_nothing_is_shared_between_clients(seeing: Seeing) -> None:
    first = seeing.ask(FRAMES[:2], client="a")
    second = seeing.ask(FRAMES[:2], client="b")
    assert second.text == first.text
    assert second.usage.cached_tokens == 0
    assert seeing.desk.count("encode") == 2
    assert seeing.backend.frame_cache[1] == 0
    seeing.ask(FRAMES[:2], client="a")
    assert seeing.desk.count("encode") == 0
    assert seeing.backend.frame_cache[1] == 2


def test_questions_are_answered_from_one_prefill(seeing: Seeing) -> None:
    questions = ("What moves?", "Is it red?", "Is it round?")
    turn: Turn = {"role": "user", "content": [0, 1]}
    done = seeing.look(FRAMES[:2], messages=(turn,), questions=questions)
    usages = [answer.usage for answer in done.answers]
    assert [u.image_tokens for u in usages] == [2 * FRAME, 0, 0]
    assert [u.cached_tokens for u in usages] == [0, 0, 0]
    assert max(u.prompt_tokens for u in usages[1:]) < 30
    asked = [question for question, _ in seeing.desk.texts if question is not None]
    assert sorted(set(asked)) == [0, 1, 2]
    assert asked == sorted(asked)
    for index, answer in enumerate(done.answers):
        said = "".join(text for question, text in seeing.desk.texts if question == index)
        assert said == answer.text
    assert seeing.desk.count("encode") == 2
    for question, answer in zip(questions, done.answers, strict=True):
        seeing.forget()
        assert seeing.ask(FRAMES[:2], question).text == answer.text


def test_a_cache_that_is_computed_anew_between_questions_has_its_frames(
    seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on models whose rotary tables change within the context."""
    turn: Turn = {"role": "user", "content": [0, 1]}
    job: dict[str, Any] = {"messages": (turn,), "questions": ("What moves?", "Is it red?")}
    texts = [answer.text for answer in seeing.look(FRAMES[:2], **job).answers]
    monkeypatch.setattr("edged.engine.session.FIRST_TABLE", 100)
    monkeypatch.setattr(vision_run, "FIRST_TABLE", 100)
    for _ in range(2):
        done = seeing.look(FRAMES[:2], **job)
        assert [answer.text for answer in done.answers] == texts
        assert [each.usage.image_tokens for each in done.answers] == [2 * FRAME, 0]
        assert done.answers[1].usage.prompt_tokens < FRAME


def test_a_schema_is_held_to_by_each_answer(seeing: Seeing) -> None:
    schema = {
        "type": "object",
        "properties": {"moved": {"type": "boolean"}},
        "required": ["moved"],
        "additionalProperties": False,
    }
    done = seeing.look(
        FRAMES[:2],
        messages=({"role": "user", "content": [0, 1]},),
        questions=("What moves?", "What else?"),
        schema=schema,
        max_tokens=40,
    )
    assert all(type(answer.json["moved"]) is bool for answer in done.answers)
    seeing.forget()
    with pytest.raises(JobFailed) as caught:
        seeing.look(FRAMES[:2], schema={"type": "nope"})
    assert caught.value.code is Code.INVALID
    assert seeing.desk.stages == ["prepare"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [(b"", "empty"), (b"GIF89a....", "GIF"), (FRAMES[1][:-300], "truncated"), (b"\0" * 99, "not")],
)
def test_a_damaged_frame_is_told_by_its_index(seeing: Seeing, bad: bytes, says: str) -> None:
    with pytest.raises(JobFailed, match=says) as caught:
        seeing.look([FRAMES[0], FRAMES[1], bad])
    assert caught.value.code is Code.BAD_FRAME
    assert caught.value.message.startswith("frame 2: ")
    assert "prefill" not in seeing.desk.stages
    assert seeing.ask(FRAMES[:2]).text


def test_a_frame_that_shows_its_damage_when_decoded_is_told_too(seeing: Seeing) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4)

    head = chunk(b"IHDR", (64).to_bytes(4) * 2 + bytes((8, 2, 0, 0, 0)))
    pixels = zlib.compress(b"\0" * 193 * 20)  # of 64 rows
    bad = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    with pytest.raises(JobFailed, match="frame 1: ") as caught:
        seeing.look([FRAMES[0], bad])
    assert caught.value.code is Code.BAD_FRAME


# Planning -----------------------------------------------------------------------------------------


def test_a_plan_that_is_given_is_kept(seeing: Seeing) -> None:
    low = seeing.look(FRAMES[:2]).frames
    seeing.forget()
    done = seeing.look(FRAMES[:2], detail="high", plan=low)
    assert done.frames == low
    assert seeing.desk.plans == []


def test_the_frames_and_their_crops_follow_the_detail(seeing: Seeing) -> None:
    high = seeing.look(FRAMES[:2], detail="high").frames
    assert high is not None
    assert [f.crops for f in high.used] == [4, 4]
    assert seeing.look(FRAMES[:1], detail="high").answers[0].usage.image_tokens == 2509


def test_frames_that_do_not_fit_are_dropped_and_told(seeing: Seeing) -> None:
    many = [frame(seed, 64, 64) for seed in range(20)]
    done = seeing.look(many)
    assert done.frames is not None
    assert len(done.frames.used) == 12  # of 313 tokens each, in 4096
    assert len(done.frames.dropped) == 8
    assert done.answers[0].usage.image_tokens == 12 * FRAME


def test_no_memory_is_spent_on_telling_which_frames_are_alike(
    seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def counted(data: bytes, least: Any = None) -> Picture:
        decoded.append(data)
        return decode(data, least)

    many = [frame(0, 1000, 64), *(frame(seed % 2, 64, 64) for seed in range(15))]
    monkeypatch.setattr(vision_run, "decode", counted)
    monkeypatch.setattr(vision_run, "PEAK_BYTES_A_PIXEL", 1_000_000)  # 64 GB and 4 GB
    free = seeing.vision._limit_mb - 10_000
    monkeypatch.setattr(footprint, "resident_mb", lambda: free)
    seeing.forget()
    with pytest.raises(JobFailed) as caught:
        seeing.look(many)
    assert caught.value.code is Code.MEMORY
    assert many[0] not in decoded
    assert "prepare" in seeing.desk.stages
    assert len(decoded) >= len(many) - 1  # the small ones were compared


def test_auto_looks_closer_where_it_is_in_time(seeing: Seeing) -> None:
    done = seeing.look(FRAMES[:1], detail="auto").frames
    assert done is not None
    assert done.used[0].crops == 16  # this model is quick
    seeing.forget()
    in_a_hurry = seeing.look(FRAMES[:1], detail="auto", left_s=0.001).frames
    assert in_a_hurry is not None
    assert in_a_hurry.used[0].crops == 1


def test_a_large_frame_does_not_make_the_next_small_ones_look_slow(
    seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = []

    def noted(candidates: Any, conditions: Conditions, kept: Any) -> FramePlan:
        speeds.append(conditions.speed.decode_s)
        return plan(candidates, conditions, kept)

    monkeypatch.setattr(vision_run, "plan", noted)
    large = io.BytesIO()
    Image.new("RGB", (4000, 5000)).save(large, "PNG")
    took = seeing.look((large.getvalue(),), client="another").timings.decode_images_ms / 1000
    seeing.look((large.getvalue(), *FRAMES[:3]))
    seeing.look(FRAMES[:3])
    # 20 megapixels; what is below one counts as one
    assert speeds[1] == pytest.approx(took * (20 + 3) / 4 / 20)
    assert speeds[2] is not None
    assert speeds[2] < took / 2


def test_a_window_goes_on_from_the_live_frames(seeing: Seeing) -> None:
    seeing.look(FRAMES[:3], detail="auto", window_min=3)
    # the oldest has left the camera's buffer: the window begins anew with the newest two
    moved = seeing.look(FRAMES[1:5], detail="auto", window_min=2)
    assert moved.frames is not None
    assert [f.index for f in moved.frames.used] == [2, 3]
    grown = seeing.look(FRAMES[2:6], detail="auto", window_min=2)
    assert grown.frames is not None
    assert [f.index for f in grown.frames.used] == [1, 2, 3]
    assert grown.answers[0].usage.cached_tokens > 2 * FRAME
    assert seeing.desk.count("encode") == 1


@pytest.mark.parametrize(
    ("question", "max_tokens", "says"),
    [("word " * 4000, None, "4096"), ("What?", 3900, "max_tokens 3900"), ("x" * 10**6, 5, "least")],
)
def test_what_does_not_fit_is_told_before_the_prefill(
    seeing: Seeing, question: str, max_tokens: int | None, says: str
) -> None:
    with pytest.raises(JobFailed, match=says) as caught:
        seeing.look(FRAMES[:1], question, max_tokens=max_tokens)
    assert caught.value.code is Code.TOO_LONG
    assert seeing.desk.stages == ["prepare"]


def test_too_little_memory_means_fewer_crops_and_at_last_a_failure_with_numbers(
    seeing: Seeing, monkeypatch: pytest.MonkeyPatch
) -> None:
    def free(mb: float) -> None:
        monkeypatch.setattr(footprint, "resident_mb", lambda: seeing.vision._limit_mb - mb)

    monkeypatch.setattr(seeing.vision._encoder, "view_mb", 64.0)
    monkeypatch.setattr(footprint, "begin_peak", lambda: False)
    crops = []
    for mb in (5000, 400, 140):
        free(mb)
        seeing.forget()
        plan = seeing.look(FRAMES[:1], detail="high").frames
        assert plan is not None
        crops.append(plan.used[0].crops)
    assert crops == [16, 4, 1]
    free(100)
    seeing.forget()
    with pytest.raises(JobFailed, match=r"frame 0 \(400 x 400\) needs 131 MB .* 100 of the") as no:
        seeing.look(FRAMES[:1])
    assert no.value.code is Code.MEMORY
    assert "prefill" not in seeing.desk.stages
    assert "encode" not in seeing.desk.stages


# The count, before and after ----------------------------------------------------------------------


class Counting:
    """A generator that only counts."""

    def __init__(self, vocab_size: int, eos: int) -> None:
        self.ids: list[int] = []
        self._logits = np.zeros((1, 1, vocab_size), np.float32)
        self._logits[0, 0, eos] = 1

    def append_tokens(self, ids: Any) -> None:
        self.ids += ids.tolist()

    def rewind_to(self, length: int) -> None:
        del self.ids[length:]

    def get_logits(self) -> Any:
        return self._logits.copy()


SIZE = st.integers(1, 3000)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=9),
    st.sampled_from(["low", "auto", "high"]),
    st.one_of(st.none(), st.integers(1, 3)),
    st.text("ab <|>\n", max_size=30),
    st.lists(st.text("ab \n?", max_size=12), max_size=3),
)
def test_the_planned_tokens_are_those_that_the_model_gets(
    loaded: Seeing,
    sizes: list[tuple[int, int]],
    detail: Any,
    window: int | None,
    before: str,
    questions: list[str],
) -> None:
    made: list[Counting] = []

    def make() -> Counting:
        made.append(Counting(1216, min(loaded.text.eos_ids)))
        return made[-1]

    counted: list[int] = []

    def size(data: bytes) -> tuple[int, int]:
        width, height, _ = map(int, data.split(b"x"))
        return width, height

    def encode(crops: Crops, tokens: int) -> Any:
        counted.append(tokens)
        return np.ones((tokens, 64), np.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaded.session, "_make", make)
        patch.setattr(vision_run, "probe", size)
        patch.setattr(
            vision_run, "decode", lambda data, least: Picture(Image.new("RGB", (8, 8)), *size(data))
        )
        none = Crops(np.zeros((1, 3, 1, 1), np.float32), (1, 1), 1, 1)
        patch.setattr(vision_run, "transform", lambda *_: none)
        patch.setattr(loaded.vision._encoder, "encode", encode)
        loaded.forget()
        frames = [f"{w}x{h}x{n}".encode() for n, (w, h) in enumerate(sizes)]
        turn: Turn = {"role": "user", "content": [before, *range(len(frames)), "what?"]}
        done = loaded.look(
            frames,
            detail=detail,
            window_min=window,
            messages=(turn,),
            questions=tuple(questions),
            max_tokens=None,
        )
        ids = made[-1].ids
        assert done.frames is not None
        planned = sum(f.tokens for f in done.frames.used)
        placeholder = loaded.text.placeholder
        assert placeholder is not None
        assert len(done.answers) == max(1, len(questions))
        assert ids.count(placeholder) == planned == sum(counted)
        assert planned == sum(answer.usage.image_tokens for answer in done.answers)
        last = done.answers[-1].usage.prompt_tokens
        if len(done.answers) == 1:
            assert len(ids) == last
        assert len(ids) < 4096
        for sight in loaded.session.seen(ids[: ids.index(placeholder)], "c"):
            assert ids[sight.start : sight.end] == [placeholder] * (sight.end - sight.start)
            assert loaded.features[sight.start : sight.end].all()
        loaded.forget()


# What must never be ------------------------------------------------------------------------------


def test_the_placeholder_is_never_said_even_if_nothing_is_likelier(seeing: Seeing) -> None:
    placeholder = seeing.text.placeholder
    assert placeholder is not None
    plain = seeing.ask(FRAMES[:2]).text
    logits = seeing.session.logits
    appended: list[int] = []
    append = seeing.session.append

    def forced() -> Any:
        found = logits()
        found[placeholder] = 1e9
        return found

    def noting(ids: Sequence[int]) -> None:
        appended.extend(ids)
        append(ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeing.session, "logits", forced)
        assert seeing.ask(FRAMES[:2]).text == plain
        patch.setattr(seeing.session, "append", noting)
        task = Task(job=2, client="c", messages=({"role": "user", "content": "x"},), max_tokens=9)
        seeing.run(task)
    assert placeholder not in appended


@pytest.mark.parametrize(
    ("features", "says"),
    [
        (np.zeros((312, 64), np.float32), "312 tokens for a frame of 1 x 1 crops, which has 313"),
        (np.full((313, 64), np.nan, np.float32), "no finite numbers"),
    ],
)
def test_an_encoder_that_gives_something_else_ends_the_job_and_no_more(
    seeing: Seeing, monkeypatch: pytest.MonkeyPatch, features: Any, says: str
) -> None:
    encoder = seeing.vision._encoder
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "_run", lambda feeds, views: features)
        with pytest.raises(JobFailed, match=f"frame 0: .*{says}") as caught:
            seeing.look(FRAMES[:2])
    assert caught.value.code is Code.UNSUPPORTED
    assert "prefill" not in seeing.desk.stages
    assert seeing.ask(FRAMES[:2]).text


# Other folders ------------------------------------------------------------------------------------


def test_a_half_precision_model_sees_too(tmp_path: Path) -> None:
    seeing = Seeing(fused_folder(tmp_path, STOCK_FP16))
    assert seeing.features.dtype == np.float16
    cold = seeing.ask(FRAMES[:2]).text
    seeing.ask(FRAMES[:3])
    assert seeing.ask(FRAMES[:2]).text == cold
    assert seeing.ask(FRAMES[:3]).usage.cached_tokens >= 2 * FRAME
    forward = seeing.logits(FRAMES[:2])
    assert np.abs(seeing.logits(FRAMES[1::-1]) - forward).max() > 0.1


def test_a_model_that_is_not_fused_answers_texts_and_says_what_to_run(
    stock_vision_folder: Path, seeing: Seeing
) -> None:
    backend = GenaiBackend()
    info = backend.load(Order(model="small", path=str(stock_vision_folder)))
    assert not info.vision
    assert info.no_vision is not None
    assert f"run: edged models fuse {stock_vision_folder}, then start" in info.no_vision
    assert backend.frame_cache == (0.0, 0)
    texts = ["Name a colour.", "Name a colour. And a shape.", "Is it red?", "Name a colour."]
    for text in texts:
        task = Task(job=1, client="c", messages=({"role": "user", "content": text},), max_tokens=9)
        assert backend.run(task, Desk()).answers[0].text == seeing.run(task).answers[0].text
    turn: Turn = {"role": "user", "content": [0, "What?"]}
    look = Look(frames=FRAMES[:1])
    with pytest.raises(JobFailed) as caught:
        backend.run(Task(job=1, client="c", messages=(turn,), look=look), Desk())
    assert caught.value.code is Code.UNSUPPORTED
    assert caught.value.message == info.no_vision


def test_a_text_model_says_that_it_has_no_vision(phi3: Any) -> None:
    info = GenaiBackend().load(Order(model="small", path=str(phi3.folder)))
    assert not info.vision
    assert str(info.no_vision).startswith("the loaded model has no vision: ")
    assert info.memory["frame_cache"] == info.memory["feature_buffer"] == 0


def test_a_context_without_room_for_a_frame_leaves_texts(vision_folder: Path) -> None:
    info = GenaiBackend().load(Order(model="small", path=str(vision_folder), max_context=256))
    assert not info.vision
    assert "256 tokens has no room for a frame" in str(info.no_vision)


def test_no_memory_for_a_frame_leaves_texts(
    vision_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "resident_mb", lambda: 1e6)
    backend = GenaiBackend()
    info = backend.load(Order(model="small", path=str(vision_folder)))
    assert not info.vision
    assert str(info.no_vision).startswith("no memory is left to look at frames: frame 0 (336 x")
    task = Task(job=1, client="c", messages=({"role": "user", "content": "x"},), max_tokens=3)
    assert backend.run(task, Desk()).answers


def test_an_encoder_that_cannot_be_run_is_a_models_fault(tmp_path: Path) -> None:
    folder = fused_folder(tmp_path)
    record = json.loads((folder / FUSED_RECORD).read_text())
    record["geometry"]["crop"] = 448  # the graph is made for crops of 336
    (folder / FUSED_RECORD).write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"its vision encoder cannot be run: .*Reshape"):
        GenaiBackend().load(Order(model="small", path=str(folder)))


def test_an_encoder_that_cannot_be_loaded_is_a_models_fault(
    tmp_path: Path, vision_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fused_folder(tmp_path)
    whole = inspect(folder)
    monkeypatch.setattr("edged.engine.genai.inspect", lambda path: whole)
    graph = folder / "vision.onnx"
    graph.write_bytes(graph.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"vision.onnx: onnxruntime cannot load it"):
        GenaiBackend().load(Order(model="small", path=str(folder)))
