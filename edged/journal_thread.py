"""The journal's thread: takes what waits, runs it as one transaction, hands the results back."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from edged.errors import EdgedError, JournalFull, JournalUnavailable
from edged.journal_frames import Frames
from edged.journal_rows import Opened
from edged.journal_schema import PAGE_BYTES, Damaged, translate
from edged.journal_store import Limits, Store
from edged.ports import Clock, Trace

#: Seconds without an operation after which erased requests leave the write-ahead log.
IDLE_S = 1.0
#: Seconds after which they do so even if operations keep coming.
ERASE_S = 30.0
#: Seconds between two commits that only store the running time, while jobs are open.
RAN_S = 60.0
#: The write-ahead log is emptied past this size: damage in a long one costs every later commit.
WAL_BYTES = 256 * PAGE_BYTES
#: The most operations, and bytes of content, in one transaction.
BATCH_OPERATIONS = 256
BATCH_BYTES = 8 * 1024 * 1024

log = structlog.get_logger()

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JournalStats:
    """The journal's size and health after its last transaction."""

    used_bytes: int = 0
    quota_bytes: int = 0
    jobs: int = 0
    ended: int = 0
    outbox_rows: int = 0
    commits: int = 0
    #: Open jobs with frames, and the bytes of those.
    frames_jobs: int = 0
    frames_bytes: int = 0
    frames_quota_bytes: int = 0
    #: Why it cannot take a job now, or None.
    trouble: str | None = "the journal is not open"
    #: Why a damaged journal was set aside, at the opening or since, or None.
    reset: str | None = None


@dataclass(slots=True, eq=False)
class Operation(Generic[T]):
    """Something to do with the store, and who waits for it."""

    run: Callable[[Store], T]
    future: asyncio.Future[T]
    submitted: float
    size: int = 0
    writes: bool = True
    #: Whether old finals are given up to let it succeed.
    must_fit: bool = True
    inside: str | None = None
    after: str | None = None
    #: Not within a transaction.
    apart: bool = False
    result: T | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    done: bool = field(default=False, init=False)

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self.result, self.error, self.done = None, error, True


class JournalThread:
    """The one thread that touches the database, and the queue to it. One loop uses it."""

    def __init__(
        self, path: Path, limits: Limits, clock: Clock, frames: Frames, trace: Trace
    ) -> None:
        self._path = path
        self._wal = path.with_name(path.name + "-wal")
        self._limits = limits
        self._clock = clock
        self._trace = trace
        #: Replaced as a whole after each transaction.
        self.stats = self._closed_stats = JournalStats(
            quota_bytes=limits.quota_bytes, frames_quota_bytes=frames.quota_bytes
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Future[None] | None = None
        # Shared by loop and thread, under the lock, which is never held during I/O.
        self._lock = threading.Lock()
        self._wakeup = threading.Condition(self._lock)
        self._queue: deque[Operation[Any]] = deque()
        self._closing = False
        self._executing_since: float | None = None
        self._returned_at = 0.0
        # The thread's own.
        self._frames = frames
        self._store: Store | None = None
        self._first_seq = 1
        self._commits = 0
        self._trouble: str | None = None
        self._log_trouble: str | None = None
        self._reset: str | None = None
        self._erased_at: float | None = None
        self._committed_at = 0.0

    # On the loop ----------------------------------------------------------------------------------

    def start(self) -> asyncio.Future[Opened]:
        """Start the thread; the future tells what it found, or why it could not open it."""
        if self._thread is not None:
            raise RuntimeError("the journal is open already")
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        opened: asyncio.Future[Opened] = self._loop.create_future()
        self._closing = False
        self._executing_since = time.monotonic()
        self._thread = threading.Thread(
            # A daemon: a disk that hangs must not keep the process from ending.
            target=self._main,
            args=(opened, self._ended),
            name="journal",
            daemon=True,
        )
        self._thread.start()
        return opened

    def submit(
        self,
        run: Callable[[Store], T],
        *,
        size: int = 0,
        writes: bool = True,
        must_fit: bool = True,
        inside: str | None = None,
        after: str | None = None,
        apart: bool = False,
    ) -> asyncio.Future[T]:
        """Queue an operation; the future has its result when its transaction is on disk.

        Args:
            run: Does it, in the thread.
            size: The bytes of content it brings.
            writes: Whether it needs a transaction.
            must_fit: Whether old finals are given up to let it succeed.
            inside: What to tell the trace before the commit.
            after: What to tell the trace after the commit.
            apart: Whether it must not run inside a transaction.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        operation = Operation(
            run, future, time.monotonic(), size, writes, must_fit, inside, after, apart
        )
        with self._wakeup:
            if self._thread is not None and not self._closing:
                self._queue.append(operation)
                self._wakeup.notify()
                return future
        future.set_exception(self._not_open())
        return future

    def ask_to_end(self) -> None:
        """Let the thread end when it has done what is queued."""
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()

    async def wait_ended(self) -> None:
        """Wait until the thread has closed the database; at once if it does not run."""
        if self._ended is not None:
            await asyncio.shield(self._ended)

    def stuck_s(self) -> float:
        """Return the seconds since the thread last came back, while it has work; else 0."""
        with self._lock:
            since = self._executing_since
            if since is None:
                if not self._queue:
                    return 0.0
                since = self._queue[0].submitted
            return max(0.0, time.monotonic() - max(since, self._returned_at))

    def _on_end(self, ended: asyncio.Future[None]) -> None:
        self._thread = None
        self._executing_since = None
        self.stats = self._closed_stats
        while self._queue:
            _settle([(self._queue.popleft().future, None, self._not_open())])
        if not ended.done():
            ended.set_result(None)

    def _not_open(self) -> JournalUnavailable:
        return JournalUnavailable(f"journal {self._path} is not open")

    # In the thread ----------------------------------------------------------------------------

    def _main(self, opened: asyncio.Future[Opened], ended: asyncio.Future[None]) -> None:
        try:
            try:
                found = self._open()
            except Exception as error:  # noqa: BLE001 - whatever it is, the opener is told
                self._post(_settle, [(opened, None, error)])
                return
            self._post(_settle, [(opened, found, None)])
            self._returned()
            while (batch := self._take()) is not None:
                if batch:
                    self._execute(batch)
                self._tend(idle=not batch)
                self._returned()
            self._say_goodbye()
        finally:
            if self._store is not None:
                self._store.close()
                self._store = None
            self._frames.forget()
            self._post(self._on_end, ended)

    def _open(self) -> Opened:
        store = self._new_store()
        try:
            self._clock.resume(store.ran)
            store.begin()
            jobs, pending = store.recover()
            # Forced: a journal that cannot be written is to be known now.
            self._commit(store, force=True)
        except Exception as error:
            store.close()
            if isinstance(error, sqlite3.Error):
                raise _unavailable(translate(error, self._path), self._path) from error
            raise
        self._store = store
        self._take_stock()
        return Opened(jobs, store.ran, self._reset, pending)

    def _new_store(self) -> Store:
        try:
            store = Store(
                self._path,
                self._limits,
                self._clock,
                self._frames,
                first_seq=self._first_seq,
                on_reset=self._note_reset,
            )
        except sqlite3.Error as error:
            raise _unavailable(translate(error, self._path), self._path) from error
        return store

    def _take(self) -> list[Operation[Any]] | None:
        """Wait for operations; return none of them after a while without, None at the end."""
        with self._wakeup:
            if not self._queue and not self._closing:
                self._wakeup.wait(self._patience())
            if not self._queue:
                if self._closing:
                    return None
                # Tending may last; what comes meanwhile is counted from when it came.
                return []
            self._executing_since = self._queue[0].submitted
            batch: list[Operation[Any]] = []
            size = 0
            while self._queue and len(batch) < BATCH_OPERATIONS and size < BATCH_BYTES:
                operation = self._queue.popleft()
                size += operation.size
                batch.append(operation)
            return batch

    def _patience(self) -> float | None:
        if self._erased_at is not None:
            return IDLE_S
        if self._store is not None and self._store.counts.open:
            return RAN_S
        return None

    def _returned(self) -> None:
        with self._lock:
            self._executing_since = None
            self._returned_at = time.monotonic()

    def _execute(self, batch: list[Operation[Any]]) -> None:
        """Run a batch, as one transaction or else one by one, and hand over the results."""
        try:
            store = self._store = self._store or self._reopen()
            apart = len(batch) == 1 or any(operation.apart for operation in batch)
            if apart or not self._run_together(store, batch):
                for operation in batch:
                    self._run_alone(store, operation)
            self._frames.tidy()
        except Exception as problem:  # noqa: BLE001 - the thread must outlive any of them
            self._give_up(problem, batch)
        self._take_stock()
        self._post(_settle, [(each.future, each.result, each.error) for each in batch])

    def _run_together(self, store: Store, batch: list[Operation[Any]]) -> bool:
        """Run a batch as one transaction; return False if it failed and was undone."""
        writes = any(operation.writes for operation in batch)
        try:
            if writes:
                store.begin()
            for operation in batch:
                self._run(store, operation)
            if writes:
                self._commit(store)
        except sqlite3.Error as error:
            self._undo(store, error)
            return False
        except Damaged:
            raise
        except Exception:  # noqa: BLE001 - it comes again, alone, and is told to who caused it
            store.rollback()
            return False
        for operation in batch:
            self._done(operation)
        return True

    def _run_alone(self, store: Store, operation: Operation[Any]) -> None:
        """Run one operation, giving up old finals if it needs their room."""
        while not operation.done:
            try:
                if operation.writes:
                    store.begin()
                self._run(store, operation)
                if operation.writes:
                    self._commit(store)
            except sqlite3.Error as error:
                problem = self._undo(store, error)
                full = isinstance(problem, JournalFull)
                if not (full and operation.must_fit and self._make_room(store)):
                    self._trouble = str(problem)
                    operation.fail(problem)
            except Damaged:
                raise
            except Exception as error:  # noqa: BLE001 - it is the caller's
                store.rollback()
                operation.fail(error)
            else:
                self._done(operation)

    def _run(self, store: Store, operation: Operation[Any]) -> None:
        operation.error = None
        try:
            operation.result = operation.run(store)
        except EdgedError as error:
            # Raised before anything was changed: no reason to undo what the others did.
            operation.error = error
            return
        except UnicodeDecodeError as error:  # text or a message of SQLite's that is garbage
            raise Damaged("garbage where text should be") from error
        if operation.inside is not None:
            self._trace(operation.inside)

    def _done(self, operation: Operation[Any]) -> None:
        operation.done = True
        if operation.after is not None and operation.error is None:
            self._trace(operation.after)

    def _commit(self, store: Store, *, force: bool = False) -> None:
        if not store.commit(force=force):
            return
        self._commits += 1
        self._trouble = None
        self._committed_at = self._clock.monotonic()
        if store.erased and self._erased_at is None:
            self._erased_at = self._committed_at

    def _undo(self, store: Store, error: sqlite3.Error) -> JournalUnavailable:
        """Roll back and return what the error means.

        Raises:
            Damaged: The database has to be opened anew.
        """
        problem = translate(error, self._path)
        if isinstance(problem, Damaged):
            raise problem from error
        store.rollback()
        return problem

    def _make_room(self, store: Store) -> bool:
        try:
            store.begin()
            found = store.make_room()
            self._commit(store)
        except sqlite3.Error as error:
            self._undo(store, error)
            return False
        return found

    def checkpoint(self, store: Store) -> None:
        """Empty the write-ahead log; an operation of its own, outside transactions."""
        store.checkpoint()
        self._erased_at = None
        self._log_trouble = None

    def _reopen(self) -> Store:
        """Open the journal again after damage or an unforeseen error; what is damaged goes aside.

        Jobs that run go on running: this process did not crash.
        """
        return self._new_store()

    def _note_reset(self, reason: str) -> None:
        self._reset = reason
        log.error("journal.reset", reason=reason)

    def _give_up(self, problem: Exception, batch: list[Operation[Any]]) -> None:
        """Fail what has not happened, and let the next operation open the journal anew."""
        if self._store is not None:
            # A number is never given twice, even if the next journal is a new one.
            self._first_seq = self._store.counts.next_seq
            self._store.close()
            self._store = None
        self._trouble = f"{problem}" or type(problem).__name__
        for operation in batch:
            if not operation.done:
                operation.fail(_unavailable(problem, self._path))

    def _tend(self, *, idle: bool) -> None:
        """Store the running time and empty the write-ahead log, when it is time for either."""
        store = self._store
        if store is None:
            return
        now = self._clock.monotonic()
        try:
            if idle and store.counts.open and now - self._committed_at >= RAN_S:
                store.begin()
                self._commit(store, force=True)
            erase = self._erased_at is not None and (idle or now - self._erased_at >= ERASE_S)
            if erase or self._wal.stat().st_size > WAL_BYTES:
                self.checkpoint(store)
        except FileNotFoundError:
            pass  # the log is made by the first commit
        except sqlite3.Error as error:
            try:
                self._log_trouble = str(self._undo(store, error))
            except (sqlite3.Error, Damaged) as problem:
                self._give_up(problem, [])
        except Exception as problem:  # noqa: BLE001 - the thread must outlive any of them
            self._give_up(problem, [])

    def _say_goodbye(self) -> None:
        if self._store is None:
            return
        # What fails here is made good at the next start.
        with contextlib.suppress(sqlite3.Error, Damaged):
            self._store.begin()
            self._commit(self._store, force=True)
            self.checkpoint(self._store)
        self._reset = None

    def _take_stock(self) -> None:
        store = self._store
        used, full = self.stats.used_bytes, None
        if store is not None:
            with contextlib.suppress(sqlite3.Error):
                used, full = store.measure()
        counts = store.counts if store is not None else None
        self.stats = JournalStats(
            used_bytes=used,
            quota_bytes=self._limits.quota_bytes,
            jobs=counts.open if counts else self.stats.jobs,
            ended=counts.ended if counts else self.stats.ended,
            outbox_rows=counts.outbox if counts else self.stats.outbox_rows,
            commits=self._commits,
            frames_jobs=self._frames.jobs,
            frames_bytes=self._frames.used_bytes,
            frames_quota_bytes=self._frames.quota_bytes,
            trouble=self._trouble or self._log_trouble or full or self._frames.trouble(),
            reset=self._reset,
        )

    def _post(self, callback: Callable[..., object], *arguments: object) -> None:
        if self._loop is not None:
            # RuntimeError: the loop is closed, so nobody waits for the answer any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(callback, *arguments)


def _unavailable(problem: Exception, path: Path) -> EdgedError:
    """Return a fresh error for one caller: what happened to the journal under its operation."""
    if isinstance(problem, JournalFull):
        return JournalFull(problem.message, hint=problem.hint)
    if isinstance(problem, EdgedError):
        return JournalUnavailable(problem.message, hint=problem.hint)
    if isinstance(problem, Damaged):
        return JournalUnavailable(f"journal {path} is damaged: {problem}")
    return JournalUnavailable(f"journal {path}: {problem!r}")


def _settle(results: list[tuple[asyncio.Future[Any], Any, Exception | None]]) -> None:
    for future, result, error in results:
        if future.done():
            continue  # its caller was cancelled
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
