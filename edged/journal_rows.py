"""What the journal's rows say, how they are written and read, and how damage in them is seen."""

from __future__ import annotations

import json
import sqlite3
import zlib
from dataclasses import dataclass
from typing import Any

from edged.jobs import Job, Key, Kind, Reply, Stamp
from edged.journal_frames import TOKEN
from edged.journal_schema import Damaged

#: An outbox row id is seq * ROWS + n; see the schema.
ROWS = 1 << 24
#: What makes a Job, with its content; see `job_of`.
COLUMNS = (
    "seq, client, id, kind, digest, replies, priority, boot_id, boottime, wall, synced, ran,"
    " deadline_s, starts, deaths, frames, frame_file, answers, plan, plan_crc"
)


@dataclass(frozen=True, slots=True)
class Opened:
    """What a journal held when it was opened."""

    #: Open jobs by number; none is running.
    jobs: tuple[Job, ...]
    #: Seconds that edged had run on this journal before.
    ran_s: float
    #: Why the old journal was set aside and a new one begun, or None.
    reset: str | None
    #: Outbox rows not delivered yet, in order.
    pending: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Accepted:
    """The draft became a job."""

    job: Job


@dataclass(frozen=True, slots=True)
class Known:
    """A job of this name is kept already; nothing was changed."""

    seq: int
    #: Another digest than the draft's means a conflict.
    digest: bytes
    ended: bool
    #: The stored final of an ended job.
    final: bytes | None
    replies: tuple[Reply, ...]


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A final that has yet to reach one reply topic."""

    row: int
    seq: int
    key: Key
    topic: str
    correlation: bytes | None
    payload: bytes
    #: The final has been replaced once; it is not replaced again.
    replaced: bool


def verify(db: sqlite3.Connection) -> None:
    """Raise Damaged unless every job has its content, unchanged, and every outbox row its job.

    Names every column: one whose name has been damaged is an error of SQLite here, and not later.
    """
    others = "frame_bytes, ended_ran, outcome, replaced, sends, last_death"
    db.execute(f"SELECT {COLUMNS}, {others} FROM job")  # noqa: S608 - names from this file
    db.execute("SELECT row, topic, correlation FROM outbox")
    db.execute("SELECT name, value FROM fact")
    db.execute("SELECT one, ran, next_seq FROM meta")
    kinds = set(Kind)
    for seq, kind, replies, content, crc in db.execute(
        "SELECT j.seq, kind, replies, bytes, crc FROM job j LEFT JOIN content c ON c.seq = j.seq"
    ):
        if kind not in kinds:
            raise Damaged(f"job {seq} is of no known kind")
        checked(seq, content, crc)
        read_replies(replies)
    for seq, frames, size, token, answers, plan, crc in db.execute(
        "SELECT seq, frames, frame_bytes, frame_file, answers, plan, plan_crc FROM job"
    ):
        if frames < 0 or size < 0 or answers < 1 or not (token is None or TOKEN.match(token)):
            raise Damaged(f"frames or answers of job {seq} are not what was written")
        read_plan(seq, plan, crc)
    (stray,) = db.execute(
        "SELECT (SELECT 1 - COUNT(*) FROM meta)"
        " + (SELECT COUNT(*) FROM outbox WHERE row / ?"
        " NOT IN (SELECT seq FROM job WHERE ended_ran IS NOT NULL))"
        " + (SELECT COUNT(*) FROM content WHERE seq NOT IN (SELECT seq FROM job))",
        (ROWS,),
    ).fetchone()
    if stray:
        raise Damaged(f"{stray} rows are missing or belong to no job")


def row_range(seq: int) -> tuple[int, int]:
    """Return the first and the last outbox row that a job can have."""
    return seq * ROWS, seq * ROWS + ROWS - 1


def write_replies(replies: tuple[Reply, ...]) -> str:
    """Return reply topics as the journal keeps them."""
    return json.dumps(
        [[r.topic, None if r.correlation is None else r.correlation.hex()] for r in replies]
    )


def read_replies(text: str) -> tuple[Reply, ...]:
    """Return reply topics from what the journal keeps; raise Damaged if they are none."""
    try:
        return tuple(
            Reply(topic, None if correlation is None else bytes.fromhex(correlation))
            for topic, correlation in json.loads(text)
        )
    except (ValueError, TypeError) as error:
        raise Damaged("reply topics cannot be read") from error


def write_plan(plan: dict[str, Any]) -> tuple[str, int]:
    """Return a plan as the journal keeps it, and its CRC."""
    text = json.dumps(plan, separators=(",", ":"))
    return text, zlib.crc32(text.encode())


def read_plan(seq: int, text: str | None, crc: int | None) -> dict[str, Any] | None:
    """Return the plan of a job, if it has one; raise Damaged if it has changed."""
    if text is None and crc is None:
        return None
    if text is None or zlib.crc32(text.encode()) != crc:
        raise Damaged(f"the plan of job {seq} is not what was written")
    plan: dict[str, Any] = json.loads(text)
    return plan


def checked(seq: int, content: bytes | None, crc: int | None) -> bytes:
    """Return the content of a job; raise Damaged if it is not there or has changed."""
    if content is None or zlib.crc32(content) != crc:
        raise Damaged(f"the content of job {seq} is not what was written")
    return content


def job_of(row: tuple[Any, ...]) -> Job:
    """Return the job of a row of COLUMNS, its content and the content's CRC."""
    seq, client, job_id, kind, digest, replies, priority = row[:7]
    boot_id, boottime, wall, synced, ran, deadline_s, starts, deaths = row[7:15]
    frames, frame_file, answers, plan, plan_crc, content, crc = row[15:]
    return Job(
        seq=seq,
        key=Key(client or None, job_id),
        kind=Kind(kind),
        request=json.loads(checked(seq, content, crc)),
        digest=digest,
        replies=read_replies(replies),
        priority=priority,
        arrived=Stamp(boot_id=boot_id, boottime=boottime, wall=wall, synced=bool(synced), ran=ran),
        deadline_s=deadline_s,
        starts=starts,
        deaths=deaths,
        frames=frames,
        answers=answers,
        plan=read_plan(seq, plan, plan_crc),
        durable=not frames or frame_file is not None,
    )
