"""How the journal's rows are written and read, and how damage in them is seen."""

from __future__ import annotations

import json
import sqlite3
import zlib
from typing import Any

from edged.jobs import Job, Key, Kind, Reply, Stamp
from edged.journal_schema import Damaged

#: An outbox row id is seq * ROWS + n; see the schema.
ROWS = 1 << 24
#: What makes a Job, with its content; see `job_of`.
COLUMNS = (
    "seq, client, id, kind, digest, replies, priority, boot_id, boottime, wall, synced, ran,"
    " deadline_s, starts, deaths"
)


def verify(db: sqlite3.Connection) -> None:
    """Raise Damaged unless every job has its content, unchanged, and every outbox row its job.

    Names every column: one whose name has been damaged is an error of SQLite here, and not later.
    """
    db.execute(f"SELECT {COLUMNS}, ended_ran, outcome, replaced, sends, last_death FROM job")  # noqa: S608 - names from this file
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


def checked(seq: int, content: bytes | None, crc: int | None) -> bytes:
    """Return the content of a job; raise Damaged if it is not there or has changed."""
    if content is None or zlib.crc32(content) != crc:
        raise Damaged(f"the content of job {seq} is not what was written")
    return content


def job_of(row: tuple[Any, ...]) -> Job:
    """Return the job of a row of COLUMNS, its content and the content's CRC."""
    seq, client, job_id, kind, digest, replies, priority = row[:7]
    boot_id, boottime, wall, synced, ran, deadline_s, starts, deaths, content, crc = row[7:]
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
    )
