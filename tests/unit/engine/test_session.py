from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edged.engine.session import Chunks, Session, Sight
from edged.errors import JobStopped


class FakeGenerator:
    """Keeps what it was given, as genai's generator would."""

    def __init__(self, log: list[Any], fail_at: int | None = None) -> None:
        self.ids: list[int] = []
        self.log = log
        self.fail_at = fail_at
        log.append("made")

    def append_tokens(self, ids: np.ndarray[Any, Any]) -> None:
        if self.fail_at is not None and len(self.ids) + len(ids) > self.fail_at:
            raise RuntimeError("no")
        self.ids += ids.tolist()
        self.log.append(("append", len(ids)))

    def rewind_to(self, length: int) -> None:
        del self.ids[length:]
        self.log.append(("rewind", length))

    def get_logits(self) -> Any:
        return np.zeros((1, 1, 7), np.float32)


class Desk:
    def __init__(self, stop_after: int | None = None) -> None:
        self.begun: list[tuple[str, int, int, int]] = []
        self.steps: list[tuple[int, int, int]] = []
        self.stop_after = stop_after

    def begin(self, stage: Any, *, work: int = 1, done: int = 0, total: int = 1) -> None:
        self.begun.append((stage, work, done, total))

    def step(self, *, work: int, done: int, total: int, **_: Any) -> None:
        self.steps.append((work, done, total))

    def planned(self, plan: Any) -> None:
        raise AssertionError("a session plans nothing")

    def check(self) -> None:
        if self.stop_after is not None and len(self.steps) >= self.stop_after:
            raise JobStopped("stop")


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def session(log: list[Any]) -> Session:
    return Session(lambda: FakeGenerator(log), Chunks(first=4, least=4, most=4))


def test_a_prompt_comes_in_chunks_each_reported(session: Session, log: list[Any]) -> None:
    desk = Desk()
    assert session.prefill(range(10), "c", desk) == 0
    assert log == ["made", ("append", 4), ("append", 4), ("append", 2)]
    assert desk.begun == [("prefill", 4, 0, 10)]
    assert desk.steps == [(4, 4, 10), (4, 8, 10), (2, 10, 10)]


def test_the_longest_shared_prefix_is_kept(session: Session, log: list[Any]) -> None:
    session.prefill([1, 2, 3, 4, 5], "c", Desk())
    session.append([9])
    del log[:]
    desk = Desk()
    assert session.prefill([1, 2, 3, 7, 7, 7], "c", desk) == 3
    assert log == [("rewind", 3), ("append", 3)]
    assert desk.begun == [("prefill", 3, 3, 6)]


def test_the_last_token_is_always_computed_anew(session: Session, log: list[Any]) -> None:
    session.prefill([1, 2, 3], "c", Desk())
    assert session.prefill([1, 2, 3], "c", Desk()) == 2
    session.append([4, 5])
    assert session.prefill([1, 2], "c", Desk()) == 1


def test_a_prompt_that_goes_on_needs_no_rewinding(session: Session, log: list[Any]) -> None:
    session.prefill([1, 2], "c", Desk())
    del log[:]
    assert session.prefill([1, 2, 3], "c", Desk()) == 2
    assert log == [("append", 1)]


@pytest.mark.parametrize(("first", "second"), [("a", "b"), (None, "a"), ("a", None)])
def test_nothing_is_shared_between_clients(
    session: Session, log: list[Any], first: str | None, second: str | None
) -> None:
    session.prefill([1, 2, 3], first, Desk())
    assert session.prefill([1, 2, 3], second, Desk()) == 0
    assert ("rewind", 0) in log
    assert session.prefill([1, 2, 3], second, Desk()) == 2


def test_a_stop_is_heard_between_two_chunks_and_what_is_done_stays(
    session: Session, log: list[Any]
) -> None:
    with pytest.raises(JobStopped):
        session.prefill(range(12), "c", Desk(stop_after=2))
    assert session.alive
    assert session.prefill(range(12), "c", Desk()) == 8


def test_after_a_failure_the_cache_is_not_believed(log: list[Any]) -> None:
    fail_at: list[int | None] = [6, None]
    session = Session(lambda: FakeGenerator(log, fail_at.pop(0)), Chunks(first=4, least=4, most=4))
    with pytest.raises(RuntimeError):
        session.prefill(range(8), "c", Desk())
    assert not session.alive
    assert session.prefill(range(8), "c", Desk()) == 0
    assert log.count("made") == 2


def test_past_the_first_rotary_table_a_cache_is_not_used_again(log: list[Any]) -> None:
    session = Session(lambda: FakeGenerator(log), Chunks(first=512))
    session.prefill(range(4096), "c", Desk())
    assert session.prefill(range(4097), "c", Desk()) == 4096
    assert session.prefill(range(10), "c", Desk()) == 0
    assert log.count("made") == 2


def test_chunks_aim_at_two_seconds_within_their_bounds() -> None:
    chunks = Chunks()
    assert chunks.size == 64
    chunks.took(64, 6.4)  # ten tokens a second: a slow box
    assert chunks.size == 20
    chunks.took(20, 20.0)
    assert chunks.size == 16
    sizes = []
    for _ in range(8):
        chunks.took(chunks.size, chunks.size / 1000)  # a fast one: step by step
        sizes.append(chunks.size)
    assert sizes == [32, 64, 128, 256, 512, 512, 512, 512]
    chunks.took(3, 3.0)  # the last bit of a prompt tells little
    assert chunks.size == 512
    chunks.took(512, 0.0)
    assert chunks.size == 512


# Frames -------------------------------------------------------------------------------------------

ROWS, WIDTH, IMAGE = 32, 4, 0


class SeeingGenerator(FakeGenerator):
    """Notes what it reads of the features at each position, as the fused graph does."""

    def __init__(self, log: list[Any], features: np.ndarray[Any, Any]) -> None:
        super().__init__(log)
        self.features = features
        self.read: list[float] = []

    def append_tokens(self, ids: np.ndarray[Any, Any]) -> None:
        for position, token in enumerate(ids.tolist(), len(self.ids)):
            self.read.append(float(self.features[position, 0]) if token == IMAGE else -1.0)
        super().append_tokens(ids)

    def rewind_to(self, length: int) -> None:
        super().rewind_to(length)
        del self.read[length:]


def sight(start: int, count: int, what: int, *, crops: int = 1, rows: bool = True) -> Sight:
    """A frame whose row n is what + n / 100, in every column."""
    features = np.repeat(what + np.arange(count)[:, None] / 100, WIDTH, 1)
    return Sight(
        start=start,
        end=start + count,
        key=(bytes([what]), crops),
        rows=features.astype(np.float32) if rows else None,
    )


class Seeing:
    def __init__(self, *, rewinds: bool = True) -> None:
        self.log: list[Any] = []
        self.features = np.zeros((ROWS, WIDTH), np.float32)
        self.made: list[SeeingGenerator] = []
        self.session = Session(
            self.make, Chunks(first=4, least=4, most=4), features=self.features, rewinds=rewinds
        )

    def make(self) -> SeeingGenerator:
        self.made.append(SeeingGenerator(self.log, self.features))
        return self.made[-1]

    def look(self, *frames: Sight, text: int = 7, client: str = "c", desk: Any = None) -> int:
        """Prefill a token, the frames, and two tokens."""
        end = frames[-1].end if frames else 1
        prompt = [5] + [IMAGE] * (end - 1) + [text, text]
        return self.session.prefill(prompt, client, desk or Desk(), sights=frames)

    @property
    def read(self) -> list[float]:
        return [round(value, 2) for value in self.made[-1].read]

    def rows(self) -> list[int]:
        """The positions whose rows are not zero."""
        return np.flatnonzero(self.features.any(axis=1)).tolist()


def seen(what: int, count: int) -> list[float]:
    return [round(what + n / 100, 2) for n in range(count)]


@pytest.fixture
def seeing() -> Seeing:
    return Seeing()


def test_features_are_at_their_positions_before_their_tokens_are_computed(seeing: Seeing) -> None:
    assert seeing.look(sight(1, 6, 1), sight(7, 3, 2)) == 0
    assert seeing.read == [-1, *seen(1, 6), *seen(2, 3), -1, -1]
    assert seeing.rows() == [*range(1, 10)]


def test_a_position_is_the_same_only_if_the_same_is_seen_there(seeing: Seeing) -> None:
    seeing.look(sight(1, 6, 1), sight(7, 3, 2))
    assert seeing.look(sight(1, 6, 1), sight(7, 3, 3)) == 7
    assert seeing.read == [-1, *seen(1, 6), *seen(3, 3), -1, -1]
    assert seeing.look(sight(1, 6, 3), sight(7, 3, 1)) == 1
    assert seeing.read == [-1, *seen(3, 6), *seen(1, 3), -1, -1]
    assert seeing.look(sight(1, 6, 3, crops=2), sight(7, 3, 1)) == 1
    # as many tokens, but cut into other frames
    assert seeing.look(sight(1, 3, 3, crops=2), sight(4, 6, 1)) == 1


def test_another_question_or_frame_costs_only_itself(seeing: Seeing) -> None:
    seeing.look(sight(1, 6, 1), sight(7, 3, 2))
    known = (sight(1, 6, 1, rows=False), sight(7, 3, 2, rows=False))
    assert seeing.look(*known, text=8) == 10
    assert seeing.look(*known, sight(10, 4, 4), text=8) == 10
    assert seeing.read == [-1, *seen(1, 6), *seen(2, 3), *seen(4, 4), -1, -1]
    assert seeing.look(*known[:1]) == 7
    assert seeing.rows() == [*range(1, 7)]


def test_rows_beyond_the_live_frames_are_zero(seeing: Seeing) -> None:
    seeing.look(sight(1, 6, 1), sight(7, 9, 2))
    seeing.look(sight(1, 2, 3))
    assert seeing.rows() == [1, 2]
    seeing.look(text=3)
    assert seeing.rows() == []
    seeing.look(sight(1, 6, 1))
    seeing.session.drop()
    assert seeing.rows() == []


def test_frames_that_are_held_need_no_rows_and_others_do(seeing: Seeing) -> None:
    seeing.look(sight(1, 6, 1))
    with pytest.raises(AssertionError, match="no features"):
        seeing.look(sight(1, 6, 1, rows=False), sight(7, 2, 2, rows=False))


def test_the_frames_held_whole_are_told_to_who_can_go_on_from_them(seeing: Seeing) -> None:
    frames = (sight(1, 6, 1), sight(7, 3, 2), sight(10, 4, 3))
    with pytest.raises(JobStopped):
        seeing.look(*frames, desk=Desk(stop_after=2))  # eight tokens
    keys = [each.key for each in seeing.session.seen([5], "c")]
    assert keys == [frames[0].key]
    assert seeing.session.seen([6], "c") == ()
    assert seeing.session.seen([5, 5], "c") == ()
    assert seeing.session.seen([5], "d") == ()
    # what was begun is gone on with
    assert seeing.look(*frames) == 8
    assert [each.key for each in seeing.session.seen([5], "c")] == [each.key for each in frames]
    assert seeing.read == [-1, *seen(1, 6), *seen(2, 3), *seen(3, 4), -1, -1]


def test_the_session_does_not_keep_what_its_buffer_holds(seeing: Seeing) -> None:
    seeing.look(sight(1, 6, 1))
    assert [each.rows for each in seeing.session.seen([5], "c")] == [None]


def test_frames_are_not_shared_between_clients(seeing: Seeing) -> None:
    seeing.look(sight(1, 6, 1), client="a")
    assert seeing.session.seen([5], "b") == ()
    assert seeing.look(sight(1, 6, 1), client="b") == 0


def test_a_generator_that_cannot_go_back_is_made_anew() -> None:
    seeing = Seeing(rewinds=False)
    assert seeing.look(text=3) == 0
    assert seeing.look(text=4) == 0
    assert len(seeing.made) == 2
    assert seeing.session.prefill([5, 4, 4, 4], "c", Desk()) == 3  # nothing to go back from
    assert len(seeing.made) == 2


def test_steps_carry_the_question(seeing: Seeing) -> None:
    questions: list[Any] = []

    class Asking(Desk):
        def step(self, *, work: int, done: int, total: int, **more: Any) -> None:
            questions.append(more["question"])

    seeing.session.prefill(range(1, 6), "c", Asking(), question=3)
    assert questions == [3, 3]


def test_the_pace_of_a_prefill_is_known_after_a_chunk_that_tells() -> None:
    chunks = Chunks()
    known = [chunks.token_s]
    for tokens, seconds in ((3, 1.0), (50, 2.0), (75, 4.0)):
        chunks.took(tokens, seconds)
        known.append(chunks.token_s)
    assert known == [None, None, 0.04, pytest.approx((1.0 + 4.0) / (25 + 75))]
