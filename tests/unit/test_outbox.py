"""The line to the broker: order, window, what is kept over a lost connection, what is set aside."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edged.errors import Code
from edged.jobs import Draft, Key, Kind, Outcome, Reply
from edged.journal import Accepted, Journal
from edged.mqtt import Connection
from edged.outbox import WINDOW, Outbox
from edged.ports import Incoming, Outgoing, Session
from edged.protocol import encode
from edged.tasks import Background
from edged.testing import ManualClock, MemoryBroker, MemoryBus


class Bench:
    """An outbox between a real journal and a broker in memory."""

    def __init__(self, broker: MemoryBroker, journal: Journal) -> None:
        self.broker = broker
        self.journal = journal
        self.clock = ManualClock()
        self.bus = MemoryBus(broker, Connection(host="x", client_id="edged-x"))
        self.background = Background()
        self.outbox = Outbox(self.bus, journal, self.background)
        self.connected = asyncio.Event()

    def on_connected(self, session: Session) -> None:
        self.outbox.on_connected(session)
        self.connected.set()

    def on_subscribed(self, refused: tuple[str, ...]) -> None: ...

    def on_message(self, message: Incoming) -> None: ...

    def on_disconnected(self, reason: str) -> None:
        self.connected.clear()
        self.outbox.on_disconnected()

    def post(self, topic: str, payload: bytes = b"{}") -> None:
        self.outbox.post(Outgoing(topic=topic, payload=payload, qos=1))

    async def final(self, name: str, payload: bytes, topic: str = "r") -> None:
        """End a job whose final is `payload`."""
        draft = Draft(
            key=Key(None, name), kind=Kind.TEXT, request={"prompt": "x"}, digest=b"d",
            reply=Reply(topic), priority=5, arrived=self.clock.stamp(), deadline_s=None,
        )  # fmt: skip
        accepted = await self.journal.accept(draft)
        assert isinstance(accepted, Accepted)
        rows = await self.journal.finish(accepted.job.seq, payload, Outcome.COMPLETED)
        self.outbox.post_rows(rows)

    async def delivered(self) -> None:
        """Wait until the journal's outbox is empty."""
        async with asyncio.timeout(10):
            await self.outbox.drained()
            await self.background.settle()
        assert self.journal.stats.outbox_rows == 0


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


@asynccontextmanager
async def running(path: Path, broker: MemoryBroker) -> AsyncIterator[Bench]:
    journal = Journal(
        path / "journal.db", clock=ManualClock(), quota_bytes=10**7, results=10, results_s=3600
    )
    await journal.open()
    bench = Bench(broker, journal)
    try:
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(bench.bus.run(bench)),
                tasks.create_task(bench.outbox.run()),
                tasks.create_task(bench.background.watch()),
            ]
            yield bench
            for task in work:
                task.cancel()
    finally:
        await journal.close()


async def test_messages_and_finals_leave_in_the_order_they_came(
    tmp_path: Path, broker: MemoryBroker
) -> None:
    async with running(tmp_path, broker) as bench:
        bench.post("a")
        await bench.final("j1", b'{"n":1}')
        bench.post("b")
        await bench.final("j2", b'{"n":2}')
        await bench.delivered()
        assert [(m.topic, m.payload) for m in broker.published] == [
            ("a", b"{}"), ("r", b'{"n":1}'), ("b", b"{}"), ("r", b'{"n":2}'),
        ]  # fmt: skip


async def test_no_more_than_the_brokers_window_is_unanswered(tmp_path: Path) -> None:
    broker = MemoryBroker(receive_maximum=2)
    broker.mute = True
    async with running(tmp_path, broker) as bench:
        for n in range(5):
            bench.post(f"t/{n}")
        await broker.wait_for("t/+", 2)
        assert len(broker.on("t/+")) == 2
        broker.answer()
        await broker.wait_for("t/+", 5)
        assert [m.topic for m in broker.on("t/+")] == [f"t/{n}" for n in range(5)]


async def test_our_own_window_holds_where_the_broker_sets_none(
    tmp_path: Path, broker: MemoryBroker
) -> None:
    broker.mute = True
    async with running(tmp_path, broker) as bench:
        for n in range(WINDOW + 5):
            bench.post(f"t/{n}")
        await broker.wait_for("t/+", WINDOW)
        assert len(broker.on("t/+")) == WINDOW
        assert bench.outbox.depth == WINDOW + 5
        broker.answer()
        await bench.delivered()


async def test_unanswered_messages_are_sent_again_first_and_in_order(
    tmp_path: Path, broker: MemoryBroker
) -> None:
    broker.mute = True
    async with running(tmp_path, broker) as bench:
        await bench.connected.wait()
        bench.post("t/0")
        await bench.final("j", b'{"n":1}', "t/1")
        await broker.wait_for("t/+", 2)
        broker.drop_connection()
        bench.post("t/2")
        broker.answer()
        await bench.delivered()
        assert [m.topic for m in broker.on("t/+")] == ["t/0", "t/1", "t/0", "t/1", "t/2"]


async def test_a_final_being_read_as_the_connection_goes_keeps_its_place(
    tmp_path: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.mute = True
    async with running(tmp_path, broker) as bench:
        await bench.connected.wait()
        reading, go_on = asyncio.Event(), asyncio.Event()
        outgoing = bench.journal.outgoing

        async def slow(row: int) -> object:
            reading.set()
            await go_on.wait()
            return await outgoing(row)

        monkeypatch.setattr(bench.journal, "outgoing", slow)
        bench.post("t/0")
        await bench.final("j", b'{"n":1}', "t/1")
        await broker.wait_for("t/+", 1)
        await reading.wait()
        bench.connected.clear()
        broker.drop_connection()
        await bench.connected.wait()
        go_on.set()
        broker.answer()
        await bench.delivered()
        assert [m.topic for m in broker.on("t/+")] == ["t/0", "t/0", "t/1"]


async def test_refusals_of_a_lost_connection_are_not_sent_in_the_next(
    tmp_path: Path, broker: MemoryBroker
) -> None:
    broker.mute = True
    async with running(tmp_path, broker) as bench:
        await bench.connected.wait()
        bench.outbox.post(Outgoing(topic="t/refusal", payload=b"", qos=1), session_bound=True)
        bench.post("t/kept")
        await broker.wait_for("t/+", 2)
        broker.drop_connection()
        broker.answer()
        await bench.delivered()
        assert [m.topic for m in broker.on("t/+")] == ["t/refusal", "t/kept", "t/kept"]


async def test_the_newest_state_jumps_the_line(tmp_path: Path) -> None:
    broker = MemoryBroker(receive_maximum=1)
    broker.mute = True
    async with running(tmp_path, broker) as bench:
        bench.post("t/0")
        await broker.wait_for("t/0")
        bench.post("t/1")
        for n in range(3):
            state = Outgoing(topic="state", payload=str(n).encode(), qos=1, retain=True)
            bench.outbox.post_state(state)
        broker.answer()
        await bench.delivered()
        assert [(m.topic, m.payload) for m in broker.published] == [
            ("t/0", b"{}"), ("state", b"2"), ("t/1", b"{}"),
        ]  # fmt: skip


async def test_a_denied_final_is_kept_told_and_sent_once_it_is_allowed(
    tmp_path: Path, broker: MemoryBroker
) -> None:
    broker.refuse_publishes("r")
    async with running(tmp_path, broker) as bench:
        await bench.final("j1", b'{"n":1}')
        await bench.final("j2", b'{"n":2}', "elsewhere")
        await broker.wait_for("elsewhere")  # one that is denied holds up nobody
        await bench.outbox.drained()
        await bench.background.settle()
        assert "not authorized" in (bench.outbox.trouble or "")
        assert bench.journal.stats.outbox_rows == 1
        broker.allow("r")
        broker.drop_connection()  # a new connection, as after the broker read its ACL anew
        await broker.wait_for("r")
        await bench.delivered()
        assert bench.outbox.trouble is None


async def test_a_final_too_large_for_the_broker_is_replaced_once_and_stored(
    tmp_path: Path,
) -> None:
    broker = MemoryBroker(maximum_packet_size=600)
    async with running(tmp_path, broker) as bench:
        await bench.connected.wait()
        await bench.final("j", encode({"text": "x" * 1000}))
        (message,) = await broker.wait_for("r")
        await bench.delivered()
        told = json.loads(message.payload)
        assert told["type"] == "error"
        assert told["code"] == Code.TOO_LARGE
        assert "600" in told["message"]
        rows = await bench.journal.add_reply(1, Reply("again"))
        bench.outbox.post_rows(rows)
        (again,) = await broker.wait_for("again")
        assert again.payload == message.payload


async def test_a_broker_without_qos_1_is_trouble_and_nothing_is_lost(tmp_path: Path) -> None:
    broker = MemoryBroker(maximum_qos=0)
    async with running(tmp_path, broker) as bench:
        await bench.connected.wait()
        await bench.final("j", b"{}")
        assert "QoS" in (bench.outbox.trouble or "")
        assert bench.journal.stats.outbox_rows == 1
        assert broker.published == []


async def test_a_final_that_ends_every_connection_is_set_aside_for_the_others(
    tmp_path: Path, broker: MemoryBroker
) -> None:
    broker.mute = True
    async with running(tmp_path, broker) as bench:
        await bench.connected.wait()
        await bench.final("poison", b"{}", "t/poison")
        for tries in range(1, 4):
            await broker.wait_for("t/poison", tries)
            await bench.connected.wait()
            broker.drop_connection()
        await bench.connected.wait()
        broker.answer()
        await bench.final("fine", b"{}", "t/fine")
        await broker.wait_for("t/fine")
        assert bench.outbox.trouble is not None
        assert bench.journal.stats.outbox_rows >= 1
        assert len(broker.on("t/poison")) == 3
