"""A whole box for a test: a real broker, the real daemon on it, and observers."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.kit.daemon import Daemon, Tree
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Observer

Protocol = Literal["5", "3.1.1"]


@dataclass(frozen=True)
class Box:
    """A broker and a daemon that is ready."""

    broker: Mosquitto
    daemon: Daemon
    protocol: Protocol

    def observer(self, **options: Any) -> Observer:
        """Return an observer, of the daemon's protocol unless another is named."""
        options.setdefault("protocol", self.protocol)
        return Observer(self.broker.port, self.daemon.root, **options)

    def tool(self, program: str, *arguments: str, stdin: bytes = b"") -> str:
        """Run mosquitto_pub or mosquitto_sub against the broker and return what it prints."""
        version = {"5": "5", "3.1.1": "311"}[self.protocol]
        done = subprocess.run(
            [program, "-p", str(self.broker.port), "-V", version, *arguments],
            check=False,
            input=stdin,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()


@contextmanager
def serve(
    directory: Path,
    *,
    protocol: Protocol = "5",
    engine: Literal["faulty", "real"] = "faulty",
    settings: Tree | None = None,
    options: Sequence[str] = (),
    config: str = "",
) -> Iterator[Box]:
    """Run a broker and a daemon until the block ends; then it must stop cleanly.

    Args:
        directory: for all files.
        protocol: the daemon's.
        engine, settings, options: as for `Daemon`.
        config: more lines of mosquitto.conf.
    """
    settings = {"mqtt": {"protocol": protocol}, "health": {"interval_s": 0.5}, **(settings or {})}
    # Without it the broker holds small packets back for 40 ms, and so every answer.
    with (
        Mosquitto(directory, config=f"{config}\nset_tcp_nodelay true") as broker,
        Daemon(directory, broker.port, engine=engine, settings=settings, options=options) as daemon,
    ):
        daemon.wait_ready()
        box = Box(broker, daemon, protocol)
        with box.observer() as observer:
            observer.wait_status("ready")
        yield box
        assert daemon.stop() == 0
        assert daemon.faults() == []
