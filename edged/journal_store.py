"""What the journal does to its database, one operation at a time, on the journal's thread.

Every method runs inside a transaction of the caller (`begin` … `commit`), so that many operations
share one sync of the disk. A method that raises an EdgedError has changed nothing yet.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edged.errors import JobGone, JournalFull
from edged.jobs import Draft, Job, Key, Outcome, Reply, State, joined
from edged.journal_frames import Frames, Held
from edged.journal_rows import (
    COLUMNS,
    ROWS,
    Accepted,
    Known,
    OutboxRow,
    checked,
    job_of,
    read_replies,
    row_range,
    verify,
    write_plan,
    write_replies,
)
from edged.journal_schema import PAGE_BYTES, open_database
from edged.ports import Clock

#: Pages that one more job may touch besides those of its content: index and table splits.
_OVERHEAD_PAGES = 4
#: How many ended jobs are forgotten in one transaction, so that none becomes long.
_EVICT_AT_ONCE = 64
#: How many are when room is needed.
_EVICT_FOR_ROOM = 8
#: What a page of overflow holds.
_PAGE_PAYLOAD = PAGE_BYTES - 4
#: Pages that an empty journal has, roughly.
_BASE_PAGES = 12
#: What the plan of a frame may need.
_PLAN_BYTES = 128
#: Bytes of disk left to the write-ahead log, which is emptied past a part of this.
_LOG_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the journal: bytes on disk, finals kept, seconds of running time, final's bytes."""

    quota_bytes: int
    results: int
    results_s: float
    max_final_bytes: int


@dataclass(slots=True)
class Counts:
    """How many rows there are; kept in step so that nothing has to be counted."""

    open: int = 0
    #: Of the requests of open jobs.
    open_pages: int = 0
    #: Set aside for the finals and the plans of open jobs.
    reserved_pages: int = 0
    ended: int = 0
    #: Of the ended: those whose final is not delivered everywhere.
    waiting: int = 0
    outbox: int = 0
    next_seq: int = 1


class Store:
    """The journal's tables. Used by one thread only.

    Errors of SQLite leave it as they are (sqlite3.Error); `Damaged` when what is read is not what
    was written.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits,
        clock: Clock,
        frames: Frames,
        *,
        first_seq: int = 1,
        on_reset: Callable[[str], None],
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._frames = frames
        self._db = open_database(
            path,
            quota_bytes=limits.quota_bytes,
            first_seq=first_seq,
            verify=verify,
            on_reset=on_reset,
        )
        self._changes = 0
        self._free_pages = 0
        #: Content was overwritten or deleted; the write-ahead log still has it until a checkpoint.
        self.erased = False
        self._age_checked_ran = float("-inf")
        self.counts = Counts()
        #: The counts to go back to; None outside a transaction.
        self._kept: Counts | None = None
        try:
            #: Seconds edged had run on this journal by its last commit.
            self.ran = self._load_counts()
            frames.adopt(self._held())
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the database as it is; an open transaction is rolled back."""
        self._db.close()

    # Transactions ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a transaction."""
        self._kept = replace(self.counts)
        self._db.execute("BEGIN IMMEDIATE")
        self._changes = self._db.total_changes
        self._free_pages = self._room()

    def commit(self, *, force: bool = False) -> bool:
        """Forget what is past its window, store the running time, and sync it all to disk.

        A transaction that changed nothing is not written, unless forced: refusals and duplicates
        must not wear the card. Returns whether it was written.
        """
        self._forget()
        if self._db.total_changes == self._changes and not force:
            self.rollback()
            return False
        self._frames.sync()
        self._db.execute(
            "UPDATE meta SET ran = ?, next_seq = ?",
            (self._clock.stamp().ran, self.counts.next_seq),
        )
        self._db.execute("COMMIT")
        self._kept = None
        self._frames.committed()
        return True

    def rollback(self) -> None:
        """Undo everything since `begin`; harmless without a transaction."""
        self._frames.rolled_back()
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        if self._kept is not None:
            self.counts, self._kept = self._kept, None

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database and empty its file."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self.erased = False

    def measure(self) -> tuple[int, str | None]:
        """Return the bytes of pages in use, and why even a small job would be refused, if it is."""
        room = self._room()
        used = self._limits.quota_bytes - room * PAGE_BYTES
        if room >= self._needed(0, self._reserve(1, 0)) or self.counts.ended > self.counts.waiting:
            return used, None
        return used, f"the journal is full: {used} of {self._limits.quota_bytes} bytes"

    # Operations -----------------------------------------------------------------------------------

    def recover(self) -> tuple[tuple[Job, ...], tuple[int, ...]]:
        """Queue again what a crash left running, one death more; return open jobs, outbox rows."""
        self._db.execute(
            "UPDATE job SET state = 'queued', deaths = deaths + 1, last_death = 'crash'"
            " WHERE state = 'running'"
        )
        jobs = tuple(
            job_of(row)
            for row in self._db.execute(
                f"SELECT {COLUMNS}, bytes, crc FROM job JOIN content USING (seq)"  # noqa: S608
                " WHERE state = 'queued' ORDER BY seq"
            )
        )
        rows = tuple(row for (row,) in self._db.execute("SELECT row FROM outbox ORDER BY row"))
        return jobs, rows

    def find(self, key: Key) -> Known | None:
        """Return what is kept by this name."""
        found = self._db.execute(
            "SELECT seq, digest, state, replies FROM job WHERE client = ? AND id = ?",
            (key.client or "", key.id),
        ).fetchone()
        if found is None:
            return None
        seq, digest, state, replies = found
        ended = state == State.ENDED
        final = self._final(seq) if ended else None
        return Known(seq, digest, ended, final, read_replies(replies))

    def accept(self, draft: Draft, request: bytes) -> Accepted | Known:
        """Store a job, `request` being its request as JSON, or return what is kept by its name.

        Raises:
            JournalFull: It would take room that the finals of the open jobs may need, or its
                frames have no room.
            JournalUnavailable: Its frames cannot be stored.
        """
        key = draft.key
        known = self.find(key)
        if known is not None:
            return known
        frames, frame_bytes = draft.frames, sum(map(len, draft.frames))
        reserve = self._reserve(draft.answers, len(frames))
        if frames:
            needed = self._needed(len(request), reserve) * PAGE_BYTES
            self._frames.admit(frame_bytes, needed + _LOG_BYTES)
        self._admit(len(request), reserve)
        seq = self.counts.next_seq
        arrived = draft.arrived
        token = self._frames.put(seq, frames) if frames else None
        self._db.execute(
            "INSERT INTO job (seq, client, id, kind, digest, priority, deadline_s, boot_id,"
            " boottime, wall, synced, ran, replies, answers, frames, frame_bytes,"
            " frame_file, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'queued')",
            (
                seq,
                key.client or "",
                key.id,
                str(draft.kind),
                draft.digest,
                draft.priority,
                draft.deadline_s,
                arrived.boot_id,
                arrived.boottime,
                arrived.wall,
                arrived.synced,
                arrived.ran,
                write_replies((draft.reply,)),
                draft.answers,
                len(frames),
                frame_bytes,
                token,
            ),
        )
        self._db.execute(
            "INSERT INTO content VALUES (?, ?, ?)", (seq, request, zlib.crc32(request))
        )
        self.counts.next_seq += 1
        self.counts.open += 1
        self.counts.open_pages += _pages(len(request))
        self.counts.reserved_pages += reserve
        return Accepted(
            Job(
                seq=seq,
                key=key,
                kind=draft.kind,
                request=draft.request,
                digest=draft.digest,
                replies=(draft.reply,),
                priority=draft.priority,
                arrived=arrived,
                deadline_s=draft.deadline_s,
                frames=len(frames),
                answers=draft.answers,
                durable=not frames or token is not None,
            )
        )

    def frames(self, seq: int) -> tuple[bytes, ...]:
        """Return the frames of an open job.

        Raises:
            FramesLost: They are gone, or are not what was put.
        """
        state, count, size, token = self._look_up(seq, "state, frames, frame_bytes, frame_file")
        if state == State.ENDED:
            raise JobGone(f"job {seq} has ended")
        return self._frames.get(Held(seq, token, size), count) if count else ()

    def plan(self, seq: int, plan: dict[str, Any]) -> None:
        """Keep what was decided about the frames of an open job, in place of what was before."""
        (state,) = self._look_up(seq, "state")
        if state == State.ENDED:
            raise JobGone(f"job {seq} has ended")
        self._db.execute(
            "UPDATE job SET plan = ?, plan_crc = ? WHERE seq = ?", (*write_plan(plan), seq)
        )

    def add_reply(self, seq: int, reply: Reply) -> tuple[int, ...]:
        """Send the events to come to `reply` too; of an ended job, queue the final for it again.

        A final that still waits for this very topic is queued once, with the new correlation.
        """
        state, replies, sends = self._look_up(seq, "state, replies, sends")
        text = write_replies(joined(read_replies(replies), reply))
        if state != State.ENDED:
            if text != replies:
                self._db.execute("UPDATE job SET replies = ? WHERE seq = ?", (text, seq))
            return ()
        waited = self._waits(seq)
        self._unqueue(seq, reply.topic)
        rows = self._queue(seq, sends, (reply,))
        self._db.execute(
            "UPDATE job SET replies = ?, sends = ? WHERE seq = ?", (text, sends + len(rows), seq)
        )
        self.counts.waiting += 1 - waited
        return rows

    def start(self, seq: int) -> int:
        """Count a start and mark the job running; return its number, from 1."""
        state, starts = self._look_up(seq, "state, starts")
        if state == State.ENDED:
            raise JobGone(f"job {seq} has ended")
        self._db.execute(
            "UPDATE job SET state = 'running', starts = ? WHERE seq = ?", (starts + 1, seq)
        )
        return int(starts) + 1

    def release(self, seq: int) -> None:
        """Put a running job back into the queue; its death is not counted."""
        self._look_up(seq, "1")
        self._db.execute(
            "UPDATE job SET state = 'queued' WHERE seq = ? AND state = 'running'", (seq,)
        )

    def died(self, seq: int, reason: str) -> int:
        """Count a death and put the job back; return the deaths. An ended job stays as it is."""
        state, deaths = self._look_up(seq, "state, deaths")
        if state == State.ENDED:
            return int(deaths)
        self._db.execute(
            "UPDATE job SET state = 'queued', deaths = ?, last_death = ? WHERE seq = ?",
            (deaths + 1, reason, seq),
        )
        return int(deaths) + 1

    def finish(self, seq: int, final: bytes, outcome: Outcome) -> tuple[int, ...]:
        """End a job: its final replaces its request and is queued for every reply topic.

        Returns the outbox rows; none if the job had ended already, and then nothing changes.
        """
        columns = "state, replies, sends, answers, frames"
        state, replies, sends, answers, frames = self._look_up(seq, columns)
        if state == State.ENDED:
            return ()
        (size,) = self._db.execute(
            "SELECT length(bytes) FROM content WHERE seq = ?", (seq,)
        ).fetchone()
        self._store_final(seq, final)
        rows = self._queue(seq, sends, read_replies(replies))
        self._db.execute(
            "UPDATE job SET state = 'ended', outcome = ?, ended_ran = ?, sends = ?,"
            " frame_bytes = 0, frame_file = NULL, plan = NULL, plan_crc = NULL WHERE seq = ?",
            (str(outcome), self._clock.stamp().ran, sends + len(rows), seq),
        )
        self._frames.drop(seq)
        self.counts.open -= 1
        self.counts.open_pages -= _pages(size)
        self.counts.reserved_pages -= self._reserve(answers, frames)
        self.counts.ended += 1
        self.counts.waiting += bool(rows)
        return rows

    def replace_final(self, seq: int, final: bytes, outcome: Outcome) -> tuple[int, ...]:
        """Put another final, once, in the place of one that no broker takes; return fresh rows.

        They are for the topics that still wait for the old final: whoever has it keeps it. If none
        waits, they are for all. Replacing again changes nothing and returns no rows.
        """
        state, replies, sends, replaced = self._look_up(seq, "state, replies, sends, replaced")
        if state != State.ENDED:
            raise JobGone(f"job {seq} has not ended: there is no final to replace")
        if replaced:
            return ()
        known = read_replies(replies)
        waiting = {
            topic
            for (topic,) in self._db.execute(
                "SELECT topic FROM outbox WHERE row BETWEEN ? AND ?", row_range(seq)
            )
        }
        self._store_final(seq, final)
        self._unqueue(seq, None)
        targets = tuple(reply for reply in known if reply.topic in waiting) or known
        rows = self._queue(seq, sends, targets)
        self.counts.waiting += 0 if waiting else 1
        self._db.execute(
            "UPDATE job SET replaced = 1, outcome = ?, sends = ? WHERE seq = ?",
            (str(outcome), sends + len(rows), seq),
        )
        return rows

    def outgoing(self, row: int) -> OutboxRow | None:
        """Return what stands in an outbox row; None if it is delivered or has been replaced."""
        found = self._db.execute(
            "SELECT o.topic, o.correlation, j.seq, j.client, j.id, j.replaced"
            " FROM outbox o JOIN job j ON j.seq = o.row / ? WHERE o.row = ?",
            (ROWS, row),
        ).fetchone()
        if found is None:
            return None
        topic, correlation, seq, client, job_id, replaced = found
        return OutboxRow(
            row,
            seq,
            Key(client or None, job_id),
            topic,
            correlation,
            self._final(seq),
            bool(replaced),
        )

    def delivered(self, row: int) -> None:
        """Take a row out of the outbox: the broker has it. Unknown rows are ignored."""
        cursor = self._db.execute("DELETE FROM outbox WHERE row = ?", (row,))
        if cursor.rowcount:
            self.counts.outbox -= 1
            self.counts.waiting -= 1 - self._waits(row // ROWS)

    def get(self, name: str) -> dict[str, Any] | None:
        """Return a small fact; None if it is not there or cannot be read."""
        found = self._db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        if found is None:
            return None
        try:
            value = json.loads(found[0])
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def put(self, name: str, value: str) -> None:
        """Keep a small fact, `value` being a JSON object."""
        self._db.execute(
            "INSERT INTO fact VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (name, value),
        )

    def make_room(self) -> bool:
        """Forget the ended, delivered jobs that ended first; return whether there were any."""
        return self._evict("j.ended_ran IS NOT NULL", (), _EVICT_FOR_ROOM) > 0

    # Parts ----------------------------------------------------------------------------------------

    def _load_counts(self) -> float:
        row = self._db.execute(
            "SELECT ran, next_seq,"
            " (SELECT COUNT(*) FROM job WHERE ended_ran IS NULL),"
            " (SELECT COUNT(*) FROM job WHERE ended_ran IS NOT NULL),"
            " (SELECT COUNT(*) FROM outbox), (SELECT COUNT(DISTINCT row / ?) FROM outbox),"
            " (SELECT MAX(seq) FROM job),"
            " (SELECT coalesce(SUM(1 + length(bytes) / ?), 0) FROM content JOIN job USING (seq)"
            "  WHERE ended_ran IS NULL) FROM meta",
            (ROWS, _PAGE_PAYLOAD),
        ).fetchone()
        ran, next_seq, open_jobs, ended, outbox, waiting, last_seq, open_pages = row
        next_seq = max(next_seq, (last_seq or 0) + 1)
        reserved = sum(
            self._reserve(answers, frames)
            for answers, frames in self._db.execute(
                "SELECT answers, frames FROM job WHERE ended_ran IS NULL"
            )
        )
        self.counts = Counts(open_jobs, open_pages, reserved, ended, waiting, outbox, next_seq)
        return float(ran)

    def _held(self) -> list[Held]:
        return [
            Held(*row)
            for row in self._db.execute(
                "SELECT seq, frame_file, frame_bytes FROM job"
                " WHERE ended_ran IS NULL AND frames > 0"
            )
        ]

    def _look_up(self, seq: int, columns: str) -> Any:
        found = self._db.execute(
            f"SELECT {columns} FROM job WHERE seq = ?",  # noqa: S608 - names from this file
            (seq,),
        ).fetchone()
        if found is None:
            raise JobGone(f"the journal has no job {seq}")
        return found

    def _final(self, seq: int) -> bytes:
        found = self._db.execute("SELECT bytes, crc FROM content WHERE seq = ?", (seq,)).fetchone()
        return checked(seq, *(found or (None, None)))

    def _store_final(self, seq: int, final: bytes) -> None:
        self.erased = True
        self._db.execute(
            "UPDATE content SET bytes = ?, crc = ? WHERE seq = ?", (final, zlib.crc32(final), seq)
        )

    def _queue(self, seq: int, sends: int, replies: tuple[Reply, ...]) -> tuple[int, ...]:
        rows = tuple(seq * ROWS + sends + n for n in range(len(replies)))
        self._db.executemany(
            "INSERT INTO outbox VALUES (?, ?, ?)",
            [(row, r.topic, r.correlation) for row, r in zip(rows, replies, strict=True)],
        )
        self.counts.outbox += len(rows)
        return rows

    def _waits(self, seq: int) -> bool:
        """Return whether a job has rows in the outbox."""
        return bool(
            self._db.execute(
                "SELECT EXISTS (SELECT 1 FROM outbox WHERE row BETWEEN ? AND ?)", row_range(seq)
            ).fetchone()[0]
        )

    def _unqueue(self, seq: int, topic: str | None) -> None:
        cursor = self._db.execute(
            "DELETE FROM outbox WHERE row BETWEEN ? AND ? AND topic = coalesce(?, topic)",
            (*row_range(seq), topic),
        )
        self.counts.outbox -= cursor.rowcount

    # Room -----------------------------------------------------------------------------------------

    def _room(self) -> int:
        """Return the pages that may still be filled inside the quota."""
        (pages,) = self._db.execute("PRAGMA page_count").fetchone()
        (free,) = self._db.execute("PRAGMA freelist_count").fetchone()
        return int(self._limits.quota_bytes // PAGE_BYTES - pages + free)

    def _reserve(self, answers: int, frames: int) -> int:
        """Return the pages set aside for the final of a job, and for its plan."""
        plan = _pages(frames * _PLAN_BYTES) if frames else 0
        return _pages(answers * self._limits.max_final_bytes) + _OVERHEAD_PAGES + plan

    def _needed(self, size: int, reserve: int) -> int:
        """Return the pages that a new job of `size` needs, the finals of all open jobs included."""
        return _pages(size) + _OVERHEAD_PAGES + self.counts.reserved_pages + reserve

    def _admit(self, size: int, reserve: int) -> None:
        needed = self._needed(size, reserve)
        quota = self._limits.quota_bytes
        # An answer long delivered is worth less than a new question that can be taken for it.
        of_use = _BASE_PAGES + self.counts.open_pages + needed <= quota // PAGE_BYTES
        while self._free_pages < needed:
            evicted = of_use and self.make_room()
            self._free_pages = self._room()
            if not evicted and self._free_pages < needed:
                raise JournalFull(
                    f"the journal is full: {quota - self._free_pages * PAGE_BYTES} of {quota} bytes"
                    f" are used, {self.counts.open} jobs are open, and this one needs"
                    f" {needed * PAGE_BYTES} with the room for their finals",
                    hint="wait for jobs to end, or raise limits.journal_mb",
                )
        self._free_pages -= _pages(size) + 1

    def _forget(self) -> None:
        """Evict a few of the ended jobs that are too many or too old and that are delivered."""
        excess = self.counts.ended - self.counts.waiting - self._limits.results
        if excess > 0:
            self._evict("j.ended_ran IS NOT NULL", (), min(excess, _EVICT_AT_ONCE))
        ran = self._clock.stamp().ran
        if ran - self._age_checked_ran >= 1.0:
            oldest = ran - self._limits.results_s
            if self._evict("j.ended_ran < ?", (oldest,), _EVICT_AT_ONCE) < _EVICT_AT_ONCE:
                self._age_checked_ran = ran

    def _evict(self, condition: str, parameters: tuple[float, ...], limit: int) -> int:
        found = self._db.execute(
            f"SELECT j.seq FROM job j WHERE {condition}"  # noqa: S608 - conditions of this file
            " AND NOT EXISTS (SELECT 1 FROM outbox o"
            f"  WHERE o.row BETWEEN j.seq * {ROWS} AND j.seq * {ROWS} + {ROWS - 1})"
            " ORDER BY j.ended_ran, j.seq LIMIT ?",
            (*parameters, limit),
        ).fetchall()
        self.erased |= bool(found)
        self._db.executemany("DELETE FROM content WHERE seq = ?", found)
        self._db.executemany("DELETE FROM job WHERE seq = ?", found)
        self.counts.ended -= len(found)
        return len(found)


def _pages(size: int) -> int:
    # One page is for the row itself.
    return 1 + size // _PAGE_PAYLOAD
