from __future__ import annotations

import json
import random

import pytest

from edged.engine.deadlines import MODELS, Deadlines, Limits
from edged.engine.restarts import Backoff, Restarts


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def deadlines(clock: Clock) -> Deadlines:
    made = Deadlines(clock)
    made.use("model")
    return made


def test_without_a_past_a_load_has_15_minutes_and_another_stage_5(deadlines: Deadlines) -> None:
    assert deadlines.limit("load") == 900
    for stage in ("prepare", "decode_images", "encode", "prefill", "token"):
        assert deadlines.limit(stage) == 300
    assert deadlines.limit("ping") == 60


def test_with_a_past_a_stage_has_ten_times_its_slowest_cost(deadlines: Deadlines) -> None:
    for took in (20.0, 30.0, 10.0):
        deadlines.done("load", took)
        deadlines.end_task()
    assert deadlines.limit("load") == 300


def test_no_stage_has_less_than_the_floor(deadlines: Deadlines) -> None:
    deadlines.done("token", 0.01)
    assert deadlines.limit("token") == 60


def test_a_prefill_scales_with_its_tokens(deadlines: Deadlines) -> None:
    deadlines.done("prefill", 64.0, work=64)  # a second a token
    assert deadlines.limit("prefill", 64) == 640
    assert deadlines.limit("prefill", 512) == 5120
    # the fixed cost of a very small chunk is not taken for the cost of a token
    assert deadlines.limit("prefill", 1) == 320


def test_encoding_scales_with_the_crops_of_a_frame(deadlines: Deadlines, clock: Clock) -> None:
    deadlines.done("encode", 16.0, work=2)  # 8 seconds a crop
    assert deadlines.limit("encode", 2) == 160
    deadlines.begin("encode", work=17)
    assert deadlines.left() == 1360
    clock.now += 1361
    assert deadlines.left() == -1


def test_only_the_recent_past_counts(deadlines: Deadlines) -> None:
    deadlines.done("load", 500.0)
    deadlines.end_task()
    for _ in range(20):
        deadlines.done("load", 8.0)
        deadlines.end_task()
    assert deadlines.limit("load") == 80


def test_the_clock_runs_from_begin_and_again_from_each_step(
    deadlines: Deadlines, clock: Clock
) -> None:
    assert deadlines.left() is None
    deadlines.begin("token")
    clock.now += 250
    assert deadlines.left() == 50
    deadlines.done("token", 2.0)
    assert deadlines.left() is None
    deadlines.begin("token")
    assert deadlines.left() == 60
    clock.now += 61
    assert deadlines.left() == -1
    assert deadlines.running == ("token", 61)


def test_our_own_stalls_are_given_back(deadlines: Deadlines, clock: Clock) -> None:
    deadlines.begin("prefill")
    clock.now += 400
    deadlines.excuse(350)
    assert deadlines.left() == 250


def test_a_kill_doubles_the_next_deadline_up_to_an_hour_and_success_ends_it(
    deadlines: Deadlines, clock: Clock
) -> None:
    limits = []
    for _ in range(6):
        deadlines.begin("prefill")
        clock.now += deadlines.limit("prefill") + 1
        assert "prefill took longer than" in deadlines.killed()
        limits.append(deadlines.limit("prefill"))
    assert limits == [600, 1200, 2400, 3600, 3600, 3600]
    assert deadlines.limit("token") == 300  # that stage's alone
    deadlines.done("prefill", 1.0, work=64)
    assert deadlines.limit("prefill", 64) == 60


def test_a_slow_box_may_need_more_than_an_hour(deadlines: Deadlines) -> None:
    deadlines.done("load", 600.0)
    assert deadlines.limit("load") == 6000


def test_the_past_belongs_to_a_model_and_survives_in_json(
    deadlines: Deadlines, clock: Clock
) -> None:
    deadlines.done("load", 9.0)
    deadlines.end_task()
    deadlines.begin("prefill")
    deadlines.killed()
    stored = json.loads(json.dumps(deadlines.export()))
    later = Deadlines(clock, Limits(), stored)
    later.use("other")
    assert later.limit("load") == 900
    later.use("model")
    assert later.limit("load") == 90
    assert later.limit("prefill") == 600


def test_only_some_models_are_remembered(clock: Clock) -> None:
    deadlines = Deadlines(clock)
    for n in range(MODELS + 3):
        deadlines.use(f"m{n}")
        deadlines.done("load", 1.0)
        deadlines.end_task()
    assert list(deadlines.export()) == [f"m{n}" for n in range(3, MODELS + 3)]


@pytest.mark.parametrize(
    "history",
    [
        {"model": None},
        {"model": {"load": 5}},
        {"model": {"load": {"slowest": "x", "kills": "y"}}},
        {"model": {"load": {"slowest": [None, -1, True, float("nan"), 1e300], "kills": -3}}},
        {"model": {"load": {}}},
        {3: {}},
    ],
)
def test_a_past_that_makes_no_sense_is_not_believed(
    clock: Clock, history: dict[str, object]
) -> None:
    deadlines = Deadlines(clock, Limits(), history)
    deadlines.use("model")
    assert deadlines.limit("load") == 900


def test_restarts_wait_longer_each_time_and_never_the_same(clock: Clock) -> None:
    restarts = Restarts(clock, Backoff(), random.Random(1))
    waits = [restarts.died() for _ in range(10)]
    for wait, full in zip(waits, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60], strict=True):
        assert full / 2 <= wait <= full
    assert len(set(waits)) == len(waits)


def test_work_done_starts_the_waiting_anew(clock: Clock) -> None:
    restarts = Restarts(clock, Backoff(), random.Random(1))
    for _ in range(5):
        restarts.died()
    restarts.worked()
    assert restarts.died() <= 1


def test_more_than_five_deaths_in_ten_minutes_are_too_many(clock: Clock) -> None:
    restarts = Restarts(clock, Backoff(), random.Random(1))
    said = []
    for _ in range(6):
        restarts.died()
        said.append(restarts.too_many)
        clock.now += 60
    assert said == [None] * 5 + ["the engine ended 6 times in 10 minutes"]
    clock.now += 241  # the first is more than ten minutes old
    assert restarts.too_many is None
