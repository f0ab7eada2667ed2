"""Cameras over a real broker: frames come as they were sent, and a flood of them harms nobody."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edged.cameras.hub import Bounds, CameraHub, camera_connection
from edged.clock import SystemClock
from edged.errors import Code, Refused
from edged.mqtt import Connection, MqttBus
from edged.options import Settings
from edged.ports import Choice, Shot
from edged.topics import Topics
from tests.kit.client import Peer
from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Observer
from tests.kit.recorder import FAST, eventually
from tests.kit.sender import JPEG, Sender, number_of

pytestmark = pytest.mark.broker

MB = 1_000_000
TOPICS = Topics("edged", "box")
#: Seconds between heartbeats here, and how late one may be on a busy machine.
BEAT, LATE = 0.5, 0.5
#: MB by which the daemon may grow beyond what its buffers may hold: packets that are being read,
#: Python's and the allocator's own.
OVERHEAD_MB = 40.0


def hub_with(**changes: Any) -> CameraHub:
    given = {"cameras": 4, "seconds": 30.0, "bytes": 8 * MB, "payload_bytes": 1 * MB, **changes}
    return CameraHub(bounds=Bounds(**given), topics=TOPICS, clock=SystemClock())


@asynccontextmanager
async def connected(hub: CameraHub, broker: Mosquitto, **changes: Any) -> AsyncIterator[MqttBus]:
    """Run the camera connection."""
    jobs = Connection(
        host="127.0.0.1",
        port=broker.port,
        client_id="edged-box",
        maximum_packet_size=2 * MB,
        **changes,
    )
    connection = camera_connection(jobs, Settings(device="box"), TOPICS)
    bus = MqttBus(connection, patience=FAST, sink=hub.take)
    run = asyncio.create_task(hub.run(bus))
    try:
        await eventually(lambda: hub._subscribed)
        yield bus
    finally:
        await hub.close()
        await asyncio.wait_for(run, 10)


def shots(hub: CameraHub, camera: str, count: int) -> tuple[Shot, ...]:
    try:
        return hub.choose(Choice(camera=camera, last=count), None)
    except Refused as refused:
        assert refused.code is Code.NO_FRAMES  # noqa: PT017 - how long it takes is not known
        return ()


async def test_four_cameras_at_20_frames_a_second(broker: Mosquitto) -> None:
    hub = hub_with()
    names = ["door", "yard", "gate", "roof"]
    async with connected(hub, broker):
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(Sender(broker.port, name, fps=20, count=50, size=30_000))
            window = Choice(camera="door", window=(4, 12))
            seen: list[int] = []

            def look() -> bool:
                """Look as a job every now and then does; the order is always the camera's."""
                try:
                    numbers = [number_of(shot.data) for shot in hub.choose(window, "ada")]
                except Refused:
                    return False
                assert 4 <= len(numbers) <= 12
                assert numbers == sorted(set(numbers))
                seen.append(numbers[-1])
                return numbers[-1] == 49

            await eventually(look, 30)
            for name in names:
                await eventually(lambda name=name: shots(hub, name, 50))  # type: ignore[misc]
        assert seen == sorted(seen)
        for name in names:
            numbers = [number_of(shot.data) for shot in shots(hub, name, 50)]
            assert numbers == list(range(50)), "none is missing, in their order"
            assert [shot.ts for shot in shots(hub, name, 50)] == numbers, "the user property"
        spread = hub.choose(Choice(camera="door", last=5, span_s=2), None)
        steps = [number_of(b.data) - number_of(a.data) for a, b in itertools.pairwise(spread)]
        assert all(7 <= step <= 13 for step in steps), steps
        assert all(beat["fps"] > 10 for beat in hub.heartbeat().values())


async def test_json_frames(broker: Mosquitto) -> None:
    hub = hub_with()
    async with connected(hub, broker):
        with Sender(broker.port, "door", count=10, as_json=True) as camera:
            await asyncio.to_thread(camera.wait)
        await eventually(lambda: shots(hub, "door", 10))
        assert [number_of(shot.data) for shot in shots(hub, "door", 10)] == list(range(10))
        assert [shot.ts for shot in shots(hub, "door", 10)] == list(range(10))


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_what_is_not_taken(broker: Mosquitto, protocol: Any) -> None:
    hub = hub_with()
    with Peer(broker.port) as peer:
        await asyncio.to_thread(
            peer.publish, "edged/box/camera/before/frame", JPEG + b"old", retain=True
        )
        async with connected(hub, broker, protocol=protocol):
            for payload in (b"GIF89a", b"", JPEG + bytes(1 * MB)):
                peer.send("edged/box/camera/door/frame", payload, qos=0)
            peer.send("edged/box/camera/door/frame", JPEG + b"kept", qos=0, retain=True)
            peer.send("edged/box/camera/a b/frame", JPEG, qos=0)
            peer.send("edged/box/camera/last/frame", JPEG, qos=0)
            await eventually(lambda: "last" in hub.heartbeat())
            rings = hub._buffers.rings
            # Of 3.1.1 a retained message is known only when it is replayed.
            live = protocol == "5"
            assert rings["door"].refused == (4 if live else 3)
            assert len(rings["door"].frames) == (0 if live else 1)
            assert set(rings) == ({"door", "last"} if live else {"before", "door", "last"})
            if not live:
                assert rings["before"].refused == 1
                assert not rings["before"].frames


async def test_it_comes_back_when_the_broker_does(broker: Mosquitto) -> None:
    hub = hub_with()
    async with connected(hub, broker):
        with Sender(broker.port, "door", count=3):
            await eventually(lambda: shots(hub, "door", 3))
        await asyncio.to_thread(broker.kill)
        await eventually(lambda: "cameras" in (hub.trouble() or ""))
        assert len(shots(hub, "door", 3)) == 3, "what is here may still be looked at"
        await asyncio.to_thread(broker.start)
        await eventually(lambda: hub.trouble() is None)
        with Sender(broker.port, "door", count=3):
            await eventually(lambda: shots(hub, "door", 6))


async def test_a_flood_costs_the_event_loop_nothing(broker: Mosquitto) -> None:
    hub = hub_with(bytes=3 * MB)
    async with connected(hub, broker):
        with (
            Sender(broker.port, "quiet", fps=10, count=20) as quiet,
            Sender(broker.port, "loud", count=20_000) as loud,
        ):
            done = asyncio.create_task(asyncio.to_thread(loud.wait))
            began, cpu, turns = time.monotonic(), time.thread_time(), 0
            while not done.done():
                await asyncio.sleep(0.01)
                turns += 1
            await asyncio.to_thread(quiet.wait)
            lasted, cpu = time.monotonic() - began, time.thread_time() - cpu
        frames = next(hub._buffers._numbers)
        print(f"{frames} frames in {lasted:.1f} s, the loop worked {cpu:.2f} s")  # noqa: T201
        assert frames > 1000
        # No work of the loop follows from a frame; what is left is this test's own turns.
        assert cpu < 0.2 * lasted
        assert turns > lasted * 10
        numbers = [number_of(frame.shot.data) for frame in hub._buffers.rings["quiet"].frames]
        # The broker may drop some of a connection that it cannot write to fast enough.
        assert len(numbers) > 10
        assert numbers == sorted(numbers)
        assert numbers[0] < 5, "the loud one took nothing from it"
        assert hub._buffers.bytes <= 3 * MB


def rss_mb(pid: int, field: str) -> float:
    """Return a field of /proc/<pid>/status: VmRSS, or VmHWM, the most it has ever been."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(field)


@pytest.mark.parametrize("what", ["cameras", "flood"])
def test_jobs_and_heartbeats_beside_cameras(what: str, tmp_path: Path, broker: Mosquitto) -> None:
    filters = ["edged/box/response/#", "edged/box/health", "edged/box/camera/+/status"]
    settings = {"health": {"interval_s": BEAT}, "cameras": {"buffer_mb": 10}}
    with (
        Observer(broker.port, only=True, filters=filters) as observer,
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
        ExitStack() as stack,
    ):
        daemon.wait_ready()
        daemon.wait_log("mqtt.connected", client_id="edged-box-cameras")
        before = rss_mb(daemon.pid, "VmRSS")
        begun = observer.last
        names = ["door", "yard", "gate", "roof"]
        if what == "cameras":
            cameras = [Sender(broker.port, name, fps=20, count=80) for name in names]
        else:
            cameras = [Sender(broker.port, name, count=8000) for name in names[:2]]
        for camera in cameras:
            stack.enter_context(camera)
        asked = [observer.ask(f"!say {n}", client="ada") for n in range(30)]
        finals = [observer.final(name) for name in asked]
        assert [final["text"] for final in finals] == [str(n) for n in range(30)]
        for camera in cameras:
            camera.wait()

        def told() -> list[dict[str, Any]] | None:
            beats = [each.body for each in observer.on("health") if each.number > begun]
            return beats if len(beats) >= 4 else None

        beats = observer.wait(told, "heartbeats")
        periods = [b["ts"] - a["ts"] for a, b in itertools.pairwise(beats)]
        grown = rss_mb(daemon.pid, "VmHWM") - before
        print(f"{what}: grew by {grown:.0f} MB, at most {max(periods):.2f} s between beats")  # noqa: T201
        assert max(periods) <= BEAT + LATE, periods
        assert grown < 10 + OVERHEAD_MB
        assert any(set(beat.get("cameras", {})) == {c.name for c in cameras} for beat in beats)
        statuses = observer.on("camera/door/status")
        assert all(each.qos == 0 and each.expiry_s for each in statuses)
        body = json.loads(statuses[-1].payload)
        assert set(body) == {"v", "fps", "buffered", "newest_age_s", "refused", "ts"}
        assert body["buffered"] > 0
        assert body["refused"] == 0
        connected = daemon.log("mqtt.connected", client_id="edged-box")
        assert len(connected) == 1
        assert not daemon.log("mqtt.disconnected")
        assert daemon.faults() == []


def test_a_broker_that_makes_the_user_name_the_client_id(tmp_path: Path) -> None:
    directory = tmp_path / "mosquitto"
    directory.mkdir()
    password = tmp_path / "password"
    password.write_text("right")
    with Mosquitto(
        directory, config="use_username_as_clientid true", passwords={"edged": "right"}
    ) as broker:
        settings = {"mqtt": {"username": "edged", "password_file": str(password)}}
        with Daemon(tmp_path, broker.port, settings=settings) as daemon:
            daemon.wait_log("camera.conflict", timeout_s=90)

            def told() -> dict[str, Any] | None:
                states = daemon.log("health.state", state="degraded")
                return next((s for s in states if "cameras.username" in s["reason"]), None)

            daemon.wait_until(told, "the conflict as the reason")
            closed = len(daemon.log("mqtt.closed", client_id="edged-box-cameras"))
            assert closed == 1
            assert daemon.stop() == 0
