"""The journal's file: made whole, migrated, refused if newer, set aside if damaged."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged import journal_schema
from edged.errors import JournalFull, JournalTooNew, JournalUnavailable
from edged.jobs import Outcome, Reply
from edged.journal_schema import Damaged, open_database, translate
from tests.kit.journal import NAME, accepted, copy_files, memory_directory, opened


@pytest.fixture(name="home")
def _home() -> Iterator[Path]:
    with memory_directory() as home:
        yield home


def no_check(_db: sqlite3.Connection) -> None:
    pass


def ignore(_reason: str) -> None:
    pass


def open_file(
    path: Path, resets: list[str] | None = None, quota_bytes: int = 1 << 24
) -> contextlib.closing[sqlite3.Connection]:
    resets = [] if resets is None else resets
    return contextlib.closing(
        open_database(
            path, quota_bytes=quota_bytes, first_seq=1, verify=no_check, on_reset=resets.append
        )
    )


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_how_the_database_is_set_up(home: Path) -> None:
    with open_file(home / NAME, quota_bytes=1000 * 4096) as db:

        def pragma(name: str) -> object:
            return db.execute(f"PRAGMA {name}").fetchone()[0]

        assert pragma("journal_mode") == "wal"
        assert pragma("synchronous") == 2  # FULL: only it syncs every commit
        assert pragma("secure_delete") == 1
        assert pragma("page_size") == 4096
        assert pragma("max_page_count") == 1000
        assert pragma("application_id") == journal_schema.APPLICATION_ID
        assert pragma("user_version") == len(journal_schema.MIGRATIONS)
        db.execute("UPDATE meta SET ran = 1.0")
        assert names(home) == {NAME, f"{NAME}-wal"}  # no shared memory: no SIGBUS when full
    assert names(home) == {NAME}
    assert (home / NAME).stat().st_mode & 0o777 == 0o600


def test_a_start_that_was_interrupted_leaves_nothing_in_the_way(home: Path) -> None:
    for leftover in (f"{NAME}.new", f"{NAME}.new-wal", f"{NAME}.new-journal"):
        (home / leftover).write_bytes(b"half a journal")
    with open_file(home / NAME):
        pass
    assert names(home) == {NAME}


def test_the_directory_must_exist(home: Path) -> None:
    with pytest.raises(JournalUnavailable) as caught:
        open_file(home / "missing" / NAME)
    assert str(home / "missing") in (caught.value.hint or "")


def test_two_at_once(home: Path) -> None:
    with open_file(home / NAME), pytest.raises(JournalUnavailable, match="in use"):
        open_file(home / NAME)
    with open_file(home / NAME):
        pass
    assert names(home) == {NAME}  # nobody thought it damaged


# Versions


MORE = ("ALTER TABLE job ADD COLUMN colour TEXT", "CREATE TABLE extra (x INTEGER) STRICT")


async def test_an_older_version_is_migrated_with_its_content(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(home) as (it, _):
        await accepted(it, "a")
    monkeypatch.setattr(journal_schema, "MIGRATIONS", (*journal_schema.MIGRATIONS, MORE, MORE[:0]))
    async with opened(home) as (it, found):
        assert [job.key.id for job in found.jobs] == ["a"]
        await accepted(it, "b")
    header = (home / NAME).read_bytes()[:100]
    assert struct.unpack(">I", header[60:64]) == (len(journal_schema.MIGRATIONS),)


def version_1(home: Path) -> None:
    """A journal as version 1 left it in a crash."""
    script = Path(__file__).with_name("journal-v1.sql").read_text()
    with contextlib.closing(sqlite3.connect(home / NAME, isolation_level=None)) as db:
        db.executescript(script)


async def test_a_journal_of_version_1(home: Path) -> None:
    version_1(home)
    async with opened(home) as (it, found):
        assert found.reset is None
        assert [(job.key.id, job.request["prompt"], job.deaths) for job in found.jobs] == [
            ("waits", "first", 0), ("died", "second", 1), ("runs", "third", 1),
        ]  # fmt: skip
        first = found.jobs[0]
        assert (first.frames, first.answers, first.plan, first.durable) == (0, 1, None, True)
        assert first.replies == (Reply("edged/reply/waits", b"\x00\xff"),)
        assert await it.frames(first.seq) == ()
        (row,) = found.pending
        sent = await it.outgoing(row)
        assert sent is not None
        assert sent.payload == b'{"final": 4}'
        assert await it.get("fact") == {"a": 1}
        job = await accepted(it, "looks", frames=(b"frame",))
        await it.plan(first.seq, {"used": []})
        for each in (*found.jobs, job):
            assert await it.finish(each.seq, b"f", Outcome.COMPLETED)
    header = (home / NAME).read_bytes()[:100]
    assert struct.unpack(">I", header[60:64]) == (len(journal_schema.MIGRATIONS),)


async def test_a_full_journal_of_version_1(home: Path) -> None:
    """It is migrated though its schema may need a page more than it has."""
    version_1(home)
    pages = (home / NAME).stat().st_size // journal_schema.PAGE_BYTES
    async with opened(home, quota_bytes=pages * journal_schema.PAGE_BYTES) as (it, found):
        assert (found.reset, len(found.jobs)) == (None, 3)
        with pytest.raises(JournalFull):
            await accepted(it)


async def test_a_migration_that_fails_leaves_the_old_version(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(home) as (it, _):
        await accepted(it, "a")
    before = (home / NAME).read_bytes()
    with monkeypatch.context() as patch:
        broken = (*MORE, "SELECT nonsense FROM nowhere")
        patch.setattr(journal_schema, "MIGRATIONS", (*journal_schema.MIGRATIONS, broken))
        with pytest.raises(JournalUnavailable, match="nowhere"):
            open_file(home / NAME)
    assert (home / NAME).read_bytes() == before
    async with opened(home) as (_, found):
        assert len(found.jobs) == 1


async def test_a_newer_version_is_refused_and_not_touched(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal_schema, "MIGRATIONS", (*journal_schema.MIGRATIONS, MORE))
        async with opened(home) as (it, _):
            await accepted(it, "a")
            kept = copy_files(home, home / "crashed")
    before = {file.name: file.read_bytes() for file in sorted(kept.iterdir())}
    assert len(before) == 2
    with pytest.raises(JournalTooNew) as caught:
        open_file(kept / NAME)
    assert caught.value.exit_status == 78
    assert caught.value.hint
    assert {file.name: file.read_bytes() for file in sorted(kept.iterdir())} == before


def test_a_newer_version_that_only_the_log_knows(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash between the commit of a migration and its checkpoint."""
    with open_file(home / NAME) as db:
        db.execute(f"PRAGMA user_version = {len(journal_schema.MIGRATIONS) + 1}")
        kept = copy_files(home, home / "crashed")
    with pytest.raises(JournalTooNew):
        open_file(kept / NAME)
    assert not list(kept.glob("*.corrupt-*"))


# Damage


def test_what_is_no_journal_is_set_aside(home: Path) -> None:
    path = home / NAME
    for number, content in enumerate((b"", b"\0" * 8192, b"hello", b"SQLite format 3\0"), 1):
        path.write_bytes(content)
        resets: list[str] = []
        with open_file(path, resets) as db:
            assert db.execute("SELECT COUNT(*) FROM job").fetchone() == (0,)
        assert resets == ["file is not a database"]
        assert (home / f"{NAME}.corrupt-{number}").read_bytes() == content
        path.unlink()


def test_another_programs_database_is_set_aside_whole(home: Path) -> None:
    path = home / NAME
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE theirs (x)")
    content = path.read_bytes()
    resets: list[str] = []
    with open_file(path, resets):
        pass
    assert "another program" in resets[0]
    assert (home / f"{NAME}.corrupt-1").read_bytes() == content


def test_a_log_without_its_database(home: Path) -> None:
    with open_file(home / NAME) as db:
        db.execute("UPDATE meta SET ran = 1.0")
        copied = copy_files(home, home / "copy")
    (copied / NAME).unlink()
    resets: list[str] = []
    with open_file(copied / NAME, resets):
        pass
    assert "gone" in resets[0]
    assert f"{NAME}.corrupt-1-wal" in names(copied)


def test_a_version_of_zero_is_damage(home: Path) -> None:
    with open_file(home / NAME):
        pass
    overwrite(home / NAME, 60, bytes(4))
    resets: list[str] = []
    with open_file(home / NAME, resets):
        pass
    assert resets == ["version 0"]


@pytest.mark.parametrize("offset", [100, 4096, 3 * 4096])
async def test_a_page_of_zeros_is_noticed(home: Path, offset: int) -> None:
    async with opened(home) as (it, _):
        for n in range(50):
            await accepted(it, f"j{n}", "x" * 500)
    overwrite(home / NAME, offset, bytes(4096 - offset % 4096))
    async with opened(home) as (it, found):
        assert found.reset
        assert found.jobs == ()
        await accepted(it)


async def test_a_flipped_bit_in_a_request_is_noticed(home: Path) -> None:
    """SQLite has no checksum of a page: this is what the content's CRC is for."""
    async with opened(home) as (it, _):
        await accepted(it, "a", "x" * 10_000)
    position = (home / NAME).read_bytes().index(b"x" * 2000)
    overwrite(home / NAME, position + 1000, b"y")
    async with opened(home) as (_, found):
        assert "content of job 1" in (found.reset or "")


async def test_text_that_is_no_text_is_noticed(home: Path) -> None:
    async with opened(home) as (it, _):
        await accepted(it, "needle")
    content = (home / NAME).read_bytes()
    position = content.index(b"edged/reply/needle")
    overwrite(home / NAME, position, b"\xff")
    async with opened(home) as (_, found):
        assert found.reset == "text that is not UTF-8"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"boottime REAL", b"bootXime REAL", "no such column"),
        (b"CREATE TABLE outbox", b"CR\xbbATE TABLE outbox", "garbage"),
        (b"CREATE TABLE outbox", b"CREATE TABLE outb0x", ""),
    ],
)
async def test_a_damaged_schema_is_noticed(home: Path, old: bytes, new: bytes, reason: str) -> None:
    async with opened(home) as (it, _):
        await accepted(it)
    overwrite(home / NAME, (home / NAME).read_bytes().index(old), new)
    async with opened(home) as (it, found):
        assert reason in (found.reset or "nothing noticed")
        await accepted(it)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM meta",
        "DELETE FROM content",
        "INSERT INTO content VALUES (99, x'', 0)",
        "INSERT INTO outbox VALUES (99, 't', NULL)",
        "UPDATE job SET replies = '[[1]]'",
        "UPDATE job SET kind = 'other'",
        "UPDATE job SET frames = -1",
        "UPDATE job SET frame_bytes = -1",
        "UPDATE job SET frame_file = '../../../../etc/passwd'",
        "UPDATE job SET answers = 0",
        "UPDATE job SET plan = '{}'",
        "UPDATE job SET plan_crc = 1",
        "UPDATE job SET plan = '[1]', plan_crc = 1",
    ],
)
async def test_rows_that_make_no_sense_are_noticed(home: Path, statement: str) -> None:
    async with opened(home) as (it, _):
        await accepted(it)
    with contextlib.closing(sqlite3.connect(home / NAME, isolation_level=None)) as db:
        db.execute(statement)
    async with opened(home) as (it, found):
        assert found.reset
        await accepted(it)


def test_only_the_newest_damaged_journals_are_kept(home: Path) -> None:
    for n in range(6):
        (home / NAME).write_bytes(b"%d" % n)
        (home / f"{NAME}-wal").write_bytes(b"log %d" % n)
        (home / f"{NAME}-shm").write_bytes(b"")
        with open_file(home / NAME):
            pass
    assert names(home) == {NAME} | {
        f"{NAME}.corrupt-{n}{suffix}" for n in (4, 5, 6) for suffix in ("", "-wal")
    }
    assert (home / f"{NAME}.corrupt-6").read_bytes() == b"5"


def test_storage_that_damages_what_is_new(home: Path) -> None:
    """No loop: one new journal, then it is said."""

    def always(_db: sqlite3.Connection) -> None:
        raise Damaged("whatever is read is wrong")

    for _ in range(5):
        with pytest.raises(JournalUnavailable, match="even when new") as caught:
            open_database(
                home / NAME, quota_bytes=1 << 20, first_seq=1, verify=always, on_reset=ignore
            )
        assert "replace" in (caught.value.hint or "")
    assert len(list(home.iterdir())) == 4


def test_an_unforeseen_error_closes_the_database(home: Path) -> None:
    def never(_db: sqlite3.Connection) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        open_database(home / NAME, quota_bytes=1 << 20, first_seq=1, verify=never, on_reset=ignore)
    with open_file(home / NAME):
        pass


def test_a_journal_left_in_another_mode_is_put_back(home: Path) -> None:
    with open_file(home / NAME):
        pass
    with contextlib.closing(sqlite3.connect(home / NAME)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    with open_file(home / NAME) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, JournalUnavailable), (errno.ENOSPC, JournalFull)]
)
def test_a_damaged_journal_that_cannot_be_set_aside(
    home: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[JournalUnavailable]
) -> None:
    def rename(_old: Path, _new: Path) -> None:
        raise OSError(number, os.strerror(number))

    (home / NAME).write_bytes(b"garbage")
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(JournalUnavailable, match=os.strerror(number)) as caught:
        open_file(home / NAME)
    assert type(caught.value) is kind
    assert (home / NAME).read_bytes() == b"garbage"


# Errors


def error_of(code: int, kind: type[sqlite3.Error] = sqlite3.OperationalError) -> sqlite3.Error:
    error = kind("what SQLite said")
    error.sqlite_errorcode = code
    error.sqlite_errorname = "SQLITE_SOMETHING"
    return error


@pytest.mark.parametrize(
    ("code", "meaning"),
    [
        (sqlite3.SQLITE_FULL, JournalFull),
        (sqlite3.SQLITE_IOERR_WRITE, JournalFull),
        (sqlite3.SQLITE_IOERR_FSYNC, JournalFull),
        (sqlite3.SQLITE_CORRUPT, Damaged),
        (sqlite3.SQLITE_NOTADB, Damaged),
        (sqlite3.SQLITE_READONLY_DIRECTORY, JournalUnavailable),
        (sqlite3.SQLITE_CANTOPEN, JournalUnavailable),
        (sqlite3.SQLITE_BUSY, JournalUnavailable),
        (sqlite3.SQLITE_NOMEM, JournalUnavailable),
    ],
)
def test_what_errors_mean(code: int, meaning: type[Exception]) -> None:
    problem = translate(error_of(code), Path("/var/lib/edged/journal.db"))
    assert type(problem) is meaning
    if isinstance(problem, JournalUnavailable):
        assert "/var/lib/edged/journal.db" in problem.message


def test_an_error_without_a_code_does_not_quote_private_text() -> None:
    path = Path("j")
    decoding = sqlite3.OperationalError("Could not decode to UTF-8 column 'x' with text 'secret'")
    assert str(translate(decoding, path)) == "text that is not UTF-8"
    assert isinstance(translate(sqlite3.ProgrammingError("closed"), path), JournalUnavailable)
