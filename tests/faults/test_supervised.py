"""F34 to F37 under something that does what systemd does by the unit file."""

from __future__ import annotations

import hashlib
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from edged.journal_schema import MIGRATIONS
from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Name, Observer
from tests.kit.supervisor import Supervisor

JOURNAL_V1 = Path(__file__).parents[1] / "unit" / "journal-v1.sql"


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as observer:
        yield observer


# F34 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        ("--stall-at", "on_receive:1=600"),
        (
            "--stall-at", "in_accept_txn:1=600",
            "--constant", "edged.health.JOURNAL_STUCK_S=0.5",
        ),
        ("--stall-at", "mqtt.on_message:2=600", "--constant", "edged.mqtt._SLACK_S=0.5"),
        ("--stall-at", "cameras.mqtt.on_connect:1=600", "--constant", "edged.mqtt._SLACK_S=0.5"),
    ],
    ids=["event loop", "journal", "network", "network of the cameras"],
)  # fmt: skip
def test_a_stuck_part_is_ended_by_the_watchdog_and_no_job_is_lost(
    fault: tuple[str, ...], tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    daemon = Daemon(tmp_path, broker.port)
    with Supervisor(daemon, first=fault, WatchdogSec="3", RestartSec="0.1") as systemd:
        systemd.wait_state("active")
        name = observer.ask("!say survived")
        systemd.wait_state("active", lives=2)
        stuck = systemd.lives[0]
        assert (stuck.killed, stuck.status) == ("WatchdogSec", -signal.SIGABRT)
        assert any("Current thread" in line for line in daemon.noise)  # where it hung
        assert observer.final(name)["text"] == "survived"
        observer.check(crashed=True)
        assert systemd.stop() == 0
        assert systemd.socket.unheard == []


def test_a_stopped_process_is_ended_by_the_watchdog(tmp_path: Path, broker: Mosquitto) -> None:
    daemon = Daemon(tmp_path, broker.port)
    with Supervisor(daemon, WatchdogSec="3", RestartSec="0.1") as systemd:
        stopped = systemd.wait_state("active")
        os.kill(stopped.pid, signal.SIGSTOP)
        systemd.wait_state("active", lives=2)
        assert (stopped.killed, stopped.status) == ("WatchdogSec", -signal.SIGABRT)


def test_a_start_takes_the_time_the_model_takes(tmp_path: Path, broker: Mosquitto) -> None:
    options = (
        "--engine-option=--slow-load=10",
        "--constant", "edged.app.EXTEND_EVERY_S=0.5",
        "--constant", "edged.app.EXTEND_S=8",
    )  # fmt: skip
    daemon = Daemon(tmp_path, broker.port, options=options)
    with Supervisor(daemon, TimeoutStartSec="8") as systemd:
        systemd.wait_state("active")
        assert [life.killed for life in systemd.lives] == [None]


def test_a_start_in_which_something_is_stuck_is_ended(tmp_path: Path, broker: Mosquitto) -> None:
    stuck = (
        "--stall-at", "mqtt.on_connect:1=600",
        "--constant", "edged.mqtt._SLACK_S=0.5",
        "--constant", "edged.app.EXTEND_EVERY_S=0.1",
        "--constant", "edged.app.EXTEND_S=2",
    )  # fmt: skip
    times = {"TimeoutStartSec": "8", "WatchdogSec": "600", "RestartSec": "0.1"}
    with Supervisor(Daemon(tmp_path, broker.port), first=stuck, **times) as systemd:
        systemd.wait_state("active", lives=2)
        assert systemd.lives[0].killed == "TimeoutStartSec"


# What is started again, and what is not ---------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_whatever_ends_it_it_is_started_again_and_says_so(
    number: signal.Signals, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Supervisor(Daemon(tmp_path, broker.port), RestartSec="0.1") as systemd:
        first = systemd.wait_state("active")
        was = observer.wait_status("ready").body["instance"]
        name = observer.ask("!tokens 10 50")
        observer.event(name, "chunk")
        os.kill(first.pid, number)
        systemd.wait_state("active", lives=2)
        assert first.status == (0 if number is signal.SIGTERM else -number)
        assert observer.final(name)["type"] == "result"
        for _ in range(3):
            observer.wait_on("health", after=observer.last)
        with Observer(broker.port, only=True, filters=["edged/box/status"]) as reader:
            status = reader.wait_on("status").body  # what is retained
        assert (status["state"], status["instance"] != was) == ("ready", True)
        observer.check(crashed=True)
        assert systemd.stop() == 0
        assert systemd.state == "inactive"


def test_a_wrong_configuration_is_not_tried_again(tmp_path: Path, broker: Mosquitto) -> None:
    daemon = Daemon(tmp_path, broker.port, settings={"mqtt": {"prot": 1}})
    with Supervisor(daemon, RestartSec="0.1") as systemd:
        assert systemd.wait_state("failed").status == 78
        assert len(systemd.lives) == 1
        assert any("mqtt.prot" in line for line in daemon.noise)


def test_a_job_that_ends_the_daemon_each_time_is_given_up_before_the_unit_is(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    name = Name(None, "deadly")
    daemon = Daemon(tmp_path, broker.port, options=("--crash-at", "after_attempt_mark"))
    with Supervisor(daemon, RestartSec="0.1") as systemd:
        systemd.wait_state("active")
        observer.ask("!say it ends all", id="deadly")
        final = observer.final(name)
        assert (final["type"], final["code"]) == ("error", "dead")
        systemd.wait_state("active", lives=4)
        assert [life.status for life in systemd.lives[:3]] == [-signal.SIGKILL] * 3
        observer.check(crashed=True)


def test_what_cannot_start_stays_down_after_some_tries(tmp_path: Path, broker: Mosquitto) -> None:
    with Daemon(tmp_path, broker.port) as holder:
        holder.wait_ready()
        (tmp_path / "second").mkdir()
        second = Daemon(
            tmp_path / "second", broker.port, settings={"state": {"dir": str(holder.state_dir)}}
        )
        with Supervisor(second, RestartSec="0.1", StartLimitBurst="3") as systemd:
            systemd.wait_state("failed", lives=3)
            assert [life.status for life in systemd.lives] == [1, 1, 1]
        assert holder.running


# F36 --------------------------------------------------------------------------------------------


def test_a_stop_lasts_as_long_as_the_running_job_may(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    daemon = Daemon(tmp_path, broker.port, settings={"state": {"stop_s": 60}})
    with Supervisor(daemon, TimeoutStopSec="1") as systemd:
        systemd.wait_state("active")
        name = observer.ask("!tokens 60 50")
        observer.event(name, "chunk")
        assert systemd.stop() == 0
        assert (systemd.state, systemd.lives[0].killed) == ("inactive", None)
        final = observer.final(name)
        assert (final["type"], final["attempt"]) == ("result", 1)
        said = systemd.socket.lines()
        assert said[said.index("STOPPING=1") + 1] == "EXTEND_TIMEOUT_USEC=100000000"


def test_a_stop_while_the_model_loads(tmp_path: Path, broker: Mosquitto) -> None:
    daemon = Daemon(tmp_path, broker.port, options=("--engine-option=--slow-load=600",))
    with Supervisor(daemon) as systemd:
        systemd.wait_state("activating")
        daemon.wait_log("engine.started")
        daemon.signal(signal.SIGHUP)
        assert daemon.wait_log("edged.signal", signal="SIGHUP")["ignored"]
        assert systemd.stop() == 0
        assert systemd.state == "inactive"
        assert "READY=1" not in systemd.socket.lines()


# F37 --------------------------------------------------------------------------------------------


def test_a_journal_of_the_version_before_is_taken_over(tmp_path: Path, broker: Mosquitto) -> None:
    daemon = Daemon(tmp_path, broker.port)
    daemon.state_dir.mkdir()
    with closing(sqlite3.connect(daemon.state_dir / "journal.db")) as journal:
        journal.executescript(JOURNAL_V1.read_text())
    # the stored final of that journal is one in name only
    with (
        Observer(broker.port, documented=False) as observer,
        Supervisor(daemon) as systemd,
    ):
        systemd.wait_state("active")

        def final(name: str) -> bool:
            seen = [each.body for each in observer.seen if each.topic == f"edged/reply/{name}"]
            return any(body.get("type") in {"result", "error"} for body in seen)

        for name in ("waits", "died", "runs"):
            observer.wait(partial(final, name), f"the final of {name}")
        stored = [each.body for each in observer.seen if each.topic == "edged/reply/ended"]
        assert stored == [{"final": 4}]  # it waited to be sent before any of them
        assert systemd.stop() == 0
    with closing(sqlite3.connect(daemon.state_dir / "journal.db")) as journal:
        assert journal.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        states = journal.execute("SELECT DISTINCT state FROM job").fetchall()
    assert states == [("ended",)]


def test_a_journal_of_a_later_version_is_left_alone_and_not_tried_again(
    tmp_path: Path, broker: Mosquitto
) -> None:
    daemon = Daemon(tmp_path, broker.port)
    daemon.state_dir.mkdir()
    path = daemon.state_dir / "journal.db"
    with closing(sqlite3.connect(path)) as journal:
        journal.executescript(JOURNAL_V1.read_text())
        journal.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with Supervisor(daemon, RestartSec="0.1") as systemd:
        assert systemd.wait_state("failed").status == 78
        assert len(systemd.lives) == 1
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
