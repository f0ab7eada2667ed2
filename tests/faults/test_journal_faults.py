"""The journal on bad storage, a full disk, a wrong clock, and beside another edged.

The numbers F13 to F15, F37 (in test_journal_schema) and F38 are those of the fault matrix.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.errors import JournalFull
from edged.jobs import Key, Outcome, Reply
from edged.journal import Accepted
from edged.testing import ManualClock
from tests.kit.journal import (
    NAME,
    ROOT,
    accepted,
    child_environment,
    copy_files,
    draft,
    lines_of,
    memory_directory,
    opened,
    run_child,
)

DONE = Outcome.COMPLETED


@pytest.fixture(name="home")
def _home() -> Iterator[Path]:
    with memory_directory() as home:
        yield home


# F14: damaged files -----------------------------------------------------------------------------

State = tuple[tuple[Any, ...], ...]


def content_of(directory: Path) -> State:
    """All that a journal says, read past it, as it is after a start that follows a crash."""
    with contextlib.closing(sqlite3.connect(directory / NAME)) as db:
        jobs = db.execute(
            "SELECT seq, client, id, kind, digest, priority, deadline_s, boot_id, boottime, wall,"
            " synced, ran, replies, CASE state WHEN 'running' THEN 'queued' ELSE state END,"
            " starts, deaths + (state = 'running'), ended_ran, outcome, replaced, sends,"
            " bytes, crc FROM job JOIN content USING (seq) ORDER BY seq"
        ).fetchall()
        outbox = db.execute("SELECT * FROM outbox ORDER BY row").fetchall()
        facts = db.execute("SELECT * FROM fact ORDER BY name").fetchall()
    return (*jobs, ("outbox",), *outbox, ("facts",), *facts)


@pytest.fixture(name="history", scope="module")
def _history() -> Iterator[tuple[Path, list[State]]]:
    """The files of a journal that was killed, and what it said after each of its commits."""
    with memory_directory() as home:
        yield asyncio.run(_make_history(home))


async def _make_history(home: Path) -> tuple[Path, list[State]]:
    live = home / "live"
    live.mkdir()
    states: list[State] = []

    def note() -> None:
        state = content_of(copy_files(live, home / "look"))
        if not states or states[-1] != state:
            states.append(state)

    async with opened(live, results=4) as (it, _):
        for n in range(3):
            await accepted(it, f"old{n}", "old " * 1000)
        await it.checkpoint()
        note()
        for n in range(12):
            job = await accepted(it, f"j{n}", "prompt " * (n * 97 % 800), reply=Reply("t", b"c"))
            note()
            await it.start(job.seq)
            note()
            if n % 3 == 0:
                await it.died(job.seq, "signal")
                note()
            if n % 4:
                for row in await it.finish(job.seq, b"final " * (n * 89 % 900), DONE):
                    note()
                    if n % 2:
                        await it.delivered(row)
                        note()
            await it.put("speed", {"n": n})
            note()
        killed = copy_files(live, home / "killed")
        assert (killed / f"{NAME}-wal").stat().st_size > 200_000
    return killed, states


def cut(content: bytearray, numbers: random.Random) -> None:
    del content[numbers.randrange(len(content)) :]


def cut_at_sector(content: bytearray, numbers: random.Random) -> None:
    del content[numbers.randrange(len(content) // 512) * 512 :]


def zero_sectors(content: bytearray, numbers: random.Random) -> None:
    at = numbers.randrange(len(content) // 512) * 512
    length = min(512 * numbers.choice([1, 1, 1, 8, 64]), len(content) - at)
    content[at : at + length] = bytes(length)


def scramble_sectors(content: bytearray, numbers: random.Random) -> None:
    for _ in range(numbers.choice([1, 1, 3])):
        at = numbers.randrange(len(content) // 512) * 512
        content[at : at + 512] = numbers.randbytes(512)


def flip_bit(content: bytearray, numbers: random.Random) -> None:
    content[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)


DAMAGES = [cut, cut_at_sector, zero_sectors, scramble_sectors, flip_bit]
Damage = Callable[[bytearray, random.Random], None]


def damaged(killed: Path, target: Path, suffix: str, damage: Damage, seed: int) -> None:
    shutil.rmtree(target, ignore_errors=True)
    copy_files(killed, target)
    file = target / f"{NAME}{suffix}"
    content = bytearray(file.read_bytes())
    damage(content, random.Random(seed))
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_log_costs_its_end_only(
    history: tuple[Path, list[State]], home: Path, damage: Damage
) -> None:
    """F14: what is read is what stood after one of the commits, and nothing in between."""
    killed, states = history
    found_at = set()
    for seed in range(60):
        damaged(killed, home / "x", "-wal", damage, seed)
        async with opened(home / "x", results=4) as (it, found):
            assert found.reset is None
            state = content_of(copy_files(home / "x", home / "look"))
            assert state in states
            assert len(found.jobs) == it.stats.jobs
            found_at.add(states.index(state))
            assert isinstance(await it.accept(draft("after")), Accepted)
    assert len(found_at) > 10  # the damage was all over the log


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_database_is_noticed_and_set_aside(
    history: tuple[Path, list[State]], home: Path, damage: Damage
) -> None:
    """F14: either nothing that matters was hit, or a new journal is begun, once, and it is said."""
    killed, states = history
    async with opened(copy_files(killed, home / "whole"), results=4):
        pass
    resets = 0
    for seed in range(60):
        damaged(home / "whole", home / "x", "", damage, seed)
        async with opened(home / "x", results=4) as (it, found):
            state = content_of(copy_files(home / "x", home / "look"))
            if found.reset:
                resets += 1
                assert found.jobs == ()
                assert found.pending == ()
                assert (home / "x" / f"{NAME}.corrupt-1").exists()
            else:
                assert undamaged(state) == undamaged(states[-1])
            answer = await it.accept(draft("after"))
            assert isinstance(answer, Accepted)
        async with opened(home / "x", results=4) as (it, again):
            assert again.reset is None
            assert answer.job.seq in {job.seq for job in again.jobs}
    assert resets > (0 if damage is flip_bit else 20)


def undamaged(state: State) -> State:
    """Of a journal's content, what is protected: names, requests, finals."""
    return tuple((row[0], row[-2], row[-1]) for row in state if len(row) > 10)


_READ_ONLY = """
import asyncio, os, sys
from pathlib import Path
from edged.errors import JournalUnavailable
from tests.kit.journal import journal, say

if os.getuid() == 0:
    os.setuid(65534)  # root may write anywhere

async def main():
    for _ in range(2):
        try:
            await journal(Path(sys.argv[1])).open()
        except JournalUnavailable as error:
            say(error.message, error.hint)

asyncio.run(main())
"""


@pytest.mark.parametrize("state", ["empty", "closed", "killed"])
def test_a_directory_that_cannot_be_written(home: Path, state: str) -> None:
    """F14: a clear word, for a new journal and for one that is there; nothing is set aside."""

    async def prepare() -> None:
        async with opened(home) as (it, _):
            await accepted(it)
            copy_files(home, home / "killed")

    if state != "empty":
        asyncio.run(prepare())
    if state == "killed":
        copy_files(home / "killed", home)
    home.chmod(0o555)
    for file in home.glob(f"{NAME}*"):
        file.chmod(0o444)
    before = {file.name: file.read_bytes() for file in home.glob(f"{NAME}*")}
    done = run_child(_READ_ONLY, str(home))
    assert done.returncode == 0, done.stderr
    said = lines_of(done.stdout)
    assert len(said) == 2
    for message, hint in said:
        assert str(home) in message
        assert str(home) in hint
    assert {file.name: file.read_bytes() for file in home.glob(f"{NAME}*")} == before


# F13: a full disk -------------------------------------------------------------------------------

_FILE_SIZE_LIMIT = """
import asyncio, resource, sys
from pathlib import Path
from edged.errors import JournalFull
from edged.jobs import Key, Outcome
from edged.journal import Accepted
from tests.kit.journal import accepted, draft, journal, say

hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

async def main():
    it = journal(Path(sys.argv[1]))
    limit(8192)
    for _ in range(2):
        try:
            await it.open()
        except JournalFull as error:
            say("full at start", error.hint)
    limit(hard)
    await it.open()
    first = await accepted(it, "first")
    (row,) = await it.finish(first.seq, b"a final", Outcome.COMPLETED)
    limit(500_000)
    jobs = []
    for n in range(200):
        try:
            jobs.append(await accepted(it, f"j{n}", "x" * 5000))
        except JournalFull:
            break
    say("full", len(jobs), it.stats.trouble is not None)
    refused = await asyncio.gather(*(it.accept(draft(f"k{n}", "x" * 9000)) for n in range(20)),
                                   return_exceptions=True)
    say("refused", sum(isinstance(r, JournalFull) for r in refused))
    sent = await it.outgoing(row)
    say("reads go on", sent.payload.decode(), (await it.find(Key("c", "j0"))).seq == jobs[0].seq)
    say("not stuck", it.stuck_s() < 5)
    limit(hard)
    for n in range(20):
        assert isinstance(await it.accept(draft(f"k{n}", "x" * 9000)), Accepted)
    for job in jobs:
        await it.finish(job.seq, b"late", Outcome.COMPLETED)
    say("recovered", it.stats.trouble, it.stats.jobs)
    await it.close()

asyncio.run(main())
"""


def test_a_limit_on_the_files_size(home: Path) -> None:
    """F13: a write that fails refuses that job; reads go on; it recovers by itself."""
    done = run_child(_FILE_SIZE_LIMIT, str(home))
    assert done.returncode == 0, done.stderr
    said = {line[0]: line[1:] for line in lines_of(done.stdout)}
    assert "free space" in said["full at start"][0]
    jobs, trouble = said["full"]
    assert 5 < jobs < 40
    assert trouble
    assert said["refused"] == [20]
    assert said["reads go on"] == ["a final", True]
    assert said["not stuck"] == [True]
    assert said["recovered"] == [None, 20]


_SMALL_DISK = """
import asyncio, sys
from pathlib import Path
from edged.errors import JournalFull
from edged.jobs import Outcome
from tests.kit.journal import accepted, draft, journal, say

disk = Path(sys.argv[1])
ballast = disk / "ballast"

def fill():
    with ballast.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

async def attempt(call):
    try:
        await call
    except JournalFull:
        return "full"
    return "done"

async def main():
    it = journal(disk)
    fill()
    say("start", await attempt(it.open()))
    ballast.unlink()
    await it.open()
    job = await accepted(it, "a", "x" * 50_000)
    other = await accepted(it, "b", "x" * 50_000)
    fill()
    say("accept", await attempt(it.accept(draft("c", "x" * 50_000))))
    say("finish", await attempt(it.finish(job.seq, b"y" * 50_000, Outcome.COMPLETED)))
    say("checkpoint", await attempt(it.checkpoint()))
    say("trouble", it.stats.trouble is not None)
    ballast.unlink()
    say("later", await attempt(it.finish(job.seq, b"y" * 50_000, Outcome.COMPLETED)))
    say("jobs", it.stats.jobs)
    fill()
    await it.close()
    ballast.unlink()
    found = await it.open()
    say("after", found.reset, [j.seq == other.seq for j in found.jobs], len(found.pending))
    await it.close()

asyncio.run(main())
"""


def inside_of(directory: Path, size: str) -> tuple[str, ...]:
    """What runs a command with a small file system mounted on a directory, for it alone."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare is not installed")
    prefix = (unshare, "-m") if os.getuid() == 0 else (unshare, "-Urm")
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    inside = (*prefix, "sh", "-c", mount, str(directory))
    if subprocess.run([*inside, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here, not even in a namespace")
    return inside


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """F13: at the start, in the middle, during a checkpoint, and when it is closed."""
    done = run_child(_SMALL_DISK, str(tmp_path), prefix=inside_of(tmp_path, "600k"))
    assert done.returncode == 0, done.stderr
    said = {line[0]: line[1:] for line in lines_of(done.stdout)}
    assert said["start"] == ["full"]
    assert said["accept"] == ["full"]
    assert said["finish"] == ["full"]
    assert said["trouble"] == [True]
    assert said["later"] == ["done"]
    assert said["jobs"] == [1]
    assert said["after"] == [None, [True], 1]


_FRAMES_ON_A_SMALL_DISK = """
import asyncio, resource, sys
from pathlib import Path
from edged.errors import JournalFull
from edged.jobs import Outcome
from edged.journal_frames import Frames
from tests.kit.journal import accepted, frame_files, opened, say

home = Path(sys.argv[1])
frames = (bytes(50_000), bytes(50_000))

async def refused(it, name, **changes):
    try:
        await accepted(it, name, **changes)
    except JournalFull as error:
        return type(error) is JournalFull, it.stats.trouble is not None

async def main():
    async with opened(home) as (it, _):
        jobs = []
        try:
            while True:
                jobs.append(await accepted(it, f"j{len(jobs)}", frames=frames))
        except JournalFull as error:
            say("full", len(jobs), "bytes free" in error.message)
        # Nothing but the disk itself says no now; some of these are cut off in their middle.
        look, Frames._free = Frames._free, lambda _frames: None
        say("no space", [await refused(it, f"k{n}", frames=(bytes(3_000_000 + n * 5000),))
                         for n in range(3)], len(frame_files(home)) == len(jobs))
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, hard))
        say("too large", await refused(it, "l", frames=(bytes(150_000),)),
            len(frame_files(home)) == len(jobs))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        Frames._free = look
        text = await accepted(it, "text")
        for job in (text, *jobs):
            assert await it.frames(job.seq) == (frames if job.frames else ())
            await it.plan(job.seq, {"used": list(range(100))})
            await it.finish(job.seq, b"x" * 8 * 1024, Outcome.COMPLETED)
        say("ended", it.stats.ended, len(frame_files(home)))
        await accepted(it, "again", frames=frames)
        say("trouble", it.stats.trouble)

asyncio.run(main())
"""


def test_frames_that_fill_the_disk(tmp_path: Path) -> None:
    """F13: those that find no room are refused; those that came first leave room for their end."""
    done = run_child(_FRAMES_ON_A_SMALL_DISK, str(tmp_path), prefix=inside_of(tmp_path, "4m"))
    assert done.returncode == 0, done.stderr
    said = {line[0]: line[1:] for line in lines_of(done.stdout)}
    jobs, by_us = said["full"]
    assert 5 < jobs < 25
    assert by_us
    assert said["no space"] == [[[True, True]] * 3, True]
    assert said["too large"] == [[True, True], True]
    assert said["ended"] == [jobs + 1, 0]
    assert said["trouble"] == [None]


# F15: a wrong clock -----------------------------------------------------------------------------

YEAR_S = 365 * 86400.0


@pytest.mark.parametrize("jump", [2 * YEAR_S, -86400.0, -1_800_000_000.0])
@pytest.mark.parametrize("reboot", [False, True])
async def test_a_wrong_clock_forgets_and_expires_nothing(
    home: Path, jump: float, *, reboot: bool
) -> None:
    """F15: the window and the deadlines count time that passed, not what the wall clock says."""
    clock = ManualClock(synced=not reboot)
    settings: dict[str, Any] = {"clock": clock, "results_s": 1000.0}

    async def end(name: str) -> None:
        job = await accepted(it, name, arrived=clock.stamp())
        for row in await it.finish(job.seq, b"f", DONE):
            await it.delivered(row)

    async with opened(home, **settings) as (it, _):
        await end("done")
        await accepted(it, "waiting", arrived=clock.stamp(), deadline_s=500.0)
        clock.advance(100)
        clock.jump_wall(jump)
        await end("x")
        assert await it.find(Key("c", "done"))
    if reboot:
        clock.reboot(off_s=0, wall=0.0, synced=False)
    else:
        clock.restart()
    async with opened(home, **settings) as (it, found):
        (job,) = found.jobs
        left = job.left_s(clock.stamp())
        assert left == pytest.approx(400.0)
        await end("y")
        assert await it.find(Key("c", "done"))
        clock.advance(890)
        await end("z")
        assert await it.find(Key("c", "done"))
        left = job.left_s(clock.stamp())
        assert left == pytest.approx(-490.0)
        clock.advance(20)
        await end("w")
        assert await it.find(Key("c", "done")) is None
        assert await it.find(Key("c", "y"))


async def test_a_clock_that_was_right_counts_the_time_without_power(home: Path) -> None:
    clock = ManualClock()
    async with opened(home, clock=clock) as (it, _):
        await accepted(it, arrived=clock.stamp(), deadline_s=500.0)
        clock.advance(100)
    clock.reboot(off_s=300.0)
    async with opened(home, clock=clock) as (_, found):
        assert found.jobs[0].left_s(clock.stamp()) == pytest.approx(100.0)


# F38: two of us ---------------------------------------------------------------------------------

_HOLDER = """
import sys
from pathlib import Path
from edged.errors import StateDirLocked
from edged.statedir import StateDir

try:
    with StateDir(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
except StateDirLocked as error:
    sys.exit(f"{error.message}|{error.hint}")
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_second_edged_on_the_same_directory(tmp_path: Path, end: signal.Signals) -> None:
    """F38: the second says whose it is and what to do; a death of the first lets go."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=child_environment(), cwd=ROOT,
    ) as first:  # fmt: skip
        assert first.stdout is not None
        assert first.stdout.readline() == "locked\n"
        second = run_child(_HOLDER, str(tmp_path), stdin=subprocess.DEVNULL)
        assert second.returncode == 1
        assert f"{tmp_path} is in use by another edged (process {first.pid})" in second.stderr
        assert "state.dir" in second.stderr
        first.send_signal(end)
        first.wait()
    third = run_child(_HOLDER, str(tmp_path), stdin=subprocess.DEVNULL)
    assert (third.returncode, third.stdout) == (0, "locked\n")


async def test_a_journal_in_use_is_not_mistaken_for_a_damaged_one(home: Path) -> None:
    async with opened(home, quota_bytes=1 << 20) as (it, _):
        await accepted(it)
        script = """
import asyncio, sys
from pathlib import Path
from edged.errors import JournalUnavailable
from tests.kit.journal import journal
try:
    asyncio.run(journal(Path(sys.argv[1])).open())
except JournalUnavailable as error:
    print(error.message, error.hint)
"""
        done = await asyncio.to_thread(run_child, script, str(home))
        assert "is in use" in done.stdout, done.stderr
        assert "end the program" in done.stdout
        with pytest.raises(JournalFull):
            await it.accept(draft("large", "x" * 2_000_000))
        assert it.stats.jobs == 1
    assert {file.name for file in home.iterdir()} == {NAME}  # noqa: ASYNC240
