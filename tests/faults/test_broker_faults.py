"""F5 to F12: a broker that dies, forgets, hangs, cuts, limits, denies; and a stolen client id."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import MakeBroker
from tests.kit.chaos import ChaosProxy, Way
from tests.kit.daemon import Daemon
from tests.kit.fakebroker import (
    MAXIMUM_PACKET_SIZE_4K,
    MAXIMUM_QOS_0,
    RECEIVE_MAXIMUM_1,
    RETAIN_UNAVAILABLE,
    FakeBroker,
    publish,
)
from tests.kit.mosquitto import Authority, Mosquitto
from tests.kit.observer import Observer

QUICK = ("--reconnect", "0.2")
#: The job connection, in log lines.
JOBS: dict[str, Any] = {"client_id": "edged-box"}
#: Settings for the fake broker, which has one connection.
ALONE = {"cameras": {"max": 0}}


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as observer:
        yield observer


def restart(broker: Mosquitto, observer: Observer) -> None:
    """Kill the broker and start it again; the observer is back when this returns."""
    before = observer.subscriptions
    broker.restart()
    observer.wait(lambda: observer.subscriptions > before, "the observer to come back")


# F5, F6: the broker dies ------------------------------------------------------------------------


def test_a_broker_that_dies_and_comes_back_loses_nothing(
    tmp_path: Path, make_broker: MakeBroker
) -> None:
    broker = make_broker(persistence=True)
    with (
        Observer(broker.port) as observer,
        Daemon(tmp_path, broker.port, options=QUICK) as daemon,
    ):
        daemon.wait_ready()
        for _ in range(2):
            seen = len(daemon.log("mqtt.connected", **JOBS))
            names = [observer.ask("!sleep 0.2 !say it") for _ in range(6)]
            observer.event(names[1], "started")
            # What it has answered in the same moment it may not have saved yet; that is its own.
            observer.send("/fence", b"x")
            restart(broker, observer)
            line = daemon.wait_log("mqtt.connected", count=seen + 1, **JOBS)
            assert line["session_present"]
            names.append(observer.ask("!say after"))
            for name in names:
                assert observer.final(name)["type"] == "result"
        observer.check(crashed=True)
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_a_broker_that_forgets_everything_costs_no_accepted_job(
    tmp_path: Path, broker: Mosquitto
) -> None:
    with (
        Observer(broker.port) as observer,
        Daemon(tmp_path, broker.port, options=QUICK) as daemon,
    ):
        daemon.wait_ready()
        names = [observer.ask("!tokens 10 30") for _ in range(8)]
        observer.wait(lambda: all(observer.events(name, "accepted") for name in names))
        observer.final(names[0])
        # The daemon is to be back after the observer, which could not hear what came before.
        daemon.signal(signal.SIGSTOP)
        restart(broker, observer)
        daemon.signal(signal.SIGCONT)
        assert not daemon.wait_log("mqtt.connected", count=2, **JOBS)["session_present"]
        names.append(observer.ask("!say after"))
        for name in names:
            assert observer.final(name)["type"] == "result"
        observer.check(crashed=True)
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_an_ack_of_the_old_session_does_not_take_a_new_request(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    """Packet ids begin again: a late ack of the first message would hit the second."""
    options = (*QUICK, "--stall-at", "in_accept_txn:1=4", "--stall-at", "in_accept_txn:2=60")
    trace = tmp_path / "trace"
    with Daemon(tmp_path, broker.port, options=(*options, "--trace-log", str(trace))) as daemon:
        daemon.wait_ready()
        first = observer.ask("!say first")
        observer.wait(lambda: "in_accept_txn" in trace.read_text() or None, timeout_s=10)
        restart(broker, observer)
        assert not daemon.wait_log("mqtt.connected", count=2, **JOBS)["session_present"]
        second = observer.ask("!say second")
        observer.event(first, "accepted")  # the first is on disk; its ack is void
        observer.wait(lambda: trace.read_text().count("in_accept_txn") == 2)
        daemon.kill()  # the second is not on disk; the broker must still have it
        daemon.options = QUICK
        daemon.start()
        assert observer.final(first)["text"] == "first"
        assert observer.final(second)["text"] == "second"
        observer.check(crashed=True)


# F7 to F9: the network --------------------------------------------------------------------------


async def _blackhole(directory: Path, broker: Mosquitto, ways: tuple[Way, ...]) -> None:
    device = f"box-{'-'.join(ways)}"
    directory = directory / device
    directory.mkdir()
    settings = {
        "device": device,
        "mqtt": {"keepalive_s": 5, "client_id": device},
        "health": {"interval_s": 0.5},
    }
    async with (
        ChaosProxy(broker.port) as proxy,
        Observer(broker.port, f"edged/{device}") as observer,
        Daemon(directory, proxy.port, settings=settings, options=QUICK) as daemon,
    ):
        await asyncio.to_thread(daemon.wait_ready)
        ask = asyncio.to_thread
        names = [await ask(observer.ask, "!tokens 10 20") for _ in range(12)]
        await ask(observer.event, names[-1], "accepted")
        proxy.blackhole(*ways)
        loop = asyncio.get_running_loop()
        began = loop.time()
        line = await ask(daemon.wait_log, "mqtt.disconnected", client_id=device)
        assert loop.time() - began < 12.5  # 2 x keepalive and a turn of the loop
        assert line["reason"]
        for count in range(1, 13):  # jobs go on
            await ask(daemon.wait_log, "job.finished", count=count)
        assert len(daemon.log("engine.started")) == 1
        proxy.heal()
        proxy.reset()
        await ask(observer.check, crashed=True)
        finals = [observer.finals(name)[0].number for name in names]
        assert finals == sorted(finals), "the finals came in another order than the jobs"
        assert await ask(daemon.stop) == 0
        assert daemon.faults() == []


async def test_a_network_that_swallows_everything_one_way_or_both(
    tmp_path: Path, broker: Mosquitto
) -> None:
    ways: tuple[tuple[Way, ...], ...] = (("up", "down"), ("up",), ("down",))
    await asyncio.gather(*(_blackhole(tmp_path, broker, each) for each in ways))


async def test_a_connection_cut_after_any_byte_costs_duplicates_at_most(
    tmp_path: Path, broker: Mosquitto
) -> None:
    async with (
        ChaosProxy(broker.port) as proxy,
        Observer(broker.port) as observer,
        Daemon(tmp_path, proxy.port, options=("--reconnect", "0.02")) as daemon,
    ):
        await asyncio.to_thread(daemon.wait_ready)
        names = []
        # up: CONNECT, SUBSCRIBE, PUBLISH of each kind, PUBACK; down: CONNACK, SUBACK, PUBACK,
        # PUBLISH
        cuts: list[tuple[Way, int]] = [("up", n) for n in (1, 2, 9, 20, 150, 331, 800, 1300, 2100)]
        cuts += [("down", n) for n in (*range(1, 21), 24, 30, 44, 61, 111, 180, 260, 400)]
        for number, cut in enumerate(cuts):
            if number % 3 == 0:
                ask = partial(observer.ask, f"!say n{number}", id=f"cut-{number}", wait=False)
                names.append(await asyncio.to_thread(ask))
            proxy.cut_after = cut
            accepted = proxy.accepted
            proxy.reset()
            async with asyncio.timeout(20):
                # that one was cut, the next has begun
                while proxy.accepted < accepted + 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        proxy.cut_after = None
        proxy.reset()
        await asyncio.to_thread(observer.check, crashed=True)
        for name in names:
            assert observer.finals(name)[0].body["text"] == f"n{name.id.removeprefix('cut-')}"
        assert await asyncio.to_thread(daemon.stop) == 0
        assert daemon.faults() == []


async def test_a_broker_that_refuses_or_hangs_is_named_and_tried_again(
    tmp_path: Path, broker: Mosquitto
) -> None:
    async with ChaosProxy(broker.port) as proxy, Observer(broker.port) as observer:
        await proxy.refuse()
        options = ("--reconnect", "0.3", "--connack", "0.5")
        async with Daemon(tmp_path, proxy.port, options=options) as daemon:

            async def disconnected(words: str) -> None:
                look = lambda: next(  # noqa: E731
                    (e for e in daemon.log("mqtt.disconnected", **JOBS) if words in e["reason"]),
                    None,
                )
                await asyncio.to_thread(daemon.wait_until, look, words)

            await disconnected("refused")
            proxy.hang = True
            proxy.listen()
            await disconnected("no CONNACK within")
            proxy.hang = False
            proxy.reset()
            await asyncio.to_thread(daemon.wait_ready)
            name = await asyncio.to_thread(observer.ask, "!say there")
            assert (await asyncio.to_thread(observer.final, name))["text"] == "there"
            assert await asyncio.to_thread(daemon.stop) == 0
            assert daemon.faults() == []


def _unreachable(daemon: Daemon, *words: str) -> None:
    """The daemon says why it cannot connect, lives on, and still ends at once."""
    look = lambda: next(  # noqa: E731
        (
            e
            for e in daemon.log("mqtt.disconnected", **JOBS)
            if any(w in e["reason"] for w in words)
        ),
        None,
    )
    daemon.wait_until(look, f"a reason with one of {words}")
    daemon.wait_log("engine.loaded")
    assert daemon.running
    assert daemon.stop() == 0
    assert daemon.faults() == []


def test_a_broker_whose_name_is_not_known_is_named(tmp_path: Path) -> None:
    settings = {"mqtt": {"host": "no-such-broker.invalid"}}
    with Daemon(tmp_path, 1883, settings=settings) as daemon:
        _unreachable(daemon, "no-such-broker.invalid", "name")


def test_a_broker_of_an_unknown_authority_is_named(
    tmp_path: Path, make_broker: MakeBroker, authority: Authority
) -> None:
    broker = make_broker(tls=authority.issue("localhost"))
    other = Authority(tmp_path, "other")
    settings = {"mqtt": {"host": "localhost", "tls": True, "ca": other.ca}}
    with Daemon(tmp_path, broker.port, settings=settings) as daemon:
        _unreachable(daemon, "certificate")


# F10: limits of the broker ----------------------------------------------------------------------


def _published(packets: list[tuple[int, bytes]]) -> list[tuple[int, str, dict[str, Any]]]:
    """Return the first byte, topic and JSON body of PUBLISH packets."""
    found = []
    for first, body in packets:
        (size,) = struct.unpack_from("!H", body)
        topic = body[2 : 2 + size].decode()
        start = body.index(b'{"v":')
        found.append((first, topic, json.loads(body[start:])))
    return found


def _request(mid: int, **body: Any) -> bytes:
    return publish("edged/box/request/text", json.dumps(body).encode(), mid)


def _events(fake: FakeBroker, name: str) -> list[dict[str, Any]]:
    said = _published(fake.of_type(3))
    return [body for _, topic, body in said if topic == f"edged/box/response/{name}"]


async def _until(fake: FakeBroker, name: str, kind: str) -> dict[str, Any]:
    """Wait for an event at a scripted broker."""
    async with asyncio.timeout(20):
        while True:
            for body in _events(fake, name):
                if body["type"] == kind:
                    return body
            await fake.wait_for(3, len(fake.of_type(3)) + 1)


async def test_a_window_of_one_is_kept(tmp_path: Path) -> None:
    async with (
        FakeBroker(connack=(0, RECEIVE_MAXIMUM_1), answers=False) as fake,
        Daemon(tmp_path, fake.port, settings=ALONE) as daemon,
    ):
        await asyncio.to_thread(daemon.wait_log, "engine.loaded")
        fake.write(_request(1, id="a", prompt="!say a") + _request(2, id="b", prompt="!say b"))
        await asyncio.to_thread(daemon.wait_log, "job.finished", count=2)
        answered = 0
        while not all(any(e["type"] == "result" for e in _events(fake, n)) for n in "ab"):
            async with asyncio.timeout(10):
                await fake.wait_for(3, 1)
                sure = [p for p in fake.of_type(3) if p[0] & 6]
                while len(sure) <= answered:
                    await fake.wait_for(3, len(fake.of_type(3)) + 1)
                    sure = [p for p in fake.of_type(3) if p[0] & 6]
            assert len(sure) == answered + 1, "two at once"
            fake.answer(fake.mid_of(sure[-1][1]))
            answered += 1
        assert daemon.faults() == []


async def test_a_result_over_the_brokers_packet_size_becomes_an_error_with_both_sizes(
    tmp_path: Path,
) -> None:
    async with (
        FakeBroker(connack=(0, MAXIMUM_PACKET_SIZE_4K)) as fake,
        Daemon(tmp_path, fake.port, settings={"limits": {"max_tokens": 4000}, **ALONE}) as daemon,
    ):
        await asyncio.to_thread(daemon.wait_log, "engine.loaded")
        fake.write(_request(1, id="big", prompt="!tokens 2000 0"))
        final = await _until(fake, "big", "error")
        assert final["code"] == "too_large"
        assert "4096" in final["message"]
        fake.write(_request(2, id="small", prompt="!say small"))
        assert (await _until(fake, "small", "result"))["text"] == "small"
        fake.write(_request(3, id="big", prompt="!tokens 2000 0"))  # what is stored is the error
        async with asyncio.timeout(20):
            while sum(e["type"] == "error" for e in _events(fake, "big")) < 2:
                await fake.wait_for(3, len(fake.of_type(3)) + 1)
        assert {json.dumps(e) for e in _events(fake, "big") if e["type"] == "error"} == {
            json.dumps(final)
        }
        assert fake.connections == 1


async def test_a_broker_without_qos_1_is_complained_of_loudly(tmp_path: Path) -> None:
    async with (
        FakeBroker(connack=(0, MAXIMUM_QOS_0)) as fake,
        Daemon(tmp_path, fake.port, settings=ALONE) as daemon,
    ):
        await asyncio.to_thread(daemon.wait_state, "degraded")
        assert "QoS 0 only" in daemon.log("health.state")[-1]["reason"]
        async with asyncio.timeout(10):
            while not any(
                topic == "edged/box/health" and "QoS 0 only" in body["reason"]
                for _, topic, body in _published(fake.of_type(3))
            ):
                await fake.wait_for(3, len(fake.of_type(3)) + 1)
        assert not [p for p in fake.of_type(3) if p[0] & 6]
        assert daemon.running


async def test_a_broker_that_retains_nothing_is_served_all_the_same(tmp_path: Path) -> None:
    async with (
        FakeBroker(connack=(0, RETAIN_UNAVAILABLE)) as fake,
        Daemon(tmp_path, fake.port, settings=ALONE) as daemon,
    ):
        await asyncio.to_thread(daemon.wait_log, "engine.loaded")
        fake.write(_request(1, id="a", prompt="!say a"))
        assert (await _until(fake, "a", "result"))["text"] == "a"
        assert not [p for p in fake.of_type(3) if p[0] & 1]
        assert daemon.log("mqtt.no_retain")
        assert fake.connections == 1


# F11: the broker denies -------------------------------------------------------------------------

_ALL = "user box\ntopic readwrite #\nuser desk\ntopic readwrite #\n"


@pytest.mark.parametrize(
    ("denied", "reason"),
    [
        ("topic deny edged/box/response/#", "edged/box/response/"),
        ("topic deny edged/box/status", "edged/box/status"),
    ],
    ids=["results", "status"],
)
def test_a_denied_topic_is_noticed_and_what_is_denied_is_kept(
    denied: str, reason: str, tmp_path: Path, make_broker: MakeBroker
) -> None:
    acl = f"user box\n{denied}\n{_ALL.removeprefix('user box')}"
    broker = make_broker(acl=acl, passwords={"box": "secret", "desk": "secret"})
    password = tmp_path / "password"
    password.write_text("secret\n")
    password.chmod(0o600)
    settings = {"mqtt": {"username": "box", "password_file": str(password)}}
    options = (*QUICK, "--constant", "edged.outbox.DENIED_RETRY_S=0.5")
    with (
        Observer(broker.port, username="desk", password="secret") as observer,
        Daemon(tmp_path, broker.port, settings=settings, options=options) as daemon,
    ):
        daemon.wait_log("engine.loaded")
        name = observer.ask("!say kept")
        beat = observer.wait_on(
            "health", lambda body: reason in body["reason"] and body["state"] == "degraded"
        ).body
        assert "refuses to take messages" in beat["reason"]
        (broker.directory / "acl").write_text(_ALL)
        os.kill(broker.pid, signal.SIGHUP)
        assert observer.final(name)["text"] == "kept"
        observer.wait_status("ready")
        observer.check(crashed=True)  # `accepted` and `started` were denied
        assert daemon.stop() == 0


def test_a_status_that_cannot_be_read_back_is_noticed(
    tmp_path: Path, make_broker: MakeBroker
) -> None:
    acl = f"user box\ntopic deny edged/box/status\n{_ALL.removeprefix('user box')}"
    acl = acl.replace("topic deny edged/box/status", "topic write edged/box/status", 1)
    acl = acl.replace(
        "topic readwrite #",
        "topic readwrite edged/box/request/#\ntopic write edged/#",
        1,
    )
    broker = make_broker(acl=acl, passwords={"box": "secret", "desk": "secret"})
    password = tmp_path / "password"
    password.write_text("secret\n")
    password.chmod(0o600)
    settings = {"mqtt": {"username": "box", "password_file": str(password)}}
    options = ("--constant", "edged.health.ECHO_S=1")
    with (
        Observer(broker.port, username="desk", password="secret") as observer,
        Daemon(tmp_path, broker.port, settings=settings, options=options),
    ):
        seen = observer.wait_on("status", lambda body: "does not come back" in body["reason"])
        assert seen.body["state"] == "degraded"


# F12: a stolen client id ------------------------------------------------------------------------


def test_two_with_one_client_id_notice_it_and_do_nothing_twice(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    directories = [tmp_path / "one", tmp_path / "two"]
    for each in directories:
        each.mkdir()
    options = ("--reconnect", "0.1", "--stolen-wait", "1.5")
    with Daemon(directories[0], broker.port, options=options) as one:
        one.wait_ready()
        before = [observer.ask("!say before") for _ in range(3)]
        for name in before:
            observer.final(name)
        with Daemon(directories[1], broker.port, options=options) as two:
            one.wait_log("mqtt.stolen")
            two.wait_log("mqtt.stolen")
            look = lambda body: "client id" in body.get("reason", "")  # noqa: E731
            observer.wait_on("health", look)
            # both back off: without the pause there were ten connections a second
            ones, twos = (len(each.log("mqtt.connected", **JOBS)) for each in (one, two))
            one.wait_log("mqtt.connected", count=ones + 1, **JOBS)
            assert (
                sum(len(each.log("mqtt.connected", **JOBS)) for each in (one, two))
                < ones + twos + 4
            )
            two.signal(signal.SIGKILL)
            two.wait_exit()
        after = observer.ask("!say after")
        assert observer.final(after)["text"] == "after"
        assert [len(observer.finals(name)) for name in before] == [1, 1, 1]
        assert len([e for e in observer.events(kind="started") if e.name in before]) == 3
        observer.check(crashed=True)
