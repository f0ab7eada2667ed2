"""The journal: every accepted job and its final, on disk before anybody is told.

One thread owns the SQLite database. Callers await; whatever waits when the thread comes round is
one transaction, synced once. A stalling disk delays those who wait for it and nothing else.

Requests are erased when their job ends: the final is written in their place, `secure_delete`
overwrites what that leaves, and the write-ahead log, which still holds the old pages, is moved into
the database and emptied once the journal has been idle for a second, at the latest half a minute
after the end. (What a flash card keeps in its spare blocks is out of reach.)

Frames lie beside the database, in a file for each job (or in memory, if so set), as long as the job
is open.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from edged.jobs import Draft, Key, Outcome, Reply
from edged.journal_frames import Frames, Keep
from edged.journal_rows import Accepted, Known, Opened, OutboxRow
from edged.journal_store import Limits
from edged.journal_thread import JournalStats, JournalThread
from edged.ports import Clock, Trace, no_trace

__all__ = ["Accepted", "Journal", "JournalStats", "Known", "Opened", "OutboxRow"]


class Journal:
    """Jobs, finals and the outbox, in one SQLite file.

    Every awaited change is on disk when it returns. Results come in the order of the calls.

    Any method may raise JournalFull (no room within the quota or on the disk) or
    JournalUnavailable (any other trouble of the storage); the operation has then not happened and
    may be tried again. Methods that take a job's number raise JobGone for a number the journal does
    not have: it was evicted, or damage made the journal start anew.

    Args:
        path: The database file; its directory must exist.
        clock: Stamps the ends of jobs; told by `open` how long edged ran before.
        quota_bytes: The most the database may hold; the write-ahead log adds about 1 MiB.
        results: The most ended jobs kept, those not counted whose final is not delivered yet.
            Fewer are if the room is needed for new jobs.
        results_s: The seconds of running time an ended job is kept.
        max_final_bytes: Room set aside for each answer of every open job.
        frames_dir: The folder of the files with frames; beside the database if absent. Files in it
            that are named as ours are, and that no open job has, are removed.
        keep_frames: Whether frames are on disk when their job is accepted, or in memory only.
        frames_bytes: The most that the frames of all open jobs may have.
        trace: Called in the journal's thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock,
        quota_bytes: int,
        results: int,
        results_s: float,
        max_final_bytes: int = 256 * 1024,
        frames_dir: Path | None = None,
        keep_frames: Keep = "durable",
        frames_bytes: int = 256 * 1024 * 1024,
        trace: Trace = no_trace,
    ) -> None:
        limits = Limits(quota_bytes, results, results_s, max_final_bytes)
        folder = frames_dir or path.parent / "frames"
        frames = Frames(folder, keep=keep_frames, quota_bytes=frames_bytes, trace=trace)
        self._thread = JournalThread(path, limits, clock, frames, trace)

    # Life -----------------------------------------------------------------------------------------

    async def open(self) -> Opened:
        """Open the journal, or make it; jobs found running were cut off by a crash: a death more.

        Raises:
            JournalTooNew: A newer edged wrote it; it was not touched.
            JournalFull: There is no room; try again.
            JournalUnavailable: It cannot be opened; the hint says what to do. Try again.
        """
        opened = self._thread.start()
        try:
            return await opened
        except asyncio.CancelledError:
            self._thread.ask_to_end()
            raise
        except Exception:
            await self.close()
            raise

    async def close(self) -> None:
        """Finish what is waiting, store the running time, empty the log, close; idempotent."""
        self._thread.ask_to_end()
        await self._thread.wait_ended()

    @property
    def stats(self) -> JournalStats:
        """Sizes and health; a snapshot."""
        return self._thread.stats

    def stuck_s(self) -> float:
        """Return for how long, in seconds, the thread has had work and has not come back from it.

        0 while it is idle. A long queue that moves is not stuck.
        """
        return self._thread.stuck_s()

    # Operations -----------------------------------------------------------------------------------

    def accept(self, draft: Draft) -> asyncio.Future[Accepted | Known]:
        """Make the draft a job unless one of its name is kept; durable when the future is done.

        Raises (in the future):
            JournalFull: The room left is set aside for the finals of the jobs that are open.
            FramesFull: The frames of the jobs that are open leave no room for these.
        """
        request = json.dumps(draft.request, ensure_ascii=False, separators=(",", ":"))
        content = request.encode("utf-8", "surrogatepass")
        return self._thread.submit(
            lambda store: store.accept(draft, content),
            size=len(content) + sum(map(len, draft.frames)),
            must_fit=False,
            inside="in_accept_txn",
            after="after_accept_commit",
        )

    def find(self, key: Key) -> asyncio.Future[Known | None]:
        """Look for a job of this name, open or ended; None if none is kept."""
        return self._thread.submit(lambda store: store.find(key), writes=False)

    async def add_reply(self, seq: int, reply: Reply) -> tuple[int, ...]:
        """Send the job's later events to `reply` too; a known topic gets its new correlation.

        If the job has ended, its final is queued for that topic (again, if it had been), and the
        outbox rows are returned.
        """
        return await self._thread.submit(lambda store: store.add_reply(seq, reply))

    async def start(self, seq: int) -> int:
        """Mark the job running; return how often it has been started: the `attempt`, from 1.

        Raises:
            JobGone: Also for a job that has ended.
        """
        return await self._thread.submit(lambda store: store.start(seq), after="after_attempt_mark")

    async def frames(self, seq: int) -> tuple[bytes, ...]:
        """Return the frames of an open job as they were accepted; none if it had none.

        Raises:
            FramesLost: They are missing, damaged, or were in memory before a restart.
            JobGone: Also for a job that has ended.
        """
        return await self._thread.submit(lambda store: store.frames(seq), writes=False)

    async def plan(self, seq: int, plan: dict[str, Any]) -> None:
        """Keep what was decided about the frames of a job until it ends; JSON, small.

        Raises:
            JobGone: Also for a job that has ended.
        """
        await self._thread.submit(lambda store: store.plan(seq, plan))

    async def release(self, seq: int) -> None:
        """Put a running job back into the queue; no death is counted."""
        await self._thread.submit(lambda store: store.release(seq))

    async def died(self, seq: int, reason: str) -> int:
        """Put a job whose engine died back into the queue; return its deaths."""
        return await self._thread.submit(lambda store: store.died(seq, reason))

    async def finish(self, seq: int, final: bytes, outcome: Outcome) -> tuple[int, ...]:
        """End the job: store its final, queue it for every reply topic, erase the request.

        Returns the outbox rows; none if the job had ended already, and then nothing changes.
        """
        return await self._thread.submit(
            lambda store: store.finish(seq, final, outcome),
            size=len(final),
            inside="in_result_txn",
            after="after_result_commit",
        )

    async def replace_final(self, seq: int, final: bytes, outcome: Outcome) -> tuple[int, ...]:
        """Put another final, once, in place of one that no broker takes; return fresh outbox rows.

        They are for the topics that still wait for the old final (for all, if none does).
        """
        return await self._thread.submit(
            lambda store: store.replace_final(seq, final, outcome), size=len(final)
        )

    async def outgoing(self, row: int) -> OutboxRow | None:
        """Return what an outbox row says; None if it was delivered, or replaced by another row."""
        return await self._thread.submit(lambda store: store.outgoing(row), writes=False)

    async def delivered(self, row: int) -> None:
        """Take a row out of the outbox; nothing happens if it is not there."""
        await self._thread.submit(lambda store: store.delivered(row), after="after_sent_mark")

    async def get(self, name: str) -> dict[str, Any] | None:
        """Return the small fact kept under this name, or None."""
        return await self._thread.submit(lambda store: store.get(name), writes=False)

    async def put(self, name: str, value: dict[str, Any]) -> None:
        """Keep a small fact, in place of the former one."""
        text = json.dumps(value)
        await self._thread.submit(
            lambda store: store.put(name, text), size=len(text), must_fit=False
        )

    async def checkpoint(self) -> None:
        """Empty the write-ahead log now: afterwards no file holds a request of an ended job."""
        await self._thread.submit(self._thread.checkpoint, writes=False, apart=True)
