"""Faults of brokers, networks and of our own code, as the bus meets them (ids: fault matrix)."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tenacity import RetryCallState, wait_fixed

from edged.errors import ConnectionLost
from edged.mqtt import Connection, MqttBus, Patience, _Network
from edged.mqttlink import Ack
from edged.ports import Incoming, Outgoing, no_trace
from tests.kit.chaos import ChaosProxy, Way
from tests.kit.client import Peer
from tests.kit.fakebroker import FakeBroker, packet
from tests.kit.mosquitto import PROGRAM, Mosquitto
from tests.kit.recorder import FAST, Recorder, either, eventually, running

needs_broker = pytest.mark.skipif(PROGRAM is None, reason="mosquitto is not installed")
pytestmark = [pytest.mark.broker, needs_broker]


def to(port: int, **settings: Any) -> Connection:
    given: dict[str, Any] = {"subscriptions": (("in/#", 1),), **settings}
    return Connection(host="127.0.0.1", port=port, client_id="device", **given)


def out(topic: str = "out/a", payload: bytes = b"x", **fields: Any) -> Outgoing:
    return Outgoing(topic=topic, payload=payload, **fields)


@pytest.fixture
async def proxy(broker: Mosquitto) -> AsyncIterator[ChaosProxy]:
    async with ChaosProxy(broker.port) as proxy:
        yield proxy


async def deliver(bus: MqttBus, message: Outgoing, recorder: Recorder) -> None:
    """Publish until it is answered, as an outbox does."""
    while True:
        try:
            assert not (await bus.publish(message)).failed
            return
        except ConnectionLost:
            await recorder.until(lambda: bus.session is not None, 35)


# F5, F6: the broker dies


async def test_f5_a_killed_broker_that_keeps_its_state_loses_nothing(tmp_path: Path) -> None:
    rounds, count = 3, 20
    with Mosquitto(tmp_path, persistence=True) as mosquitto, Peer(mosquitto.port, "out/#") as peer:
        # It is back so soon each time that it might be taken for a theft of our client id.
        patience = replace(FAST, soon_s=0)
        bus = MqttBus(to(mosquitto.port, receive_maximum=count), patience=patience)
        recorder = Recorder()
        asked, told = set[bytes | None](), set[bytes]()
        async with running(bus, recorder):
            await recorder.until_connected()
            for turn in range(rounds):
                bodies = [b"%d.%d" % (turn, number) for number in range(count)]
                for body in bodies:
                    await asyncio.to_thread(peer.publish, "in/a", body)
                    asked.add(body)
                await recorder.until(lambda: asked <= set(recorder.bodies))
                start = len(recorder.messages)
                for message in recorder.messages[-count : -count // 2]:
                    bus.ack(message.receipt)
                await deliver(bus, out(payload=bodies[0]), recorder)  # after those acks
                await asyncio.to_thread(mosquitto.save)
                mosquitto.kill()
                # Some are on their way, and none is answered, when the connection goes.
                sending = [
                    asyncio.create_task(deliver(bus, out(payload=b), recorder)) for b in bodies
                ]
                await asyncio.to_thread(mosquitto.start)
                await asyncio.gather(*sending, asyncio.to_thread(peer.wait_connected))
                told.update(bodies)
                # What was not acknowledged comes again, and nothing else.
                await recorder.until(lambda: len(recorder.messages) >= start + count // 2)  # noqa: B023
                again = recorder.messages[start:]
                assert [message.payload for message in again] == bodies[count // 2 :]
                assert all(message.duplicate for message in again)
                for message in again:
                    bus.ack(message.receipt)
            await asyncio.to_thread(peer.wait, lambda seen: {m.payload for m in seen} == told)
            assert len(recorder.sessions) == rounds + 1
            assert all(session.session_present for session in recorder.sessions[1:])


async def test_f6_a_broker_that_forgot_us_gets_no_ack_of_the_old_days(broker: Mosquitto) -> None:
    bus, recorder = MqttBus(to(broker.port), patience=FAST), Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        with Peer(broker.port) as peer:
            await asyncio.to_thread(peer.publish, "in/a", b"old")
        await recorder.until(lambda: recorder.messages)
        await asyncio.to_thread(broker.restart)
        await recorder.until_connected(2)
        assert not recorder.sessions[1].session_present
        with Peer(broker.port) as peer:
            await asyncio.to_thread(peer.publish, "in/a", b"new")
        await recorder.until(lambda: len(recorder.messages) == 2)
        old, new = (message.receipt for message in recorder.messages)
        assert old.mid == new.mid  # the trap: the number means another message now
        bus.ack(old)
        # The same, on its way when the connection went.
        assert bus._network is not None
        bus._network.command(Ack(old.generation, old.mid))
        await bus.publish(out())
        async with ChaosProxy(broker.port) as proxy:  # end the connection, keep the session
            taker = MqttBus(to(proxy.port), patience=FAST)
            again = Recorder(acks=taker)
            async with running(taker, again):
                await again.until(lambda: again.messages)
                assert again.messages[0].payload == b"new"


# F7, F17: the network is silent, or slow


@pytest.mark.parametrize("ways", [("up", "down"), ("up",), ("down",)], ids="-".join)
async def test_f7_a_silent_network_is_noticed_and_survived(
    proxy: ChaosProxy, ways: tuple[Way, ...]
) -> None:
    bus = MqttBus(to(proxy.port, keepalive_s=1), patience=replace(FAST, connack_s=0.5))
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        proxy.blackhole(*ways)
        begin = time.monotonic()
        lost = bus.publish(out("out/lost"))
        await recorder.until(lambda: recorder.reasons)
        # Twice the keepalive, and a second for the granularity of it.
        assert time.monotonic() - begin < 2 * 1 + 1.5
        assert recorder.reasons == ["no sign of the broker for the keepalive time"]
        with pytest.raises(ConnectionLost):
            await lost
        await recorder.until(lambda: "no CONNACK within 0 s" in recorder.reasons)
        proxy.heal()
        await recorder.until_connected(2)
        assert recorder.sessions[1].session_present
        assert not (await bus.publish(out())).failed


async def test_f7_a_short_silence_costs_nothing(proxy: ChaosProxy) -> None:
    bus, recorder = MqttBus(to(proxy.port)), Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        proxy.blackhole()
        answers = [bus.publish(out(payload=b"%d" % number)) for number in range(20)]
        done, _ = await asyncio.wait(answers, timeout=0.3)
        assert not done
        proxy.heal()
        assert not any(answer.failed for answer in await asyncio.gather(*answers))
        assert not recorder.reasons


async def test_f17_a_large_frame_over_a_slow_link_outlasts_the_keepalive(
    broker: Mosquitto, proxy: ChaosProxy
) -> None:
    bus = MqttBus(to(proxy.port, keepalive_s=1))
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        proxy.rate["down"] = 400_000  # bytes a second: four seconds
        with Peer(broker.port) as peer:
            await asyncio.to_thread(peer.publish, "in/a", bytes(1_600_000))
        await recorder.until(lambda: recorder.messages)
        assert recorder.messages[0].size == 1_600_000
        assert not recorder.reasons


async def test_f7_what_waited_for_a_lost_connection_is_not_counted_for_ever(
    proxy: ChaosProxy,
) -> None:
    bus, recorder = MqttBus(to(proxy.port), patience=FAST), Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        network, session = bus._network, bus.session
        assert network is not None
        assert session is not None
        proxy.blackhole("up")
        offered = 0
        while bus.offer(out(payload=bytes(60_000))):
            offered += 1
            await asyncio.sleep(0)
        held = [bus.publish(out(payload=bytes(1000))) for _ in range(session.receive_maximum + 5)]
        assert offered >= 4
        proxy.heal()
        proxy.reset()
        await recorder.until_connected(2)
        # One that was on its way when the connection went.
        bus._hand_over(network, session, out(), 0)
        await eventually(lambda: bus._offered == network.written)
        assert all(isinstance(answer.exception(), ConnectionLost) for answer in held)
        assert bus.offer(out())


# F8, cut anywhere


@pytest.mark.parametrize("way", ["up", "down"])
async def test_f8_cuts_at_every_byte_are_survived(
    broker: Mosquitto, proxy: ChaosProxy, way: Way, events: list[dict[str, Any]]
) -> None:
    quick = Patience(retry=wait_fixed(0.0), stolen_after=10_000)
    bus = MqttBus(to(proxy.port), patience=quick)
    recorder = Recorder(acks=bus)

    def on_subscribed(refused: tuple[str, ...]) -> None:
        Recorder.on_subscribed(recorder, refused)
        bus.publish(out("in/loop", b"to myself"))  # PUBLISH and PUBACK both ways

    recorder.on_subscribed = on_subscribed  # type: ignore[method-assign]
    cuts = 0
    async with running(bus, recorder):
        await recorder.until_connected()
        for cut in range(1, 120):
            proxy.cut_after = (way, cut)
            ends, arrived = len(recorder.reasons), len(recorder.messages)
            proxy.reset()
            # The end that we made, and either one more or all that is to be said was said.
            await recorder.until(
                lambda: len(recorder.reasons) >= ends + 2 or len(recorder.messages) > arrived  # noqa: B023
            )
            cuts += len(recorder.reasons) >= ends + 2
        assert cuts >= 30
        proxy.cut_after = None
        proxy.reset()
        await recorder.until(lambda: bus.session is not None)
        await deliver(bus, out("in/last", b"last"), recorder)
        await recorder.until(lambda: b"last" in recorder.bodies)
        assert set(recorder.bodies) == {b"to myself", b"last"}
        assert "mqtt.failed" not in {event["event"] for event in events}


# F9: no broker at all (refusal, TLS, names: test_mqtt_security)


async def test_f9_a_port_that_accepts_and_hangs(proxy: ChaosProxy) -> None:
    proxy.hang = True
    bus = MqttBus(to(proxy.port), patience=replace(FAST, connack_s=0.2))
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until(lambda: len(recorder.reasons) >= 3)
        assert set(recorder.reasons) == {"no CONNACK within 0 s"}
        assert bus.stuck() is None
        proxy.hang = False
        proxy.reset()
        await recorder.until_connected()


async def test_f9_a_broker_that_never_answers_the_subscription() -> None:
    async with FakeBroker(suback=False) as fake:
        bus = MqttBus(to(fake.port), patience=replace(FAST, suback_s=0.2))
        recorder = Recorder()
        async with running(bus, recorder):
            await recorder.until(lambda: len(recorder.reasons) >= 2)
            assert set(recorder.reasons) == {"no SUBACK within 0 s"}
            fake.suback = True
            await recorder.until_connected()


async def test_f9_waits_grow_and_vary() -> None:
    loop = asyncio.get_running_loop()
    network = _Network(to(1), Patience(), no_trace, iter([1]), loop, lambda _: None)
    try:
        for attempt in range(1, 40):
            waits = {network._wait_s(attempt, clock=False) for _ in range(50)}
            bound = min(30, 2 ** (attempt - 1))
            assert 0.5 <= min(waits) <= max(waits) <= bound
            assert max(waits) > 0.7 * bound
            assert len(waits) == 50
            # With a clock that is about to be set a long wait would be for nothing.
            assert max(network._wait_s(attempt, clock=True) for _ in range(50)) <= 15
    finally:
        network._wake_in.close()
        network._wake_out.close()


async def test_f9_a_connection_that_lasted_makes_the_next_wait_short(proxy: ChaosProxy) -> None:
    asked: list[int] = []

    class Noting(wait_fixed):
        def __call__(self, state: RetryCallState) -> float:
            asked.append(state.attempt_number)
            return super().__call__(state)

    bus = MqttBus(to(proxy.port), patience=Patience(retry=Noting(0.01), lasting_s=0.3))
    recorder = Recorder()
    await proxy.refuse()
    async with running(bus, recorder):
        await recorder.until(lambda: len(asked) >= 3)
        proxy.listen()
        await recorder.until_connected(1)
        failed = len(asked)
        proxy.reset()  # at once: not a good connection yet
        await recorder.until_connected(2)
        assert asked[failed] == failed + 1
        await asyncio.sleep(0.35)  # what is meant by lasting
        proxy.reset()
        await recorder.until_connected(3)
        assert asked[-1] == 1


async def test_f9_a_name_lookup_that_hangs_is_announced_and_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release, asked = threading.Event(), threading.Event()

    def lookup(*_: object, **__: object) -> list[object]:
        asked.set()
        release.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    bus, recorder = MqttBus(to(1)), Recorder()
    begin = time.monotonic()
    async with running(bus, recorder):
        assert await asyncio.to_thread(asked.wait, 5)
        assert bus.stuck() is None
        network = bus._network
        assert network is not None
    assert time.monotonic() - begin < 4
    release.set()
    network._thread.join(5)
    assert not network.is_alive()


# F12: another client with our id


async def test_f12_repeated_takeovers_are_an_alarm_and_are_backed_off(
    events: list[dict[str, Any]],
) -> None:
    patience = replace(FAST, stolen_wait_s=0.5, stolen_within_s=1.5)
    async with FakeBroker() as fake:
        bus, recorder = MqttBus(to(fake.port), patience=patience), Recorder()
        async with running(bus, recorder):
            for times in (1, 2, 3):
                await recorder.until_connected(times)
                assert not bus.state.stolen
                fake.write(packet(0xE0, b"\x8e\0"))  # session taken over
                await recorder.until(lambda: len(recorder.reasons) == times)  # noqa: B023
            begin = time.monotonic()
            assert bus.state.stolen
            assert set(recorder.reasons) == {
                "the broker ended the connection: client id taken over"
            }
            assert [e["event"] for e in events].count("mqtt.stolen") == 1
            await recorder.until_connected(4)
            assert time.monotonic() - begin >= 0.5
            # Nobody takes it any more.
            await eventually(lambda: not bus.state.stolen)
            assert len(recorder.reasons) == 3


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_f12_two_real_clients_end_their_fight(broker: Mosquitto, version: Any) -> None:
    patience = replace(FAST, stolen_wait_s=60)
    connection = to(broker.port, protocol=version)
    one, two = (MqttBus(connection, patience=patience) for _ in range(2))
    first, second = Recorder(), Recorder()
    async with running(one, first), running(two, second):
        await either(first.until(lambda: one.state.stolen), second.until(lambda: two.state.stolen))
        connects = len(first.sessions) + len(second.sessions)
        assert connects < 20
        # The one waits, the other is left alone.
        await either(
            first.until(lambda: one.state.connected and two.state.stolen),
            second.until(lambda: two.state.connected and one.state.stolen),
        )
        assert one.state.stolen != two.state.stolen


async def test_f12_a_broker_that_goes_down_again_and_again_is_no_theft() -> None:
    async with FakeBroker() as fake, ChaosProxy(fake.port) as proxy:
        bus, recorder = MqttBus(to(proxy.port), patience=FAST), Recorder()
        async with running(bus, recorder):
            for times in range(1, 6):
                await recorder.until_connected(times)
                await proxy.refuse()
                ends = len(recorder.reasons)
                fake.drop()  # in good order, as a broker does that is stopped
                await recorder.until(lambda: len(recorder.reasons) >= ends + 2)  # noqa: B023
                proxy.listen()
            await recorder.until_connected(6)
            assert not bus.state.stolen


async def test_f12_a_network_that_drops_us_is_no_theft(proxy: ChaosProxy) -> None:
    bus, recorder = MqttBus(to(proxy.port), patience=FAST), Recorder()
    async with running(bus, recorder):
        for times in range(1, 6):
            await recorder.until_connected(times)
            proxy.reset()
        await recorder.until_connected(6)
        assert not bus.state.stolen


# F16, floods


class Sleepy(Recorder):
    """Holds the event loop up at the first message, as a stalled daemon does."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.stall: Callable[[], None] = lambda: time.sleep(seconds)
        self.bytes = 0
        self.count = self.refused = 0

    def on_message(self, message: Incoming) -> None:
        self.count += 1
        if message.payload is None:
            self.refused += 1
        else:
            self.bytes = max(self.bytes, message.size)
        if self.count == 1:
            self.stall()
        self._note()


_FLOOD = """
import sys
from paho.mqtt import client as paho
port, topic, qos, count, size = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
client.connect("127.0.0.1", int(port))
client.loop_start()
sent = [client.publish(topic, bytes(size), qos) for _ in range(count)]
for info in sent:
    info.wait_for_publish(60)
client.disconnect()
client.loop_stop()
"""


async def flood(port: int, topic: str, *, qos: int, count: int, size: int) -> None:
    """Publish from another process, so that this one's memory is the bus's."""
    arguments = [sys.executable, "-c", _FLOOD, *map(str, (port, topic, qos, count, size))]
    await asyncio.to_thread(subprocess.run, arguments, check=True, timeout=60)


def peak_rss() -> int:
    """Return the highest resident size since `reset_peak`, bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024


def reset_peak() -> int:
    """Forget the highest resident size, and return the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


MB = 1024 * 1024


async def test_f16_large_unacknowledged_frames_are_bounded(broker: Mosquitto) -> None:
    bus = MqttBus(to(broker.port, maximum_packet_size=10 * MB, receive_maximum=8))
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        before = reset_peak()
        await flood(broker.port, "in/frame", qos=1, count=15, size=8 * MB)
        await recorder.until(lambda: len(recorder.messages) == 8)  # receive maximum
        kept = [message for message in recorder.messages if message.payload is not None]
        assert len(kept) == 4  # 40 MB
        assert all(message.size == 8 * MB for message in recorder.messages)
        # What is kept, and one more that arrives and is copied once.
        assert peak_rss() - before < (40 + 2 * 10 + 10) * MB
        # Refused ones are acknowledged like any other, and then all 15 have come.
        recorder.acks = bus
        for message in list(recorder.messages):
            bus.ack(message.receipt)
        await recorder.until(lambda: len(recorder.messages) == 15)
        assert not recorder.reasons


async def test_f16_a_flood_at_qos_0_on_a_stalled_loop_is_bounded(broker: Mosquitto) -> None:
    bus = MqttBus(to(broker.port, maximum_packet_size=2 * MB))  # 6 MB may wait
    recorder = Sleepy(1.0)
    async with running(bus, recorder):
        await recorder.until_connected()
        before = reset_peak()
        await flood(broker.port, "in/frame", qos=0, count=60, size=1 * MB)
        await recorder.until(lambda: recorder.count == 60)
        assert recorder.refused > 0
        assert peak_rss() - before < (6 + 2 * 2 + 10) * MB
        assert bus._network is not None
        assert bus._network.taken == bus._network.released  # nothing leaks from the budget


async def test_f16_many_small_messages_on_a_stalled_loop_are_bounded(broker: Mosquitto) -> None:
    bus = MqttBus(to(broker.port, inbound_bytes=1 * MB))
    recorder = Sleepy(0.0)
    waiting = 0

    def stall() -> None:
        nonlocal waiting
        assert bus._network is not None
        until = time.monotonic() + 20
        while not bus._network._blocked and time.monotonic() < until:
            time.sleep(0.01)
        waiting = len(bus._network.events)

    recorder.stall = stall
    async with running(bus, recorder):
        await recorder.until_connected()
        before = reset_peak()
        await flood(broker.port, "in/small", qos=0, count=30_000, size=20)
        await recorder.until(lambda: recorder.count == 30_000, 30)
        # 8192, and what was in the buffer that was just read.
        assert 8192 <= waiting < 8192 + 256 * 1024 / 28
        assert peak_rss() - before < 30 * MB
        assert bus.stuck() is None


# F18: our own code fails


@pytest.mark.parametrize(
    "label",
    [
        "mqtt.on_connect",
        "mqtt.on_subscribe",
        "mqtt.on_publish",
        "mqtt.on_message",
        "mqtt.on_disconnect",
    ],
)
async def test_f18_an_exception_in_a_callback_costs_one_connection(
    proxy: ChaosProxy, label: str, events: list[dict[str, Any]]
) -> None:
    failures = 2

    def trace(reached: str) -> None:
        nonlocal failures
        if reached == label and failures:
            failures -= 1
            raise RuntimeError("a fault on purpose")

    bus = MqttBus(to(proxy.port), patience=FAST, trace=trace)
    recorder = Recorder(acks=bus)
    async with running(bus, recorder) as task:
        async with asyncio.timeout(10):
            while failures:
                await recorder.until(lambda: bus.session is not None)
                if label == "mqtt.on_disconnect":
                    proxy.reset()
                lost = bus.publish(out("in/me", b"x"))
                await asyncio.wait([lost])
                if recorder.sessions and label == "mqtt.on_disconnect":
                    reasons = len(recorder.reasons)
                    await recorder.until(lambda: len(recorder.reasons) >= reasons)  # noqa: B023
        await recorder.until(lambda: bus.session is not None)
        await deliver(bus, out("in/me", b"well"), recorder)
        await recorder.until(lambda: b"well" in recorder.bodies)
        await eventually(lambda: bus._network.taken == bus._network.released)  # type: ignore[union-attr]
        assert "internal error (RuntimeError)" in recorder.reasons
        assert "mqtt.failed" in {event["event"] for event in events}
        assert not task.done()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_f18_a_network_thread_that_ends_is_replaced(
    broker: Mosquitto, events: list[dict[str, Any]]
) -> None:
    armed = True

    def trace(reached: str) -> None:
        nonlocal armed
        if reached == "mqtt.on_message" and armed:
            armed = False
            raise SystemExit  # passes every `except Exception`

    bus = MqttBus(to(broker.port), patience=FAST, trace=trace)
    recorder = Recorder(acks=bus)
    async with running(bus, recorder) as task:
        await recorder.until_connected()
        lost = bus.publish(out("in/me", b"x"))
        await recorder.until_connected(2, 10)
        assert lost.done()
        assert not (await bus.publish(out())).failed
        assert "mqtt.thread_ended" in {event["event"] for event in events}
        assert recorder.reasons == ["the network thread ended"]
        assert recorder.sessions[1].generation > recorder.sessions[0].generation
        assert not task.done()


async def test_a_thread_that_hangs_is_said_to_be_stuck(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.mqtt._SLACK_S", 0.2)
    hanging, release = threading.Event(), threading.Event()

    def trace(reached: str) -> None:
        if reached == "mqtt.on_message":
            hanging.set()
            release.wait(20)

    bus = MqttBus(to(broker.port), patience=FAST, trace=trace)
    recorder = Recorder(acks=bus)
    async with running(bus, recorder):
        await recorder.until_connected()
        assert bus.stuck() is None
        bus.publish(out("in/me"))
        assert await asyncio.to_thread(hanging.wait, 5)
        await eventually(bus.stuck)
        assert "late" in (bus.stuck() or "")
        assert bus.state.connected  # which is why nobody may go by that alone
        release.set()
        await recorder.until(lambda: recorder.messages)
        await eventually(lambda: bus.stuck() is None)


# F19: many at once


async def test_f19_callers_on_many_sides_do_not_lock_each_other_out(
    broker: Mosquitto, proxy: ChaosProxy
) -> None:
    bus = MqttBus(to(proxy.port), patience=FAST)
    recorder = Recorder(acks=bus)
    loop = asyncio.get_running_loop()
    until = time.monotonic() + 3
    progress = [0, 0]
    lost = [0, 0]

    async def once(number: int) -> None:
        bus.offer(out("in/offer"))
        try:
            await bus.publish(out("in/me", b"%d" % number))
            progress[number] += 1
        except ConnectionLost:
            lost[number] += 1
            await recorder.until(lambda: bus.session is not None)

    def caller(number: int) -> None:
        while time.monotonic() < until:
            asyncio.run_coroutine_threadsafe(once(number), loop).result(20)
            assert bus.stuck() is None
            assert bus.state is not None

    async with running(bus, recorder):
        await recorder.until_connected()
        callers = [asyncio.to_thread(caller, number) for number in range(2)]
        work = asyncio.gather(*callers)
        for _ in range(4):
            seen = sum(progress)
            await eventually(lambda: sum(progress) >= seen + 100)  # noqa: B023 - used at once
            proxy.reset()
        await work
        assert min(progress) > 200
        assert len(recorder.sessions) >= 5


# Leaving


def _lost() -> Outgoing:
    return out("out/status", b"lost", qos=1)


async def test_a_farewell_is_heard_although_the_broker_is_still_sending(broker: Mosquitto) -> None:
    for _ in range(5):
        bus = MqttBus(to(broker.port, will=_lost, clean_start=True))
        recorder = Recorder(acks=bus)
        with Peer(broker.port, "out/status") as peer:
            async with running(bus, recorder):
                await recorder.until_connected()
                for _ in range(300):
                    peer.send("in/a", bytes(10_000), qos=0)
                await recorder.until(lambda: len(recorder.messages) > 20)  # noqa: B023 - used at once
                await bus.close(out("out/status", b"stopped"))
            await asyncio.to_thread(peer.publish, "out/status", b"marker")
            await asyncio.to_thread(peer.wait, lambda seen: seen[-1].payload == b"marker")
            assert [message.payload for message in peer.seen] == [b"stopped", b"marker"]


# F20: topics that make brokers hang up (publishes: test_bus_port)


async def test_f20_a_will_that_must_not_be_is_a_reason_not_a_crash(broker: Mosquitto) -> None:
    topics = iter(["$SYS/x", "a/#", "out/status"])
    bus = MqttBus(to(broker.port, will=lambda: out(next(topics))), patience=FAST)
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until_connected()
        assert len(recorder.reasons) == 2
        assert all(reason.startswith("the will cannot be: ") for reason in recorder.reasons)


# F35: what the last will says


async def test_f35_a_new_connection_is_not_declared_dead_by_the_old_one(
    broker: Mosquitto, proxy: ChaosProxy
) -> None:
    will = out("out/status", b"lost", qos=1, retain=True)
    old = MqttBus(to(proxy.port, will=lambda: will), patience=replace(FAST, connect_s=60))
    new = MqttBus(to(broker.port, will=lambda: will), patience=FAST)
    one, two = Recorder(), Recorder()
    async with running(old, one):
        await one.until_connected()
        proxy.blackhole()  # half-open: the broker still believes in it
        async with running(new, two):
            await two.until_connected()
            await new.publish(out("out/status", b"ready", retain=True))
            proxy.reset()
            await one.until(lambda: one.reasons)
            with Peer(broker.port, "out/status") as peer:
                seen = await asyncio.to_thread(peer.wait_for, 1)
                assert [message.payload for message in seen] == [b"ready"]
            assert not two.reasons
