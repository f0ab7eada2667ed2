"""What brokers may demand and do that mosquitto cannot be made to."""

from __future__ import annotations

import asyncio
import ssl
import struct
from typing import Any

import pytest

from edged.errors import BadPublish, ConnectionLost
from edged.mqtt import Connection, MqttBus, Patience
from edged.ports import Outgoing
from tests.kit.fakebroker import (
    MAXIMUM_PACKET_SIZE_4K,
    MAXIMUM_QOS_0,
    RECEIVE_MAXIMUM_1,
    RETAIN_UNAVAILABLE,
    FakeBroker,
    packet,
    publish,
)
from tests.kit.mosquitto import Authority
from tests.kit.recorder import FAST, Recorder, eventually, running

WILL = Outgoing(topic="out/status", payload=b"lost", qos=1, retain=True)


def bus_to(fake: FakeBroker, patience: Patience = FAST, **settings: Any) -> MqttBus:
    given: dict[str, Any] = {"subscriptions": (("in/#", 1), ("own", 0)), **settings}
    connection = Connection(host="127.0.0.1", port=fake.port, client_id="device", **given)
    return MqttBus(connection, patience=patience)


def out(payload: bytes = b"x", **fields: Any) -> Outgoing:
    return Outgoing(topic="out/a", payload=payload, **fields)


# The CONNACK's limits


async def test_a_receive_maximum_of_one_is_a_window_of_one() -> None:
    async with FakeBroker(connack=(0, RECEIVE_MAXIMUM_1), answers=False) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            assert recorder.sessions[0].receive_maximum == 1
            # A caller that goes beyond it does not make us break the protocol.
            answers = [bus.publish(out(b"%d" % number)) for number in range(3)]
            for number in range(3):
                sent = await fake.wait_for(3, number + 1)
                assert bus.offer(out(b"chunk"))  # QoS 0 is not held up
                await fake.wait_for(3, number + 2)
                fake.packets.remove(fake.of_type(3)[-1])
                assert len(fake.of_type(3)) == number + 1
                assert sent[-1][1].endswith(b"%d" % number)
                assert not answers[number].done()
                fake.answer(fake.mid_of(sent[-1][1]))
                assert not (await answers[number]).failed


async def test_a_packet_that_is_too_large_for_the_broker_is_not_sent() -> None:
    async with FakeBroker(connack=(0, MAXIMUM_PACKET_SIZE_4K)) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            assert recorder.sessions[0].maximum_packet_size == 4096
            with pytest.raises(BadPublish, match="4096"):
                await bus.publish(out(bytes(4096)))
            assert not bus.offer(out(bytes(4096)))
            assert not (await bus.publish(out(bytes(4000)))).failed
            assert len(fake.of_type(3)) == 1
            assert not recorder.reasons


async def test_a_broker_without_qos_1_is_a_loud_error() -> None:
    async with FakeBroker(connack=(0, MAXIMUM_QOS_0)) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            assert recorder.sessions[0].maximum_qos == 0
            with pytest.raises(BadPublish, match="QoS 0 only"):
                await bus.publish(out())
            assert bus.offer(out())
            ((first, _),) = await fake.wait_for(3)
            assert first == 0x30
            assert not recorder.reasons


async def test_without_retain_messages_go_unretained(events: list[dict[str, Any]]) -> None:
    async with FakeBroker(connack=(0, RETAIN_UNAVAILABLE)) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            assert recorder.sessions[0].retain_available is False
            assert not (await bus.publish(out(retain=True))).failed
            bus.offer(out(retain=True))
            sent = await fake.wait_for(3, 2)
            assert [first & 1 for first, _ in sent] == [0, 0]
            assert [e["event"] for e in events].count("mqtt.no_retain") == 1


@pytest.mark.parametrize(
    ("reason", "flags"), [(0x9A, [0b101110, 0b001110]), (0x9B, [0b101110, 0b100110])]
)
async def test_a_will_that_the_broker_cannot_take_is_made_smaller(
    reason: int, flags: list[int]
) -> None:
    async with FakeBroker(connack=(reason, b"")) as fake:
        bus, recorder = bus_to(fake, will=lambda: WILL), Recorder()
        async with running(bus, recorder):
            await recorder.until(lambda: recorder.reasons)
            assert recorder.reasons[0] in {"retain not supported", "qos not supported"}
            fake.connack = (0, b"")
            await recorder.until_connected()
            # Connect flags (MQTT 5 section 3.1.2.3), bit 0 reserved, bit 1 clean start.
            connects = [body[7] for _, body in fake.of_type(1)]
            assert connects[0] == flags[0] & ~2
            assert connects[-1] == flags[1] & ~2


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (0x86, "bad user name or password"),
        (0x87, "not authorized (bad user name or password, or a client id that is not allowed)"),
        (0x88, "server unavailable"),
        (0x89, "server busy (come back later)"),
        (0x8A, "banned"),
        (0x01, "unsupported protocol version"),
    ],
)
async def test_a_refusal_is_told_in_words(code: int, why: str) -> None:
    words = b"\x1f\0\x0fcome back later" if code == 0x89 else b""
    async with FakeBroker(connack=(code, words)) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until(lambda: len(recorder.reasons) >= 2)
            assert set(recorder.reasons) == {why}
            assert not recorder.sessions


async def test_what_we_ask_for_at_connect_and_subscribe() -> None:
    async with FakeBroker() as fake:
        bus = bus_to(
            fake,
            maximum_packet_size=1_000_000,
            receive_maximum=5,
            session_expiry_s=77,
            keepalive_s=20,
        )
        recorder = Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
        ((_, connect),) = fake.of_type(1)
        assert connect[:8] == b"\0\4MQTT\x05\x00"  # no clean start
        assert connect[8:10] == struct.pack("!H", 20)
        for wanted in (b"\x11" + struct.pack("!I", 77), b"\x21\0\5", b"\x27\x00\x0f\x42\x40"):
            assert wanted in connect
        ((_, subscribe),) = fake.of_type(8)
        # QoS, retain as published (8), retain handling 2 (0x20)
        assert subscribe[2:] == b"\0" + b"\0\4in/#\x29" + b"\0\3own\x28"


# What a broker may write


@pytest.mark.parametrize("read_bytes", [16, 64 * 1024])
@pytest.mark.parametrize("tls", [False, True])
async def test_many_packets_in_one_write_are_all_delivered(
    tls: bool, read_bytes: int, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.mqttwire._READ_BYTES", read_bytes)
    monkeypatch.setattr("edged.mqttwire._READ_TURN_BYTES", read_bytes)
    many = b"".join(publish("in/a", b"%d" % number, number) for number in range(1, 9))
    settings: dict[str, Any] = {}
    context = None
    if tls:
        issued = authority.issue("localhost")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(issued.cert, issued.key)
        settings = {"tls": True, "ca": issued.ca}
    async with FakeBroker(after_suback=many, tls=context) as fake:
        bus = bus_to(fake, **settings)
        recorder = Recorder(acks=bus)
        async with running(bus, recorder):
            # Nothing more comes that could wake a reader which left bytes in the TLS layer.
            await recorder.until(lambda: len(recorder.messages) == 8, 2)
            acks = await fake.wait_for(4, 8)
            assert [struct.unpack("!H", body[:2])[0] for _, body in acks] == list(range(1, 9))


async def test_messages_before_the_suback_are_delivered() -> None:
    async with FakeBroker(suback=False) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await fake.wait_for(8)
            fake.write(publish("in/a", b"early", 1))
            await recorder.until(lambda: recorder.messages)
            assert not recorder.subscribed


async def test_a_refused_subscription_is_named() -> None:
    async with FakeBroker(suback=False) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            ((_, body),) = await fake.wait_for(8)
            fake.write(packet(0x90, body[:2] + b"\0" + b"\x87\x00"))
            await recorder.until_connected()
            assert recorder.subscribed == [("in/#",)]


async def test_a_publish_that_is_refused_has_the_brokers_words() -> None:
    async with FakeBroker(answers=False) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            answer = bus.publish(out())
            ((_, body),) = await fake.wait_for(3)
            mid = struct.pack("!H", fake.mid_of(body))
            fake.write(packet(0x40, mid + b"\x97" + b"\x07\x1f\0\x04full"))
            told = await answer
            assert (told.failed, told.reason) == (True, "quota exceeded (full)")


async def test_a_puback_for_nobody_is_ignored() -> None:
    async with FakeBroker() as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            fake.answer(77)
            assert not (await bus.publish(out())).failed
            assert not recorder.reasons


async def test_a_message_larger_than_we_allow_comes_without_payload() -> None:
    async with FakeBroker() as fake:
        bus = bus_to(fake, maximum_packet_size=10_000)
        recorder = Recorder(acks=bus)
        async with running(bus, recorder):
            await recorder.until_connected()
            fake.write(publish("in/a", bytes(5_000_000), 1, b"\x08\0\3r/t"))
            fake.write(publish("in/a", b"next", 2))
            await recorder.until(lambda: len(recorder.messages) == 2)
            large, small = recorder.messages
            assert (large.payload, large.size) == (None, 5_000_000)
            assert large.response_topic == "r/t"
            assert small.payload == b"next"
            assert len(await fake.wait_for(4, 2)) == 2


async def test_half_a_message_takes_no_room_once_its_connection_is_gone() -> None:
    async with FakeBroker() as fake:
        bus = bus_to(fake, inbound_bytes=100_000)
        recorder = Recorder(acks=bus)
        async with running(bus, recorder):
            for times in (1, 2):
                await recorder.until_connected(times)
                fake.write(publish("in/a", bytes(90_000), 1)[:50_000])
                fake.drop()
                await recorder.until(lambda: len(recorder.reasons) == times)  # noqa: B023 - at once
            await recorder.until_connected(3)
            fake.write(publish("in/a", bytes(90_000), 1))
            await recorder.until(lambda: recorder.messages)
            assert recorder.bodies == [bytes(90_000)]


async def test_a_message_full_of_properties_does_not_hold_up_the_next() -> None:
    async with FakeBroker() as fake:
        bus = bus_to(fake)
        recorder = Recorder(acks=bus)
        async with running(bus, recorder):
            await recorder.until_connected()
            fake.write(publish("in/a", b"x", 1, b"\x26\0\1a\0\1b" * 300_000))
            fake.write(publish("in/a", b"next", 2))
            await recorder.until(lambda: len(recorder.messages) == 2, 5)
            assert recorder.bodies == [None, b"next"]


async def test_a_session_that_somebody_else_subscribed_at_qos_2_is_drained() -> None:
    async with FakeBroker() as fake:
        bus = bus_to(fake)
        recorder = Recorder(acks=bus)
        async with running(bus, recorder):
            await recorder.until_connected()
            fake.write(publish("in/a", b"two", 9, first=0x34))
            await fake.wait_for(5)  # PUBREC
            fake.write(b"\x62\x02\0\x09")  # PUBREL
            await recorder.until(lambda: recorder.messages)
            assert (recorder.messages[0].payload, recorder.messages[0].qos) == (b"two", 1)
            ((_, body),) = await fake.wait_for(7)  # PUBCOMP
            assert body[:2] == b"\0\x09"


@pytest.mark.parametrize(
    ("rubbish", "why"),
    [
        (b"\xf0\0", "malformed"),
        (b"\x36\x05\0\1a\0\1", "QoS 3"),
        (b"\x30\x03\0\x09a", "malformed PUBLISH"),
        (b"\x90" + b"\xff" * 5, "four bytes"),
        (b"HTTP/1.1 400 Bad Request\r\n" * 10, "malformed"),
    ],
)
async def test_rubbish_ends_the_connection_and_nothing_else(rubbish: bytes, why: str) -> None:
    async with FakeBroker() as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            lost = bus.publish(out()) if rubbish[0] == 0xF0 else None
            fake.write(rubbish)
            await recorder.until_connected(2)
            assert why in recorder.reasons[0]
            assert bus.state.reconnects == 1
            if lost is not None:
                await asyncio.wait([lost])


async def test_a_disconnect_is_told_in_words_and_publishes_fail() -> None:
    async with FakeBroker(answers=False) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            answer = bus.publish(out())
            await fake.wait_for(3)
            fake.write(packet(0xE0, b"\x8b\0"))
            with pytest.raises(ConnectionLost, match="shutting down"):
                await answer
            await recorder.until_connected(2)
            assert recorder.reasons == ["the broker ended the connection: server shutting down"]
            assert not bus.state.stolen


async def test_the_brokers_keepalive_is_obeyed() -> None:
    async with FakeBroker(connack=(0, b"\x13\0\x01")) as fake:
        bus, recorder = bus_to(fake, keepalive_s=600), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            await fake.wait_for(12)  # PINGREQ, after a second
            assert not recorder.reasons


async def test_the_end_is_orderly_although_much_is_unread() -> None:
    async with FakeBroker() as fake:
        bus = bus_to(fake, inbound_bytes=1000)
        recorder = Recorder(acks=bus)
        async with running(bus, recorder):
            await recorder.until_connected()
            for _ in range(200):
                fake.write(publish("in/a", bytes(100_000), 0, first=0x30))
            await recorder.until(lambda: recorder.messages)
            await bus.close()
        assert len(await fake.wait_for(14)) == 1  # DISCONNECT
        await eventually(lambda: fake.ends)
        assert fake.ends == ["eof"]


# Backpressure


async def test_qos_0_is_refused_while_much_waits_to_be_written() -> None:
    async with FakeBroker() as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            # The broker does not read while this coroutine does not yield.
            sent = 0
            while bus.offer(out(bytes(60_000))):
                sent += 1
                assert sent < 1000
            assert sent >= 4
            async with asyncio.timeout(0.9):  # at the network's pace, not at that of any timer
                await fake.wait_for(3, sent)
            await eventually(lambda: bus.offer(out()), 0.9)
            await fake.wait_for(3, sent + 1)


async def test_too_many_unanswered_publishes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.mqtt.MAX_HELD", 10)
    async with FakeBroker(connack=(0, RECEIVE_MAXIMUM_1), answers=False) as fake:
        bus, recorder = bus_to(fake), Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            answers = [bus.publish(out()) for _ in range(11)]
            assert not any(answer.done() for answer in answers)
            with pytest.raises(ConnectionLost, match="too many"):
                await bus.publish(out())
