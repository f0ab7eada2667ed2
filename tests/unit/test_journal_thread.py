"""The journal's thread: groups, isolates, tidies up, and outlives what goes wrong under it."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edged import journal_thread
from edged.errors import JobGone, JournalFull, JournalTooNew, JournalUnavailable
from edged.jobs import Key, Outcome, Reply
from edged.journal import Accepted, Journal
from edged.journal_schema import MIGRATIONS, Damaged
from edged.journal_store import Store
from edged.testing import ManualClock
from tests.kit.journal import (
    NAME,
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


class Gate:
    """A trace that holds the journal's thread, inside its first transaction, until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, label: str) -> None:
        if label == "in_accept_txn":
            self.reached.set()
            assert self.open.wait(30)


@asynccontextmanager
async def held(home: Path, **changes: Any) -> AsyncIterator[tuple[Journal, Gate]]:
    """A journal whose thread is held, so that what is called now waits and forms one batch."""
    gate = Gate()
    async with opened(home, trace=gate, **changes) as (it, _):
        first = it.accept(draft("held"))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        try:
            yield it, gate
        finally:
            gate.open.set()
        await first


def wal_size(home: Path) -> int:
    return (home / f"{NAME}-wal").stat().st_size


def run(it: Journal, function: Callable[[Store], Any], **options: Any) -> asyncio.Future[Any]:
    """Run a function as an operation of the journal's thread."""
    return it._thread.submit(function, **options)


def failing(code: int) -> Callable[[Store], None]:
    def fail(_store: Store) -> None:
        error = sqlite3.OperationalError("what SQLite said")
        error.sqlite_errorcode = code
        error.sqlite_errorname = "SQLITE_SOMETHING"
        raise error

    return fail


# Groups


async def test_what_waits_is_one_transaction(home: Path) -> None:
    async with held(home) as (it, gate):
        commits = it.stats.commits
        futures = [it.accept(draft(f"j{n}")) for n in range(100)]
        gate.open.set()
        await asyncio.gather(*futures)
        assert it.stats.commits == commits + 2  # the first one, and the hundred


async def test_a_batch_is_bounded(home: Path) -> None:
    async with held(home) as (it, gate):
        commits = it.stats.commits
        large = [it.accept(draft(f"l{n}", "x" * 3_000_000)) for n in range(5)]
        many = [it.accept(draft(f"j{n}")) for n in range(600)]
        gate.open.set()
        await asyncio.gather(*large, *many)
        # The one held; 9 MB; 6 MB and 254 small ones; 256; 90.
        assert it.stats.commits == commits + 5


async def test_only_the_guilty_fails(home: Path) -> None:
    async with held(home, quota_bytes=1 << 20) as (it, gate):
        calls = [it.accept(draft(f"a{n}")) for n in range(3)]
        too_large_a_number = it.accept(draft("b", priority=2**70))
        gone = asyncio.ensure_future(it.start(4711))
        await asyncio.sleep(0)
        unforeseen = run(it, lambda _store: 1 // 0)
        full = asyncio.ensure_future(it.put("f", {"x": "y" * 2_000_000}))
        await asyncio.sleep(0)
        damaged_disk = run(it, failing(sqlite3.SQLITE_IOERR_FSYNC), must_fit=False)
        calls += [it.accept(draft(f"c{n}")) for n in range(3)]
        gate.open.set()
        with pytest.raises(OverflowError):
            await too_large_a_number
        with pytest.raises(JobGone):
            await gone
        with pytest.raises(ZeroDivisionError):
            await unforeseen
        with pytest.raises(JournalFull):
            await full
        with pytest.raises(JournalFull):
            await damaged_disk
        answers = await asyncio.gather(*calls)
        assert all(isinstance(answer, Accepted) for answer in answers)
        assert it.stats.jobs == 7
        assert it.stats.trouble is None


async def test_a_refusal_does_not_undo_the_others(home: Path) -> None:
    async with held(home) as (it, gate):
        commits = it.stats.commits
        calls: list[Any] = [it.accept(draft("a")), asyncio.ensure_future(it.start(4711))]
        await asyncio.sleep(0)
        calls.append(it.accept(draft("b")))
        gate.open.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [Accepted, JobGone, Accepted]
        assert it.stats.commits == commits + 2


async def test_a_transaction_that_fails_leaves_nothing(home: Path) -> None:
    async with opened(home) as (it, _):
        job = await accepted(it, reply=Reply("t"))

        def half(store: Store) -> None:
            store.finish(job.seq, b"final", DONE)
            failing(sqlite3.SQLITE_IOERR_WRITE)(store)

        with pytest.raises(JournalFull):
            await run(it, half)
        assert (it.stats.jobs, it.stats.ended, it.stats.outbox_rows) == (1, 0, 0)
        assert it.stats.trouble is not None
        assert len(await it.finish(job.seq, b"final", DONE)) == 1
        assert it.stats.trouble is None


async def test_the_labels_of_the_steps(home: Path) -> None:
    seen: list[str] = []
    async with opened(home, trace=seen.append) as (it, _):
        job = await accepted(it)
        await it.start(job.seq)
        (row,) = await it.finish(job.seq, b"f", DONE)
        await it.outgoing(row)
        await it.delivered(row)
        with pytest.raises(JobGone):
            await it.start(job.seq)
    assert seen == [
        "in_accept_txn", "after_accept_commit", "after_attempt_mark", "in_result_txn",
        "after_result_commit", "after_sent_mark",
    ]  # fmt: skip


# Progress


async def test_stuck_is_counted_from_the_last_return(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(journal_thread, "time", SimpleNamespace(monotonic=lambda: now))
    async with held(home) as (it, gate):
        assert it.stuck_s() == 0.0
        now += 5
        waiting = it.accept(draft("b"))
        assert it.stuck_s() == 5.0
        now += 2
        assert it.stuck_s() == 7.0
        gate.open.set()
        await waiting
        await it.get("x")
        await it.checkpoint()
    assert it.stuck_s() == 0.0
    it._thread._queue.append(SimpleNamespace(submitted=900.0))  # type: ignore[arg-type]
    it._thread._returned_at = 1006.0
    assert it.stuck_s() == 1.0  # it waits for long, but the thread came back a second ago
    it._thread._queue.clear()


async def test_the_loop_is_not_blocked_while_the_thread_is(home: Path) -> None:
    async with held(home) as (it, gate):
        calls = [it.accept(draft(f"j{n}")) for n in range(10)]
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not any(call.done() for call in calls)
        assert it.stats.jobs == 0
        gate.open.set()
        await asyncio.gather(*calls)


# Tidying up


async def test_an_idle_journal_erases(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    erased = threading.Event()
    checkpoint = Store.checkpoint

    def noted(store: Store) -> None:
        checkpoint(store)
        erased.set()

    monkeypatch.setattr(Store, "checkpoint", noted)
    monkeypatch.setattr(journal_thread, "IDLE_S", 0.01)
    async with opened(home) as (it, _):
        job = await accepted(it, "a", "a secret")
        assert not erased.is_set()
        await it.finish(job.seq, b"f", DONE)
        assert await asyncio.to_thread(erased.wait, 30)
        assert b"a secret" not in bytes_of(home)
        assert wal_size(home) == 0


async def test_a_busy_journal_erases_in_the_end(home: Path) -> None:
    clock = ManualClock()
    async with opened(home, clock=clock) as (it, _):
        job = await accepted(it, "a", "a secret")
        await it.finish(job.seq, b"f", DONE)
        await it.get("x")
        assert b"a secret" in bytes_of(home)
        clock.advance(journal_thread.ERASE_S)
        await it.get("x")
        await it.get("x")  # the tidying up comes after the answer
        assert b"a secret" not in bytes_of(home)


async def test_the_log_stays_short(home: Path) -> None:
    async with opened(home) as (it, _):
        for n in range(40):
            await accepted(it, f"j{n}", "x" * 100_000)
            await it.get("x")
            assert wal_size(home) <= journal_thread.WAL_BYTES + 200_000


async def test_running_time_is_stored_while_a_long_job_runs(home: Path) -> None:
    clock = ManualClock()

    async def stored() -> float:
        copied = copy_files(home, home / f"{clock.monotonic()}")
        async with opened(copied) as (_, found):
            return found.ran_s

    async with opened(home, clock=clock) as (it, _):
        await accepted(it)
        before = it.stats.commits
        for seconds, expected in ((59.0, 0.0), (1.0, 60.0), (10.0, 60.0)):
            clock.advance(seconds)
            await run(it, lambda _s: it._thread._tend(idle=True), writes=False, apart=True)
            assert await stored() == expected
        assert it.stats.commits == before + 1
        assert it._thread._patience() == journal_thread.RAN_S


async def test_nobody_is_woken_for_nothing(home: Path) -> None:
    async with opened(home) as (it, _):
        assert it._thread._patience() is None
        job = await accepted(it)
        await it.finish(job.seq, b"f", DONE)
        assert it._thread._patience() == journal_thread.IDLE_S
        await it.checkpoint()
        assert it._thread._patience() is None


async def test_a_checkpoint_that_fails_is_said_and_made_up_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(home) as (it, _):
        job = await accepted(it)
        await it.finish(job.seq, b"f", DONE)

        async def tend() -> str | None:
            await run(it, lambda _s: it._thread._tend(idle=True), writes=False, apart=True)
            return it.stats.trouble

        with monkeypatch.context() as patch:
            patch.setattr(Store, "checkpoint", failing(sqlite3.SQLITE_FULL))
            assert "SQLITE_SOMETHING" in (await tend() or "")
            assert (it.stats.jobs, it.stats.ended) == (0, 1)
            await accepted(it, "b")
        assert await tend() is None
        assert wal_size(home) == 0


@pytest.mark.parametrize(
    "broken", [failing(sqlite3.SQLITE_CORRUPT), lambda _store: 1 // 0], ids=["damage", "unforeseen"]
)
async def test_what_goes_wrong_while_tidying_up(
    home: Path, monkeypatch: pytest.MonkeyPatch, broken: Callable[[Store], None]
) -> None:
    async with opened(home) as (it, _):
        await it.finish((await accepted(it)).seq, b"f", DONE)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "checkpoint", broken)
            await run(it, lambda _s: it._thread._tend(idle=True), writes=False, apart=True)
            trouble = it.stats.trouble
            assert trouble
        await accepted(it, "b")
        assert it.stats.trouble is None


# Damage while it runs


def _seen(_store: Store) -> None:
    raise Damaged("what was seen")


def _garbage(_store: Store) -> None:
    b"what was seen\xff".decode()


@pytest.mark.parametrize("fail", [_seen, _garbage, failing(sqlite3.SQLITE_CORRUPT)])
async def test_what_only_looked_like_damage(home: Path, fail: Callable[[Store], None]) -> None:
    """The journal is opened anew; nothing is lost, and nobody has died."""
    async with opened(home) as (it, _):
        running = await accepted(it, "a")
        await it.start(running.seq)
        with pytest.raises(JournalUnavailable, match="damaged"):
            await run(it, fail)
        assert await it.start(running.seq) == 2
        assert it.stats.reset is None
        assert await it.died(running.seq, "signal") == 1
        assert (it.stats.jobs, it.stats.trouble) == (1, None)


async def test_damage_fails_the_batch_it_is_found_in(home: Path) -> None:
    async with held(home) as (it, gate):
        calls: list[Any] = [it.accept(draft("a")), run(it, failing(sqlite3.SQLITE_CORRUPT))]
        calls.append(it.accept(draft("b")))
        gate.open.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [JournalUnavailable] * 3
        assert it.stats.jobs == 1
        assert it.stats.trouble
        assert isinstance(await it.accept(draft("a")), Accepted)


async def test_real_damage_begins_a_new_journal_once(home: Path) -> None:
    async with opened(home) as (it, _):
        job = await accepted(it, "a")
        await it.checkpoint()
        content = (home / NAME).read_bytes()
        (home / NAME).write_bytes(content[:4096] + bytes(len(content) - 4096))
        with pytest.raises(JournalUnavailable, match="damaged"):
            await run(it, failing(sqlite3.SQLITE_CORRUPT))
        before = it.stats
        with pytest.raises(JobGone):
            await it.start(job.seq)
        assert (before.reset, bool(it.stats.reset)) == (None, True)
        assert it.stats.jobs == 0
        again = await accepted(it, "a")
        assert again.seq > job.seq
        assert it.stats.trouble is None
    assert (home / f"{NAME}.corrupt-1").exists()
    assert not (home / f"{NAME}.corrupt-2").exists()


async def test_a_journal_that_cannot_be_opened_again_yet(home: Path) -> None:
    async with opened(home) as (it, _):
        await accepted(it, "a")
        with pytest.raises(JournalUnavailable):
            await run(it, failing(sqlite3.SQLITE_NOTADB))
        moved = shutil.move(home, home.with_name(home.name + "-away"))
        for _ in range(3):
            with pytest.raises(JournalUnavailable, match="not a directory"):
                await it.accept(draft("b"))
        trouble = it.stats.trouble
        assert trouble
        shutil.move(moved, home)
        assert it.stuck_s() < 5  # the thread came back each time
        await accepted(it, "b")
        assert it.stats.trouble is None
        assert it.stats.jobs == 2


async def test_another_version_under_a_running_journal(home: Path) -> None:
    async with opened(home) as (it, _):
        with pytest.raises(JournalUnavailable):
            await run(it, failing(sqlite3.SQLITE_CORRUPT))
        with (home / NAME).open("r+b") as file:
            file.seek(60)
            file.write((len(MIGRATIONS) + 1).to_bytes(4, "big"))
        with pytest.raises(JournalUnavailable, match="version"):
            await it.get("x")


# Opening


async def test_a_journal_that_cannot_be_opened_says_why_and_can_be_tried_again(
    home: Path,
) -> None:
    it = journal(home / "later")
    for _ in range(2):
        with pytest.raises(JournalUnavailable, match="not a directory"):
            await it.open()
    (home / "later").mkdir()
    await it.open()
    await accepted(it)
    await it.close()


async def test_a_reset_is_told_even_if_the_new_journal_had_to_wait(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / NAME).write_bytes(b"garbage")
    it = journal(home)
    with monkeypatch.context() as patch:
        patch.setattr("edged.journal_schema._create", lambda *_: failing(sqlite3.SQLITE_FULL)(None))  # type: ignore[arg-type]
        with pytest.raises(JournalFull):
            await it.open()
    found = await it.open()
    assert found.reset == "file is not a database"
    assert it.stats.reset == found.reset
    await it.close()
    assert (await it.open()).reset is None
    await it.close()


async def test_a_newer_journal_is_no_journal_to_wait_for(home: Path) -> None:
    async with opened(home):
        pass
    with (home / NAME).open("r+b") as file:
        file.seek(60)
        file.write((len(MIGRATIONS) + 1).to_bytes(4, "big"))
    it = journal(home)
    with pytest.raises(JournalTooNew):
        await it.open()
    await it.close()


async def test_a_failure_in_the_first_transaction(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = journal(home)
    for code, kind in (
        (sqlite3.SQLITE_FULL, JournalFull),
        (sqlite3.SQLITE_READONLY, JournalUnavailable),
        (sqlite3.SQLITE_CORRUPT, JournalUnavailable),
    ):
        for step in ("recover", "_load_counts"):
            with monkeypatch.context() as patch:
                patch.setattr(Store, step, failing(code))
                with pytest.raises(kind):
                    await it.open()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "recover", lambda _s: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            await it.open()
    await it.open()
    await it.close()


async def test_opening_can_be_given_up(home: Path) -> None:
    it = journal(home)
    opening = asyncio.create_task(it.open())
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await it.close()
    async with opened(home) as (again, _):
        assert await again.find(Key("c", "a")) is None


def test_a_loop_that_is_gone_is_no_trouble(home: Path) -> None:
    gate = Gate()
    it = journal(home, trace=gate)

    async def leave() -> None:
        await it.open()
        it.accept(draft())
        await asyncio.to_thread(gate.reached.wait, 30)

    asyncio.run(leave())
    it._thread.ask_to_end()
    gate.open.set()
    thread = it._thread._thread
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
    assert {file.name for file in home.iterdir()} == {NAME}
