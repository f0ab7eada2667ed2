"""What every `ports.Bus` does: the in-memory one, and MqttBus with a real broker and network."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from edged.errors import BadPublish, ConnectionLost
from edged.mqtt import Connection, MqttBus
from edged.ports import Bus, Incoming, Outgoing, Sink
from edged.testing import MemoryBroker, MemoryBus, Published, matches
from tests.kit.chaos import ChaosProxy
from tests.kit.client import Peer
from tests.kit.mosquitto import PROGRAM, Mosquitto
from tests.kit.recorder import FAST, Recorder, either, eventually, running

Version = Literal["5", "3.1.1"]
#: mosquitto 2.0.11 lets a new message overtake those that wait behind a full window of 20.
CONFIG = "max_inflight_messages 0"
ACL = "topic readwrite #\ntopic deny denied/#\n"


class World(Protocol):
    """A broker, seen from outside, and what can happen to a connection to it."""

    version: Version

    def bus(self, *, sink: Sink | None = None, **settings: Any) -> Bus: ...
    async def publish(self, topic: str, payload: bytes = b"", **properties: Any) -> None: ...
    async def published(self, pattern: str, count: int = 1) -> list[Published]: ...
    async def retained(self, topic: str) -> bytes | None: ...
    async def drop(self) -> None: ...
    async def stop_answering(self) -> None: ...
    async def answer_again(self) -> None: ...
    async def be_unreachable(self) -> None: ...
    async def be_reachable(self) -> None: ...


def _connection(version: Version, **settings: Any) -> Connection:
    given: dict[str, Any] = {
        "host": "127.0.0.1",
        "client_id": "device",
        "protocol": version,
        "subscriptions": (("in/#", 1),),
    }
    return Connection(**{**given, **settings})


class MemoryWorld:
    def __init__(self, version: Version) -> None:
        self.version = version
        self.broker = MemoryBroker()
        self.broker.refuse_publishes("denied/#")

    def bus(self, *, sink: Sink | None = None, **settings: Any) -> Bus:
        return MemoryBus(self.broker, _connection(self.version, **settings), sink=sink)

    async def publish(self, topic: str, payload: bytes = b"", **properties: Any) -> None:
        self.broker.publish(topic, payload, **properties)

    async def published(self, pattern: str, count: int = 1) -> list[Published]:
        return await self.broker.wait_for(pattern, count)

    async def retained(self, topic: str) -> bytes | None:
        message = self.broker.retained.get(topic)
        return message.payload if message else None

    async def drop(self) -> None:
        self.broker.drop_connection()

    async def stop_answering(self) -> None:
        self.broker.mute = True

    async def answer_again(self) -> None:
        self.broker.answer()

    async def be_unreachable(self) -> None:
        self.broker.unreachable = "connection refused"
        self.broker.drop_connection()

    async def be_reachable(self) -> None:
        self.broker.unreachable = None


class MosquittoWorld:
    def __init__(self, version: Version, mosquitto: Mosquitto, proxy: ChaosProxy, peer: Peer):
        self.version = version
        self.mosquitto = mosquitto
        self.proxy = proxy
        self.peer = peer

    def bus(self, *, sink: Sink | None = None, **settings: Any) -> Bus:
        connection = _connection(self.version, port=self.proxy.port, **settings)
        return MqttBus(connection, patience=FAST, sink=sink)

    async def publish(self, topic: str, payload: bytes = b"", **given: Any) -> None:
        names = {
            "correlation": "CorrelationData",
            "response_topic": "ResponseTopic",
            "expiry_s": "MessageExpiryInterval",
        }
        if (ts := given.pop("ts", None)) is not None:
            given["UserProperty"] = ("ts", ts)
        given = {names.get(name, name): value for name, value in given.items()}
        await asyncio.to_thread(lambda: self.peer.publish(topic, payload, **given))

    async def published(self, pattern: str, count: int = 1) -> list[Published]:
        def found() -> list[Published]:
            return [
                Published(
                    topic=seen.topic,
                    payload=seen.payload,
                    qos=seen.qos,
                    correlation=getattr(seen.properties, "CorrelationData", None),
                    expiry_s=getattr(seen.properties, "MessageExpiryInterval", None),
                )
                for seen in list(self.peer.seen)
                if matches(pattern, seen.topic)
            ]

        await asyncio.to_thread(self.peer.wait, lambda _: len(found()) >= count)
        return found()

    async def retained(self, topic: str) -> bytes | None:
        def look() -> bytes | None:
            with Peer(self.mosquitto.port, topic, "marker") as peer:
                peer.publish("marker")  # what is retained comes before it
                seen = peer.wait_for(1)
                peer.wait(lambda seen: seen[-1].topic == "marker")
                return seen[0].payload if seen[0].topic == topic else None

        return await asyncio.to_thread(look)

    async def drop(self) -> None:
        self.proxy.reset()

    async def stop_answering(self) -> None:
        self.proxy.blackhole("down")

    async def answer_again(self) -> None:
        self.proxy.heal()

    async def be_unreachable(self) -> None:
        await self.proxy.refuse()
        self.proxy.reset()

    async def be_reachable(self) -> None:
        self.proxy.listen()


@pytest.fixture(
    params=[
        "memory-5",
        "memory-3.1.1",
        pytest.param("mosquitto-5", marks=pytest.mark.broker),
        pytest.param("mosquitto-3.1.1", marks=pytest.mark.broker),
    ]
)
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    kind, _, number = request.param.partition("-")
    version: Version = "5" if number == "5" else "3.1.1"
    if kind == "memory":
        yield MemoryWorld(version)
        return
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    async with AsyncExitStack() as stack:
        mosquitto = stack.enter_context(Mosquitto(tmp_path, acl=ACL, config=CONFIG))
        proxy = await stack.enter_async_context(ChaosProxy(mosquitto.port))
        peer = stack.enter_context(Peer(mosquitto.port, "#"))
        yield MosquittoWorld(version, mosquitto, proxy, peer)


def out(topic: str = "out/a", payload: bytes = b"x", **fields: Any) -> Outgoing:
    return Outgoing(topic=topic, payload=payload, **fields)


# Coming and going


async def test_it_connects_and_says_so(world: World) -> None:
    bus = world.bus()
    assert (bus.session, bus.state.connected) == (None, False)
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        assert recorder.subscribed == [()]
        assert recorder.sessions == [bus.session]
        assert recorder.sessions[0].session_present is False
        assert bus.state.connected
        assert bus.state.reconnects == 0
        assert bus.stuck() is None


async def test_it_comes_back_after_a_drop_with_its_session(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.drop()
        await recorder.until_connected(2)
        first, second = recorder.sessions
        assert second.session_present
        assert second.generation > first.generation
        assert len(recorder.reasons) == 1
        assert bus.state.reconnects == 1
        assert bus.state.last_reason == recorder.reasons[0]


async def test_it_says_why_it_cannot_connect_and_tries_again(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    await world.be_unreachable()
    async with running(bus, recorder):
        await recorder.until(lambda: len(recorder.reasons) >= 2)
        assert set(recorder.reasons) == {"connection refused"}
        assert bus.state.last_reason == "connection refused"
        assert not recorder.sessions
        await world.be_reachable()
        await recorder.until_connected()


async def test_close_ends_run(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder) as task:
        await recorder.until_connected()
        await bus.close()
        await asyncio.wait_for(task, 5)
        assert recorder.reasons == ["closed"]
        assert bus.session is None
        assert not bus.state.connected


async def test_close_ends_run_while_there_is_no_connection(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    await world.be_unreachable()
    async with running(bus, recorder) as task:
        await recorder.until(lambda: recorder.reasons)
        await asyncio.wait_for(bus.close(out("out/status", b"offline")), 5)
        await asyncio.wait_for(task, 5)


async def test_a_clean_start_has_no_session(world: World) -> None:
    for _ in range(2):
        bus = world.bus(clean_start=True)
        recorder = Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            assert not recorder.sessions[0].session_present


# The will and the farewell


async def test_cancelling_lets_the_will_speak(world: World) -> None:
    bus = world.bus(will=lambda: out("out/status", b"lost", qos=1, retain=True))
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
    assert [m.payload for m in await world.published("out/status")] == [b"lost"]
    assert await world.retained("out/status") == b"lost"


async def test_a_farewell_replaces_the_will(world: World) -> None:
    bus = world.bus(will=lambda: out("out/status", b"lost", qos=1, retain=True))
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        await bus.close(out("out/status", b"stopped", retain=True))
    await world.publish("out/status/marker")
    await world.published("out/status/marker")
    assert [m.payload for m in await world.published("out/status")] == [b"stopped"]
    assert await world.retained("out/status") == b"stopped"


async def test_a_farewell_that_is_not_taken_leaves_it_to_the_will(world: World) -> None:
    bus = world.bus(will=lambda: out("out/status", b"lost", qos=1))
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        await bus.close(out("denied/status", b"stopped"))
    await world.publish("out/marker")
    await world.published("out/marker")
    # A PUBACK of 3.1.1 cannot say no: there the farewell counts as given.
    lost = [b"lost"] if world.version == "5" else []
    assert [m.payload for m in await world.published("out/status", len(lost))] == lost


# Coming in


async def test_a_message_arrives_as_it_was_sent(world: World) -> None:
    bus = world.bus()
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.publish(
            "in/a", b"\x00\xff", correlation=b"\x00c", response_topic="out/r", expiry_s=60
        )
        await world.publish("in/b", b"", qos=0)
        await recorder.until(lambda: len(recorder.messages) == 2)
        first, second = sorted(recorder.messages, key=lambda m: m.topic)
        assert (first.topic, first.payload, first.size, first.qos) == ("in/a", b"\x00\xff", 2, 1)
        assert (second.topic, second.payload, second.qos) == ("in/b", b"", 0)
        assert not first.retain
        assert not first.duplicate
        properties = (first.correlation, first.response_topic, first.expiry_s)
        five = (b"\x00c", "out/r", 60)
        assert properties == (five if world.version == "5" else (None, None, None))


async def test_the_user_property_ts(world: World) -> None:
    bus = world.bus()
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.publish("in/a", b"x", ts="1770000000.5")
        await world.publish("in/a", b"x")
        await recorder.until(lambda: len(recorder.messages) == 2)
        five = world.version == "5"
        assert [m.ts for m in recorder.messages] == ["1770000000.5" if five else None, None]


async def test_a_sink_takes_what_needs_no_answer(world: World) -> None:
    taken: list[Incoming] = []
    bus = world.bus(sink=taken.append, inbound_bytes=5000)
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        payloads = [bytes([number]) * 2000 for number in range(20)]
        for payload in payloads:  # far beyond the budget, one after the other
            await world.publish("in/a", payload, qos=0)
            await eventually(lambda: taken and taken[-1].payload == payload)  # noqa: B023
        await world.publish("in/b", b"mark", qos=1)
        await recorder.until(lambda: recorder.messages)
        assert [message.payload for message in taken] == payloads
        assert recorder.bodies == [b"mark"]


async def test_a_sink_that_fails_ends_nothing(world: World) -> None:
    taken: list[Incoming] = []

    def fail(message: Incoming) -> None:
        taken.append(message)
        raise ValueError("a bug")

    bus = world.bus(sink=fail)
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        for _ in range(3):
            await world.publish("in/a", b"x", qos=0)
        await eventually(lambda: len(taken) == 3)
        await world.publish("in/b", b"y")
        await recorder.until(lambda: recorder.messages)
        assert not recorder.reasons


async def test_messages_wait_for_a_client_that_is_away(world: World) -> None:
    bus = world.bus()
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.be_unreachable()
        await recorder.until(lambda: recorder.reasons)
        for number in range(5):
            await world.publish("in/a", b"%d" % number)
        await world.be_reachable()
        await recorder.until(lambda: len(recorder.messages) >= 5)
        assert recorder.bodies == [b"%d" % number for number in range(5)]


async def test_what_was_not_acknowledged_comes_again(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.publish("in/a", b"kept")
        await world.publish("in/a", b"done")
        await recorder.until(lambda: len(recorder.messages) == 2)
        first = recorder.messages[0].receipt
        bus.ack(recorder.messages[1].receipt)
        await bus.publish(out("out/after-the-ack"))  # the ack went before it
        await world.drop()
        await recorder.until(lambda: len(recorder.messages) == 3)
        again = recorder.messages[2]
        assert (again.payload, again.duplicate) == (b"kept", True)
        assert again.receipt.generation == recorder.sessions[1].generation > first.generation

        # An ack of the old connection must not acknowledge anything of the new one.
        bus.ack(first)
        await bus.publish(out("out/after-the-ack"))
        await world.drop()
        await recorder.until(lambda: len(recorder.messages) == 4)
        assert recorder.messages[3].payload == b"kept"

        # Nor must it take the place of the one that counts.
        bus.ack(first)
        bus.ack(recorder.messages[3].receipt)
        await bus.publish(out("out/after-the-ack"))
        await world.drop()
        await recorder.until_connected(4)
        await world.publish("in/a", b"next")
        await recorder.until(lambda: len(recorder.messages) == 5)
        assert recorder.messages[4].payload == b"next"


async def test_no_more_than_the_receive_maximum_comes_without_acks(world: World) -> None:
    bus = world.bus(receive_maximum=3)
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        for number in range(10):
            await world.publish("in/a", b"%d" % number)
        await world.publish("in/marker", b"m", qos=0)  # overtakes what has to wait
        await recorder.until(lambda: b"m" in recorder.bodies)
        sent = len(recorder.messages) - 1
        assert sent == (3 if world.version == "5" or sent == 3 else 10)  # 3.1.1 has no such limit
        recorder.acks = bus
        for message in list(recorder.messages):
            bus.ack(message.receipt)
        await recorder.until(lambda: len(recorder.messages) == 11)
        bodies = [m.payload for m in recorder.messages if m.qos]
        assert bodies == [b"%d" % number for number in range(10)]


async def test_acknowledging_twice_does_nothing(world: World) -> None:
    bus = world.bus(receive_maximum=1)
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        for number in range(3):
            await world.publish("in/a", b"%d" % number)
        await recorder.until(lambda: recorder.messages)
        for _ in range(3):
            bus.ack(recorder.messages[0].receipt)
        await bus.publish(out())
        await recorder.until(lambda: len(recorder.messages) >= 2)
        await world.drop()
        # The second message has not been acknowledged: it comes again.
        await recorder.until(lambda: recorder.bodies.count(b"1") == 2)


async def test_retained_messages(world: World) -> None:
    await world.publish("in/old", b"old", retain=True)
    bus = world.bus()
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.publish("in/new", b"new", retain=True)
        await recorder.until(lambda: b"new" in recorder.bodies)
        got = {(m.topic, m.retain) for m in recorder.messages}
        if world.version == "5":  # never replayed, and shown as published
            assert got == {("in/new", True)}
        else:  # replayed, and only then shown as retained
            assert got == {("in/old", True), ("in/new", False)}


async def test_over_the_inbound_budget_a_message_comes_without_payload(world: World) -> None:
    bus = world.bus(inbound_bytes=100_000, receive_maximum=10)
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        for letter in (b"a", b"b", b"c"):
            await world.publish("in/a", letter * 60_000, correlation=b"7")
        await recorder.until(lambda: len(recorder.messages) == 3)
        one, two, three = recorder.messages
        assert one.payload == b"a" * 60_000
        assert (two.payload, two.size) == (None, 60_000)
        assert (three.payload, three.size) == (None, 60_000)
        if world.version == "5":
            assert two.correlation == b"7"
        for message in recorder.messages:
            bus.ack(message.receipt)
        await world.publish("in/a", b"d" * 60_000)
        await recorder.until(lambda: len(recorder.messages) == 4)
        assert recorder.messages[3].payload == b"d" * 60_000


async def test_the_budget_is_given_back_when_the_connection_goes(world: World) -> None:
    bus = world.bus(inbound_bytes=100_000)
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.publish("in/a", b"a" * 90_000)
        await recorder.until(lambda: recorder.messages)
        for times in (2, 3):
            await world.drop()
            await recorder.until(lambda: len(recorder.messages) == times)  # noqa: B023 - used at once
            assert recorder.messages[-1].payload == b"a" * 90_000


# Going out


async def test_a_publish_is_answered(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        answer = await bus.publish(out(correlation=b"c\x00", expiry_s=60))
        assert not answer.failed
        assert answer.reason in {"success", "no matching subscribers"}
        (seen,) = await world.published("out/a")
        assert (seen.payload, seen.qos) == (b"x", 1)
        properties = (seen.correlation, seen.expiry_s)
        assert properties == ((b"c\x00", 60) if world.version == "5" else (None, None))


async def test_a_denied_publish_is_answered_with_the_reason(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        answer = await bus.publish(out("denied/a"))
        assert answer.failed == (world.version == "5")
        assert answer.reason == ("not authorized" if world.version == "5" else "success")


async def test_publishes_keep_their_order(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        answers = [bus.publish(out(payload=b"%d" % number)) for number in range(100)]
        await asyncio.gather(*answers)
        seen = await world.published("out/a", 100)
        assert [m.payload for m in seen] == [b"%d" % number for number in range(100)]


async def test_qos_0_is_sent_without_an_answer(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        assert bus.offer(out("out/chunk", b"token")) is True
        (seen,) = await world.published("out/chunk")
        assert (seen.payload, seen.qos) == (b"token", 0)


async def test_a_retained_publish_is_retained(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        await bus.publish(out("out/info", b"me", retain=True))
        assert await world.retained("out/info") == b"me"


async def test_without_a_connection_nothing_is_sent(world: World) -> None:
    bus = world.bus()
    with pytest.raises(ConnectionLost):
        await bus.publish(out())
    assert bus.offer(out()) is False
    recorder = Recorder()
    await world.be_unreachable()
    async with running(bus, recorder):
        await recorder.until(lambda: recorder.reasons)
        with pytest.raises(ConnectionLost):
            await bus.publish(out())
        assert bus.offer(out()) is False


async def test_an_unanswered_publish_fails_with_the_connection_and_is_not_sent_again(
    world: World,
) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        await world.stop_answering()
        lost = bus.publish(out("out/lost"))
        await world.published("out/lost")  # the broker took it
        assert not lost.done()
        await world.drop()
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(lost, 5)
        await world.answer_again()
        await recorder.until_connected(2)
        await bus.publish(out("out/next"))
        await world.published("out/next")
        assert len(await world.published("out/lost")) == 1


BAD_TOPICS = [
    "",
    "#",
    "a/+/b",
    "$SYS/x",
    "a\0b",
    "a\x01b",
    "a\uffff",
    "/".join("x" * 300),
    "\ud800",
]


async def test_what_must_not_be_published_never_reaches_the_broker(world: World) -> None:
    bus = world.bus()
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        bad = [out(topic) for topic in [*BAD_TOPICS, "x" * 70_000]]
        bad.append(out(correlation=b"c" * 70_000))
        for message in bad:
            future = bus.publish(message)
            assert future.done()
            with pytest.raises(BadPublish):
                future.result()
            assert bus.offer(message) is False
        assert not (await bus.publish(out("out/good"))).failed
        assert len(await world.published("#")) == 1
        assert recorder.reasons == []


# Faults of the listener


async def test_a_listener_that_fails_does_not_end_the_bus(
    world: World, events: list[dict[str, Any]]
) -> None:
    bus = world.bus()
    recorder = Recorder(acks=bus)
    recorder.fail = RuntimeError("a bug of the listener")
    async with running(bus, recorder) as task:
        await recorder.until_connected()
        await world.publish("in/a", b"1")
        await recorder.until(lambda: recorder.messages)
        await world.drop()
        await recorder.until_connected(2)
        await world.publish("in/a", b"2", qos=0)
        await recorder.until(lambda: b"2" in recorder.bodies)
        assert not task.done()
        assert not (await bus.publish(out())).failed
        assert "mqtt.listener_failed" in [event["event"] for event in events]


async def test_two_with_one_client_id_are_noticed(world: World) -> None:
    one, two = world.bus(), world.bus()
    first, second = Recorder(), Recorder()
    async with running(one, first), running(two, second):
        await either(first.until(lambda: one.state.stolen), second.until(lambda: two.state.stolen))
        assert first.reasons
        assert second.reasons
