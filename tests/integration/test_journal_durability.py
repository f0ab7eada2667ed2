"""What was told is on disk: syncs counted from outside, and processes killed at every step."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edged.jobs import Outcome
from edged.journal import Accepted, Known
from tests.kit.journal import (
    ROOT,
    child_environment,
    draft,
    frame_files,
    lines_of,
    memory_directory,
    opened,
    run_child,
)


@pytest.fixture(name="home")
def _home() -> Iterator[Path]:
    with memory_directory() as home:
        yield home


# Syncs

_AUDITED = """
import asyncio, os, sys
from pathlib import Path
from edged.jobs import Outcome
from tests.kit.journal import accepted, opened

async def main():
    async with opened(Path(sys.argv[1])) as (it, _):
        for n in range(20):
            os.write(1, b"ask %d" % n)
            frames = (b"frame" * 1000, b"more") if n % 2 else ()
            job = await accepted(it, f"j{n}", "x" * 3000, frames=frames)
            os.write(1, b"accepted %d" % n)
            await it.start(job.seq)
            os.write(1, b"started %d" % n)
            (row,) = await it.finish(job.seq, b"f", Outcome.COMPLETED)
            os.write(1, b"finished %d" % n)
            await it.delivered(row)
            os.write(1, b"delivered %d" % n)
        os.write(1, b"commits %d" % it.stats.commits)

asyncio.run(main())
"""


@pytest.mark.strace
def test_nothing_is_told_before_it_is_synced(tmp_path: Path) -> None:
    """Between a write to the log and the word to the caller lies a sync of that file.

    Frames, and then their folder, are synced before anything of their job is written to the log.
    """
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    if subprocess.run([strace, "-o", "/dev/null", "true"], check=False).returncode:
        pytest.skip("strace may not trace here (ptrace is forbidden)")
    log = tmp_path / "strace"
    calls = "trace=fsync,fdatasync,pwrite64,write,unlink,unlinkat"
    prefix = (strace, "-f", "-y", "-s", "24", "-o", str(log), "-e", calls)
    done = run_child(_AUDITED, str(tmp_path), prefix=prefix)
    assert done.returncode == 0, done.stderr
    commits = int(re.findall(r"commits (\d+)", done.stdout)[0])
    assert commits >= 80

    syncs, unsynced, told = 0, False, 0
    #: What has happened to frames since the last one was asked for.
    steps: list[str] = []
    removed = 0
    for line in log.read_text().splitlines():
        if re.search(r"pwrite64\(\d+<[^>]*journal\.db-wal>", line):
            unsynced = True
            assert steps in ([], ["write", "file", "folder"]), line
        elif re.search(r'write\(1<[^>]*>, "ask ', line):
            steps = []
        elif re.search(r"write\(\d+<[^>]*\.frames>", line):
            steps = ["write"]
        elif re.search(r"fsync\(\d+<[^>]*\.frames>\)\s+= 0", line):
            steps.append("file")
        elif steps and re.search(r"fsync\(\d+<[^>]*/frames>\)\s+= 0", line):
            steps.append("folder")
        elif re.search(r'unlink(at)?\(.*\.frames"', line):
            removed += 1
            assert not unsynced, line
        elif re.search(r"f(data)?sync\(\d+<[^>]*journal\.db-wal>\)\s+= 0", line):
            syncs += 1
            unsynced = False
        elif re.search(r'write\(1<[^>]*>, "(accepted|started|finished|delivered) ', line):
            told += 1
            assert not unsynced, line
    assert (told, removed) == (80, 10)
    assert syncs >= commits - 1  # the first commit is that of making the file


# Kills

_WORKER = """
import asyncio, os, signal, sys
from pathlib import Path
from edged.jobs import Outcome, Reply
from edged.journal import Accepted
from tests.kit.journal import accepted, opened, say

directory, label, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
frames = (b"a frame" * 5000, b"another")

def trace(reached):
    global count
    if reached == label:
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with opened(directory, trace=trace) as (it, found):
        for n in range(6):
            job = await accepted(it, f"j{n}", f"prompt {n}", frames=frames)
            say("accepted", n, job.seq)
            say("started", n, await it.start(job.seq))
            if n == 1:
                await it.release(job.seq)
                say("started", n, await it.start(job.seq))
            rows = await it.finish(job.seq, b"final %d" % n, Outcome.COMPLETED)
            say("finished", n, rows)
            for row in rows:
                assert await it.outgoing(row)
                await it.delivered(row)
                say("delivered", n, row)

asyncio.run(main())
"""

_FRAMES = (b"a frame" * 5000, b"another")
_BEFORE_ACCEPTED = ("after_frames_write", "in_accept_txn", "after_frames_sync")
_LABELS = (
    *_BEFORE_ACCEPTED,
    "after_accept_commit",
    "after_attempt_mark",
    "in_result_txn",
    "after_result_commit",
    "after_frames_unlink",
    "after_sent_mark",
)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("label", _LABELS)
async def test_a_kill_at_every_step(home: Path, label: str, count: int) -> None:
    done = run_child(_WORKER, str(home), label, str(count))
    assert done.returncode == -signal.SIGKILL, done.stderr
    told: dict[str, dict[int, Any]] = {
        step: {} for step in ("accepted", "started", "finished", "delivered")
    }
    for step, n, value in lines_of(done.stdout):
        told[step][n] = value

    before = len(frame_files(home))
    async with opened(home) as (it, found):
        assert found.reset is None
        # A file more than jobs where the kill came between the two; never one less; swept now.
        assert len(frame_files(home)) == len(found.jobs)
        orphan = label in {*_BEFORE_ACCEPTED, "after_result_commit"}
        assert before == len(found.jobs) + orphan
        jobs = {job.seq: job for job in found.jobs}
        names = {job.key.id for job in found.jobs}
        for n, seq in told["accepted"].items():
            known = await it.accept(draft(f"j{n}", f"prompt {n}"))
            assert isinstance(known, Known)
            assert known.seq == seq
            assert known.ended == (seq not in jobs)
            assert known.final == (f"final {n}".encode() if known.ended else None)
            if n in told["finished"]:
                assert known.ended
                waiting = set(told["finished"][n]) & set(found.pending)
                assert bool(waiting) <= (n not in told["delivered"])
            elif not known.ended:
                assert jobs[seq].starts >= told["started"].get(n, 0)
                assert jobs[seq].deaths == (label in {"after_attempt_mark", "in_result_txn"})

        # What the step itself left: nothing before its commit, all of it after.
        cut = f"j{len(told['accepted'])}"
        if label in {*_BEFORE_ACCEPTED, "after_accept_commit"}:
            assert (cut in names) == (label == "after_accept_commit")
        last = max(told["accepted"], default=-1)
        if label == "after_attempt_mark":
            assert jobs[told["accepted"][last]].starts == told["started"].get(last, 0) + 1
        if label in {"in_result_txn", "after_result_commit", "after_frames_unlink"}:
            assert last not in told["finished"]
            assert (f"j{last}" in names) == (label == "in_result_txn")
            assert len(found.pending) == (label != "in_result_txn")
        if label == "after_sent_mark":
            assert last not in told["delivered"]
            assert found.pending == ()

        # And it goes on: every job gets its one final.
        for job in found.jobs:
            assert job.request == {"prompt": f"prompt {job.key.id[1:]}"}
            assert await it.frames(job.seq) == _FRAMES
            final = f"final {job.key.id[1:]}".encode()
            await it.start(job.seq)
            assert len(await it.finish(job.seq, final, Outcome.COMPLETED)) == 1
        assert isinstance(await it.accept(draft("new")), Accepted)


_FLOOD = """
import asyncio, sys
from pathlib import Path
from tests.kit.journal import accepted, opened, say

async def main():
    async with opened(Path(sys.argv[1]), quota_bytes=1 << 30) as (it, _):
        async def worker(w):
            for n in range(10**6):
                name, frames = f"{w}.{n}", (f"{w}.{n}".encode(),) if w % 4 == 0 else ()
                job = await accepted(it, name, "x" * 500, frames=frames)
                say("accepted", name, job.seq)
        await asyncio.gather(*(worker(w) for w in range(64)))

asyncio.run(main())
"""


def flood(directory: Path, lines: int) -> dict[str, int]:
    """Let 64 callers at once have jobs accepted, kill them, return what they were told."""
    with subprocess.Popen(
        [sys.executable, "-c", _FLOOD, str(directory)],
        stdout=subprocess.PIPE, text=True, env=child_environment(), cwd=ROOT,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(lines)]
        child.kill()
        said += child.stdout.readlines()
    return {name: seq for _, name, seq in lines_of("".join(x for x in said if x.endswith("\n")))}


@pytest.mark.parametrize("lines", [101, 350, 777])
async def test_kills_in_a_flood(home: Path, lines: int) -> None:
    """Nothing that was told is missing, whenever the process dies; the order is kept."""
    told = await asyncio.to_thread(flood, home, lines)
    assert len(told) >= lines
    assert list(told.values()) == sorted(told.values())
    async with opened(home, quota_bytes=1 << 30) as (it, found):
        assert found.reset is None
        kept = {job.key.id: job.seq for job in found.jobs}
        assert told.items() <= kept.items()
        assert list(kept.values()) == list(range(1, len(kept) + 1))
        assert all(job.request == {"prompt": "x" * 500} for job in found.jobs)
        seen = [job for job in found.jobs if job.frames]
        assert len(frame_files(home)) == len(seen) > 0
        for job in seen:
            assert await it.frames(job.seq) == (job.key.id.encode(),)
