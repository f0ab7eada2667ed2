"""`status`, `info` and `health`: what they hold, when they come, and what the end looks like."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.box import Box, Protocol, serve
from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Observer, Seen

pytestmark = pytest.mark.broker

INTERVAL_S = 0.5


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    protocol: Protocol = request.param
    settings = {"limits": {"queue": 40, "payload_mb": 0.5, "results": 77}}
    with serve(tmp_path_factory.mktemp("status"), protocol=protocol, settings=settings) as box:
        yield box


def retained(box: Box, topic: str) -> Seen:
    """Return what the broker retains on this topic, as a newcomer gets it."""
    with box.observer(protocol="5", filters=[f"{box.daemon.root}/{topic}"], only=True) as newcomer:
        return newcomer.wait(lambda: next(iter(newcomer.seen), None), f"a retained {topic}")


# While it lives -----------------------------------------------------------------------------------


def test_the_status_is_retained_and_complete(box: Box) -> None:
    status = retained(box, "status")

    assert status.retain
    assert status.qos == 1
    assert status.body["state"] == "ready"
    assert status.body["interval_s"] == INTERVAL_S
    assert abs(status.body["ts"] - time.time()) < 30


def test_live_state_expires_after_three_beats_where_the_protocol_can(box: Box) -> None:
    for topic in ("status", "health"):
        expiry = retained(box, topic).expiry_s
        assert expiry is None if box.protocol == "3.1.1" else 1 <= (expiry or 0) <= 2


def test_the_status_is_told_at_each_beat(observer: Observer) -> None:
    first = observer.wait_status("ready")
    times = [first.body["ts"]]
    for _ in range(4):
        first = observer.wait_status("ready", after=first.number)
        times.append(first.body["ts"])

    assert times == sorted(set(times))
    assert 3 * INTERVAL_S <= times[-1] - times[0] <= 8 * INTERVAL_S


def test_the_heartbeat_is_complete_and_steady(box: Box, observer: Observer) -> None:
    last = observer.wait_on("health")  # the retained one
    beats = []
    for _ in range(5):
        last = observer.wait_on("health", after=last.number)
        beats.append(last)

    for beat in beats:
        assert beat.qos == 0
        assert beat.retain or box.protocol == "3.1.1"  # it shows the flag to newcomers only
    bodies = [beat.body for beat in beats]
    assert [body["seq"] for body in bodies] == list(range(bodies[0]["seq"], bodies[0]["seq"] + 5))
    assert 3 * INTERVAL_S <= bodies[-1]["ts"] - bodies[0]["ts"] <= 8 * INTERVAL_S
    assert bodies[-1]["uptime_s"] > bodies[0]["uptime_s"] > 0
    assert len({body["instance"] for body in bodies}) == 1
    assert bodies[0]["state"] == "ready"
    assert bodies[0]["engine"]["state"] == "idle"
    assert (bodies[0]["model"], bodies[0]["provider"], bodies[0]["threads"]) == ("small", "cpu", 1)
    assert bodies[0]["mqtt"]["connected"] is True
    assert bodies[0]["engine"]["rss_mb"] > 1
    assert bodies[0]["host"]["rss_mb"] > 1
    assert "job" not in bodies[0]


def test_the_heartbeat_is_retained(box: Box) -> None:
    beat = retained(box, "health")

    assert beat.retain


def test_info_is_retained_and_complete(box: Box) -> None:
    info = retained(box, "info")

    assert info.retain
    assert info.qos == 1
    assert info.expiry_s is None
    assert info.body["capabilities"] == {"text": True, "vision": True, "json_schema": True}
    assert (info.body["model"], info.body["provider"]) == ("small", "cpu")
    limits = info.body["limits"]
    assert (limits["queue"], limits["payload_mb"], limits["results"]) == (40, 0.5, 77)
    assert limits["packet_bytes"] == 500_000 * 5 // 4 + 65536
    assert info.body["instance"] == retained(box, "status").body["instance"]


def test_info_warns_of_what_311_cannot_do(box: Box) -> None:
    warnings = " ".join(retained(box, "info").body["warnings"])

    assert ("packet limit" in warnings) == (box.protocol == "3.1.1")


def test_the_heartbeat_shows_the_running_job_and_the_queue(observer: Observer) -> None:
    running = observer.ask("!prefill 20 100 !say x", client="desk")
    waiting = [observer.ask("!say x") for _ in range(3)]
    observer.event(waiting[-1], "accepted")

    beat = observer.wait_on(
        "health", lambda body: "job" in body and body["job"]["stage"] == "prefill"
    ).body

    assert (beat["job"]["id"], beat["job"]["client"]) == (running.id, "desk")
    assert beat["job"]["progress_age_s"] < 2
    assert beat["queue"]["depth"] == 3, "the running one is not counted"
    assert 0 <= beat["queue"]["oldest_s"] < 3
    assert beat["engine"]["state"] == "busy"
    idle = observer.wait_on("health", lambda body: "job" not in body, after=observer.last).body
    assert idle["queue"] == {"depth": 0, "oldest_s": 0}


def test_the_totals_add_up(box: Box, observer: Observer) -> None:
    start = _totals(observer)

    observer.ask("!say x")
    name = observer.ask("!say y")
    observer.final(name)
    observer.ask("!say y", id=name.id)  # a duplicate
    observer.ask("!say z", id=name.id)  # a conflict
    observer.ask("!fail too_long")
    observer.send("request/text", b"no")
    running = observer.ask("!tokens 100 20")
    observer.event(running, "started")
    observer.final(observer.ask("!say x", deadline_s=0.1))
    observer.cancel(running)
    observer.settle()

    end = _totals(observer)
    gone = {name: end[name] - start[name] for name in start}
    assert gone == {
        "accepted": 5, "completed": 2, "failed": 1, "refused": 2, "expired": 1, "cancelled": 1,
        "dead": 0, "duplicates": 1,
    }  # fmt: skip
    ends = ("completed", "failed", "expired", "cancelled", "dead")
    assert end["accepted"] == sum(end[name] for name in ends)


def _totals(observer: Observer) -> dict[str, int]:
    """Return the totals of a heartbeat that is yet to come."""
    beat = observer.wait_on("health", after=observer.wait_on("health", after=observer.last).number)
    totals: dict[str, int] = beat.body["totals"]
    return totals


def test_speeds_are_measured(observer: Observer) -> None:
    observer.final(observer.ask("!tokens 10 10"))

    beat = observer.wait_on("health", lambda body: body["speed"]["ttft_ms_p50"] is not None).body

    assert beat["speed"]["ttft_ms_p50"] > 0


@pytest.mark.parametrize(
    "payload",
    [
        {"state": "offline", "instance": "0" * 32, "reason": "lost"},
        {"state": "offline", "instance": "0" * 32},
        b"",
        b"nonsense",
        b"[]",
        b"{}",
        b'{"state":[],"instance":{}}',
        b"\xff",
    ],
)
def test_an_old_will_on_the_status_is_put_right_at_once(
    box: Box, observer: Observer, payload: bytes | dict[str, Any]
) -> None:
    observer.wait_status("ready")

    observer.send("status", payload, retain=True)

    wrong = observer.wait_on("status", lambda body: body.get("state") != "ready")
    right = observer.wait_status("ready", after=wrong.number)
    assert right.at - wrong.at < INTERVAL_S * 0.9, "it did not wait for the beat"
    assert retained(box, "status").body["state"] == "ready"


def test_an_end_in_our_own_name_is_put_right_at_once(box: Box, observer: Observer) -> None:
    mine = observer.wait_status("ready").body

    observer.send("status", {**mine, "state": "offline", "reason": "lost"}, retain=True)

    wrong = observer.wait_status("offline")
    assert observer.wait_status("ready", after=wrong.number).at - wrong.at < INTERVAL_S * 0.9


# Begin and end ------------------------------------------------------------------------------------


@pytest.fixture(params=["5", "3.1.1"])
def protocol(request: pytest.FixtureRequest) -> Protocol:
    value: Protocol = request.param
    return value


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path) as broker:
        yield broker


def test_killed_it_is_offline_and_lost(
    tmp_path: Path, broker: Mosquitto, protocol: Protocol
) -> None:
    began = time.time()
    settings = {"mqtt": {"protocol": protocol}}
    with (
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
        Observer(broker.port, protocol=protocol) as observer,
    ):
        ready = observer.wait_status("ready").body

        daemon.kill()

        lost = observer.wait_status("offline")
        assert lost.body["reason"] == "lost"
        assert lost.body["instance"] == ready["instance"]
        assert began <= lost.body["ts"] <= ready["ts"], "the time of connecting"
        with Observer(broker.port, filters=["edged/box/status"], only=True) as newcomer:
            kept = newcomer.wait(lambda: next(iter(newcomer.seen), None))
        assert (kept.retain, kept.expiry_s) == (True, None)
        assert kept.payload == lost.payload

        daemon.start()
        again = observer.wait_status("ready", after=lost.number).body
        assert again["instance"] != ready["instance"]


def test_stopped_it_says_so_before_it_leaves(
    tmp_path: Path, broker: Mosquitto, protocol: Protocol
) -> None:
    settings = {"mqtt": {"protocol": protocol}}
    with (
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
        Observer(broker.port, protocol=protocol) as observer,
    ):
        ready = observer.wait_status("ready").body

        assert daemon.stop() == 0

        stopped = observer.wait_status("offline")
        assert stopped.body["reason"] == "stopped"
        assert stopped.body["instance"] == ready["instance"]
        assert stopped.expiry_s is None
        observer.send("fence", "x")  # no will came behind it
        observer.wait_on("fence")
        assert len([s for s in observer.on("status") if s.body["state"] == "offline"]) == 1


def test_jobs_are_taken_while_the_model_loads(tmp_path: Path, broker: Mosquitto) -> None:
    options = ["--engine-option=--slow-load", "--engine-option=1.5"]
    with (
        Daemon(tmp_path, broker.port, options=options) as daemon,
        Observer(broker.port) as observer,
    ):
        observer.wait_status("starting")
        # subscribed is not told; but it is when our own status has come back
        daemon.wait_log("health.state", state="starting")
        name = observer.ask("!say x")
        accepted = observer.event(name, "accepted")

        assert not [s for s in observer.on("status") if s.body["state"] == "ready"]
        info = observer.wait_on("info")
        assert info.body["capabilities"]["text"] is False
        assert observer.final(name)["text"] == "x"
        ready = observer.wait_status("ready")
        assert ready.number > accepted.number
        observer.wait_on("info", lambda body: body["capabilities"]["text"] is True)
        observer.check()


def test_jobs_wait_while_the_model_cannot_be_loaded(tmp_path: Path, broker: Mosquitto) -> None:
    fails = ["--engine-option=--fail-load", "--engine-option=no such model"]
    with (
        Daemon(tmp_path, broker.port) as daemon,
        Observer(broker.port) as observer,
    ):
        daemon.kill()
        daemon.start(*fails)
        degraded = observer.wait_status("degraded")
        assert "no such model" in degraded.body["reason"]
        name = observer.ask("!say x")
        observer.event(name, "accepted")
        observer.wait_on("health", lambda body: body["state"] == "degraded", after=-1)
        waiting = observer.wait_on("health", lambda body: body["queue"]["depth"] == 1)
        assert waiting.body["engine"]["state"] in {"loading", "backoff"}

        daemon.restart()

        assert observer.final(name)["text"] == "x"


def test_stopping_it_takes_nothing_more(
    tmp_path: Path, broker: Mosquitto, protocol: Protocol
) -> None:
    settings = {"mqtt": {"protocol": protocol}}
    with (
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
        Observer(broker.port, protocol=protocol) as observer,
    ):
        daemon.wait_ready()
        running = observer.ask("!tokens 40 50")
        waiting = observer.ask("!say waited")
        observer.event(waiting, "accepted")
        observer.event(running, "started")
        daemon.signal(signal.SIGTERM)
        observer.wait_status("stopping")

        kept = observer.ask("!say kept", client="desk")
        refused = observer.ask("!say refused", qos=0)

        refusal = observer.refusal(refused)
        assert (refusal.body["code"], refusal.body["retryable"]) == ("stopping", True)
        assert refusal.topic == f"edged/box/response/{refused.id}"
        assert observer.final(running)["type"] == "result", "it had the time to finish"
        assert daemon.wait_exit() == 0
        assert observer.wait_status("offline").body["reason"] == "stopped"
        assert not observer.events(kept)
        assert not observer.events(waiting, "started")

        daemon.start()
        assert observer.final(kept)["text"] == "kept"
        assert observer.final(waiting)["text"] == "waited"
        assert observer.final(running)["attempt"] == 1
        observer.check(crashed=True)


def test_a_job_that_does_not_finish_in_time_goes_back_to_the_queue(
    tmp_path: Path, broker: Mosquitto
) -> None:
    settings = {"state": {"stop_s": 0.2}}
    with (
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
        Observer(broker.port) as observer,
    ):
        daemon.wait_ready()
        name = observer.ask("!tokens 20 40")
        observer.event(name, "chunk")

        assert daemon.stop() == 0
        assert not observer.finals(name)

        daemon.start()
        assert observer.final(name)["attempt"] == 2
        observer.check(crashed=True)


def test_the_status_is_told_after_every_connect(tmp_path: Path, protocol: Protocol) -> None:
    settings = {"health": {"interval_s": 60}}  # no beat helps
    with (
        serve(tmp_path, protocol=protocol, settings=settings) as box,
        box.observer() as observer,
    ):
        observer.wait_status("ready")
        before = observer.last

        # someone else connects as us, and goes again
        box.tool("mosquitto_pub", "-i", "edged-box", "-q", "1", "-t", "elsewhere", "-m", "x")

        box.daemon.wait_log("mqtt.connected", client_id="edged-box", count=2)
        observer.wait_status("ready", after=before)
        observer.wait_on("info", after=before)
        assert retained(box, "status").body["state"] == "ready"
        assert observer.final(observer.ask("!say x"))["text"] == "x"


def test_the_heartbeat_tells_of_reconnects(box: Box, observer: Observer) -> None:
    box.tool("mosquitto_pub", "-i", "edged-box", "-q", "1", "-t", "elsewhere", "-m", "x")

    beat = observer.wait_on("health", lambda body: body["mqtt"]["reconnects"] >= 1)

    assert beat.body["mqtt"]["last_reason"]


def test_two_of_one_name_are_noticed(tmp_path: Path, broker: Mosquitto) -> None:
    with (
        Daemon(tmp_path, broker.port) as daemon,
        Observer(broker.port) as observer,
    ):
        mine = observer.wait_status("ready").body

        foreign = {**mine, "instance": "f" * 32, "reason": "I am well"}
        observer.send("status", foreign, retain=True)

        degraded = observer.wait_status("degraded")
        assert "device" in degraded.body["reason"]
        assert degraded.body["instance"] == mine["instance"]
        assert daemon.log("health.foreign_status")
        assert json.loads(retained_raw(broker))["instance"] == mine["instance"]


def retained_raw(broker: Mosquitto) -> bytes:
    """Return the retained status."""
    with Observer(broker.port, filters=["edged/box/status"], only=True) as newcomer:
        return newcomer.wait(lambda: next(iter(newcomer.seen), None)).payload
