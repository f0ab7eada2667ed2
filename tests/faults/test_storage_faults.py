"""F13 to F15, F38: a full disk, a damaged or foreign journal, a wrong clock, two on one state."""

from __future__ import annotations

import ctypes
import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Observer

SOON = ("--constant", "edged.app.JOURNAL_RETRY_S=0.3")
MS_RDONLY, MS_REMOUNT, MNT_DETACH = 1, 32, 2

_libc = ctypes.CDLL(None, use_errno=True)


def _mount(target: Path, flags: int = 0, options: str = "size=2m") -> bool:
    return bool(_libc.mount(b"tmpfs", str(target).encode(), b"tmpfs", flags, options.encode()) == 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, mounted where the daemon keeps its state."""
    target = tmp_path / "state"
    target.mkdir()
    if not _mount(target):
        why = os.strerror(ctypes.get_errno())
        pytest.skip(f"no file system can be mounted here: {why}")
    target.chmod(0o700)
    yield target
    _libc.umount2(str(target).encode(), MNT_DETACH)


@pytest.fixture
def observer(broker: Mosquitto) -> Iterator[Observer]:
    with Observer(broker.port) as observer:
        yield observer


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """No byte is free on the disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    yield
    ballast.unlink()


def beats(observer: Observer, count: int = 2) -> None:
    """Wait for so many heartbeats more."""
    for _ in range(count):
        observer.wait_on("health", after=observer.last)


# F13 --------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_at_start_is_said_and_waited_for(
    tmp_path: Path, small_disk: Path, broker: Mosquitto, observer: Observer
) -> None:
    with filled(small_disk):
        daemon = Daemon(tmp_path, broker.port, options=SOON)
        daemon.start()
        try:
            observer.wait_on("health", lambda body: "journal cannot be opened" in body["reason"])
            daemon.wait_log("engine.loaded")
            refusal = observer.refusal(observer.ask("!say no")).body
            assert (refusal["code"], refusal["retryable"]) == ("disk_full", True)
            assert refusal["retry_after_s"] > 0
            beats(observer)
        except BaseException:
            daemon.kill()
            daemon.tell()
            raise
    with_room = observer.last
    try:
        observer.wait_status("ready", after=with_room)
        name = observer.ask("!say yes")
        assert observer.final(name)["text"] == "yes"
        observer.check()
        assert daemon.stop() == 0
        assert daemon.faults() == []
    finally:
        daemon.kill()


def test_a_disk_that_fills_while_jobs_run_costs_none_of_them(
    tmp_path: Path, small_disk: Path, broker: Mosquitto, observer: Observer
) -> None:
    with Daemon(tmp_path, broker.port) as daemon:
        daemon.wait_ready()
        running, waiting = observer.ask("!tokens 20 50"), observer.ask("!say waited")
        observer.event(waiting, "accepted")
        observer.event(running, "chunk")
        with filled(small_disk):
            refusal = observer.refusal(observer.ask("!say no", system="x" * 100_000)).body
            assert refusal["code"] == "disk_full"
            observer.wait_on("health", lambda body: body["state"] == "degraded")
            daemon.wait_log("journal.unavailable")  # it tries again to store what happens
            beats(observer)
        assert observer.final(running)["finish_reason"] == "stop"
        assert observer.final(waiting)["text"] == "waited"
        after = observer.ask("!say after")
        assert observer.final(after)["text"] == "after"
        observer.check()
        observer.wait_on("health", lambda body: body["state"] == "ready", after=observer.last)
        assert daemon.stop() == 0


def test_sigterm_while_nothing_can_be_stored_ends_all_the_same(
    tmp_path: Path, small_disk: Path, broker: Mosquitto, observer: Observer
) -> None:
    settings = {"state": {"stop_s": 0.5}}
    options = ("--constant", "edged.app.PATIENCE_S=0.5")
    with Daemon(tmp_path, broker.port, settings=settings, options=options) as daemon:
        daemon.wait_ready()
        name = observer.ask("!tokens 20 50 !say kept")
        observer.event(name, "chunk")
        with filled(small_disk):
            daemon.wait_log("journal.unavailable")
            assert daemon.stop(20) == 0
            assert not daemon.engine_pids
        daemon.start()
        assert observer.final(name)["type"] == "result"
        observer.check(crashed=True)


def test_a_full_quota_refuses_and_takes_jobs_again_when_there_is_room(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    settings = {"limits": {"journal_mb": 1}}
    with Daemon(tmp_path, broker.port, settings=settings) as daemon:
        daemon.wait_ready()
        first = observer.ask("!tokens 20 100")
        observer.event(first, "accepted")
        names = [observer.ask("!say small", system="x" * 60_000) for _ in range(10)]
        observer.wait(lambda: all(observer.events(name) for name in names))
        refused = [name for name in names if observer.events(name, "refused")]
        assert 1 <= len(refused) < 10
        assert {observer.refusal(name).body["code"] for name in refused} == {"disk_full"}
        observer.final(first)
        for name in set(names) - set(refused):
            assert observer.final(name)["text"] == "small"
        for _ in range(3):
            again = observer.ask("!say again", system="x" * 60_000)
            assert observer.final(again)["text"] == "again"
        observer.check()


# F14 --------------------------------------------------------------------------------------------


def _zero_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(100))


def _cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _scramble(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        for offset in range(4096, size, 4096):
            file.seek(offset)
            file.write(os.urandom(64))


@pytest.mark.parametrize("damage", [_zero_header, _cut_off, _scramble])
def test_a_damaged_journal_is_set_aside_and_said(
    damage: object, tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    assert callable(damage)
    with Daemon(tmp_path, broker.port) as daemon:
        daemon.wait_ready()
        lost = observer.ask("!say done")
        observer.final(lost)
        daemon.stop()
        damage(tmp_path / "state" / "journal.db")
        daemon.start()
        daemon.wait_log("journal.reset")
        daemon.wait_ready()
        info = observer.wait_on("info", lambda body: bool(body["warnings"])).body
        assert any("journal" in warning for warning in info["warnings"])
        assert (tmp_path / "state" / "journal.db.corrupt-1").exists()
        name = observer.ask("!say goes on")
        assert observer.final(name)["text"] == "goes on"
        observer.check()
        assert daemon.stop() == 0
        if damage is _cut_off:  # it is no loop
            daemon.start()
            daemon.wait_ready()
            assert not daemon.log("journal.reset")


def test_a_journal_of_a_newer_version_is_refused_and_not_touched(
    tmp_path: Path, broker: Mosquitto
) -> None:
    path = tmp_path / "state" / "journal.db"
    with Daemon(tmp_path, broker.port) as daemon:
        daemon.wait_ready()
        daemon.stop()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA journal_mode = DELETE").fetchone()
            connection.execute("PRAGMA user_version = 9999")
        connection.close()
        before = hashlib.sha256(path.read_bytes()).hexdigest()
        daemon.start()
        assert daemon.wait_exit() == 78
        said = " ".join(daemon.noise)
        assert "9999" in said
        assert "Traceback" not in said
        assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_state_directory_that_cannot_be_written_is_refused(
    tmp_path: Path, small_disk: Path, broker: Mosquitto
) -> None:
    assert _mount(small_disk, MS_RDONLY | MS_REMOUNT)
    with Daemon(tmp_path, broker.port) as daemon:
        assert daemon.wait_exit() == 78
        said = " ".join(daemon.noise)
        assert str(small_disk) in said
        assert "Traceback" not in said


# F15 --------------------------------------------------------------------------------------------


def test_a_wrong_wall_clock_expires_repeats_and_blocks_nothing(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    offset = tmp_path / "offset"
    year = 365 * 86400
    settings = {"health": {"interval_s": 0.25}, "limits": {"results_s": 3600}}
    options = ("--wall-offset", str(offset))
    with Daemon(tmp_path, broker.port, settings=settings, options=options) as daemon:
        daemon.wait_ready()
        first = observer.ask("!say first", id="first")
        observer.final(first)
        for jump in (2 * year, -86400, -55 * year):
            slow = observer.ask("!tokens 8 50", deadline_s=20)
            observer.event(slow, "started")
            offset.write_text(str(jump))
            beats(observer)
            assert observer.final(slow)["type"] == "result"
            observer.ask("!say first", id="first")  # not run again
            late = observer.ask("!tokens 200 20", deadline_s=0.3)
            assert observer.final(late)["code"] == "expired"
        daemon.restart()
        assert len(observer.events(first, "started")) == 1
        observer.check(crashed=True)


# F38 --------------------------------------------------------------------------------------------


def test_a_second_daemon_on_one_state_directory_is_refused(
    tmp_path: Path, broker: Mosquitto, observer: Observer
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with Daemon(tmp_path, broker.port) as daemon:
        daemon.wait_ready()
        settings = {"state": {"dir": str(daemon.state_dir)}, "mqtt": {"client_id": "other"}}
        with Daemon(other, broker.port, settings=settings) as second:
            assert second.wait_exit() == 1
            said = " ".join(second.noise)
            assert "in use by another edged" in said
            assert str(daemon.pid) in said
            assert "Traceback" not in said
        name = observer.ask("!say mine")
        assert observer.final(name)["text"] == "mine"
        observer.check()
