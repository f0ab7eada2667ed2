"""A camera as a process of its own that sends so many numbered frames; none of edged's code.

    with Sender(port, "door", fps=20, count=60) as sender:
        sender.wait()

A frame begins as a JPEG does, then comes its number; `number_of` reads it back. Its `ts` is the
number as well. Packets are made by hand: with `fps` 0 they come as fast as the broker takes them.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

from tests.kit.daemon import ROOT

JPEG = b"\xff\xd8\xff\xe0"

PATIENCE_S = 60.0


def number_of(frame: bytes) -> int:
    """Return the number of a frame."""
    assert frame.startswith(JPEG)
    return int.from_bytes(frame[4:12], "big")


class Sender:
    """The process.

    Args:
        port: the broker's.
        name: the camera's.
        options: `count` frames to send; `fps`, 0 (default): as fast as it goes; `size`, bytes of a
            frame; `as_json`; `root`, what the topic begins with.
    """

    def __init__(self, port: int, name: str, **options: Any) -> None:
        self.name = name
        self._command = [sys.executable, "-m", "tests.kit.sender"]
        self._command.append(json.dumps({"port": port, "name": name, **options}))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, cwd=ROOT)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(PATIENCE_S)

    def wait(self) -> None:
        """Wait until the broker has all its frames."""
        assert self._process is not None
        assert self._process.wait(PATIENCE_S) == 0


# The program ------------------------------------------------------------------------------------


def _length(number: int) -> bytes:
    out = bytearray()
    while True:
        number, byte = divmod(number, 128)
        out.append(byte | 0x80 if number else byte)
        if not number:
            return bytes(out)


def _text(text: str) -> bytes:
    return struct.pack("!H", len(text)) + text.encode()


def _publish(topic: str, payload: bytes, ts: str) -> bytes:
    """Return a PUBLISH of MQTT 5 at QoS 0."""
    properties = b"\x26" + _text("ts") + _text(ts)
    body = _text(topic) + _length(len(properties)) + properties + payload
    return b"\x30" + _length(len(body)) + body


def main(
    *,
    port: int,
    name: str,
    count: int,
    fps: float = 0,
    size: int = 30_000,
    as_json: bool = False,
    root: str = "edged/box",
) -> None:
    """Send."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        hello = _text("MQTT") + b"\x05\x02\0\0\0" + _text(f"camera-{name}")
        sock.sendall(b"\x10" + _length(len(hello)) + hello)
        assert sock.recv(2)[0] == 0x20
        topic = f"{root}/camera/{name}/frame"
        filler = bytes(size - 12)
        began = time.monotonic()
        for number in range(count):
            if fps:
                time.sleep(max(0.0, began + number / fps - time.monotonic()))
            frame = JPEG + number.to_bytes(8, "big") + filler
            payload = _json(frame, number) if as_json else frame
            sock.sendall(_publish(topic, payload, str(number)))
        sock.sendall(b"\xe0\0")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass  # until the broker has read everything


def _json(frame: bytes, number: int) -> bytes:
    return json.dumps({"image": base64.b64encode(frame).decode(), "ts": number}).encode()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
