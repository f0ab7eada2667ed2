"""Cutting the broker's bytes into packets, against paho's own decoder as the oracle."""

from __future__ import annotations

import errno
import socket
import ssl
import struct
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.exception import MalformedPacket
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edged.mqttwire import (
    HEAD_BYTES,
    MAX_CONTROL_BYTES,
    MAX_PROPERTIES_BYTES,
    NoConnection,
    ProtocolError,
    Publish,
    Splitter,
    Wire,
    decode_publish,
    dial,
    explain,
)
from tests.kit.fakebroker import packet, publish, variable


def splitter(*, five: bool = True, maximum: int | None = None, room: int = 1 << 40) -> Splitter:
    taken = 0

    def reserve(size: int) -> bool:
        nonlocal taken
        if taken + size > room:
            return False
        taken += size
        return True

    return Splitter(five=five, maximum=maximum, reserve=reserve)


def feed(split: Splitter, data: bytes, sizes: list[int]) -> list[Publish | bytes]:
    """Feed the data in pieces of these sizes, then the rest."""
    done: list[Publish | bytes] = []
    for size in sizes:
        done += split.feed(data[:size])
        data = data[size:]
    return done + split.feed(data)


utf8 = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@st.composite
def publishes(draw: st.DrawFn) -> tuple[bytes, Publish]:
    """A PUBLISH as paho would pack it, and what it means."""
    qos = draw(st.sampled_from([0, 1]))
    wanted = Publish(
        topic=draw(utf8.filter(bool)),
        payload=draw(st.binary(max_size=300)),
        size=0,
        qos=qos,
        retain=draw(st.booleans()),
        duplicate=draw(st.booleans()),
        mid=draw(st.integers(1, 65535)) if qos else 0,
        response_topic=draw(st.none() | utf8),
        correlation=draw(st.none() | st.binary(max_size=50)),
        expiry_s=draw(st.none() | st.integers(0, 2**32 - 1)),
    )
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if wanted.response_topic is not None:
        properties.ResponseTopic = wanted.response_topic
    if wanted.correlation is not None:
        properties.CorrelationData = wanted.correlation
    if wanted.expiry_s is not None:
        properties.MessageExpiryInterval = wanted.expiry_s
    names = utf8 | st.just("ts")
    for name, value in draw(st.lists(st.tuples(names, utf8), max_size=4)):
        properties.UserProperty = (name, value)
        if name == "ts" and wanted.ts is None:
            wanted.ts = value
    if draw(st.booleans()):
        properties.ContentType = draw(utf8)
        properties.PayloadFormatIndicator = 1
        properties.SubscriptionIdentifier = draw(st.integers(1, 268_435_455))
    assert wanted.payload is not None
    wanted.size = len(wanted.payload)
    first = 0x30 | wanted.duplicate << 3 | qos << 1 | wanted.retain
    packed: bytes = properties.pack()  # type: ignore[no-untyped-call]
    head = struct.pack("!H", len(wanted.topic.encode())) + wanted.topic.encode()
    head += struct.pack("!H", wanted.mid) if qos else b""
    data = packet(first, head + packed + wanted.payload)
    wanted.reserved = len(head + packed + wanted.payload) + 512
    return data, wanted


@given(
    packets=st.lists(publishes() | st.binary(max_size=300), max_size=6),
    sizes=st.lists(st.integers(1, 200), max_size=20),
)
def test_packets_come_out_as_they_went_in_however_the_bytes_are_cut(
    packets: list[tuple[bytes, Publish] | bytes], sizes: list[int]
) -> None:
    data, wanted = b"", list[Publish | bytes]()
    for item in packets:
        if isinstance(item, bytes):  # any other packet: a SUBACK
            raw = packet(0x90, item)
            data += raw
            wanted.append(raw)
        else:
            data += item[0]
            wanted.append(item[1])
    split = splitter()
    assert feed(split, data, sizes) == wanted
    assert split.reserved == 0


def test_a_ts_is_bounded_and_seen_to_be_too_long() -> None:
    for value, kept in ((b"1" * 64, 64), (b"1" * 65, 65), (b"1" * 60_000, 65)):
        named = struct.pack("!H", 2) + b"ts" + struct.pack("!H", len(value)) + value
        body = b"\0\1a" + variable(1 + len(named)) + b"\x26" + named + b"payload"
        message = decode_publish(0x30, body, five=True, length=len(body), whole=True)
        assert message.ts is not None
        assert len(message.ts) == kept


def test_a_ts_that_is_no_text_stays_something_else() -> None:
    body = b"\0\1a" + b"\x09" + b"\x26" + b"\0\2ts\0\2\xff\xfe"
    message = decode_publish(0x30, body, five=True, length=len(body), whole=True)
    assert message.ts == "\ufffd\ufffd"


@given(st.sampled_from([0x30, 0x32, 0x33, 0x3A]), st.binary(max_size=80), st.booleans())
def test_bytes_that_paho_can_decode_mean_the_same_to_us(
    first: int, body: bytes, five: bool
) -> None:
    version = MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311
    try:
        ours = decode_publish(first, body, five=five, length=len(body), whole=True)
    except ProtocolError:
        return
    try:
        theirs = _packet.decode_publish(first, body, version)
    except MalformedPacket:
        return  # paho also judges the values: text, doubles
    assert (ours.payload, ours.qos, ours.mid) == (theirs.payload, theirs.qos, theirs.mid)
    assert ours.topic == theirs.topic.decode(errors="replace")
    assert ours.correlation == getattr(theirs.properties, "CorrelationData", None)
    assert ours.response_topic == getattr(theirs.properties, "ResponseTopic", None)
    assert ours.expiry_s == getattr(theirs.properties, "MessageExpiryInterval", None)


@given(st.binary(max_size=400), st.lists(st.integers(1, 50), max_size=10), st.booleans())
def test_any_bytes_are_packets_or_a_protocol_error(
    data: bytes, sizes: list[int], five: bool
) -> None:
    with suppress(ProtocolError):
        feed(splitter(five=five), data, sizes)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x36\x05\0\1a\0\1", "QoS 3"),
        (b"\x30\xff\xff\xff\xff\x01", "four bytes"),
        (b"\x30\x00", "malformed"),
        (b"\x30\x03\0\x09a", "malformed"),
        (b"\x32\x06\0\1a\0\0\0", "malformed"),  # packet id 0
        (b"\x30\x05\0\1a\x01\x77", "unknown property"),
        (b"\x30\x06\0\1a\x02\x02\0", "malformed properties"),
        (b"\x30\x04\0\1a\x05", "malformed"),  # properties beyond the packet
    ],
)
def test_what_is_no_publish_is_said_to_be_none(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        splitter().feed(data)


def test_a_packet_beyond_the_maximum_is_let_go_while_it_arrives() -> None:
    split = splitter(five=False, maximum=1000)
    body = struct.pack("!H", 3) + b"a/b" + struct.pack("!H", 7)
    start = b"\x32" + variable(len(body) + 50_000_000) + body
    assert split.feed(start) == []
    chunk = bytes(100_000)
    for _ in range(499):
        assert split.feed(chunk) == []
        assert len(split._body) <= HEAD_BYTES
    (message,) = split.feed(chunk)
    assert isinstance(message, Publish)
    assert (message.topic, message.payload, message.size) == ("a/b", None, 50_000_000)
    assert (message.mid, message.reserved) == (7, 0)
    assert split.feed(b"\x30\x04\0\1ax") == [
        Publish("a", b"x", 1, 0, False, False, 0, reserved=4 + 512)
    ]


def test_without_room_the_head_is_kept_and_the_payload_is_not() -> None:
    properties = b"\x08\0\3r/t\x09\0\2cc"
    (message,) = splitter(room=1000).feed(publish("a", bytes(1000), 3, properties))
    assert isinstance(message, Publish)
    assert (message.payload, message.size, message.mid) == (None, 1000, 3)
    assert (message.response_topic, message.correlation) == ("r/t", b"cc")


def test_a_flood_of_properties_costs_nothing() -> None:
    # 2 million user properties: paho's decoder, copying the rest for each, would take hours.
    properties = b"\x26\0\0\0\0" * 2_000_000
    data = publish("a", b"payload", 9, properties)
    begin = time.perf_counter()
    (message,) = splitter().feed(data)
    took = time.perf_counter() - begin
    assert isinstance(message, Publish)
    assert (message.topic, message.payload, message.mid) == ("a", None, 9)
    assert message.size > len(properties)
    assert took < 2


def test_properties_up_to_the_limit_are_read() -> None:
    filler = b"\x26\0\0\0\0" * ((MAX_PROPERTIES_BYTES - 10) // 5)
    (message,) = splitter().feed(publish("a", b"p", 9, filler + b"\x09\0\2cc"))
    assert isinstance(message, Publish)
    assert (message.payload, message.correlation) == (b"p", b"cc")


def test_names_that_are_no_utf_8_stay_recognisable_as_such() -> None:
    body = b"\0\2a\xff" + b"\x05\x08\0\2r\xfe" + b"p"
    (message,) = splitter().feed(packet(0x30, body))
    assert isinstance(message, Publish)
    assert message.topic == "a\ufffd"
    assert message.response_topic == "r\udcfe"


def test_qos_2_is_left_to_paho() -> None:
    data = publish("a", b"p", 4, first=0x34)
    assert splitter().feed(data) == [data]


def test_a_control_packet_is_bounded() -> None:
    with pytest.raises(ProtocolError):
        splitter().feed(b"\x90" + variable(MAX_CONTROL_BYTES + 1))


# Leaving


def test_the_peer_reads_our_last_words_although_we_did_not_read_its() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with peer:
            sock.setblocking(False)
            wire = Wire(sock, splitter())
            peer.sendall(bytes(100_000))
            assert wire.send(b"\xe0\x00") == 2
            wire.close()  # as paho does
            leaving = threading.Thread(target=wire.finish, kwargs={"linger_s": 5.0})
            leaving.start()
            assert peer.recv(10) == b"\xe0\x00"
            assert peer.recv(10) == b""  # an orderly end, no reset
            peer.close()
            leaving.join(4)
            assert not leaving.is_alive()
            assert wire.fileno() == -1
            with pytest.raises(ConnectionResetError):
                wire.send(b"more")


# Reasons


def test_every_failure_has_words() -> None:
    assert str(explain(ConnectionRefusedError())) == "connection refused"
    assert str(explain(ConnectionResetError())) == "connection reset"
    assert str(explain(TimeoutError())) == "no answer from the broker's address"
    assert str(explain(OSError(errno.ENETUNREACH, ""))) == "network unreachable"
    assert str(explain(OSError(errno.EMFILE, ""))) == "network error EMFILE"
    assert "TLS" in str(explain(ssl.SSLEOFError()))
    assert str(explain(ValueError("secret"))) == "ValueError"
    told = NoConnection("as it is")
    assert explain(told) is told


def test_a_certificate_that_is_not_valid_yet_puts_the_clock_in_doubt() -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = 9, "certificate is not yet valid"
    told = explain(error)
    assert told.clock_suspect
    assert "clock" in str(told)
    error.verify_code = 10
    assert str(explain(error)) == "certificate expired"
    assert not explain(error).clock_suspect
    error.verify_code, error.verify_message = 79, "invalid CA certificate"
    assert str(explain(error)) == "certificate refused: invalid CA certificate"


def test_getaddrinfo_is_what_we_think(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(code: int) -> str:
        def lookup(*_: object, **__: object) -> object:
            raise socket.gaierror(code, "x")

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        with pytest.raises(NoConnection) as caught:
            dial("h", 1, None, until=0.0, wait=lambda *_: False)
        return str(caught.value)

    assert "lookup failed" in fail(socket.EAI_AGAIN)
    assert fail(socket.EAI_NONAME) == "host name not found"
