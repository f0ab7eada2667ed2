"""Any order of steps, crashes and clock jumps: every accepted job gets its one final.

Hypothesis drives a journal, a broker and a model of what was promised. A crash keeps only the files
as they are at a step of the journal's thread: before a commit, or after it and before anybody is
told. The second test plants bugs and shows that the machine finds them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edged.errors import EdgedError, JobGone
from edged.jobs import Draft, Key, Outcome, Reply
from edged.journal import Accepted, Journal, Known, Opened
from edged.journal_frames import Frames
from edged.journal_store import Store
from edged.testing import ManualClock
from tests.kit.journal import copy_files, draft, frame_files, journal, memory_directory

T = TypeVar("T")

clients = st.sampled_from([None, "one", "two"])
ids = st.sampled_from(["a", "b", "c"])
prompts = st.sampled_from(["hello", "other", "long"])
topics = st.sampled_from(["t/1", "t/2", "t/3"])
finals = st.sampled_from(["yes", "no", "long"])
frames = st.sampled_from([(b"one",), (b"a" * 5000, b"", b"b"), ()])


def crashes(*labels: str) -> st.SearchStrategy[str | None]:
    """No crash, or one at one of these steps."""
    return st.sampled_from([None, None, *labels])


#: No crash, or one on the way of a final.
ENDING = crashes("in_result_txn", "in_result_txn", "after_result_commit", "after_frames_unlink")


def body(word: str) -> str:
    """The text that a word stands for: one of them for a long one."""
    return word * 2000 if word == "long" else word


class Promise:
    """What the outside was told about one accepted job."""

    def __init__(self, seq: int, prompt: str, topic: str, frames: tuple[bytes, ...]) -> None:
        self.seq = seq
        self.prompt = prompt
        self.frames = frames
        self.plan: dict[str, Any] | None = None
        self.topics = {topic}
        #: At most this; a crash may have come between the mark and the answer.
        self.starts = 0
        self.finals: set[bytes] = set()


class JournalMachine(RuleBasedStateMachine):
    """The journal, the part of the daemon that uses it, a broker, and what was promised."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.loop = asyncio.new_event_loop()
        self.stack.callback(self.loop.close)
        self.home = self.stack.enter_context(memory_directory())
        self.clock = ManualClock()
        self.crash_at: str | None = None
        self.crashed: Path | None = None
        self.lives = 0
        self.promises: dict[Key, Promise] = {}
        #: Of requests that a crash came upon.
        self.asked: dict[Key, tuple[bytes, ...]] = {}
        #: What the broker has: every final that was published, by topic.
        self.broker: list[tuple[str, Key, bytes]] = []
        self.pending: list[int] = []
        self.running: set[int] = set()
        self.journal: Journal

    # Running it

    def trace(self, label: str) -> None:
        """Keep the files as they are at this step, in the journal's thread."""
        if label == self.crash_at and self.crashed is None:
            self.crashed = copy_files(self.journal._thread._path.parent, self.next_home())

    def next_home(self) -> Path:
        self.lives += 1
        return self.home / f"{self.lives}"

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T | None:
        """Do it; None if a crash came before the answer."""
        result = self.loop.run_until_complete(coroutine)
        self.crash_at = None
        if self.crashed is None:
            return result
        self.loop.run_until_complete(self.journal.close())
        self.open(self.crashed)
        return None

    def open(self, home: Path) -> None:
        self.crash_at = self.crashed = None
        self.clock.restart()
        self.journal = journal(home, clock=self.clock, trace=self.trace, results=1000)
        found: Opened = self.loop.run_until_complete(self.journal.open())
        assert found.reset is None
        self.pending = list(found.pending)
        self.running = set()
        self.check(found)

    def check(self, found: Opened) -> None:
        """Everything that was promised is there, as it was promised."""
        for job in found.jobs:
            # One that was stored though nobody was told: its caller will ask again, or not.
            promise = self.promises.setdefault(
                job.key,
                Promise(
                    job.seq,
                    job.request["prompt"][:5].removesuffix("l"),
                    job.replies[0].topic,
                    self.asked.get(job.key, ()),
                ),
            )
            frames = self.loop.run_until_complete(self.journal.frames(job.seq))
            assert frames == promise.frames
            assert job.plan == promise.plan
            assert job.seq == promise.seq
            assert job.request == {"prompt": body(promise.prompt)}
            assert promise.topics <= {reply.topic for reply in job.replies}
            assert job.starts >= promise.starts
            assert job.starts >= job.deaths
            assert not promise.finals, "a job with a final is open again"
        files = frame_files(self.journal._thread._path.parent)
        assert len(files) == sum(job.frames > 0 for job in found.jobs)
        open_jobs = {job.key for job in found.jobs}
        for key, promise in self.promises.items():
            if key not in open_jobs:
                known = self.loop.run_until_complete(_found(self.journal, key))
                assert known is not None
                assert known.ended
                assert known.final is not None
                promise.finals.add(known.final)
                assert len(promise.finals) == 1

    def open_jobs(self) -> list[tuple[Key, Promise]]:
        return [(key, p) for key, p in self.promises.items() if not p.finals]

    # Rules

    @initialize()
    def begin(self) -> None:
        home = self.next_home()
        home.mkdir()
        self.open(home)

    @rule(
        client=clients,
        name=ids,
        prompt=prompts,
        topic=topics,
        frames=frames,
        crash=crashes(
            "after_frames_write", "in_accept_txn", "after_frames_sync", "after_accept_commit"
        ),
    )
    def request(
        self,
        client: str | None,
        name: str,
        prompt: str,
        topic: str,
        frames: tuple[bytes, ...],
        crash: str | None,
    ) -> None:
        self.crash_at = crash
        wanted = draft(
            name, body(prompt), client=client, reply=Reply(topic), arrived=self.clock.stamp(),
            frames=frames,
        )  # fmt: skip
        self.asked[wanted.key] = frames
        answer = self.wait(_accepted(self.journal, wanted))
        if answer is None:
            return
        promise = self.promises.get(wanted.key)
        if isinstance(answer, Accepted):
            assert promise is None
            self.promises[wanted.key] = Promise(answer.job.seq, prompt, topic, frames)
            return
        assert promise is not None
        assert answer.seq == promise.seq
        assert answer.ended == bool(promise.finals)
        assert (answer.digest == wanted.digest) == (prompt == promise.prompt)
        if answer.ended:
            assert {answer.final} == promise.finals
        if answer.digest == wanted.digest:
            rows = self.wait(self.journal.add_reply(answer.seq, Reply(topic)))
            if rows is not None:
                promise.topics.add(topic)
                assert len(rows) == (1 if promise.finals else 0)
                self.pending += rows

    @precondition(lambda self: self.open_jobs())
    @rule(data=st.data(), crash=crashes("after_attempt_mark"))
    def start(self, data: st.DataObject, crash: str | None) -> None:
        _, promise = data.draw(st.sampled_from(self.open_jobs()))
        self.crash_at = crash
        attempt = self.wait(self.journal.start(promise.seq))
        if attempt is not None:
            assert attempt > promise.starts
            promise.starts = attempt
            self.running.add(promise.seq)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def plan(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.running)))
        (promise,) = [p for p in self.promises.values() if p.seq == seq]
        promise.plan = {"starts": promise.starts}
        self.wait(self.journal.plan(seq, promise.plan))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), death=st.booleans())
    def stop(self, data: st.DataObject, death: bool) -> None:
        seq = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(seq)
        if death:
            self.wait(self.journal.died(seq, "signal"))
        else:
            self.wait(self.journal.release(seq))

    @precondition(lambda self: self.open_jobs())
    @rule(data=st.data(), final=finals, crash=ENDING)
    def finish(self, data: st.DataObject, final: str, crash: str | None) -> None:
        _, promise = data.draw(st.sampled_from(self.open_jobs()))
        self.crash_at = crash
        self.end(promise, body(final).encode())

    def end(self, promise: Promise, final: bytes) -> None:
        rows = self.wait(self.journal.finish(promise.seq, final, Outcome.COMPLETED))
        if rows is not None:
            promise.finals.add(final)
            self.running.discard(promise.seq)
            assert len(rows) == len(promise.topics)
            self.pending += rows

    @precondition(lambda self: self.pending)
    @rule(crash=crashes("after_sent_mark"), lost_after_publish=st.booleans())
    def publish(self, crash: str | None, lost_after_publish: bool) -> None:
        row = self.send()
        if row is not None and lost_after_publish:
            self.die()
        elif row is not None:
            self.crash_at = crash
            self.wait(self.journal.delivered(row))

    def send(self) -> int | None:
        """Let the broker have a final; return the row that says so, if it is still wanted."""
        row = self.pending.pop(0)
        sent = self.wait(self.journal.outgoing(row))
        if sent is None:
            return None
        self.broker.append((sent.topic, sent.key, sent.payload))
        return row

    @precondition(lambda self: any(p.finals for p in self.promises.values()))
    @rule(data=st.data(), final=finals)
    def finish_again(self, data: st.DataObject, final: str) -> None:
        ended = [p for p in self.promises.values() if p.finals]
        promise = data.draw(st.sampled_from(ended))
        again = self.journal.finish(promise.seq, body(final).encode(), Outcome.FAILED)
        assert self.wait(again) == ()
        with pytest.raises(JobGone):
            self.wait(self.journal.start(promise.seq))

    @rule()
    def crash(self) -> None:
        self.die()

    def die(self) -> None:
        """The process ends while nothing is under way."""
        home = copy_files(self.journal._thread._path.parent, self.next_home())
        self.loop.run_until_complete(self.journal.close())
        self.open(home)

    @rule()
    def restart(self) -> None:
        self.loop.run_until_complete(self.journal.close())
        self.open(self.journal._thread._path.parent)

    @rule()
    def checkpoint(self) -> None:
        self.wait(self.journal.checkpoint())

    @rule(seconds=st.sampled_from([1.0, -86400.0, 2 * 365 * 86400.0, -1.7e9]))
    def jump(self, seconds: float) -> None:
        """Let time pass, with the wall clock anywhere."""
        self.clock.advance(100)
        self.clock.jump_wall(seconds)

    @invariant()
    def one_final_each(self) -> None:
        for topic, key, payload in self.broker:
            assert self.promises[key].finals == {payload}, topic

    def teardown(self) -> None:
        try:
            if hasattr(self, "journal"):
                for _, promise in self.open_jobs():
                    self.end(promise, b"last")
                while self.pending:
                    self.send()
                self.one_final_each()
                for key, promise in self.promises.items():
                    reached = {topic for topic, name, _ in self.broker if name == key}
                    assert reached >= promise.topics, "a final never reached its topic"
        finally:
            if hasattr(self, "journal"):
                self.loop.run_until_complete(self.journal.close())
            self.stack.close()


async def _accepted(it: Journal, wanted: Draft) -> Accepted | Known:
    return await it.accept(wanted)


async def _found(it: Journal, key: Key) -> Known | None:
    return await it.find(key)


LIMITS = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_every_job_gets_its_one_final() -> None:
    run_state_machine_as_test(JournalMachine, settings=LIMITS)


def _split_finish(store: Store, seq: int, final: bytes, outcome: Outcome) -> tuple[int, ...]:
    """A `finish` in two transactions: the outbox rows come in the second."""
    rows = FINISH(store, seq, final, outcome)
    if rows:
        kept = store._db.execute("SELECT * FROM outbox WHERE row >= ?", rows[:1]).fetchall()
        store._db.execute("DELETE FROM outbox WHERE row >= ?", rows[:1])
        store._db.execute("COMMIT")
        store._db.execute("BEGIN IMMEDIATE")
        store._db.executemany("INSERT INTO outbox VALUES (?, ?, ?)", kept)
    return rows


def _lazy_commit(store: Store, *, force: bool = False) -> bool:
    """A commit that only happens with the next one: told before it is on disk."""
    if store.counts.next_seq % 2 and not force:
        store._kept = None
        return True
    return COMMIT(store, force=force)


def _lazy_begin(store: Store) -> None:
    if not store._db.in_transaction:
        BEGIN(store)


def _overwriting_finish(store: Store, seq: int, final: bytes, outcome: Outcome) -> tuple[int, ...]:
    """A `finish` that is not idempotent."""
    rows = FINISH(store, seq, final, outcome)
    store._store_final(seq, final)
    return rows


def _eager_drop(frames: Frames, seq: int) -> None:
    """Frames that go before the final is on disk."""
    if seq in frames._held:
        frames._path(frames._held[seq]).unlink(missing_ok=True)
    DROP(frames, seq)


def _late_write(frames: Frames, path: Path, token: str, content: tuple[bytes, ...]) -> None:
    """Frames whose file gets its name only after the commit."""
    WRITE(frames, path, token, content)
    path.rename(path.with_suffix(".unfinished"))


def _late_commit(frames: Frames) -> None:
    COMMITTED(frames)
    frames._trace("after_accept_commit")
    for unfinished in frames._folder.glob("*.unfinished"):
        unfinished.rename(unfinished.with_suffix(".frames"))


DROP, WRITE, COMMITTED = Frames.drop, Frames._write, Frames.committed
FINISH, COMMIT, BEGIN = Store.finish, Store.commit, Store.begin


@pytest.mark.parametrize(
    "bug",
    [
        {"finish": _split_finish},
        {"finish": _overwriting_finish},
        {"commit": _lazy_commit, "begin": _lazy_begin},
        {"add_reply": lambda *_: ()},
        {"drop": _eager_drop},
        {"_write": _late_write, "committed": _late_commit},
        {"adopt": lambda *_: None},
    ],
    ids=[
        "two transactions",
        "not idempotent",
        "told before the commit",
        "forgets reply topics",
        "frames go before the commit",
        "frames come after the commit",
        "no sweep",
    ],
)
def test_the_machine_finds_planted_bugs(
    monkeypatch: pytest.MonkeyPatch, bug: dict[str, Callable[..., Any]]
) -> None:
    for name, function in bug.items():
        monkeypatch.setattr(Store if hasattr(Store, name) else Frames, name, function)
    hunt = settings(
        LIMITS, max_examples=300, derandomize=True, phases=[Phase.generate], print_blob=False
    )
    with pytest.raises((AssertionError, EdgedError, ExceptionGroup)):
        run_state_machine_as_test(JournalMachine, settings=hunt)
