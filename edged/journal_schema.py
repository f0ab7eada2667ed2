"""The journal's file: how it is made, checked, migrated and, if damaged, set aside.

A new journal is made under another name and renamed when it is complete. So a file of the right
name that is empty, foreign or without a schema is damage and never a start that was interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

from edged.errors import JournalFull, JournalTooNew, JournalUnavailable

#: "edgd": tells our file from any other SQLite database (PRAGMA application_id).
APPLICATION_ID = 0x65646764
PAGE_BYTES = 4096
#: How many damaged journals are kept beside the live one; they may hold prompts.
KEPT_DAMAGED = 3

#: Statements that lead from version N (the index) to N + 1; each entry is one transaction.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        # One row, written with every commit. `ran`: seconds edged has run on this journal.
        """CREATE TABLE meta (
            one INTEGER PRIMARY KEY CHECK (one = 1),
            ran REAL NOT NULL,
            next_seq INTEGER NOT NULL
        ) STRICT""",
        "INSERT INTO meta VALUES (1, 0.0, 1)",
        # `client` is '' for anonymous; `replies` is JSON [[topic, correlation in hex or null], …];
        # `sends` counts the outbox rows this job ever had.
        """CREATE TABLE job (
            seq INTEGER PRIMARY KEY,
            client TEXT NOT NULL,
            id TEXT NOT NULL,
            kind TEXT NOT NULL,
            digest BLOB NOT NULL,
            priority INTEGER NOT NULL,
            deadline_s REAL,
            boot_id TEXT NOT NULL,
            boottime REAL NOT NULL,
            wall REAL NOT NULL,
            synced INTEGER NOT NULL,
            ran REAL NOT NULL,
            replies TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'ended')),
            starts INTEGER NOT NULL DEFAULT 0,
            deaths INTEGER NOT NULL DEFAULT 0,
            last_death TEXT,
            ended_ran REAL,
            outcome TEXT,
            replaced INTEGER NOT NULL DEFAULT 0,
            sends INTEGER NOT NULL DEFAULT 0
        ) STRICT""",
        "CREATE UNIQUE INDEX job_name ON job (client, id)",
        "CREATE INDEX job_ended ON job (ended_ran) WHERE ended_ran IS NOT NULL",
        # The request while the job is open, its final afterwards: the final takes the very place of
        # the request. SQLite keeps no checksum of a database page, so we keep one of the bytes.
        """CREATE TABLE content (
            seq INTEGER PRIMARY KEY,
            bytes BLOB NOT NULL,
            crc INTEGER NOT NULL
        ) STRICT""",
        # `row` is seq * 2**24 + n: the rows of a job are a range of the primary key, which spares
        # a second index and with it a page per commit.
        """CREATE TABLE outbox (
            row INTEGER PRIMARY KEY,
            topic TEXT NOT NULL,
            correlation BLOB
        ) STRICT""",
        "CREATE TABLE fact (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
    ),
    (
        # `frame_file` is the random part of the name of the file with the frames, NULL if they are
        # in memory; `frame_bytes` is what counts against their quota; `plan` is JSON.
        "ALTER TABLE job ADD COLUMN frames INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE job ADD COLUMN frame_bytes INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE job ADD COLUMN frame_file TEXT",
        "ALTER TABLE job ADD COLUMN answers INTEGER NOT NULL DEFAULT 1",
        "ALTER TABLE job ADD COLUMN plan TEXT",
        "ALTER TABLE job ADD COLUMN plan_crc INTEGER",
    ),
)

_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR})
_FORBIDDEN = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
)
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
#: Errors of the operating system that mean a full disk.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Damaged(Exception):
    """The journal's content is not what was written."""


def translate(error: sqlite3.Error, path: Path) -> JournalUnavailable | Damaged:
    """Return what an error of SQLite means for the journal at `path`."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        # The module's own errors. This one quotes the text, which may be private.
        if isinstance(error, sqlite3.OperationalError) and "UTF-8" in str(error):
            return Damaged("text that is not UTF-8")
        return JournalUnavailable(f"journal {path}: {error}")
    name = error.sqlite_errorname
    primary = code & 0xFF
    if primary in _DAMAGE:
        return Damaged(str(error))
    if primary in _FULL:
        return JournalFull(
            f"journal {path} cannot be written: {error} ({name})",
            hint=f"free space on the file system of {path.parent}, or raise limits.journal_mb",
        )
    if primary in _FORBIDDEN:
        return JournalUnavailable(
            f"journal {path} cannot be opened for writing: {error} ({name})",
            hint=f"make {path.parent} a directory that edged's user may write",
        )
    if primary in _BUSY:
        return JournalUnavailable(
            f"journal {path} is in use: {error}",
            hint="end the program that has it open (another edged, or a database browser)",
        )
    return JournalUnavailable(f"journal {path}: {error} ({name})")


def open_database(
    path: Path,
    *,
    quota_bytes: int,
    first_seq: int,
    verify: Callable[[sqlite3.Connection], None],
    on_reset: Callable[[str], None],
) -> sqlite3.Connection:
    """Open the journal, making or replacing it as needed.

    Args:
        path: The database file; its WAL lies beside it.
        quota_bytes: The most the database file may hold.
        first_seq: The first job number of a new journal.
        verify: Called with a journal of the present version; raises Damaged to have it set aside.
        on_reset: Told why, when a journal has been set aside.

    Returns:
        A connection for this thread, in exclusive WAL mode.

    Raises:
        JournalTooNew: A newer edged wrote it; nothing was changed.
        JournalFull: No room to open it or make a new one.
        JournalUnavailable: It cannot be opened; the hint says what to do.
    """
    if not path.parent.is_dir():
        raise JournalUnavailable(
            f"journal {path}: {path.parent} is not a directory", hint=f"create {path.parent}"
        )
    try:
        try:
            return _open_or_create(path, quota_bytes, first_seq, verify)
        except Damaged as damage:
            _set_aside(path)
            on_reset(str(damage))
        return _open_or_create(path, quota_bytes, first_seq, verify)
    except Damaged as damage:
        raise JournalUnavailable(
            f"journal {path} is damaged even when new: {damage}",
            hint="the storage is failing: replace it",
        ) from damage
    except OSError as error:
        kind = JournalFull if error.errno in NO_SPACE else JournalUnavailable
        raise kind(
            f"journal {path}: {error}",
            hint=f"make {path.parent} a directory that edged's user may write, with free space",
        ) from error


def _open_or_create(
    path: Path,
    quota_bytes: int,
    first_seq: int,
    verify: Callable[[sqlite3.Connection], None],
) -> sqlite3.Connection:
    _check_header(path)
    if not path.exists():
        _create(path, first_seq)
    return _connect(path, quota_bytes, verify)


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _shm(path: Path) -> Path:
    return path.with_name(path.name + "-shm")


def _check_header(path: Path) -> None:
    """Raise Damaged or JournalTooNew by what the file's header says, touching nothing.

    SQLite deletes the WAL of an empty database file and may write to a file it opens, so these
    questions come first. Header: https://www.sqlite.org/fileformat2.html#the_database_header
    """
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        wal = _wal(path)
        if wal.exists() and wal.stat().st_size > 0:
            raise Damaged("the database file is gone, its write-ahead log is not") from None
        return
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise Damaged("file is not a database")
    version: int
    (version,) = struct.unpack(">I", header[60:64])
    (application,) = struct.unpack(">I", header[68:72])
    if application != APPLICATION_ID:
        raise Damaged(f"file is another program's database (application id {application:#x})")
    if version > len(MIGRATIONS):
        raise _too_new(path, version)


def _too_new(path: Path, version: int) -> JournalTooNew:
    return JournalTooNew(
        f"journal {path} has version {version}; this edged knows up to {len(MIGRATIONS)}",
        hint="install the edged that wrote it, or move the journal away to start a new one",
    )


def _create(path: Path, first_seq: int) -> None:
    """Make an empty journal under another name, complete, and rename it."""
    new = path.with_name(path.name + ".new")
    for leftover in (new, _wal(new), _shm(new), new.with_name(new.name + "-journal")):
        leftover.unlink(missing_ok=True)
    # Made here and not by SQLite, so that nobody else may read it even for a moment.
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as connection:
            connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            _migrate(connection, 0)
            connection.execute("UPDATE meta SET next_seq = ?", (first_seq,))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise translate(error, path) from error
    new.rename(path)
    sync_directory(path.parent)


def _connect(
    path: Path, quota_bytes: int, verify: Callable[[sqlite3.Connection], None]
) -> sqlite3.Connection:
    """Open an existing journal, migrate it if it is older, and check it for damage.

    Raises:
        Damaged: It must be set aside.
    """
    # No waiting for locks: nobody else is meant to have it open.
    connection = sqlite3.connect(path, isolation_level=None, timeout=0, cached_statements=256)
    try:
        # Exclusive: without a shared-memory file, whose pages raise SIGBUS when the disk is full.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise JournalUnavailable(
                f"journal {path}: its file system allows only mode {mode}, not wal",
                hint="put state.dir on a local file system",
            )
        # FULL syncs the WAL at each commit; builds differ in their default.
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA secure_delete = ON").fetchone()
        # A net only: the journal checkpoints by itself, earlier and after it has answered.
        connection.execute("PRAGMA wal_autocheckpoint = 2048").fetchone()
        connection.execute(f"PRAGMA journal_size_limit = {2048 * PAGE_BYTES}").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):  # in the write-ahead log, after a crash of its migration
            raise _too_new(path, version)
        if version < 1:
            raise Damaged(f"version {version}")
        # Not quick_check: that would not see an index that disagrees with its table.
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise Damaged(verdict)
        _migrate(connection, version)
        # Not before: a full journal of an older version must not be kept from migrating.
        connection.execute(f"PRAGMA max_page_count = {quota_bytes // PAGE_BYTES}").fetchone()
        try:
            verify(connection)
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_ERROR:  # no such column or table
                raise Damaged(str(error)) from error
            raise
    except sqlite3.Error as error:
        connection.close()
        raise translate(error, path) from error
    except BaseException as error:
        connection.close()
        if isinstance(error, UnicodeDecodeError):  # of SQLite's own message, quoting garbage
            raise Damaged("garbage where text should be") from error
        raise
    return connection


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    for target, statements in enumerate(MIGRATIONS[version:], version + 1):
        connection.execute("BEGIN IMMEDIATE")
        for statement in statements:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {target}")
        connection.execute("COMMIT")
        # The version must stand in the file's header, where it is looked for first.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _set_aside(path: Path) -> None:
    """Rename a damaged journal to `<name>.corrupt-<n>`; keep only the newest few."""
    prefix = path.name + ".corrupt-"
    numbers = sorted(
        {
            int(tail)
            for entry in path.parent.iterdir()
            if entry.name.startswith(prefix)
            and (tail := entry.name[len(prefix) :].removesuffix("-wal")).isdecimal()
        }
    )
    aside = path.with_name(f"{prefix}{max(numbers, default=0) + 1}")
    # The database first: a WAL left alone is noticed at the next start, a missing WAL is not.
    for old, new in ((path, aside), (_wal(path), _wal(aside))):
        with contextlib.suppress(FileNotFoundError):
            old.rename(new)
    _shm(path).unlink(missing_ok=True)
    for number in numbers[: 1 - KEPT_DAMAGED]:
        for extra in ("", "-wal"):
            path.with_name(f"{prefix}{number}{extra}").unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
