"""TLS, passwords, and what the bus says when they are wrong."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edged.mqtt import Connection, MqttBus, Patience
from edged.ports import Outgoing
from tests.kit.client import Peer
from tests.kit.mosquitto import PROGRAM, Authority, Certificates, Mosquitto
from tests.kit.recorder import FAST, Recorder, running

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(PROGRAM is None, reason="mosquitto is not installed"),
]


async def reason(connection: Connection, patience: Patience = FAST) -> str:
    """Return why this does not connect; it must say the same a second time."""
    bus = MqttBus(connection, patience=patience)
    recorder = Recorder()
    async with running(bus, recorder):
        await recorder.until(lambda: recorder.sessions or len(recorder.reasons) >= 2)
        assert not recorder.sessions
        assert len(set(recorder.reasons)) == 1
        assert bus.state.last_reason == recorder.reasons[0]
        assert not bus.state.connected
        assert bus.stuck() is None
        return recorder.reasons[0]


@pytest.fixture(scope="module")
def certificates(authority: Authority) -> Certificates:
    return authority.issue("localhost")


@pytest.fixture(scope="module")
def tls_broker(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("tls"), tls=certificates) as mosquitto:
        yield mosquitto


def at(mosquitto: Mosquitto, **settings: Any) -> Connection:
    return Connection(
        host=mosquitto.host,
        port=mosquitto.port,
        client_id="device",
        subscriptions=(("in/#", 1),),
        **settings,
    )


# TLS


async def test_messages_pass_through_tls(tls_broker: Mosquitto, certificates: Certificates) -> None:
    bus = MqttBus(at(tls_broker, tls=True, ca=certificates.ca, maximum_packet_size=4_000_000))
    recorder = Recorder(acks=bus)
    with Peer(tls_broker.port, "out/#", host="localhost", ca=certificates.ca) as peer:
        async with running(bus, recorder):
            await recorder.until_connected()
            big = bytes(range(256)) * 4096 * 3  # 3 MB, many TLS records
            await asyncio.to_thread(peer.publish, "in/a", big)
            for number in range(100):
                peer.send("in/a", b"%d" % number)
            await recorder.until(lambda: len(recorder.messages) == 101)
            assert recorder.bodies == [big, *(b"%d" % number for number in range(100))]
            answers = [bus.publish(Outgoing(topic="out/a", payload=big[:100_000]))] * 3
            await asyncio.gather(*answers)
            assert not recorder.reasons


async def test_the_brokers_certificate_is_checked(
    tls_broker: Mosquitto, certificates: Certificates, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger")
    good = at(tls_broker, tls=True, ca=certificates.ca)
    assert "its CA is not ours" in await reason(replace(good, ca=stranger.ca))
    assert "certificate not trusted" in await reason(replace(good, ca=None))  # the system's


@pytest.mark.parametrize(
    ("name", "start", "end", "why"),
    [
        ("localhost", None, "20210101000000Z", "certificate expired"),
        ("elsewhere", None, None, "certificate is for another host name"),
        ("localhost", "tomorrow", None, "certificate not yet valid (is the clock right?)"),
    ],
)
async def test_a_wrong_certificate_is_named(
    authority: Authority, tmp_path: Path, name: str, start: str | None, end: str | None, why: str
) -> None:
    if start == "tomorrow":
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        start, end = (t.strftime("%Y%m%d%H%M%SZ") for t in (soon, soon + dt.timedelta(days=1)))
    issued = authority.issue(name, start=start, end=end)
    with Mosquitto(tmp_path, tls=issued) as mosquitto:
        assert await reason(at(mosquitto, tls=True, ca=issued.ca)) == why


async def test_plain_text_and_tls_are_not_mixed_up(
    broker: Mosquitto, tls_broker: Mosquitto, certificates: Certificates
) -> None:
    told = await reason(at(broker, tls=True, ca=certificates.ca))
    assert told in {
        "the broker does not speak TLS on this port",
        "the broker closed the connection during TLS",
        "connection reset",
    }
    told = await reason(at(tls_broker))
    assert told in {"the broker closed the connection before it answered", "connection reset"}


async def test_a_client_certificate(
    authority: Authority, certificates: Certificates, tmp_path: Path
) -> None:
    config = "require_certificate true\nuse_identity_as_username true"
    mine = authority.issue("device-one")
    with Mosquitto(
        tmp_path, tls=certificates, config=config, acl="user device-one\ntopic #\n"
    ) as m:
        anonymous = at(m, tls=True, ca=certificates.ca)
        assert await reason(anonymous) == "the broker wants a client certificate"
        bus = MqttBus(replace(anonymous, cert=mine.cert, key=mine.key))
        recorder = Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            answer = await bus.publish(Outgoing(topic="out/a", payload=b""))
            assert not answer.failed
        assert "not usable" in await reason(
            replace(anonymous, cert=mine.cert, key=certificates.key)
        )


async def test_files_that_cannot_be_read_are_named(
    tls_broker: Mosquitto, certificates: Certificates, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.pem")
    told = await reason(at(tls_broker, tls=True, ca=missing))
    assert told == "cannot read the CA, certificate or key file"
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("this is no certificate")
    assert "not usable" in await reason(at(tls_broker, tls=True, ca=str(rubbish)))
    encrypted = at(tls_broker, tls=True, ca=certificates.ca, cert=str(rubbish), key=str(rubbish))
    assert "not usable" in await reason(encrypted)

    def password() -> str:
        return (tmp_path / "password").read_text()

    told = await reason(at(tls_broker, username="u", password=password))
    assert told == f"cannot read the password file ({tmp_path / 'password'})"


# Passwords


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_passwords(tmp_path: Path, version: Any) -> None:
    with Mosquitto(tmp_path, passwords={"edged": "s3cret-word"}) as mosquitto:
        right = at(mosquitto, username="edged", password="s3cret-word", protocol=version)
        for wrong in (
            replace(right, password="wrong"),
            replace(right, username="nobody"),
            replace(right, username=None, password=None),
        ):
            assert "bad user name or password" in await reason(wrong)
        # The file may be written anew between two attempts.
        given = iter(["wrong", "s3cret-word"])
        bus = MqttBus(replace(right, password=lambda: next(given)), patience=FAST)
        recorder = Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            assert len(recorder.reasons) == 1


async def test_the_password_is_nowhere_to_be_seen(
    tmp_path: Path, events: list[dict[str, Any]]
) -> None:
    with Mosquitto(tmp_path, passwords={"edged": "s3cret-word"}) as mosquitto:
        connection = at(mosquitto, username="edged", password="s3cret-word")
        bus = MqttBus(connection, patience=FAST)
        recorder = Recorder()
        async with running(bus, recorder):
            await recorder.until_connected()
            mosquitto.restart()
            await recorder.until_connected(2)
        shown = f"{connection!r} {bus!r} {bus.state!r} {events!r} {recorder.reasons!r}"
        assert "device" in shown
        assert "s3cret" not in shown


# Names


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "bad\0name", ".", "host.invalid"])
async def test_bad_host_names(host: str) -> None:
    told = await reason(Connection(host=host, client_id="device"))
    assert told in {
        "bad host name",
        "host name not found",
        "host name lookup failed (is there a network?)",
    }


async def test_nobody_there(unused_tcp_port: int) -> None:
    connection = Connection(host="localhost", port=unused_tcp_port, client_id="device")
    assert await reason(connection) == "connection refused"
