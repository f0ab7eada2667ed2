"""The queue: bounded, by priority, fair, honest about places and deadlines."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import Code, Refused
from edged.jobs import Job, Key, Kind, Reply, Stamp
from edged.metrics import Speed
from edged.ports import Answer, Completed, Timings, Usage
from edged.scheduler import Scheduler

T0 = Stamp(boot_id="b", boottime=100.0, wall=0.0, synced=False, ran=0.0)


def at(seconds: float) -> Stamp:
    return replace(T0, boottime=T0.boottime + seconds)


def job(
    seq: int, client: str | None = None, priority: int = 5, deadline_s: float | None = None
) -> Job:
    return Job(
        seq=seq, key=Key(client, f"j{seq}"), kind=Kind.TEXT, request={"prompt": "x" * 40},
        digest=b"", replies=(Reply("t"),), priority=priority, arrived=T0, deadline_s=deadline_s,
    )  # fmt: skip


def queue(*jobs: Job, limit: int = 100) -> Scheduler:
    scheduler = Scheduler(limit, Speed())
    for each in jobs:
        scheduler.reserve(each.key.client)
        scheduler.admit(each)
    return scheduler


def drain(scheduler: Scheduler, cost_s: float = 1.0) -> list[int]:
    order = []
    while (taken := scheduler.take()) is not None:
        order.append(taken.seq)
        scheduler.done(taken, cost_s)
    return order


def test_oldest_first_within_a_client() -> None:
    assert drain(queue(job(1), job(2), job(3))) == [1, 2, 3]


def test_higher_priority_first_whoever_asks() -> None:
    scheduler = queue(job(1, "a", 5), job(2, "a", 9), job(3, "b", 0), job(4, "b", 9))
    assert drain(scheduler) == [2, 4, 1, 3]


def test_a_box_in_trouble_lets_half_as_many_wait() -> None:
    trouble: str | None = None
    scheduler = Scheduler(5, Speed(), lambda: trouble)
    scheduler.reserve("a")
    scheduler.reserve("b")
    trouble = "the box is hot: 90 °C"
    with pytest.raises(Refused, match="takes 2 now, because the box is hot: 90 °C") as caught:
        scheduler.reserve("c")
    assert caught.value.code is Code.QUEUE_FULL
    scheduler.give_up("b")
    scheduler.reserve("c")
    trouble = None
    for _ in range(3):
        scheduler.reserve("d")


def test_a_box_in_trouble_takes_one_job_at_least() -> None:
    scheduler = Scheduler(1, Speed(), lambda: "it is hot")
    scheduler.reserve(None)
    with pytest.raises(Refused):
        scheduler.reserve(None)


def test_a_chatty_client_does_not_starve_others() -> None:
    scheduler = queue(*(job(n, "chatty") for n in range(1, 21)), job(21, "quiet"), job(22, "quiet"))
    order = drain(scheduler)
    assert order.index(21) <= 1
    assert order.index(22) <= 3


def test_fairness_counts_engine_time_not_jobs() -> None:
    scheduler = queue(
        *(job(n, "long") for n in (1, 2, 3)), *(job(n, "short") for n in (4, 5, 6, 7))
    )
    order = []
    while (taken := scheduler.take()) is not None:
        order.append(taken.seq)
        scheduler.done(taken, 3.0 if taken.key.client == "long" else 1.0)
    assert order == [1, 4, 5, 6, 2, 7, 3]


def test_a_client_that_comes_back_has_saved_up_nothing() -> None:
    scheduler = queue(*(job(n, "steady") for n in range(1, 9)))
    for _ in range(4):
        taken = scheduler.take()
        assert taken is not None
        scheduler.done(taken, 10.0)
    for n in range(11, 15):
        scheduler.reserve("back")
        scheduler.admit(job(n, "back"))
    order = drain(scheduler, 10.0)
    assert order[:4] in ([5, 11, 6, 12], [11, 5, 12, 6])


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    scheduler = queue(job(1), job(2), limit=2)
    with pytest.raises(Refused) as caught:
        scheduler.reserve(None)
    assert caught.value.code is Code.QUEUE_FULL
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s > 0


def test_the_running_job_takes_no_place() -> None:
    scheduler = queue(job(1), job(2), limit=2)
    scheduler.take()
    scheduler.reserve(None)
    with pytest.raises(Refused):
        scheduler.reserve(None)


def test_a_few_places_are_kept_for_clients_with_few_jobs() -> None:
    scheduler = queue(*(job(n, "chatty") for n in range(1, 15)), limit=16)
    with pytest.raises(Refused):
        scheduler.reserve("chatty")
    scheduler.reserve("quiet")
    scheduler.reserve("quiet")
    with pytest.raises(Refused):
        scheduler.reserve("quiet")


def test_a_place_that_was_given_up_is_free_again() -> None:
    scheduler = Scheduler(1, Speed())
    scheduler.reserve("a")
    scheduler.give_up("a")
    scheduler.reserve("b")
    assert scheduler.depth == 0


def test_a_job_put_back_keeps_its_place_and_ignores_the_limit() -> None:
    scheduler = queue(job(1), job(2), limit=2)
    first = scheduler.take()
    assert first is not None
    scheduler.reserve(None)
    scheduler.admit(job(3))
    scheduler.requeue(first)
    assert scheduler.running is None
    assert drain(scheduler) == [1, 2, 3]


def test_places_count_the_running_job_and_what_is_ahead() -> None:
    scheduler = queue(*(job(n) for n in (1, 2, 3)))
    assert scheduler.place(job(3))[0] == 2
    first = scheduler.take()
    assert first is not None
    assert scheduler.place(first)[0] == 0
    assert scheduler.place(job(3))[0] == 2
    scheduler.reserve("b")
    scheduler.admit(job(4, "b", priority=9))
    assert scheduler.place(job(4, "b", priority=9))[0] == 1
    assert scheduler.place(job(3))[0] == 3


def test_eta_is_unknown_until_something_was_measured_and_then_grows_with_the_line() -> None:
    speed = Speed()
    scheduler = Scheduler(10, speed)
    for n in (1, 2, 3):
        scheduler.reserve(None)
        scheduler.admit(job(n))
    assert scheduler.place(job(3))[1] is None
    usage = Usage(prompt_tokens=10, completion_tokens=20)
    speed.learn(
        job(9),
        Completed(
            answers=(Answer(text="", finish_reason="stop", usage=usage),),
            timings=Timings(prefill_ms=1000, generate_ms=2000, ttft_ms=1000, tokens_per_second=10),
        ),
    )
    first, third = scheduler.place(job(1))[1], scheduler.place(job(3))[1]
    assert first == pytest.approx(3.0)
    assert third == pytest.approx(9.0)


def test_deadlines_of_waiting_and_running_jobs() -> None:
    scheduler = queue(job(1, deadline_s=5), job(2, deadline_s=2), job(3))
    assert scheduler.next_deadline_s(at(1)) == pytest.approx(1.0)
    assert scheduler.expired(at(1)) == []
    running = scheduler.take()
    assert running is not None
    assert running.seq == 1
    assert [each.seq for each in scheduler.expired(at(3))] == [2]
    assert {each.seq for each in scheduler.expired(at(6))} == {1, 2}
    scheduler.done(running)
    scheduler.done(job(2, deadline_s=2))
    assert scheduler.expired(at(9)) == []
    assert scheduler.next_deadline_s(at(9)) is None


async def test_waiting_ends_when_a_job_comes() -> None:
    scheduler = Scheduler(1, Speed())
    scheduler.reserve(None)
    scheduler.admit(job(1))
    await scheduler.wait()
    assert scheduler.depth == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "take", "done", "requeue", "end"]),
            st.sampled_from(["a", "b", None]),
            st.integers(0, 9),
        ),
        max_size=60,
    )
)
def test_no_job_is_lost_or_doubled_whatever_happens(
    steps: list[tuple[str, str | None, int]],
) -> None:
    scheduler = Scheduler(8, Speed())
    waiting: dict[int, Job] = {}
    running: Job | None = None
    for seq, (step, client, priority) in enumerate(steps):
        if step == "reserve":
            try:
                scheduler.reserve(client)
            except Refused:
                assert len(waiting) >= 7
                continue
            waiting[seq] = job(seq, client, priority)
            scheduler.admit(waiting[seq])
        elif step == "take" and running is None:
            running = scheduler.take()
            assert (running is None) == (not waiting)
            if running is not None:
                assert running.priority == max(each.priority for each in waiting.values())
                del waiting[running.seq]
        elif step == "done" and running is not None:
            scheduler.done(running, 1.0)
            running = None
        elif step == "requeue" and running is not None:
            scheduler.requeue(running)
            waiting[running.seq] = running
            running = None
        elif step == "end" and waiting:
            scheduler.done(waiting.pop(min(waiting)))
        assert scheduler.depth == len(waiting) == len(list(scheduler.waiting))
        assert scheduler.running == running
    assert sorted(drain_from(scheduler, running)) == sorted(waiting)


def drain_from(scheduler: Scheduler, running: Job | None) -> list[int]:
    if running is not None:
        scheduler.done(running)
    return drain(scheduler)
