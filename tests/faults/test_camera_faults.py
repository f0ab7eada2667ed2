"""Cameras that never stop: bounded, told apart, in nobody's way, and back after every cut."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.test_flood import rss_mb
from tests.faults.test_vision_faults import first_event, on_time
from tests.kit.camera import EPOCH, SIZE, Cameras, frame
from tests.kit.chaos import ChaosProxy
from tests.kit.client import Peer
from tests.kit.daemon import Daemon
from tests.kit.frames import digest, digests, marked
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Body, Observer

pytestmark = pytest.mark.broker

NAMES = ("door", "yard", "hall", "gate")
FPS = 20
FILTERS = [
    "edged/box/response/#", "edged/box/refused", "edged/box/health", "edged/box/status",
    "edged/box/camera/+/status",
]  # fmt: skip


class Film:
    """Tells from what the engine answered which of the frames it was given."""

    def __init__(self, *names: str, most: int = 1200) -> None:
        self._known = {
            digest(frame(name, number)): (name, number) for name in names for number in range(most)
        }

    def numbers(self, camera: str, final: Body) -> list[int]:
        """Return the numbers of a job's frames, which are this camera's and have their times."""
        words = [word for word in final["text"].split() if not re.fullmatch(r"w\d+", word)]
        found = [self._known[word] for word in words]
        assert {name for name, _ in found} == {camera}
        numbers = [number for _, number in found]
        assert [each["ts"] - EPOCH for each in final["frames"]["used"]] == numbers
        return numbers


def newest(observer: Observer, camera: str) -> int:
    """Return the number of the frame that the observer saw last."""
    seen = observer.on(f"camera/{camera}/frame")[-1]
    match = re.search(rf"frame {camera} (\d+) ".encode(), seen.payload[:60])
    assert match is not None
    return int(match[1])


def row(numbers: Iterable[int]) -> bool:
    """Return whether none is missing and none is out of order."""
    return all(b == a + 1 for a, b in itertools.pairwise(numbers))


#: MB for the frames, which four cameras fill in three seconds; what the daemon may have grown by
#: when they are full; and what it may grow by from then on.
BUFFER_MB, FULL_MB, MORE_MB = 6, 14.0, 4.0
#: Frames of a camera then, nearly.
SHARE = BUFFER_MB * 1_000_000 // (len(NAMES) * SIZE) - 3
#: Frames that may come between the choice for a job and what the observer saw last before it.
SLACK = FPS


def test_cameras_that_never_stop_are_bounded_and_each_job_gets_its_frames(
    tmp_path: Path, broker: Mosquitto
) -> None:
    settings = {"cameras": {"buffer_mb": BUFFER_MB}, "health": {"interval_s": 1}}
    film = Film(*NAMES)
    with (
        Observer(
            broker.port, only=True, filters=[*FILTERS, "edged/box/camera/door/frame"]
        ) as observer,
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
    ):
        daemon.wait_ready()
        before = rss_mb(daemon.pid, "VmRSS")
        with Cameras(broker.port, *NAMES, fps=FPS):
            for name in NAMES:
                observer.wait_on(f"camera/{name}/status", lambda body: body["buffered"] >= SHARE)
            begun, full = observer.last, rss_mb(daemon.pid, "VmRSS")
            windows: dict[str, list[int]] = {}
            for turn in itertools.count():
                name = NAMES[turn % len(NAMES)]
                seen = newest(observer, "door")  # all cameras are at the same number
                last = observer.look("!tokens 5 40 !frames", {"camera": name, "last": 4})
                span = observer.look(
                    "!frames", {"camera": name, "last": 5, "span_s": 1}, client="desk"
                )
                grows = observer.look("!frames", {"camera": name, "window": {"min": 2, "max": 4}})
                numbers = film.numbers(name, observer.final(last))
                assert len(numbers) == 4
                assert row(numbers)
                assert numbers[-1] >= seen - SLACK
                spread = film.numbers(name, observer.final(span))
                assert len(spread) == 5
                assert spread == sorted(set(spread))
                assert 0.5 * FPS < spread[-1] - spread[0] < 1.5 * FPS
                assert spread[-1] >= numbers[-1]
                window = film.numbers(name, observer.final(grows))
                assert window[-1] >= spread[-1]
                old = windows.get(name, [])
                if len(old) == 4:  # it begins anew with its newest two
                    assert window[:-1] == old[-1:]
                elif old:
                    assert window[:-1] == old
                else:
                    assert len(window) == 2
                    assert row(window)
                windows[name] = window
                if turn >= 12 and observer.on("health")[-1].body["seq"] >= 10:
                    break
            beat = observer.wait_on("health", after=observer.last).body
            assert set(beat["cameras"]) == set(NAMES)
            for each in beat["cameras"].values():
                assert 0.7 * FPS < each["fps"] < 1.3 * FPS
                assert each["newest_age_s"] < 1
            on_time(observer, begun)
            end = rss_mb(daemon.pid, "VmRSS")
            print(f"{full - before:.1f} MB, and then {end - full:.1f}")  # noqa: T201
            assert full - before < FULL_MB
            assert end - full < MORE_MB
        observer.check()
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_frames_do_not_push_a_job_out_of_the_brokers_queue(tmp_path: Path) -> None:
    """A session of mosquitto's keeps 1000 messages by default, and drops the newest silently."""
    with (
        Mosquitto(tmp_path, config="set_tcp_nodelay true") as broker,
        Observer(broker.port, only=True, filters=FILTERS) as observer,
        Peer(broker.port) as camera,
        Daemon(tmp_path, broker.port) as daemon,
    ):
        daemon.wait_ready()
        camera.publish("edged/box/camera/door/frame", marked("first"), qos=1)
        observer.wait_on("camera/door/status", lambda body: body["buffered"] == 1)
        daemon.kill()
        small = marked("while it is away")
        sent = [camera.send("edged/box/camera/door/frame", small, qos=1) for _ in range(1100)]
        for info in sent:
            info.wait_for_publish(30)
        names = [observer.look("!frames", [marked(n)], id=f"n{n}") for n in range(3)]
        daemon.start()
        for number, name in enumerate(names):
            assert observer.final(name)["text"] == digests([marked(number)])
        assert daemon.stop() == 0


def fresh(observer: Observer, film: Film, than: int) -> int:
    """Ask until a job gets frames that were all sent after this one; return its newest."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        name = observer.look("!frames", {"camera": "door", "last": 3})
        first = observer.wait(partial(first_event, observer, name))
        if first.type == "refused":
            assert first.body["code"] == "no_frames"
            continue
        numbers = film.numbers("door", observer.final(name))
        assert numbers == sorted(set(numbers))
        if numbers[0] > than:
            assert row(numbers)
            return numbers[-1]
    raise AssertionError(f"no frames after {than}")


async def test_cameras_are_back_after_a_cut_and_after_a_new_broker(
    tmp_path: Path, broker: Mosquitto
) -> None:
    def fills(body: Body) -> bool:
        return bool(body["buffered"] > 3)

    def grows_old(body: Body) -> bool:
        return bool(body["cameras"]["door"]["newest_age_s"] > 1)

    settings = {"health": {"interval_s": 0.5}}
    film = Film("door", "yard")
    there = asyncio.to_thread
    async with (
        ChaosProxy(broker.port) as proxy,
        Observer(broker.port, only=True, filters=FILTERS) as observer,
        Daemon(tmp_path, proxy.port, settings=settings, options=("--reconnect", "0.3")) as daemon,
    ):
        await there(daemon.wait_ready)
        with Cameras(broker.port, "door", "yard", fps=FPS):
            await there(observer.wait_on, "camera/door/status", fills)
            seen = await there(fresh, observer, film, 0)
            # The camera connection goes and cannot come back; the job connection stays.
            await proxy.refuse()
            proxy.reset(b"edged-box-cameras")
            await there(observer.wait_on, "health", grows_old, after=observer.last)
            status = await there(observer.wait_status, "degraded")
            assert "cameras" in status.body["reason"]
            name = observer.look(
                "!frames", {"camera": "door", "last": 3, "max_age_s": 0.5}, wait=False
            )
            refusal = await there(observer.refusal, name)
            assert refusal.body["code"] == "no_frames"
            assert "no connection to the broker for cameras" in refusal.body["message"]
            name = await there(observer.ask, "!say still here")
            assert (await there(observer.final, name))["text"] == "still here"
            proxy.listen()
            await there(observer.wait_status, "ready", after=observer.last)
            seen = await there(fresh, observer, film, seen)
            beat = await there(observer.wait_on, "health", after=observer.last)
            assert beat.body["mqtt"]["reconnects"] == 0
            # All connections go, the cameras' own too.
            before = observer.subscriptions
            await there(broker.restart)
            await there(observer.wait, lambda: observer.subscriptions > before, "the observer")
            await there(observer.wait_status, "ready", after=observer.last)
            await there(fresh, observer, film, seen + FPS)
        await there(partial(observer.check, crashed=True))
        assert await there(daemon.stop) == 0
        assert daemon.faults() == []
