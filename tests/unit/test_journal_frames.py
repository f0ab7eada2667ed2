"""What the journal promises about frames: with their job on disk, or said to be lost."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from edged import journal_frames
from edged.errors import (
    FramesFull,
    FramesLost,
    JobGone,
    JournalFull,
    JournalUnavailable,
    Loss,
)
from edged.jobs import Job, Kind, Outcome, Reply
from edged.journal import Accepted, Journal, Known
from edged.journal_store import Store
from tests.kit.journal import (
    NAME,
    accepted,
    bytes_of,
    copy_files,
    draft,
    frame_files,
    memory_directory,
    opened,
)

DONE = Outcome.COMPLETED
#: One of them is empty, one has all bytes, one is larger than a page.
FRAMES = (b"", bytes(range(256)), b"\xff\xd8a frame" * 2000)
SIZE = sum(map(len, FRAMES))


@pytest.fixture(name="home")
def _home() -> Iterator[Path]:
    with memory_directory() as home:
        yield home


@pytest.fixture(name="it")
async def _it(home: Path) -> AsyncIterator[Journal]:
    async with opened(home) as (it, _):
        yield it


async def looks(it: Journal, name: str = "v", **changes: Any) -> Job:
    """A job with frames that the journal has just taken."""
    return await accepted(it, name, kind=Kind.VISION, **{"frames": FRAMES, **changes})


# Keeping


async def test_frames_come_back_as_they_came(home: Path) -> None:
    async with opened(home) as (it, _):
        job = await looks(it, answers=3)
        assert (job.frames, job.answers, job.plan, job.durable) == (3, 3, None, True)
        assert await it.frames(job.seq) == FRAMES
        stats = it.stats
        assert (stats.frames_jobs, stats.frames_bytes) == (1, SIZE)
    async with opened(home) as (it, found):
        assert found.jobs == (job,)
        assert await it.frames(job.seq) == FRAMES
        assert (it.stats.frames_jobs, it.stats.frames_bytes) == (1, SIZE)


async def test_a_job_has_one_private_file(it: Journal, home: Path) -> None:
    previous = os.umask(0)  # what follows is not its doing
    try:
        job = await looks(it)
    finally:
        os.umask(previous)
    (file,) = frame_files(home)
    assert file.name.startswith(f"{job.seq}-")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


async def test_a_text_job_has_none(it: Journal, home: Path) -> None:
    job = await accepted(it)
    assert (job.frames, job.answers, job.durable) == (0, 1, True)
    assert await it.frames(job.seq) == ()
    assert not (home / "frames").exists()


async def test_frames_go_with_the_final(it: Journal, home: Path) -> None:
    job, other = await looks(it), await looks(it, "other")
    await it.finish(job.seq, b"f", DONE)
    assert len(frame_files(home)) == 1
    assert it.stats.frames_bytes == SIZE
    with pytest.raises(JobGone):
        await it.frames(job.seq)
    assert await it.finish(job.seq, b"again", DONE) == ()
    assert await it.frames(other.seq) == FRAMES
    await it.finish(other.seq, b"f", DONE)
    assert frame_files(home) == []
    assert (it.stats.frames_jobs, it.stats.frames_bytes) == (0, 0)


async def test_a_number_the_journal_does_not_have(it: Journal) -> None:
    for call in (it.frames(7), it.plan(7, {})):
        with pytest.raises(JobGone):
            await call


async def test_a_request_that_comes_again_writes_nothing(it: Journal, home: Path) -> None:
    job = await looks(it)
    (file,) = frame_files(home)
    before = file.stat()
    both = [it.accept(draft("w", frames=FRAMES)), it.accept(draft("w", frames=FRAMES))]
    first, second = await asyncio.gather(*both)
    assert isinstance(first, Accepted)
    assert isinstance(second, Known)
    assert isinstance(await it.accept(draft("v", "other", frames=(b"other",))), Known)
    assert len(frame_files(home)) == 2
    assert file.stat() == before
    assert await it.frames(job.seq) == FRAMES
    await it.finish(job.seq, b"f", DONE)
    assert isinstance(await it.accept(draft("v", frames=FRAMES)), Known)
    assert len(frame_files(home)) == 1


async def test_the_labels_of_the_steps(home: Path) -> None:
    seen: list[str] = []
    async with opened(home, trace=seen.append) as (it, _):
        job = await looks(it)
        await it.frames(job.seq)
        await it.finish(job.seq, b"f", DONE)
    assert seen == [
        "after_frames_write", "in_accept_txn", "after_frames_sync", "after_accept_commit",
        "in_result_txn", "after_result_commit", "after_frames_unlink",
    ]  # fmt: skip


class Gate:
    """A trace that holds the journal's thread at the first call of a label."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.seen: list[str] = []
        self.reached = threading.Event()
        self.open = threading.Event()

    def __call__(self, label: str) -> None:
        self.seen.append(label)
        if label == self.label and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(30)


async def test_jobs_that_wait_together_share_the_sync_of_the_folder(home: Path) -> None:
    gate = Gate("after_frames_write")
    async with opened(home, trace=gate) as (it, _):
        first = it.accept(draft("held", frames=FRAMES))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        calls = [it.accept(draft(f"j{n}", frames=(b"%d" % n,))) for n in range(5)]
        for _ in range(100):
            await asyncio.sleep(0)  # the loop turns while the disk does not
        assert not first.done()
        gate.open.set()
        answers = await asyncio.gather(*calls)
        assert gate.seen.count("after_frames_write") == 6
        assert gate.seen.count("after_frames_sync") == 2
        for n, answer in enumerate(answers):
            assert isinstance(answer, Accepted)
            assert await it.frames(answer.job.seq) == (b"%d" % n,)


async def test_frames_bound_a_batch(home: Path) -> None:
    gate = Gate("in_accept_txn")
    async with opened(home, trace=gate) as (it, _):
        calls = [it.accept(draft("held"))]
        assert await asyncio.to_thread(gate.reached.wait, 30)
        commits = it.stats.commits
        calls += [it.accept(draft(f"j{n}", frames=(bytes(5_000_000),))) for n in range(4)]
        gate.open.set()
        await asyncio.gather(*calls)
        assert it.stats.commits == commits + 3


# Transactions that fail


async def test_a_job_that_cannot_be_stored_leaves_no_frames(home: Path) -> None:
    gate = Gate("in_accept_txn")
    async with opened(home, trace=gate) as (it, _):
        calls: list[Any] = [it.accept(draft("held"))]
        assert await asyncio.to_thread(gate.reached.wait, 30)
        calls.append(it.accept(draft("a", frames=(b"a",))))
        calls.append(it.accept(draft("wrong", frames=(b"wrong",), priority=2**70)))
        calls.append(it.accept(draft("b", frames=(b"b",))))
        gate.open.set()
        answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in answers] == [Accepted, Accepted, OverflowError, Accepted]
        assert len(frame_files(home)) == 2
        assert it.stats.frames_bytes == 2
        for answer, expected in ((answers[1], b"a"), (answers[3], b"b")):
            assert await it.frames(answer.job.seq) == (expected,)


async def test_a_number_given_twice_does_not_mix_frames(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a job that was undone stays; the next job gets the same number."""
    async with opened(home) as (it, _):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", _refuse)
            with pytest.raises(OverflowError):
                await looks(it, frames=(b"theirs",), priority=2**70)
        job = await looks(it, frames=(b"ours",))
        one, two = frame_files(home)
        assert {file.name.partition("-")[0] for file in (one, two)} == {f"{job.seq}"}
        assert await it.frames(job.seq) == (b"ours",)
    async with opened(home) as (it, _):
        assert len(frame_files(home)) == 1
        assert await it.frames(job.seq) == (b"ours",)


async def test_a_final_that_is_undone_keeps_the_frames(home: Path) -> None:
    async with opened(home, quota_bytes=1 << 20) as (it, _):
        job = await looks(it)
        with pytest.raises(JournalFull):
            await it.finish(job.seq, b"x" * 2_000_000, DONE)
        assert await it.frames(job.seq) == FRAMES
        assert it.stats.frames_bytes == SIZE
        await it.finish(job.seq, b"f", DONE)
        assert frame_files(home) == []


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "no")


async def test_a_file_that_cannot_be_removed_counts_until_it_can(
    it: Journal, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await looks(it)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _refuse)
        await it.finish(job.seq, b"f", DONE)
        assert (it.stats.frames_jobs, it.stats.frames_bytes) == (0, SIZE)
    await it.put("x", {})
    assert it.stats.frames_bytes == 0
    assert frame_files(home) == []


# The quota


@pytest.mark.parametrize("keep", ["durable", "none"])
async def test_frames_have_a_quota(home: Path, keep: str) -> None:
    async with opened(home, frames_bytes=1000, keep_frames=keep) as (it, _):
        first = await looks(it, "a", frames=(bytes(400), bytes(200)))
        for size, remedy in ((401, "wait"), (1001, "fewer")):
            with pytest.raises(FramesFull, match=f"600 of 1000 .* {size}") as caught:
                await looks(it, "b", frames=(bytes(size),))
            assert caught.value.in_memory == (keep == "none")
            assert remedy in (caught.value.hint or "")
            assert "state.frames_mb" in (caught.value.hint or "")
        await looks(it, "b", frames=(bytes(400),))
        await accepted(it, "text")
        stats = it.stats
        assert (stats.frames_jobs, stats.frames_bytes, stats.frames_quota_bytes) == (2, 1000, 1000)
        assert stats.trouble is None  # waiting helps
        await it.finish(first.seq, b"f", DONE)
        await looks(it, "c", frames=(bytes(600),))


async def test_a_restart_counts_what_is_there(home: Path) -> None:
    async with opened(home, frames_bytes=1000) as (it, _):
        await looks(it, "a", frames=(bytes(900),))
    async with opened(home, frames_bytes=1000) as (it, _):
        with pytest.raises(FramesFull):
            await looks(it, "b", frames=(bytes(101),))
    async with opened(home, frames_bytes=100) as (it, found):  # lowered: what is there stays
        assert await it.frames(found.jobs[0].seq) == (bytes(900),)


# The disk


@pytest.mark.parametrize(
    ("call", "number", "kind"),
    [
        ("open", errno.EROFS, JournalUnavailable),
        ("open", errno.EMFILE, JournalUnavailable),
        ("write", errno.ENOSPC, JournalFull),
        ("write", errno.EIO, JournalUnavailable),
        ("fsync", errno.EIO, JournalUnavailable),
        ("fsync", errno.EDQUOT, JournalFull),
        ("sync_directory", errno.EIO, JournalUnavailable),
        ("sync_directory", errno.ENOSPC, JournalFull),
    ],
)
async def test_a_disk_that_takes_no_frames(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    kind: type[JournalUnavailable],
) -> None:
    """Those who bring frames are refused; all others are not harmed; nothing is left behind."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    gate = Gate("in_accept_txn")
    async with opened(home, trace=gate) as (it, _):
        (home / "frames").mkdir()
        calls: list[Any] = [it.accept(draft("held"))]
        assert await asyncio.to_thread(gate.reached.wait, 30)
        with monkeypatch.context() as patch:
            if call == "sync_directory":
                patch.setattr(journal_frames, call, fail)
            else:
                broken = SimpleNamespace(**{**vars(os), call: fail})
                patch.setattr(journal_frames, "os", broken)
            calls.append(it.accept(draft("a", frames=FRAMES)))
            calls.append(it.accept(draft("text")))
            calls.append(it.accept(draft("b", frames=FRAMES)))
            gate.open.set()
            answers: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in answers] == [Accepted, kind, Accepted, kind]
        assert os.strerror(number) in answers[1].message
        assert str(home) in answers[1].hint
        assert frame_files(home) == []
        assert it.stats.frames_bytes == 0
        await looks(it)
        assert it.stats.trouble is None


async def test_a_disk_that_takes_a_part_of_a_write(
    it: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(descriptor: int, content: memoryview) -> int:
        return os.write(descriptor, content[:100])

    monkeypatch.setattr(journal_frames, "os", SimpleNamespace(**{**vars(os), "write": some}))
    job = await looks(it)
    assert await it.frames(job.seq) == FRAMES


async def test_frames_do_not_take_the_room_of_finals_on_the_disk(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 3 * 1024 * 1024
    status = SimpleNamespace(f_bavail=0, f_frsize=1, f_blocks=1)
    statvfs = SimpleNamespace(**{**vars(os), "statvfs": lambda _path: status})
    monkeypatch.setattr(journal_frames, "os", statvfs)
    async with opened(home) as (it, _):
        status.f_bavail = free
        job = await looks(it, "a")
        status.f_bavail = 2_000_000
        with pytest.raises(JournalFull, match="2000000 bytes free") as caught:
            await looks(it, "b")
        assert not isinstance(caught.value, FramesFull)
        assert "bytes free" in (it.stats.trouble or "")
        await accepted(it, "text")
        assert "bytes free" in (it.stats.trouble or "")
        status.f_bavail = free
        await it.finish(job.seq, b"f", DONE)
        assert it.stats.trouble is None
        status.f_blocks = status.f_bavail = 0  # the file system does not say
        await looks(it, "b")


async def test_the_trouble_lasts_until_frames_are_taken(
    it: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal_frames, "os", SimpleNamespace(**{**vars(os), "fsync": _refuse}))
        with pytest.raises(JournalUnavailable):
            await looks(it)
    await accepted(it, "text")
    assert "frames" in (it.stats.trouble or "")
    await looks(it)
    assert it.stats.trouble is None


# Loss


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


async def lost(it: Journal, job: Job) -> Loss:
    """Why the frames are lost; the job itself is not."""
    with pytest.raises(FramesLost, match="send it again") as caught:
        await it.frames(job.seq)
    assert await it.start(job.seq) > 0
    return caught.value.reason


async def test_a_flipped_bit_anywhere_is_noticed(it: Journal, home: Path) -> None:
    job = await looks(it, frames=(b"one", b"", b"three"))
    (file,) = frame_files(home)
    for position in range(file.stat().st_size):
        _flip(file, position)
        assert await lost(it, job) == Loss.DAMAGED
        _flip(file, position)
    assert await it.frames(job.seq) == (b"one", b"", b"three")


@pytest.mark.parametrize("size", [0, 5, 40, -1, 10**6])
async def test_a_file_of_another_length_is_noticed(home: Path, size: int) -> None:
    async with opened(home) as (it, _):
        await looks(it)
    (file,) = frame_files(home)
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    async with opened(home) as (it, found):
        assert await lost(it, found.jobs[0]) == Loss.DAMAGED
        await it.finish(found.jobs[0].seq, b"f", DONE)
        assert frame_files(home) == []


async def test_the_file_of_another_job_is_noticed(it: Journal, home: Path) -> None:
    one, two = await looks(it, "a"), await looks(it, "b")
    first, second = frame_files(home)
    first.write_bytes(second.read_bytes())
    assert await lost(it, one) == Loss.DAMAGED
    assert await it.frames(two.seq) == FRAMES


async def test_a_file_that_is_gone(home: Path) -> None:
    async with opened(home) as (it, _):
        await looks(it)
    frame_files(home)[0].unlink()
    async with opened(home) as (it, found):
        (job,) = found.jobs
        assert await lost(it, job) == Loss.MISSING
        assert await it.finish(job.seq, b"f", DONE)
        assert it.stats.frames_bytes == 0


async def test_a_file_that_is_no_file(it: Journal, home: Path) -> None:
    job = await looks(it)
    (file,) = frame_files(home)
    file.unlink()
    file.mkdir()
    assert await lost(it, job) == Loss.DAMAGED
    file.rmdir()
    file.symlink_to("/dev/zero")
    assert await lost(it, job) == Loss.DAMAGED


async def test_trouble_of_ours_is_no_loss(
    it: Journal, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await looks(it)

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many files")

    with monkeypatch.context() as patch:
        patch.setattr(journal_frames, "os", SimpleNamespace(**{**vars(os), "open": fail}))
        with pytest.raises(JournalUnavailable):
            await it.frames(job.seq)
    assert await it.frames(job.seq) == FRAMES


# Memory


async def test_frames_in_memory_are_lost_in_a_restart(home: Path) -> None:
    async with opened(home, keep_frames="none") as (it, _):
        job = await looks(it)
        assert not job.durable
        assert (await accepted(it, "text")).durable
        assert await it.frames(job.seq) == FRAMES
        assert it.stats.frames_bytes == SIZE
        assert frame_files(home) == []
        assert FRAMES[2] not in bytes_of(home)
        ended = await looks(it, "ended")
        await it.finish(ended.seq, b"f", DONE)
        assert it.stats.frames_bytes == SIZE
        with pytest.raises(OverflowError):
            await looks(it, "wrong", priority=2**70)
        assert it.stats.frames_bytes == SIZE
    for keep in ("none", "durable"):
        async with opened(home, keep_frames=keep) as (it, found):
            assert found.jobs[0] == job
            assert it.stats.frames_bytes == 0
            with pytest.raises(FramesLost, match=r"state\.frames") as caught:
                await it.frames(job.seq)
            assert caught.value.reason == Loss.MEMORY
            await looks(it, f"new {keep}")
    async with opened(home) as (it, _):
        assert await it.finish(job.seq, b"lost", Outcome.FAILED)


async def test_frames_on_disk_are_read_whatever_the_setting_is_now(home: Path) -> None:
    async with opened(home) as (it, _):
        job = await looks(it)
    async with opened(home, keep_frames="none") as (it, found):
        assert found.jobs == (job,)
        assert await it.frames(job.seq) == FRAMES
        await it.finish(job.seq, b"f", DONE)
        assert frame_files(home) == []


def _corrupt(_store: Store) -> None:
    error = sqlite3.DatabaseError("what SQLite said")
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    error.sqlite_errorname = "SQLITE_CORRUPT"
    raise error


@pytest.mark.parametrize("keep", ["durable", "none"])
async def test_a_journal_that_is_opened_again_still_has_them(home: Path, keep: str) -> None:
    gate = Gate("in_accept_txn")
    async with opened(home, keep_frames=keep) as (it, _):
        job = await looks(it)
        it._thread._trace = gate
        calls: list[Any] = [it.accept(draft("held"))]
        assert await asyncio.to_thread(gate.reached.wait, 30)
        calls.append(it.accept(draft("undone", frames=FRAMES)))
        calls.append(it._thread.submit(_corrupt))
        gate.open.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(each) for each in answers] == [Accepted, *[JournalUnavailable] * 2]
        assert await it.frames(job.seq) == FRAMES
        assert (it.stats.frames_jobs, it.stats.frames_bytes) == (1, SIZE)
        assert len(frame_files(home)) == (keep == "durable")


@pytest.mark.parametrize("keep", ["durable", "none"])
async def test_frames_go_with_a_damaged_journal(home: Path, keep: str) -> None:
    async with opened(home, keep_frames=keep) as (it, _):
        await looks(it)
        await it.checkpoint()
        content = (home / NAME).read_bytes()
        (home / NAME).write_bytes(content[:4096] + bytes(len(content) - 4096))
        with pytest.raises(JournalUnavailable, match="damaged"):
            await it._thread.submit(_corrupt)
        await accepted(it)
        assert it.stats.reset
        assert (it.stats.frames_jobs, it.stats.frames_bytes) == (0, 0)
        assert frame_files(home) == []


# The sweep


async def test_what_no_job_has_is_swept_and_nothing_else(home: Path) -> None:
    async with opened(home) as (it, _):
        job = await looks(it)
    folder = home / "frames"
    (own,) = frame_files(home)
    orphans = [folder / f"{n}-{n:016x}.frames" for n in (1, 2, 2**60)]
    for orphan in orphans:
        orphan.write_bytes(b"12345")
    kept = [folder / name for name in ("notes.txt", f"x{own.name}", f"{own.name}.bak", "7.frames")]
    for file in kept:
        file.write_bytes(b"")
    (folder / f"8-{8:016x}.frames").mkdir()
    (folder / f"9-{9:016x}.frames").symlink_to(kept[0])
    with capture_logs() as logs:
        async with opened(home) as (it, _):
            assert await it.frames(job.seq) == FRAMES
    assert not any(orphan.exists() for orphan in orphans)
    assert all(file.exists() for file in kept)
    assert len(list(folder.iterdir())) == 1 + len(kept) + 2
    (swept,) = [line for line in logs if line["event"] == "frames.swept"]
    assert (swept["files"], swept["bytes"]) == (3, 15)


async def test_a_sweep_takes_no_longer_than_it_may(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "frames").mkdir()
    for n in range(5):
        (home / "frames" / f"{n}-{n:016x}.frames").write_bytes(b"")
    monkeypatch.setattr(journal_frames, "SWEEP_S", -1.0)
    for left in (4, 3):
        async with opened(home):
            assert len(list((home / "frames").iterdir())) == left


async def test_a_folder_that_is_no_folder(home: Path) -> None:
    (home / "frames").write_bytes(b"mine")
    async with opened(home) as (it, _):
        with pytest.raises(JournalUnavailable, match="frames"):
            await looks(it)
        await accepted(it)
    assert (home / "frames").read_bytes() == b"mine"


async def test_the_folder_may_be_elsewhere(home: Path) -> None:
    (home / "disk").mkdir()
    async with opened(home, frames_dir=home / "disk" / "f") as (it, _):
        await looks(it)
        assert len(list((home / "disk" / "f").iterdir())) == 1


# Plans

PLAN = {"used": [{"index": 0, "crops": 4, "tokens": 757}], "dropped": [{"index": 1, "reason": "ä"}]}


async def test_a_plan_is_kept_until_the_end(home: Path) -> None:
    async with opened(home) as (it, _):
        job = await looks(it)
        await it.plan(job.seq, {"used": "MARKER"})
        await it.plan(job.seq, PLAN)
        crashed = copy_files(home, home / "crashed")
    for directory in (crashed, home):
        async with opened(directory) as (it, found):
            assert found.jobs == (job.evolve(plan=PLAN),)
            await it.plan(job.seq, {"used": "MARKER"})
            await it.finish(job.seq, b"f", DONE)
            with pytest.raises(JobGone):
                await it.plan(job.seq, PLAN)
            await it.checkpoint()
            assert b"MARKER" not in (directory / NAME).read_bytes()


async def test_a_flipped_bit_in_a_plan_is_noticed(home: Path) -> None:
    async with opened(home) as (it, _):
        await it.plan((await looks(it)).seq, {"used": "MARKER"})
    content = (home / NAME).read_bytes()
    (home / NAME).write_bytes(content.replace(b"MARKER", b"MASKER"))
    async with opened(home) as (_, found):
        assert "plan of job 1" in (found.reset or "")
    assert frame_files(home) == []


# Room for finals


async def test_many_answers_have_room_kept_for_them(home: Path) -> None:
    """As for one: after a restart, too, and with the largest plan each."""
    final, answers = 32 * 1024, 5
    limits = {"quota_bytes": 4 * 1024 * 1024, "max_final_bytes": final}
    frames = (b"x",) * 64
    plan = {"dropped": [{"index": n, "reason": "r" * 90} for n in range(64)]}
    jobs: list[Job] = []

    async def fill(it: Journal, prefix: str) -> None:
        for n in range(1000):
            jobs.append(  # noqa: PERF401
                await accepted(it, f"{prefix}{n}", answers=answers, frames=frames)
            )

    async with opened(home, **limits) as (it, _):
        with pytest.raises(JournalFull):
            await fill(it, "a")
        assert 10 < len(jobs) < limits["quota_bytes"] // (final * answers)
    async with opened(home, **limits) as (it, _):
        count = len(jobs)
        with pytest.raises(JournalFull):
            await fill(it, "b")
        assert len(jobs) == count
        for job in jobs:
            await it.plan(job.seq, plan)
        for job in jobs:
            assert await it.finish(job.seq, b"y" * final * answers, DONE)
        assert (home / NAME).stat().st_size <= limits["quota_bytes"]


async def test_the_room_is_given_back(home: Path) -> None:
    async with opened(home, quota_bytes=1 << 20, results=1) as (it, _):
        for n in range(200):
            job = await accepted(it, f"j{n}", answers=30, frames=(b"x",))
            await it.add_reply(job.seq, Reply("t"))
            for row in await it.finish(job.seq, b"f", DONE):
                await it.delivered(row)
        counts = it._thread._store.counts if it._thread._store else None
        assert counts is not None
        assert (counts.open, counts.open_pages, counts.reserved_pages) == (0, 0, 0)


# Erasing


async def test_frames_are_nowhere_when_their_job_has_ended(it: Journal, home: Path) -> None:
    secret = b"a secret that only the frame has"
    job = await looks(it, frames=(secret * 100,))
    assert secret in frame_files(home)[0].read_bytes()
    assert secret not in bytes_of(home)  # the database never sees it
    await it.finish(job.seq, b"f", DONE)
    assert secret not in bytes_of(home)
    assert frame_files(home) == []
