"""F18, F34 to F36: exceptions where none may be, the watchdog, stale status, the end."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import MakeBroker
from tests.kit.chaos import ChaosProxy
from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Name, Observer
from tests.kit.supervisor import NotifySocket

QUICK = ("--reconnect", "0.2", "--backoff", "0.1")


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as observer:
        yield observer


# F18 --------------------------------------------------------------------------------------------

#: What survives an exception in it, and what ends the daemon, so that it is started again.
SURVIVES = (
    "mqtt.on_connect:2", "mqtt.on_subscribe:2", "mqtt.on_message:3", "mqtt.on_publish:9",
    "mqtt.on_disconnect:1", "on_receive:2", "in_accept_txn:3", "cameras.mqtt.on_connect:1",
)  # fmt: skip
ENDS = ("after_attempt_mark:2", "after_infer:2", "after_publish:12", "on_puback:12")


def answered(observer: Observer, name: Name, since: int) -> bool:
    """Return whether a request has its final or was refused, perhaps before its id was read."""
    refused = observer.events(kind="refused")
    return bool(observer.finals(name) or [each for each in refused if each.number > since])


def test_exceptions_while_requests_come_in_cost_connections_at_most(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    faults = [option for place in SURVIVES for option in ("--raise-at", place)]
    with Daemon(tmp_path, broker.port, options=(*QUICK, *faults)) as daemon:
        daemon.wait_ready()
        pid = daemon.pid
        for number in range(16):
            since = observer.last
            name = observer.ask(f"!say n{number}")
            done = partial(answered, observer, name, since)
            observer.wait(done, f"answer {number}", timeout_s=10)
        last = observer.ask("!say last")
        assert observer.final(last)["text"] == "last"
        observer.check(crashed=True)
        refused = observer.events(kind="refused")
        assert len(refused) <= 3
        assert daemon.pid == pid
        assert daemon.stop() == 0


@pytest.mark.parametrize("place", ["on_receive:2", "in_accept_txn:2"])
def test_an_exception_over_one_request_holds_up_no_other(
    place: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, options=("--raise-at", place)) as daemon:
        daemon.wait_ready()
        names = [observer.ask(f"!say n{number}") for number in range(12)]
        observer.check(timeout_s=10)
        refused = [name for name in names if observer.events(name, "refused")]
        assert len(refused) <= 1
        assert len(daemon.log("mqtt.connected", client_id="edged-box")) == 1
        assert daemon.stop() == 0


@pytest.mark.parametrize("place", ENDS)
def test_exceptions_elsewhere_end_the_daemon_and_the_next_start_goes_on(
    place: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, options=("--raise-at", place)) as daemon:
        daemon.wait_ready()
        names = [observer.ask(f"!say n{number}") for number in range(6)]
        assert daemon.wait_exit(10) == 70
        daemon.options = ()
        daemon.start()
        for number, name in enumerate(names):
            assert observer.final(name)["text"] == f"n{number}"
        observer.check(crashed=True)
        assert daemon.stop() == 0


# F34 --------------------------------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[NotifySocket]:
    with NotifySocket(tmp_path) as manager:
        yield manager


def test_systemd_is_told_each_step_of_a_life(
    tmp_path: Path, broker: Mosquitto, observer: Observer, manager: NotifySocket
) -> None:
    options = (
        "--engine-option=--slow-load=1.5",
        "--constant", "edged.app.EXTEND_EVERY_S=0.3",
    )  # fmt: skip
    with Daemon(tmp_path, broker.port, options=options, env=manager.env(1.0)) as daemon:
        manager.wait(lambda: "READY=1" in [x for _, x in manager.said], "READY=1")
        assert daemon.log("engine.loaded")  # written before
        ready = manager.lines().index("READY=1")
        before = manager.lines()[:ready]
        assert sum(line == "EXTEND_TIMEOUT_USEC=60000000" for line in before) >= 2
        assert "STATUS=starting: loading the model" in before
        assert "WATCHDOG=1" in before
        manager.wait(
            lambda: any(x.startswith("STATUS=ready: ") for _, x in manager.said), "the status"
        )
        assert daemon.stop() == 0
        manager.wait(lambda: "STOPPING=1" in [x for _, x in manager.said], "STOPPING=1")
        assert manager.lines().count("READY=1") == 1


def test_ready_waits_for_the_broker(tmp_path: Path, manager: NotifySocket) -> None:
    with Daemon(tmp_path, 1, options=("--reconnect", "0.1"), env=manager.env()) as daemon:
        daemon.wait_log("engine.loaded")
        daemon.wait_log("mqtt.disconnected", client_id="edged-box")
        said = "STATUS=starting: no connection to the broker: connection refused"
        manager.wait(lambda: said in [x for _, x in manager.said], "the status that says so")
        assert "READY=1" not in manager.lines()


def test_an_engine_that_hangs_is_killed_and_the_watchdog_is_fed(
    tmp_path: Path, broker: Mosquitto, observer: Observer, manager: NotifySocket
) -> None:
    options = ("--stage-floor", "1", "--backoff", "0.1")
    with Daemon(tmp_path, broker.port, options=options, env=manager.env(1.0)) as daemon:
        daemon.wait_ready()
        engine = daemon.engine_pid
        name = observer.ask("!tokens 25 100")
        observer.event(name, "chunk")
        os.kill(engine, signal.SIGSTOP)
        died = daemon.wait_log("engine.died")
        assert died["reason"] == "deadline"
        final = observer.final(name)
        assert (final["type"], final["attempt"]) == ("result", 2)
        fed = [at for at, line in manager.said if line == "WATCHDOG=1"]
        assert max(b - a for a, b in itertools.pairwise(fed)) < 1.0
        observer.check()


# F35 --------------------------------------------------------------------------------------------

BEAT = 0.5


def retained(port: int) -> dict[str, object] | None:
    """Return the retained status, as a reader who comes now sees it."""
    with Observer(port, only=True, filters=["edged/box/status", "fence"]) as reader:
        reader.send("/fence", b"x")
        reader.wait(lambda: any(each.topic == "fence" for each in reader.seen))
        return next((each.body for each in reader.seen if each.topic.endswith("status")), None)


def test_no_live_status_outlives_a_device_that_died_with_its_broker(
    tmp_path: Path, make_broker: MakeBroker
) -> None:
    broker = make_broker(persistence=True)
    settings = {"health": {"interval_s": BEAT}}
    with Daemon(tmp_path, broker.port, settings=settings) as daemon:
        daemon.wait_ready()
        with Observer(broker.port) as observer:
            observer.wait_status("ready")
        broker.kill()
        daemon.kill()
        died = time.monotonic()
        broker.start()
        while (status := retained(broker.port)) is not None and status["state"] != "offline":
            assert time.monotonic() - died < 3 * BEAT + 2, "stale"  # whole seconds at the broker


def test_after_a_restart_of_the_broker_the_status_is_right(
    tmp_path: Path, make_broker: MakeBroker
) -> None:
    broker = make_broker()  # it forgets what it retained
    settings = {"health": {"interval_s": BEAT}}
    with Daemon(tmp_path, broker.port, settings=settings, options=QUICK) as daemon:
        daemon.wait_ready()
        broker.kill()
        daemon.wait_state("degraded")
        broker.start()
        with Observer(broker.port) as observer:
            for _ in range(3):
                observer.wait_on("health", after=observer.last)
        status = retained(broker.port)
        assert status is not None
        assert status["state"] == "ready"
        assert status["instance"] == daemon.log("edged.starting")[-1]["instance"]


def test_after_a_clean_stop_the_status_is_offline(tmp_path: Path, broker: Mosquitto) -> None:
    with Daemon(tmp_path, broker.port) as daemon:
        daemon.wait_ready()
        assert daemon.stop() == 0
        status = retained(broker.port)
        assert status is not None
        assert (status["state"], status["reason"]) == ("offline", "stopped")


async def test_the_old_half_open_connection_does_not_declare_the_new_one_dead(
    tmp_path: Path, make_broker: MakeBroker
) -> None:
    broker = make_broker()
    async with ChaosProxy(broker.port) as proxy:
        settings = {"health": {"interval_s": BEAT}}
        async with Daemon(tmp_path, proxy.port, settings=settings) as daemon:
            await asyncio.to_thread(daemon.wait_ready)
            old = daemon.log("edged.starting")[-1]["instance"]
            proxy.blackhole()
            await asyncio.to_thread(daemon.kill)  # the broker does not hear of it
            daemon.settings["mqtt"]["port"] = broker.port
            await asyncio.to_thread(daemon.start)
            await asyncio.to_thread(daemon.wait_ready)
            proxy.heal()
            proxy.reset()

            def look() -> None:
                with Observer(broker.port) as observer:
                    for _ in range(3):
                        observer.wait_on("status", after=observer.last)

            await asyncio.to_thread(look)
            status = await asyncio.to_thread(retained, broker.port)
            assert status is not None
            assert status["state"] == "ready"
            assert status["instance"] != old


# F36 --------------------------------------------------------------------------------------------


def deaths(daemon: Daemon, name: str) -> int:
    """Return what the journal of a daemon that does not run counts against a job."""
    with closing(sqlite3.connect(daemon.state_dir / "journal.db")) as connection:
        (count,) = connection.execute("SELECT deaths FROM job WHERE id = ?", (name,)).fetchone()
        return int(count)


def test_a_running_job_finishes_before_the_end(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port) as daemon:
        daemon.wait_ready()
        name, waits = observer.ask("!tokens 20 50"), observer.ask("!say later")
        observer.event(name, "chunk")
        daemon.signal(signal.SIGHUP)
        assert daemon.wait_log("edged.signal", signal="SIGHUP")["ignored"]
        daemon.signal(signal.SIGTERM)
        observer.wait_status("stopping")
        unheard = observer.ask("!say for the next")  # neither taken nor acknowledged
        assert observer.final(name)["attempt"] == 1
        assert daemon.wait_exit() == 0
        assert not observer.events(waits, "started")
        assert not observer.events(unheard)
        daemon.start()
        assert observer.final(waits)["attempt"] == 1
        assert observer.final(unheard)["text"] == "for the next"
        observer.check()
        assert daemon.faults() == []


@pytest.mark.parametrize("script", ["!tokens 40 50", "!deaf 40 50", "!spin"])
def test_a_job_that_takes_too_long_is_for_the_next_start_and_no_death(
    script: str, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    settings = {"state": {"stop_s": 0.3}}
    options = ("--constant", "edged.app.PATIENCE_S=0.5")
    with Daemon(tmp_path, broker.port, settings=settings, options=options) as daemon:
        daemon.wait_ready()
        name = observer.ask(script)
        observer.event(name, "started")
        assert daemon.stop(10) == 0
        assert deaths(daemon, name.id) == 0
        daemon.start()
        assert observer.event(name, "started", count=2).body["attempt"] == 2
        if script.startswith("!spin"):
            observer.cancel(name)
        assert observer.final(name)["type"] == ("error" if script == "!spin" else "result")
        observer.check()


def test_offline_it_ends_as_well(tmp_path: Path, broker: Mosquitto) -> None:
    with Daemon(tmp_path, broker.port, options=QUICK) as daemon:
        daemon.wait_ready()
        broker.kill()
        daemon.wait_log("mqtt.disconnected", client_id="edged-box")
        began = time.monotonic()
        assert daemon.stop(15) == 0
        assert time.monotonic() - began < 5


def test_a_second_signal_ends_it_at_once(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port, settings={"state": {"stop_s": 60}}) as daemon:
        daemon.wait_ready()
        name = observer.ask("!tokens 100 50")
        observer.event(name, "chunk")
        daemon.signal(signal.SIGTERM)
        daemon.wait_log("edged.stopping")
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        assert daemon.wait_exit(10) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 1
        daemon.start()
        observer.cancel(name)
        assert observer.final(name)["code"] == "cancelled"
        observer.check(crashed=True)
