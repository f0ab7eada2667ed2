"""The cameras: takes what they send, chooses frames for jobs, and says how they do.

Frames come over a connection of their own and are put into the buffers on its network thread: none
of them waits for the event loop, costs it time or stands in a job's way, and when more comes than
can be kept, the newest is what is kept. The event loop takes the lock only to choose frames and
once a beat.

What a frame may be: `frames.read_frame`; which frames are kept: `buffer`; which are chosen:
`windows`. What is not taken is counted by camera and logged at most once a minute for each reason.

Logged as `camera.` new, forgotten, refused, conflict.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import structlog

from edged import payloads, protocol
from edged.cameras.buffer import Buffers, Full, Ring
from edged.cameras.frames import read_frame
from edged.cameras.windows import TooFew, Windows, newest
from edged.errors import Code, Refused
from edged.mqttconfig import Connection
from edged.options import MB, Settings
from edged.ports import Bus, Choice, Clock, Incoming, Outgoing, Session, Shot
from edged.settings import packet_bytes, read_password
from edged.topics import NAME, Topics

log = structlog.get_logger()

#: Seconds between two log lines about frames refused for one reason.
TELL_S = 60.0
#: Seconds between two looks at whether the two connections take each other's place.
LOOK_S = 1.0
#: How often the camera connection must have come back before that can be so.
CAME_BACK = 2
#: Bytes for what is read at once, many small frames: none of them waits for anybody.
READ_BYTES = 4 * 1024 * 1024
#: There is nothing to say goodbye for: seconds.
CLOSE_S = 1.0


class _Why(StrEnum):
    """What was wrong with a frame, in kinds."""

    NAME = "name"
    RETAINED = "retained"
    SIZE = "size"
    ROOM = "room"
    CONTENT = "content"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What the cameras may take. `cameras` 0: there are none."""

    cameras: int
    #: How long a frame is kept.
    seconds: float
    #: Bytes of all frames together.
    bytes: int
    #: Bytes of one message.
    payload_bytes: int


def bounds(settings: Settings) -> Bounds:
    """Return what the settings allow the cameras."""
    cameras = settings.cameras
    return Bounds(
        cameras=cameras.max,
        seconds=cameras.buffer_s,
        bytes=int(cameras.buffer_mb * MB),
        payload_bytes=int(settings.limits.payload_mb * MB),
    )


def camera_connection(jobs: Connection, settings: Settings, topics: Topics) -> Connection:
    """Return the connection that frames come over, made after the one that jobs come over.

    It has no will: whether edged lives is told on the job connection, and the loss of this one in
    the heartbeat there.
    """
    cameras = settings.cameras
    connection = replace(
        jobs,
        client_id=f"{jobs.client_id}-cameras",
        clean_start=True,
        session_expiry_s=0,
        subscriptions=((topics.camera_frames, 0),),
        will=None,
        inbound_bytes=2 * packet_bytes(settings) + READ_BYTES,
    )
    if cameras.username is not None:
        connection = replace(
            connection, username=cameras.username, password=_password(cameras.password_file)
        )
    if cameras.cert is not None:
        connection = replace(connection, cert=str(cameras.cert), key=str(cameras.key))
    return connection


def same_user(jobs: Connection, cameras: Connection) -> bool:
    """Return whether a broker sees both connections as one user's; of nobody it sees nothing."""
    user = jobs.username, jobs.cert
    return user != (None, None) and user == (cameras.username, cameras.cert)


def _password(path: Path | None) -> Callable[[], str | None]:
    return lambda: None if path is None else read_password(path)


class CameraHub:
    """All cameras: `ports.FrameSource`, the camera connection's sink and its `BusListener`.

    `take` and `add` may be called on any thread, everything else on the event loop.
    """

    def __init__(self, *, bounds: Bounds, topics: Topics, clock: Clock) -> None:
        self._bounds = bounds
        self._topics = topics
        self._clock = clock
        self._lock = threading.Lock()  # around everything in the buffers and windows
        self._windows = Windows()
        self._buffers = self._windows.buffers = Buffers(
            cameras=bounds.cameras,
            seconds=bounds.seconds,
            size=bounds.bytes,
            forget_window=self._windows.forget_one,
            forget_camera=self._windows.forget_camera,
        )
        self._untold: Counter[_Why] = Counter()  # refusals since the last line about them
        self._told: dict[_Why, float] = {}
        self._bus: Bus | None = None
        self._subscribed = False
        self._refused_filters: tuple[str, ...] = ()
        self._conflict: str | None = None
        self._wanted = False

    # Frames come

    def take(self, message: Incoming) -> None:
        """Take a message of the camera connection; what is no frame is counted."""
        camera = self._topics.parse_frame(message.topic)
        if camera is None:
            return
        if not NAME.match(camera):
            self._refuse(None, _Why.NAME, "a camera's name is 1 to 64 of A-Z a-z 0-9 _ -")
            return
        if message.retain:
            self._refuse(camera, _Why.RETAINED, "publish frames without retain")
            return
        limit = self._bounds.payload_bytes
        if message.size > limit or message.payload is None:
            self._refuse(camera, _Why.SIZE, f"above limits.payload_mb, {limit} bytes")
            return
        with self._lock:
            has_place = self._buffers.may_come(camera, self._clock.monotonic())
        if not has_place:  # before anything is read: nobody may keep us busy with more cameras
            self._refuse(camera, _Why.ROOM, f"there are {self._bounds.cameras}, see cameras.max")
            return
        try:
            data, ts = read_frame(message.payload, message.ts)
        except Refused as error:
            self._refuse(camera, _Why.CONTENT, error.message)
            return
        self.add(camera, data, ts)

    def add(self, camera: str, data: bytes, ts: float | None = None) -> bool:
        """Put a frame into its camera's buffer; return whether it is there.

        Args:
            camera: Its name.
            data: JPEG or PNG.
            ts: When it was taken, Unix seconds; None: now.
        """
        shot = Shot(data=data, ts=self._clock.stamp().wall if ts is None else ts)
        try:
            with self._lock:
                is_new = self._buffers.put(camera, shot, self._clock.monotonic())
        except Full as error:
            self._refuse(camera, _Why.ROOM, str(error))
            return False
        self._wanted = True
        if is_new:
            log.info("camera.new", camera=camera)
        return True

    def _refuse(self, camera: str | None, why: _Why, reason: str) -> None:
        now = self._clock.monotonic()
        with self._lock:
            if camera is not None:
                self._buffers.refuse(camera, now)
            self._untold[why] += 1
            told = self._told.get(why)
            if told is not None and now - told < TELL_S:
                return
            self._told[why] = now
            count = self._untold.pop(why)
        log.warning("camera.refused", about=why, camera=camera, reason=reason, count=count)

    # Frames are chosen

    def choose(self, choice: Choice, client: str | None) -> tuple[Shot, ...]:
        """Return the frames for a job, oldest first; see `ports.FrameSource`."""
        self._wanted = True
        now = self._clock.monotonic()
        with self._lock:
            ring = self._buffers.find(choice.camera, now)
            if ring is not None:
                try:
                    if choice.window is not None:
                        frames = self._windows.choose(choice, client, ring, now)
                    else:
                        frames = newest(choice, ring, now)
                except TooFew as error:
                    raise self._no_frames(choice, ring, error, now) from None
                return tuple(frame.shot for frame in frames)
        trouble = self.trouble()
        raise Refused(
            Code.NO_FRAMES,
            f"no camera {choice.camera} has sent a frame lately"
            + (f": {trouble}" if trouble else self._where_to(choice.camera)),
        )

    def trim(self, choice: Choice, client: str | None, since: float) -> None:
        """Let a window begin with the frame of this `ts`; see `ports.FrameSource`."""
        with self._lock:
            self._windows.trim(choice, client, since)

    def _where_to(self, camera: str) -> str:
        if not self._bounds.cameras:
            return ": this edged takes none, see cameras.max"
        return f": it publishes on {self._topics.root}/camera/{camera}/frame, without retain"

    def _no_frames(self, choice: Choice, ring: Ring, few: TooFew, now: float) -> Refused:
        horizon = self._bounds.seconds
        within = ""
        if choice.span_s is not None and choice.span_s < horizon:
            horizon = choice.span_s
            within = f" in its newest {choice.span_s:g} s"
        if choice.max_age_s is not None and choice.max_age_s < horizon:
            horizon = choice.max_age_s
            within = f" that are not older than {choice.max_age_s:g} s"
        age = ring.newest_age_s(now)
        seen = "none has ever come" if age is None else f"the newest is {age:.1f} s old"
        fps = ring.rate.fps(now)
        missing = few.need - few.have
        # More frames than it sends in that time will not be there later either.
        later = max(1.0, math.ceil(missing / fps)) if fps * horizon >= few.need else None
        return Refused(
            Code.NO_FRAMES,
            f"camera {choice.camera} has {few.have} of {few.need} frames{within}, {seen}: "
            + (self.trouble() or "ask for fewer, or later"),
            retry_after_s=later,
        )

    # How they do

    def heartbeat(self) -> dict[str, payloads.CameraRate]:
        """Return the heartbeat's `cameras`."""
        now = self._clock.monotonic()
        with self._lock:
            return {
                name: {"fps": _round(ring.rate.fps(now)), "newest_age_s": _age(ring, now)}
                for name, ring in self._buffers.rings.items()
            }

    def beat(self, bus: Bus, expiry_s: int) -> None:
        """Let go of what is too old, and publish each camera's status on the job connection.

        A camera that has fallen silent is told until its buffer is empty, that included.
        """
        now, wall = self._clock.monotonic(), self._clock.stamp().wall
        with self._lock:
            before = set(self._buffers.rings)
            self._buffers.expire(now)
            self._windows.expire(now)
            rings = dict(self._buffers.rings)
            bodies = {
                name: _status(ring, now, wall)
                for name, ring in rings.items()
                if ring.frames or ring.news
            }
            for name in bodies:
                rings[name].news = False
        for name in before - set(rings):
            log.info("camera.forgotten", camera=name)
        for name, body in bodies.items():
            sent = bus.offer(
                Outgoing(
                    topic=self._topics.camera_status(name),
                    payload=protocol.encode(body),
                    retain=True,
                    expiry_s=expiry_s,
                )
            )
            if not sent or body["buffered"]:  # there will be something to tell: it is empty then
                rings[name].news = True
        self._tell_rest(now)

    def _tell_rest(self, now: float) -> None:
        """Log how many more were refused where nothing has been refused since."""
        with self._lock:
            due = [why for why, told in self._told.items() if now - told >= TELL_S]
            rest = {why: self._untold.pop(why) for why in due if self._untold[why]}
            self._told |= dict.fromkeys(rest, now)
        for why, count in rest.items():
            log.warning("camera.refused", about=why, count=count)

    def trouble(self) -> str | None:
        """Return what is wrong with the camera connection, once anybody has had a use for it."""
        if self._conflict is not None:
            return self._conflict
        if self._bus is None or not self._wanted:
            return None
        state = self._bus.state
        if state.stolen:
            return "another program connects with our client id for cameras"
        if not self._subscribed:
            return f"no connection to the broker for cameras: {state.last_reason or 'not yet'}"
        if self._refused_filters:
            return (
                f"the broker refuses the subscription to {', '.join(self._refused_filters)}: allow "
                "it in the broker's ACL"
            )
        return None

    def stuck(self) -> str | None:
        """Return why the camera connection's thread no longer turns, or None."""
        reason = self._bus.stuck() if self._bus is not None else None
        return None if reason is None else f"cameras: {reason}"

    # The connection

    async def run(self, bus: Bus, jobs: Bus | None = None) -> None:
        """Keep the camera connection up until `close`.

        Args:
            bus: The camera connection; `take` is its sink.
            jobs: The job connection, if the broker sees both as one user's. One that makes the user
                name the client id would let them take each other's place for ever: then this one
                gives way, until the next start.
        """
        self._bus = bus
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self._give_way(bus, jobs)) if jobs is not None else None
            await bus.run(self)
            if looking is not None:
                looking.cancel()

    async def _give_way(self, bus: Bus, jobs: Bus) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if jobs.state.stolen and bus.state.reconnects >= CAME_BACK:
                break
        self._conflict = (
            "the broker takes the camera connection for the job connection, so it was closed: make "
            "a user for cameras at the broker, set cameras.username and cameras.password_file, and "
            "start edged again"
        )
        log.error("camera.conflict", reason=self._conflict)
        await bus.close(timeout_s=CLOSE_S)

    async def close(self) -> None:
        """End the camera connection and `run`."""
        if self._bus is not None:
            await self._bus.close(timeout_s=CLOSE_S)

    def on_connected(self, _session: Session) -> None:
        """Do nothing yet: frames come once the subscription is there."""

    def on_subscribed(self, refused: tuple[str, ...]) -> None:
        """Take note that frames can reach us."""
        self._subscribed = True
        self._refused_filters = refused

    def on_disconnected(self, _reason: str) -> None:
        """Take note that no frame can reach us; those that are here grow old."""
        self._subscribed = False

    def on_message(self, message: Incoming) -> None:
        """Take a message that did not go to the sink: above QoS 0, which was never asked for."""
        self.take(message)
        if self._bus is not None and message.qos:
            self._bus.ack(message.receipt)


def _round(number: float) -> float:
    return round(number, 2)


def _age(ring: Ring, now: float) -> float | None:
    age = ring.newest_age_s(now)
    return None if age is None else round(age, 1)


def _status(ring: Ring, now: float, wall: float) -> payloads.CameraStatus:
    return {
        "v": protocol.VERSION,
        "fps": _round(ring.rate.fps(now)),
        "buffered": len(ring.frames),
        "newest_age_s": _age(ring, now),
        "refused": ring.refused,
        "ts": wall,
    }
