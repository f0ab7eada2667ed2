"""Telling systemd how the service is: sd_notify(3) over its datagram socket.

Without NOTIFY_SOCKET, and when sending fails, nothing happens: the service runs as well without.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import structlog

log = structlog.get_logger()

_MAX_STATUS = 200


class Notifier:
    """The service manager's ear. Every method is safe anywhere, at any time, and never waits."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        path = environ.get("NOTIFY_SOCKET", "")
        # Other transports than a path or an abstract name (vsock) are for virtual machines.
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._enabled = path[:1] in {"@", "/"} and len(path) > 1
        self._failed = False
        self._watchdog_s = _watchdog_s(environ)

    def ready(self) -> bool:
        """Say that the service is up; return, as every method does, whether it could be said."""
        return self._send("READY=1")

    def status(self, text: str) -> bool:
        """Set the line that `systemctl status` shows."""
        line = " ".join(text.split())
        return self._send(f"STATUS={line[:_MAX_STATUS]}")

    def stopping(self) -> bool:
        """Say that the service is on its way down."""
        return self._send("STOPPING=1")

    def extend_timeout(self, seconds: float) -> bool:
        """Ask for this many seconds more, from now, for the start or stop that is under way."""
        return self._send(f"EXTEND_TIMEOUT_USEC={round(max(0.0, seconds) * 1e6)}")

    def watchdog(self) -> bool:
        """Say that every part still turns."""
        return self._send("WATCHDOG=1")

    def watchdog_interval(self) -> float | None:
        """Return how often to call `watchdog`, in seconds: half of what systemd waits.

        None if systemd does not wait, or waits for another process.
        """
        return self._watchdog_s

    def _send(self, message: str) -> bool:
        if not self._enabled:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # A full queue at systemd's end must not stop the event loop.
                sock.setblocking(False)
                sock.connect(self._address)
                sock.send(message.encode("utf-8", "replace"))
        except (OSError, ValueError) as error:
            if not self._failed:
                self._failed = True
                log.warning("systemd.unreachable", reason=str(error))
            return False
        self._failed = False
        return True


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        wait_us = int(environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return wait_us / 2e6 if wait_us > 0 else None
