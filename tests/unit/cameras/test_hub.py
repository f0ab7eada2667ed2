"""The hub: from a message to a choice, and what is told about cameras."""

from __future__ import annotations

import asyncio
import json
import threading
from functools import partial
from typing import Any

import pytest

from edged.cameras import hub as hub_module
from edged.cameras.buffer import FORGOTTEN_S
from edged.cameras.hub import TELL_S, Bounds, CameraHub, bounds, camera_connection, same_user
from edged.errors import Code, Refused
from edged.mqttconfig import Connection
from edged.options import Cameras, Limits, Settings
from edged.ports import BusState, Choice, Incoming, Outgoing, Receipt, Shot
from edged.testing import ManualClock, MemoryBroker, MemoryBus
from edged.topics import Topics
from tests.kit.recorder import eventually

JPEG = b"\xff\xd8\xff"
TOPICS = Topics("edged", "box")
BOUNDS = Bounds(cameras=3, seconds=30.0, bytes=1_000_000, payload_bytes=100_000)


class World:
    """A hub whose clock stands still."""

    def __init__(self, limits: Bounds = BOUNDS) -> None:
        self.clock = ManualClock()
        self.hub = CameraHub(bounds=limits, topics=TOPICS, clock=self.clock)

    def send(self, camera: str = "door", payload: bytes | None = JPEG, **fields: Any) -> None:
        given: dict[str, Any] = {
            "topic": f"edged/box/camera/{camera}/frame",
            "payload": payload,
            "size": len(payload or b""),
            "qos": 0,
            "receipt": Receipt(1, 0),
        }
        self.hub.take(Incoming(**{**given, **fields}))

    def status(self, camera: str = "door") -> dict[str, Any] | None:
        """Return what one beat tells about a camera."""
        return self.beat().get(f"edged/box/camera/{camera}/status")

    def beat(self) -> dict[str, Any]:
        bus = Told()
        self.hub.beat(bus, 30)  # type: ignore[arg-type]
        assert all(m.qos == 0 and m.retain and m.expiry_s == 30 for m in bus.told)
        return {m.topic: json.loads(m.payload) for m in bus.told}

    def refusal(self, **choice: Any) -> Refused:
        with pytest.raises(Refused) as refused:
            self.hub.choose(Choice(**{"camera": "door", **choice}), None)
        assert refused.value.code is Code.NO_FRAMES
        return refused.value


class Told:
    """The part of a bus that a beat uses."""

    def __init__(self, *, congested: bool = False) -> None:
        self.told: list[Outgoing] = []
        self.congested = congested

    def offer(self, message: Outgoing) -> bool:
        if not self.congested:
            self.told.append(message)
        return not self.congested


@pytest.fixture(name="world")
def _world() -> World:
    return World()


def test_frames_are_chosen_as_they_came(world: World) -> None:
    world.send(payload=JPEG + b"1", ts="5.5")
    world.send(payload=JPEG + b"2")
    shots = world.hub.choose(Choice(camera="door", last=2), None)
    assert shots == (
        Shot(data=JPEG + b"1", ts=5.5),
        Shot(data=JPEG + b"2", ts=world.clock.stamp().wall),
    )


def test_a_window_and_its_trim(world: World) -> None:
    choice = Choice(camera="door", window=(2, 9))
    for n in range(3):
        world.send(payload=JPEG + b"%d" % n, ts=str(n))
        if n:
            world.hub.choose(choice, "ada")
    assert [shot.ts for shot in world.hub.choose(choice, "ada")] == [0, 1, 2]
    world.hub.trim(choice, "ada", 1.0)
    assert [shot.ts for shot in world.hub.choose(choice, "ada")] == [1, 2]


def test_no_frames_says_how_many_there_are(world: World) -> None:
    assert "edged/box/camera/door/frame" in world.refusal(last=1).message
    assert world.refusal(last=1).retry_after_s is None
    for _ in range(20):
        world.send()
        world.clock.advance(1)
    refused = world.refusal(last=30)
    assert "20 of 30 frames, the newest is 1.0 s old" in refused.message
    assert refused.retry_after_s is not None
    assert 9 <= refused.retry_after_s <= 12
    refused = world.refusal(last=4, span_s=2)
    assert "3 of 4 frames in its newest 2 s" in refused.message
    assert refused.retry_after_s is None, "there will never be more"
    world.clock.advance(9)
    assert "0 of 1 frames that are not older than 5 s" in world.refusal(last=1, max_age_s=5).message
    assert "0 of 2 frames" in world.refusal(window=(2, 3), max_age_s=5).message
    world.clock.advance(30)
    assert "0 of 1 frames, the newest is 40.0 s old" in world.refusal(last=1).message


def test_without_cameras_there_is_nothing_to_choose() -> None:
    world = World(Bounds(cameras=0, seconds=30, bytes=1000, payload_bytes=1000))
    world.send()
    assert "cameras.max" in world.refusal(last=1).message
    assert world.hub.heartbeat() == {}


@pytest.mark.parametrize(
    ("about", "fields"),
    [
        ("retained", {"retain": True}),
        ("size", {"payload": JPEG + bytes(100_000)}),
        ("size", {"payload": None, "size": 200_000}),
        ("content", {"payload": b"GIF89a"}),
        ("content", {"ts": "yesterday"}),
    ],
)
def test_what_is_refused_is_counted_and_logged_rarely(
    about: str, fields: dict[str, Any], world: World, events: list[dict[str, Any]]
) -> None:
    for _ in range(1000):
        world.send(**fields)
    (line,) = events
    assert (line["event"], line["about"], line["camera"]) == ("camera.refused", about, "door")
    status = world.status()
    assert status is not None
    assert status["refused"] == 1000
    assert status["newest_age_s"] is None
    assert world.status() is None, "nothing has come since"
    world.clock.advance(TELL_S)
    assert world.beat() == {}
    assert events[1:] == [
        {"event": "camera.refused", "log_level": "warning", "about": about, "count": 999}
    ]
    world.clock.advance(TELL_S)
    world.beat()
    assert len(events) == 2


@pytest.mark.parametrize("name", ["a b", "ü", "a" * 65, "", "a\n"])
def test_names_that_cannot_be(name: str, world: World, events: list[dict[str, Any]]) -> None:
    world.send(name)
    assert [line["about"] for line in events] == ["name"]
    assert world.hub.heartbeat() == {}


@pytest.mark.parametrize(
    "topic", ["edged/box/status", "edged/other/camera/door/frame", "edged/box/camera/frame", "x"]
)
def test_other_topics(topic: str, world: World) -> None:
    world.send(topic=topic)
    assert world.hub.heartbeat() == {}


def test_further_cameras_are_refused_before_anything_is_read(
    world: World, events: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        world.send(f"c{n}")
    monkeypatch.setattr(hub_module, "read_frame", None)
    for n in range(3, 50):
        world.send(f"c{n}")
    assert list(world.hub.heartbeat()) == ["c0", "c1", "c2"]
    assert [line["event"] for line in events] == ["camera.new"] * 3 + ["camera.refused"]
    assert "cameras.max" in events[-1]["reason"]


def test_a_frame_that_does_not_fit(events: list[dict[str, Any]]) -> None:
    world = World(Bounds(cameras=2, seconds=30, bytes=1000, payload_bytes=10_000))
    world.send(payload=JPEG + bytes(1000))
    assert events[0]["about"] == "room"
    status = world.status()
    assert status is not None
    assert status["refused"] == 1


# What is told


def test_status_and_heartbeat(world: World) -> None:
    for _ in range(40):
        world.send()
        world.clock.advance(0.5)
    world.send(payload=b"?")
    assert world.hub.heartbeat() == {"door": {"fps": 2.0, "newest_age_s": 0.5}}
    assert world.status() == {
        "v": 1,
        "fps": 2.0,
        "buffered": 40,
        "newest_age_s": 0.5,
        "refused": 1,
        "ts": world.clock.wall,
    }


def test_a_camera_that_falls_silent_is_told_until_its_buffer_is_empty(
    world: World, events: list[dict[str, Any]]
) -> None:
    world.send()
    world.clock.advance(30)
    assert world.status() is not None
    world.clock.advance(10)
    status = world.status()
    assert status is not None
    assert (status["buffered"], status["newest_age_s"], status["fps"]) == (0, 40.0, 0)
    assert world.status() is None
    assert world.hub.heartbeat() == {"door": {"fps": 0.0, "newest_age_s": 40.0}}
    world.send()
    assert world.status() is not None
    world.clock.advance(FORGOTTEN_S + 1)
    assert world.status() is None
    assert world.hub.heartbeat() == {}
    assert events[-1]["event"] == "camera.forgotten"


def test_the_last_status_is_repeated_until_it_was_sent(world: World) -> None:
    world.send()
    world.clock.advance(31)
    for _ in range(2):
        world.hub.beat(Told(congested=True), 30)  # type: ignore[arg-type]
    assert world.status() is not None
    assert world.status() is None


# Threads


def test_frames_may_come_while_others_are_chosen(world: World) -> None:
    stop = threading.Event()
    failed: list[BaseException] = []

    def send(camera: str) -> None:
        number = 0
        try:
            while not stop.is_set():
                number += 1
                world.send(camera, JPEG + bytes(20_000), ts=str(number))
        except BaseException as error:  # noqa: BLE001 - shown below
            failed.append(error)

    threads = [threading.Thread(target=send, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    chosen = 0
    while chosen < 500 and not failed:
        try:
            shots = world.hub.choose(Choice(camera="a", window=(2, 8)), None)
            assert [shot.ts for shot in shots] == sorted({shot.ts for shot in shots})
            chosen += 1
        except Refused:
            pass
        world.beat()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failed
    buffers = world.hub._buffers
    assert buffers.bytes <= BOUNDS.bytes


# The connection

JOBS = Connection(
    host="broker", client_id="edged-box", username="edged", password="secret", cert="c", key="k",
    will=lambda: Outgoing(topic="x", payload=b""), subscriptions=(("y", 1),),
)  # fmt: skip


def test_the_camera_connection(tmp_path: Any) -> None:
    connection = camera_connection(JOBS, Settings(), TOPICS)
    assert connection.client_id == "edged-box-cameras"
    assert connection.clean_start
    assert connection.session_expiry_s == 0
    assert connection.subscriptions == (("edged/box/camera/+/frame", 0),)
    assert connection.will is None
    assert (connection.username, connection.password) == ("edged", "secret")
    assert same_user(JOBS, connection)
    file = tmp_path / "password"
    file.write_text("other\n")
    for cameras in (Cameras(username="eyes"), Cameras(username="eyes", password_file=file)):
        connection = camera_connection(JOBS, Settings(cameras=cameras), TOPICS)
        assert connection.username == "eyes"
        assert callable(connection.password)
        assert connection.password() == ("other" if cameras.password_file else None)
        assert connection.cert == "c"
        assert not same_user(JOBS, connection)
    own = Settings(cameras=Cameras(cert=file, key=file))
    connection = camera_connection(JOBS, own, TOPICS)
    assert (connection.cert, connection.key) == (str(file), str(file))
    assert connection.username == "edged"
    assert not same_user(JOBS, connection)
    nobody = Connection(host="broker", client_id="edged-box")
    assert not same_user(nobody, camera_connection(nobody, Settings(), TOPICS))


def test_the_bounds_are_the_settings() -> None:
    settings = Settings(
        cameras=Cameras(max=2, buffer_s=5, buffer_mb=1.5), limits=Limits(payload_mb=1)
    )
    assert bounds(settings) == Bounds(
        cameras=2, seconds=5, bytes=1_500_000, payload_bytes=1_000_000
    )


@pytest.fixture(name="broker")
def _broker() -> MemoryBroker:
    return MemoryBroker()


def camera_bus(world: World, broker: MemoryBroker) -> MemoryBus:
    jobs = Connection(host="memory", client_id="edged-box")
    connection = camera_connection(jobs, Settings(device="box"), TOPICS)
    return MemoryBus(broker, connection, sink=world.hub.take)


async def test_frames_over_a_broker(world: World, broker: MemoryBroker) -> None:
    bus = camera_bus(world, broker)
    run = asyncio.create_task(world.hub.run(bus))
    await eventually(lambda: bus.session)
    broker.publish("edged/box/camera/door/frame", JPEG, qos=1, ts="7")
    broker.publish("edged/box/camera/door/frame", JPEG, qos=0, retain=True)
    await eventually(world.hub.heartbeat)
    assert [s.ts for s in world.hub.choose(Choice(camera="door", last=1), None)] == [7]
    await eventually(lambda: (world.status() or {}).get("refused") == 1)
    bus.stuck_reason = "late"
    assert world.hub.stuck() == "cameras: late"
    await world.hub.close()
    await run


async def test_trouble_is_told_once_somebody_counts_on_cameras(
    world: World, broker: MemoryBroker
) -> None:
    broker.unreachable = "connection refused"
    bus = camera_bus(world, broker)
    run = asyncio.create_task(world.hub.run(bus))
    await eventually(lambda: bus.state.last_reason)
    assert world.hub.trouble() is None
    assert "connection refused" in world.refusal(last=1).message
    assert "connection refused" in (world.hub.trouble() or "")
    broker.unreachable = None
    await eventually(lambda: world.hub.trouble() is None)
    world.send()
    broker.refuse_subscriptions("edged/box/camera/+/frame")
    broker.drop_connection()
    await eventually(lambda: "ACL" in (world.hub.trouble() or ""))
    assert "ACL" in world.refusal(last=2).message
    await world.hub.close()
    await run


def came_back(bus: MemoryBus, run: asyncio.Task[None], times: int) -> bool:
    return bus.state.reconnects >= times or run.done()


async def test_it_gives_way_to_the_job_connection(
    world: World, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch, events: list[Any]
) -> None:
    monkeypatch.setattr(hub_module, "LOOK_S", 0.01)
    bus = camera_bus(world, broker)
    jobs = MemoryBus(broker, bus.connection)
    stolen = BusState(connected=False, reconnects=3, last_reason="closed", stolen=True)
    jobs._state = stolen
    run = asyncio.create_task(world.hub.run(bus, jobs))
    await eventually(lambda: bus.session)
    for count in (1, 2):
        broker.drop_connection()
        await eventually(partial(came_back, bus, run, count))
    await asyncio.wait_for(run, 5)
    assert "cameras.username" in (world.hub.trouble() or "")
    assert [line["event"] for line in events if line["event"] == "camera.conflict"]
