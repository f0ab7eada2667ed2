"""What the journal promises about jobs, finals and the outbox."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.errors import JobGone, JournalFull, JournalUnavailable
from edged.jobs import MAX_DEATHS, Job, Key, Kind, Outcome, Reply, Stamp
from edged.journal import Accepted, Journal, Known
from edged.testing import ManualClock
from tests.kit.journal import (
    accepted,
    bytes_of,
    copy_files,
    draft,
    journal,
    memory_directory,
    opened,
)

DONE = Outcome.COMPLETED


@pytest.fixture(name="home")
def _home() -> Iterator[Path]:
    with memory_directory() as home:
        yield home


@pytest.fixture(name="it")
async def _it(home: Path) -> AsyncIterator[Journal]:
    async with opened(home) as (it, _):
        yield it


async def finished(it: Journal, name: str, final: bytes = b"final", **changes: Any) -> int:
    """A job that has ended and whose final is delivered."""
    job = await accepted(it, name, **changes)
    for row in await it.finish(job.seq, final, DONE):
        await it.delivered(row)
    return job.seq


# Accepting


async def test_a_new_journal_is_empty(home: Path) -> None:
    async with opened(home) as (it, found):
        assert (found.jobs, found.ran_s, found.reset, found.pending) == ((), 0.0, None, ())
        stats = it.stats
        assert (stats.jobs, stats.ended, stats.outbox_rows, stats.trouble) == (0, 0, 0, None)


async def test_a_draft_becomes_a_job(it: Journal) -> None:
    wanted = draft("a", client=None, priority=9, deadline_s=1.5, kind=Kind.VISION)
    answer = await it.accept(wanted)
    assert isinstance(answer, Accepted)
    job = answer.job
    assert job.request == {"prompt": "hello"}
    assert (job.key, job.kind, job.priority, job.deadline_s) == (
        Key(None, "a"), Kind.VISION, 9, 1.5,
    )  # fmt: skip
    assert (job.replies, job.arrived, job.digest) == (
        (wanted.reply,), wanted.arrived, wanted.digest,
    )  # fmt: skip
    assert (job.starts, job.deaths) == (0, 0)
    assert it.stats.jobs == 1


async def test_everything_about_a_job_survives_a_restart(home: Path) -> None:
    stamp = Stamp(boot_id="b", boottime=12345.678901234567, wall=1e9 / 3, synced=True, ran=0.1)
    wanted = draft(
        "a", "ä\udc80\x00\U0001f600", client=None, arrived=stamp, kind=Kind.VISION,
        priority=0, deadline_s=0.1, reply=Reply("t/ö", bytes(range(256))),
    )  # fmt: skip
    async with opened(home) as (it, _):
        first = await it.accept(wanted)
        assert isinstance(first, Accepted)
        await it.accept(draft("b", arrived=stamp))
    async with opened(home) as (it, found):
        assert found.jobs[0] == first.job
        assert [job.key.id for job in found.jobs] == ["a", "b"]


async def test_a_name_belongs_to_its_client(it: Journal) -> None:
    first = await accepted(it, "a", client="one")
    second = await accepted(it, "a", client="two")
    third = await accepted(it, "a", client=None)
    assert len({first.seq, second.seq, third.seq}) == 3


async def test_a_known_name_changes_nothing(it: Journal) -> None:
    job = await accepted(it)
    commits = it.stats.commits
    known = Known(job.seq, job.digest, ended=False, final=None, replies=job.replies)
    for prompt in ("hello", "other"):
        assert await it.accept(draft("a", prompt, reply=Reply("elsewhere"))) == known
    assert known.digest != draft("a", "other").digest
    assert it.stats.jobs == 1
    assert it.stats.commits == commits  # a duplicate does not wear the card


async def test_a_known_ended_job_has_its_final(it: Journal) -> None:
    seq = await finished(it, "a", b"the final")
    answer = await it.accept(draft("a"))
    assert isinstance(answer, Known)
    assert (answer.seq, answer.ended, answer.final) == (seq, True, b"the final")
    assert await it.find(Key("c", "a")) == answer
    assert await it.find(Key("c", "z")) is None
    assert await it.find(Key(None, "a")) is None


async def test_a_request_that_is_no_json_is_the_callers_mistake(it: Journal) -> None:
    wrong = draft("a")
    wrong.request["prompt"] = object()
    with pytest.raises(TypeError):
        it.accept(wrong)


# Starts and deaths


async def test_starts_are_counted_and_survive(home: Path) -> None:
    async with opened(home) as (it, _):
        seq = (await accepted(it)).seq
        assert await it.start(seq) == 1
        await it.release(seq)
        assert await it.start(seq) == 2
        assert await it.died(seq, "signal") == 1
        assert await it.start(seq) == 3
        await it.release(seq)
    async with opened(home) as (_, found):
        assert [(job.starts, job.deaths) for job in found.jobs] == [(3, 1)]


async def test_only_a_job_found_running_has_died_with_the_daemon(home: Path) -> None:
    async with opened(home) as (it, _):
        running, waiting, released = [(await accepted(it, name)).seq for name in "abc"]
        await it.start(running)
        await it.start(released)
        await it.release(released)
    for deaths in range(1, MAX_DEATHS + 1):
        async with opened(home) as (it, found):
            assert {job.seq: job.deaths for job in found.jobs} == {
                running: deaths, waiting: 0, released: 0,
            }  # fmt: skip
            await it.start(running)


async def test_numbers_the_journal_does_not_have(it: Journal) -> None:
    for call in (
        it.start(7), it.release(7), it.died(7, "oom"), it.finish(7, b"", DONE),
        it.replace_final(7, b"", DONE), it.add_reply(7, Reply("t")),
    ):  # fmt: skip
        with pytest.raises(JobGone):
            await call
    assert await it.outgoing(7) is None
    await it.delivered(7)


async def test_an_ended_job_does_not_start_again(it: Journal) -> None:
    seq = await finished(it, "a")
    with pytest.raises(JobGone):
        await it.start(seq)
    await it.release(seq)
    assert await it.died(seq, "signal") == 0
    known = await it.find(Key("c", "a"))
    assert known is not None
    assert known.ended


# Finals and the outbox


async def test_a_final_goes_to_every_reply_topic(it: Journal) -> None:
    job = await accepted(it, reply=Reply("one", b"1"))
    assert await it.add_reply(job.seq, Reply("two", b"2")) == ()
    assert await it.add_reply(job.seq, Reply("one", b"new")) == ()
    rows = await it.finish(job.seq, b"final", DONE)
    sent = [await it.outgoing(row) for row in rows]
    assert [(s.topic, s.correlation, s.payload, s.key, s.seq) for s in sent if s] == [
        ("two", b"2", b"final", job.key, job.seq),
        ("one", b"new", b"final", job.key, job.seq),
    ]
    assert not any(s.replaced for s in sent if s)
    assert it.stats.outbox_rows == 2


async def test_a_job_ends_once(it: Journal) -> None:
    job = await accepted(it)
    (row,) = await it.finish(job.seq, b"first", DONE)
    assert await it.finish(job.seq, b"second", Outcome.FAILED) == ()
    sent = await it.outgoing(row)
    assert sent is not None
    assert sent.payload == b"first"
    assert (it.stats.jobs, it.stats.ended, it.stats.outbox_rows) == (0, 1, 1)


async def test_pending_rows_survive_until_delivered(home: Path) -> None:
    async with opened(home) as (it, _):
        (first,) = await it.finish((await accepted(it, "a")).seq, b"1", DONE)
        (second,) = await it.finish((await accepted(it, "b")).seq, b"2", DONE)
    async with opened(home) as (it, found):
        assert found.pending == (first, second)
        assert found.jobs == ()
        await it.delivered(first)
        assert await it.outgoing(first) is None
        await it.delivered(first)
        assert it.stats.outbox_rows == 1
    async with opened(home) as (_, found):
        assert found.pending == (second,)


async def test_a_final_is_sent_again_to_whoever_asks_again(it: Journal) -> None:
    seq = await finished(it, "a", b"final", reply=Reply("one"))
    (again,) = await it.add_reply(seq, Reply("one", b"c"))
    (other,) = await it.add_reply(seq, Reply("two"))
    assert len({again, other}) == 2
    for row, topic, correlation in ((again, "one", b"c"), (other, "two", None)):
        sent = await it.outgoing(row)
        assert sent is not None
        assert (sent.topic, sent.correlation, sent.payload) == (topic, correlation, b"final")


async def test_asking_again_and_again_does_not_fill_the_outbox(it: Journal) -> None:
    job = await accepted(it, reply=Reply("one"))
    (old,) = await it.finish(job.seq, b"final", DONE)
    for n in range(5):
        (fresh,) = await it.add_reply(job.seq, Reply("one", b"%d" % n))
        assert await it.outgoing(old) is None
        await it.delivered(old)  # a late answer of the broker does not take the fresh one out
        assert it.stats.outbox_rows == 1
        old = fresh
    sent = await it.outgoing(old)
    assert sent is not None
    assert sent.correlation == b"4"


async def test_a_final_is_replaced_once(it: Journal) -> None:
    job = await accepted(it, reply=Reply("one"))
    await it.add_reply(job.seq, Reply("two"))
    old = await it.finish(job.seq, b"too large", DONE)
    fresh = await it.replace_final(job.seq, b"error", Outcome.FAILED)
    assert not set(fresh) & set(old)
    assert [await it.outgoing(row) for row in old] == [None, None]
    sent = [await it.outgoing(row) for row in fresh]
    assert [(s.topic, s.payload, s.replaced) for s in sent if s] == [
        ("one", b"error", True), ("two", b"error", True),
    ]  # fmt: skip
    assert await it.replace_final(job.seq, b"another", Outcome.FAILED) == ()
    known = await it.find(job.key)
    assert known is not None
    assert known.final == b"error"


async def test_whoever_has_the_final_gets_no_other(it: Journal) -> None:
    job = await accepted(it, reply=Reply("one"))
    await it.add_reply(job.seq, Reply("two"))
    first, _second = await it.finish(job.seq, b"large", DONE)
    await it.delivered(first)
    (row,) = await it.replace_final(job.seq, b"error", Outcome.FAILED)
    sent = await it.outgoing(row)
    assert sent is not None
    assert sent.topic == "two"


async def test_a_replaced_final_goes_to_all_if_none_waits(it: Journal) -> None:
    seq = await finished(it, "a", reply=Reply("one"))
    assert len(await it.replace_final(seq, b"error", Outcome.FAILED)) == 1


async def test_an_open_job_has_no_final_to_replace(it: Journal) -> None:
    seq = (await accepted(it)).seq
    with pytest.raises(JobGone):
        await it.replace_final(seq, b"error", Outcome.FAILED)


# The window


async def test_finals_are_kept_up_to_a_number(home: Path) -> None:
    async with opened(home, results=3) as (it, _):
        for n in range(10):
            await finished(it, f"j{n}")
            assert it.stats.ended <= 3
        kept = [n for n in range(10) if await it.find(Key("c", f"j{n}"))]
        assert kept == [7, 8, 9]


async def test_a_final_that_waits_is_not_forgotten(home: Path) -> None:
    async with opened(home, results=1, results_s=10.0) as (it, _):
        rows: list[int] = []
        for n in range(4):
            rows += await it.finish((await accepted(it, f"j{n}")).seq, b"x", DONE)
        assert it.stats.ended == 4
        await it.delivered(rows[2])
        assert [n for n in range(4) if await it.find(Key("c", f"j{n}"))] == [0, 1, 2, 3]
        await it.delivered(rows[1])  # one too many is delivered; the first of those goes
        assert [n for n in range(4) if await it.find(Key("c", f"j{n}"))] == [0, 2, 3]
        for row in rows:
            await it.delivered(row)
        assert it.stats.ended == 1
        assert await it.find(Key("c", "j3"))


async def test_finals_are_kept_for_a_time_that_edged_ran(home: Path) -> None:
    clock = ManualClock()
    async with opened(home, clock=clock, results_s=100.0) as (it, _):
        await finished(it, "old")
        clock.advance(60)
        await finished(it, "young")
        clock.advance(39)
        await finished(it, "x")
        assert await it.find(Key("c", "old"))
        clock.advance(2)
        await finished(it, "y")
        assert await it.find(Key("c", "old")) is None
        assert await it.find(Key("c", "young"))


async def test_a_number_is_not_used_twice(home: Path) -> None:
    seen = []
    for n in range(4):
        async with opened(home, results=1) as (it, _):
            seen.append(await finished(it, f"a{n}"))
            seen.append(await finished(it, f"b{n}"))
    assert len(set(seen)) == 8


# Running time


async def test_running_time_adds_up_over_starts(home: Path) -> None:
    clock = ManualClock()
    for start in range(3):
        async with opened(home, clock=clock) as (_, found):
            assert found.ran_s == pytest.approx(100.0 * start)
            assert clock.stamp().ran == pytest.approx(100.0 * start)
            clock.advance(100)
        clock.reboot(off_s=1e6, wall=0.0)


async def test_running_time_is_stored_with_every_commit(home: Path) -> None:
    clock = ManualClock()
    async with opened(home, clock=clock) as (it, _):
        clock.advance(50)
        await it.put("x", {})
        clock.advance(7)  # lost: nothing is written before the crash
        copied = copy_files(home, home / "copy")
        other = ManualClock()
        async with opened(copied, clock=other) as (_, found):
            assert found.ran_s == pytest.approx(50.0)
            assert other.stamp().ran == pytest.approx(50.0)


# Small facts


async def test_facts_are_kept(home: Path) -> None:
    async with opened(home) as (it, _):
        assert await it.get("speed") is None
        await it.put("speed", {"a": 1})
        await it.put("speed", {"b": [1.5, "ä"]})
    async with opened(home) as (it, _):
        assert await it.get("speed") == {"b": [1.5, "ä"]}
    with contextlib.closing(sqlite3.connect(home / "journal.db", isolation_level=None)) as db:
        db.execute("UPDATE fact SET value = '{'")
    async with opened(home) as (it, _):
        assert await it.get("speed") is None


# Privacy

SECRET = "a secret of 31 characters, no less"


@pytest.mark.parametrize("size", [1, 40, 400, 40_000], ids=lambda n: f"{n * 34}B")
async def test_a_request_is_gone_when_its_job_has_ended(home: Path, size: int) -> None:
    async with opened(home) as (it, _):
        jobs = [await accepted(it, f"j{n}", f"{n} {SECRET * size}") for n in range(5)]
        assert SECRET.encode() in bytes_of(home)
        for job in jobs[::2] + jobs[1::2]:
            await it.finish(job.seq, b"the answer", DONE)
        await it.checkpoint()
        left = bytes_of(home)
        assert SECRET.encode() not in left
        assert b"the answer" in left
    assert SECRET.encode() not in bytes_of(home)


async def test_an_evicted_final_is_gone(home: Path) -> None:
    async with opened(home, results=1) as (it, _):
        await finished(it, "a", SECRET.encode() * 1000)
        await finished(it, "b", b"short")
        await it.checkpoint()
        assert SECRET.encode() not in bytes_of(home)


async def test_neighbours_do_not_keep_what_is_erased(home: Path) -> None:
    """Rows move between pages when tables grow and shrink; no copy may stay behind."""
    async with opened(home, results=20) as (it, _):
        waiting = {}
        for n in range(400):
            token = f"TOKEN{n:05d}" * (1 + n * 37 % 300)
            waiting[(await accepted(it, f"j{n}", token)).seq] = f"TOKEN{n:05d}"
            if n % 3:
                victim = sorted(waiting)[n * 7 % len(waiting)]
                for row in await it.finish(victim, b"f" * (n * 53 % 5000), DONE):
                    await it.delivered(row)
                del waiting[victim]
        await it.checkpoint()
        left = bytes_of(home)
    for n in range(400):
        token = f"TOKEN{n:05d}"
        assert (token.encode() in left) == (token in waiting.values()), token


# The quota


async def test_finals_have_room_kept_for_them(home: Path) -> None:
    """The quota is filled with jobs; all of them can still store the largest final."""
    final = 64 * 1024
    limits = {"quota_bytes": 4 * 1024 * 1024, "max_final_bytes": final}
    async with opened(home, **limits) as (it, _):
        jobs: list[Job] = []

        async def fill() -> None:
            for n in range(1000):
                jobs.append(await accepted(it, f"j{n}", "x" * (n * 997 % 20_000)))  # noqa: PERF401

        with pytest.raises(JournalFull) as caught:
            await fill()
        assert "limits.journal_mb" in (caught.value.hint or "")
        assert len(jobs) > 20
        assert it.stats.trouble is not None
        with pytest.raises(JournalFull):
            await it.accept(draft("one more", "x" * 10_000))
        for job in jobs:
            assert await it.start(job.seq) == 1
            assert len(await it.finish(job.seq, b"y" * final, DONE)) == 1
        assert it.stats.used_bytes <= limits["quota_bytes"]
        assert (home / "journal.db").stat().st_size <= limits["quota_bytes"]


async def test_delivered_finals_give_way_to_new_jobs(home: Path) -> None:
    async with opened(home, quota_bytes=1024 * 1024, results=200) as (it, _):
        for n in range(300):
            await finished(it, f"j{n}", b"y" * 8 * 1024)
        assert it.stats.trouble is None
        assert 50 < it.stats.ended < 200  # the quota is the tighter limit
        assert await it.find(Key("c", "j299"))
        assert (home / "journal.db").stat().st_size <= 1024 * 1024


async def test_undelivered_finals_do_not(home: Path) -> None:
    async with opened(home, quota_bytes=1024 * 1024) as (it, _):
        rows: list[int] = []

        async def fill() -> None:
            for n in range(300):
                rows.extend(await it.finish((await accepted(it, f"j{n}")).seq, b"y" * 8192, DONE))

        with pytest.raises(JournalFull):
            await fill()
        assert len(rows) > 50
        assert [await it.outgoing(row) for row in rows].count(None) == 0
        for row in rows:
            await it.delivered(row)
        await accepted(it, "again")
        assert it.stats.trouble is None


async def test_a_request_too_large_for_the_quota_evicts_nobody(home: Path) -> None:
    async with opened(home, quota_bytes=1024 * 1024) as (it, _):
        await finished(it, "kept")
        with pytest.raises(JournalFull):
            await it.accept(draft("huge", "x" * 2_000_000))
        assert await it.find(Key("c", "kept"))
        await accepted(it, "small")


async def test_a_final_larger_than_announced_takes_the_room_of_old_ones(home: Path) -> None:
    async with opened(home, quota_bytes=1024 * 1024) as (it, _):
        for n in range(80):
            await finished(it, f"j{n}", b"y" * 8 * 1024)
        before = it.stats.ended
        job = await accepted(it, "long")
        (row,) = await it.finish(job.seq, b"z" * 500_000, DONE)
        assert await it.outgoing(row) is not None
        assert it.stats.ended < before
        with pytest.raises(JournalFull):
            await it.finish((await accepted(it, "longer")).seq, b"z" * 900_000, DONE)
        await finished(it, "next")


async def test_facts_take_no_room_from_finals(home: Path) -> None:
    async with opened(home, quota_bytes=256 * 1024) as (it, _):
        await it.put("a", {"x": "y" * 1000})
        with pytest.raises(JournalFull):
            await it.put("b", {"x": "y" * 1_000_000})
        assert await it.get("b") is None
        assert await it.get("a") is not None


async def test_the_counts_are_right_after_everything(home: Path) -> None:
    async with opened(home, results=5, quota_bytes=1024 * 1024) as (it, _):
        for n in range(20):
            seq = await finished(it, f"j{n}", b"f" * n * 1000)
            if n % 2:
                await it.add_reply(seq, Reply(f"t{n}"))
        jobs = [await accepted(it, f"k{n}", "x" * 6000) for n in range(10)]
        for _ in range(3):
            with pytest.raises(JournalFull):
                await it.finish(jobs[0].seq, b"z" * 2_000_000, DONE)
        live = it.stats
    async with opened(home, results=5, quota_bytes=1024 * 1024) as (again, _):
        stats = again.stats
        assert (stats.jobs, stats.ended, stats.outbox_rows) == (
            live.jobs, live.ended, live.outbox_rows,
        )  # fmt: skip
        assert stats.jobs == 10


# Life


async def test_a_journal_that_is_not_open(home: Path) -> None:
    it = journal(home)
    with pytest.raises(JournalUnavailable):
        await it.accept(draft())
    await it.close()
    await it.open()
    with pytest.raises(RuntimeError):
        await it.open()
    await it.close()
    await it.close()
    with pytest.raises(JournalUnavailable):
        await it.get("x")
    assert it.stats.trouble == "the journal is not open"
    assert it.stuck_s() == 0.0


async def test_it_opens_again_after_it_was_closed(home: Path) -> None:
    it = journal(home)
    await it.open()
    await accepted(it)
    await it.close()
    found = await it.open()
    assert len(found.jobs) == 1
    await it.close()


async def test_close_does_what_waits(home: Path) -> None:
    it = journal(home)
    await it.open()
    futures = [it.accept(draft(f"j{n}")) for n in range(50)]
    await it.close()
    assert all(isinstance(future.result(), Accepted) for future in futures)


async def test_results_come_in_the_order_of_the_calls(it: Journal) -> None:
    order: list[asyncio.Future[Any]] = []
    futures: list[asyncio.Future[Any]] = []
    for n in range(200):
        name = f"j{n}"
        futures.append(it.accept(draft(name)) if n % 3 else it.find(Key("c", name)))
        futures[-1].add_done_callback(order.append)
    await asyncio.gather(*futures)
    assert order == futures
    assert it.stats.commits < 50


async def test_a_caller_that_is_cancelled_is_no_trouble(it: Journal) -> None:
    task = asyncio.create_task(it.put("x", {"y": 1}))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await it.get("x") == {"y": 1}
