"""What frames cost the daemon: its processor, its memory, and the jobs that come meanwhile.

The cameras are one process that speaks just enough MQTT over plain sockets, so that what is
measured is the broker and the daemon. No job looks at the frames: they are received, read for what
they are, and kept in the buffers.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.child import Child
from tests.bench.flood import packet, text
from tests.bench.frames import SIZE, encoded
from tests.bench.machine import Meter, memory_mb
from tests.bench.report import Report, Row
from tests.bench.rig import TOPICS, Asker, Daemon, broker
from tests.bench.scale import Scale

#: A house with cameras: so many, and frames a second of each.
CAMERAS, FPS = 4, 5.0
#: Different frames; they are sent in turns.
_PICTURES = 8
_BUFFER_MB = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the cameras do."""

    port: int
    root: str
    cameras: int
    #: Frames a second of all cameras together; None: as many as the broker takes.
    rate: float | None
    seconds: float


class Filming(Child):
    """The process of the cameras, as the bench sees it."""

    def __init__(self, order: Order) -> None:
        super().__init__("tests.bench.cameras", "the cameras", json.dumps(asdict(order)))

    def greet(self) -> None:
        """Wait until they are connected and their pictures made."""
        self.hear()

    def begin(self) -> None:
        """Let them film."""
        self.say({})

    def end(self) -> dict[str, float]:
        """Wait until they have ended; return `published` (frames), `seconds`, `bytes`."""
        return self.hear()


def cameras(folder: Path, scale: Scale, report: Report) -> None:
    """(k) The daemon while cameras film: at an everyday rate, then as fast as they can."""
    place = folder / "cameras"
    with (
        broker(place / "broker") as mosquitto,
        Daemon(
            place,
            mosquitto.port,
            faulty=True,
            cameras={"buffer_mb": _BUFFER_MB},
            health={"interval_s": 1.0},
        ) as daemon,
        Asker(mosquitto.port) as asker,
    ):
        asker.wait_ready(daemon)
        before = memory_mb(daemon.pid)["rss"]
        runs = {}
        for name, rate, seconds in (
            ("steady", CAMERAS * FPS, scale.camera_s),
            ("flood", None, scale.camera_flood_s),
        ):
            order = Order(
                port=mosquitto.port, root=TOPICS, cameras=CAMERAS, rate=rate, seconds=seconds
            )
            runs[name] = _film(order, daemon, asker, mosquitto.pid)
            report.noise[f"cameras, {name}"] = [runs[name]["use"]["others"]]
    report.details["cameras"] = {"frame": SIZE, "memory_before_mb": before, **runs}
    steady, flood = runs["steady"], runs["flood"]
    report.rows += [
        Row(key="k", what=f"{CAMERAS} cameras, {CAMERAS * FPS:g} JPEG/s in all: daemon, of a core",
            values=[100 * steady["use"]["cores"]["daemon"]], unit="%",
            note=f"{steady['taken_fps']:.1f} frames/s taken, {steady['frame_bytes'] / 1e3:.0f} kB "
            "a frame"),
        Row(key="", what="  publish to accepted of a job meanwhile", values=steady["accepted_ms"],
            unit="ms"),
        Row(key="", what="  flooded with frames: taken a second", values=[flood["taken_fps"]],
            unit="/s", note=f"{flood['published_fps']:.0f} published"),
        Row(key="", what="  daemon meanwhile, of a core",
            values=[100 * flood["use"]["cores"]["daemon"]], unit="%"),
        Row(key="", what="  publish to accepted of a job meanwhile", values=flood["accepted_ms"],
            unit="ms"),
        Row(key="", what=f"  daemon's memory then, {_BUFFER_MB:g} MB of it for frames",
            values=[flood["memory_mb"]["rss"]], unit="MB", note=f"{before:.0f} MB before"),
    ]  # fmt: skip


def _film(order: Order, daemon: Daemon, asker: Asker, broker_pid: int) -> dict[str, Any]:
    accepted: list[float] = []
    with Filming(order) as filming:
        pids = {"daemon": daemon.pid, "broker": broker_pid, "cameras": filming.pid}
        with Meter(pids) as meter:
            filming.begin()
            began = time.perf_counter()
            until = began + order.seconds
            while not accepted or time.perf_counter() + 0.5 < until:
                time.sleep(0.4)
                trail = asker.ask(daemon, "bench", prompt="a job", max_tokens=4)
                accepted.append(1e3 * trail.first("accepted"))
            done = filming.end()
        asker.wait_beats(1, daemon)
    beats = [beat.body.get("cameras", {}) for beat in asker.beats if beat.at > began]
    return {
        "published_fps": done["published"] / done["seconds"],
        # the highest that a beat has told: each speaks of the 10 s before it
        "taken_fps": max(sum(camera["fps"] for camera in beat.values()) for beat in beats),
        "frame_bytes": done["bytes"] / max(1, done["published"]),
        "accepted_ms": accepted,
        "memory_mb": memory_mb(daemon.pid),
        "use": meter.use.as_dict(),
    }


# In the process ---------------------------------------------------------------------------------


def main() -> None:
    """Film."""
    order = Order(**json.loads(sys.argv[1]))
    pictures = [encoded(n, "JPEG") for n in range(_PICTURES)]
    sockets = [_connected(order, n) for n in range(order.cameras)]
    packets = [
        [packet(0x30, text(f"{order.root}/camera/c{n}/frame") + picture) for picture in pictures]
        for n in range(order.cameras)
    ]
    print("{}", flush=True)
    sys.stdin.readline()
    began = now = time.perf_counter()
    published = size = 0
    while now < began + order.seconds:
        camera, turn = published % order.cameras, published // order.cameras
        if order.rate is not None:
            time.sleep(max(0.0, began + published / order.rate - now))
        message = packets[camera][turn % _PICTURES]
        sockets[camera].sendall(message)
        published, size = published + 1, size + len(message)
        now = time.perf_counter()
    print(json.dumps({"published": published, "seconds": now - began, "bytes": size}), flush=True)
    sys.stdin.readline()  # stay connected until the parent ends this


def _connected(order: Order, number: int) -> socket.socket:
    one = socket.create_connection(("127.0.0.1", order.port))
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    name = text(f"camera{number}")
    one.sendall(packet(0x10, text("MQTT") + b"\x04\x02" + struct.pack("!H", 600) + name))
    if one.recv(4)[:1] != b"\x20":
        raise ConnectionError("the broker refused a camera")
    return one


if __name__ == "__main__":
    main()
