"""Cameras in a process of their own, which publish numbered frames until they are ended.

    with Cameras(broker.port, "door", "yard", fps=20) as cameras:
        ...

A frame is known by its camera and number: `frame("door", 7)`. Its `ts` is EPOCH + its number. They
connect again by themselves, and number on.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import TracebackType
from typing import Self

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.kit.daemon import ROOT
from tests.kit.frames import marked

EPOCH = 1_700_000_000
SIZE = 30_000


def frame(camera: str, number: int) -> bytes:
    """Return a camera's frame."""
    return marked(f"{camera} {number}", SIZE)


class Cameras:
    """Cameras, each with a connection of its own, publishing `fps` frames a second each."""

    def __init__(self, port: int, *names: str, fps: float = 20, root: str = "edged/box") -> None:
        command = [sys.executable, "-W", "error", "-m", "tests.kit.camera"]
        self._command = [*command, str(port), root, str(fps), *names]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdin=subprocess.PIPE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()


def main(port: int, root: str, fps: float, *names: str) -> None:
    """Publish until killed, or until standard input is closed."""
    clients = {}
    for name in names:
        client = paho.Client(
            CallbackAPIVersion.VERSION2, f"cam-{name}", protocol=MQTTProtocolVersion.MQTTv5
        )
        client.reconnect_delay_set(1, 1)
        client.connect_async("127.0.0.1", port)
        client.loop_start()
        clients[name] = client
    ended = threading.Event()

    def wait_end() -> None:
        sys.stdin.read()  # until whoever started this has closed it, or is gone
        ended.set()

    threading.Thread(target=wait_end, daemon=True).start()
    began, number = time.monotonic(), 0
    while not ended.wait(max(0.0, began + number / fps - time.monotonic())):
        for name, client in clients.items():
            taken = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            taken.UserProperty = [("ts", str(EPOCH + number))]
            client.publish(f"{root}/camera/{name}/frame", frame(name, number), 0, properties=taken)
        number += 1


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), *sys.argv[4:])
