from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from edged.systemd import Notifier


@pytest.fixture(name="manager")
def _manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end of a real datagram socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


@pytest.fixture(name="notifier")
def _notifier(manager: socket.socket) -> Notifier:
    return Notifier({"NOTIFY_SOCKET": manager.getsockname()})


def test_what_is_said(manager: socket.socket, notifier: Notifier) -> None:
    assert notifier.extend_timeout(60)
    assert notifier.status("loading\nthe\tmodel")
    assert notifier.ready()
    assert notifier.watchdog()
    assert notifier.stopping()
    said = [manager.recv(4096) for _ in range(5)]
    assert said == [
        b"EXTEND_TIMEOUT_USEC=60000000",
        b"STATUS=loading the model",
        b"READY=1",
        b"WATCHDOG=1",
        b"STOPPING=1",
    ]


def test_a_status_is_one_short_line(manager: socket.socket, notifier: Notifier) -> None:
    assert notifier.status("READY=1\n" * 1000 + "\udcff")
    said = manager.recv(65536)
    assert b"\n" not in said
    assert len(said) < 1000


def test_a_time_below_nothing(manager: socket.socket, notifier: Notifier) -> None:
    assert notifier.extend_timeout(-1)
    assert manager.recv(100) == b"EXTEND_TIMEOUT_USEC=0"


def test_an_abstract_socket() -> None:
    name = f"edged-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        sock.setblocking(False)
        assert Notifier({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", [None, "", "@", "/", "vsock:2:1234", "relative"])
def test_without_a_socket_nothing_happens(path: str | None) -> None:
    notifier = Notifier({} if path is None else {"NOTIFY_SOCKET": path})
    with capture_logs() as logs:
        assert not notifier.ready()
    assert logs == []


@pytest.mark.parametrize("path", ["/nowhere/notify", "/" + "x" * 200, "/nul\0byte"])
def test_a_socket_that_cannot_be_reached_is_told_once(path: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": path})
    with capture_logs() as logs:
        assert not notifier.ready()
        assert not notifier.watchdog()
    assert [each["event"] for each in logs] == ["systemd.unreachable"]


def test_a_manager_that_comes_back_is_reached(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    notifier = Notifier({"NOTIFY_SOCKET": path})
    assert not notifier.ready()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        assert notifier.ready()


def test_a_manager_that_does_not_read_does_not_stop_us(
    manager: socket.socket, notifier: Notifier
) -> None:
    sent = 0
    while notifier.watchdog():  # ends when the queue is full, and would hang if sending waited
        sent += 1
        assert sent < 100_000
    assert manager.recv(100) == b"WATCHDOG=1"
    assert notifier.watchdog()


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_how_often_the_watchdog_is_fed(environ: dict[str, str], interval: float | None) -> None:
    assert Notifier(environ).watchdog_interval() == interval


def test_the_environment_of_this_process_is_the_default(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert Notifier().watchdog_interval() == 1.0
    assert Notifier().ready()
