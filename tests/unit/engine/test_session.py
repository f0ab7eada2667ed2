from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edged.engine.session import Chunks, Session
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
