"""Whether edged is well, and saying so: status, info, heartbeat.

Health is progress. `ready` means: an engine process has passed its warm-up and answers, the broker
has confirmed the subscriptions and gives our own status back, and the journal takes writes. A
failure is `degraded` with its reason; being stuck is for the watchdog (see `stuck`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from edged import payloads, protocol
from edged.dispatcher import Dispatcher
from edged.jobs import Totals
from edged.journal import Journal
from edged.metrics import Speed
from edged.outbox import Outbox
from edged.payloads import Condition
from edged.ports import Bus, Clock, Engine, EngineState, Incoming, Outgoing
from edged.scheduler import Scheduler
from edged.topics import Topics

#: Live states, the heartbeat and camera status expire after this many beats (MQTT 5).
EXPIRY_BEATS = 3
#: Our own status must come back from the broker within this, seconds.
ECHO_S = 20.0
#: The journal thread may work this long on one call before the watchdog starves, seconds.
JOURNAL_STUCK_S = 60.0
#: Another instance's status counts against us this long, seconds.
FOREIGN_S = 60.0

log = structlog.get_logger()


_LIVE = [state for state in Condition if state is not Condition.OFFLINE]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What does not change while this process lives."""

    instance: str
    interval_s: float
    #: The `limits`, `topics` and `warnings` of `info`.
    limits: payloads.Limits
    topics: payloads.InfoTopics
    warnings: tuple[str, ...]
    versions: dict[str, str]
    #: The configured model's name, known before it is loaded.
    model: str | None


class Cameras(Protocol):
    """What is asked of the cameras."""

    def heartbeat(self) -> dict[str, payloads.CameraRate]:
        """Return the heartbeat's `cameras`."""
        ...

    def beat(self, bus: Bus, expiry_s: int) -> None:
        """Publish each camera's status."""
        ...

    def trouble(self) -> str | None:
        """Return why frames cannot come, if anybody counts on them."""
        ...

    def stuck(self) -> str | None:
        """Return why no longer anything turns there, or None."""
        ...


class Health:
    """Judges and tells how edged is."""

    def __init__(
        self,
        *,
        identity: Identity,
        topics: Topics,
        bus: Bus,
        engine: Engine,
        journal: Journal,
        scheduler: Scheduler,
        dispatcher: Dispatcher,
        outbox: Outbox,
        totals: Totals,
        speed: Speed,
        clock: Clock,
        host: Callable[[], payloads.Host],
        host_trouble: Callable[[], str | None],
        cameras: Cameras | None = None,
    ) -> None:
        self._identity = identity
        self._topics = topics
        self._bus = bus
        self._engine = engine
        self._journal = journal
        self._scheduler = scheduler
        self._dispatcher = dispatcher
        self._outbox = outbox
        self._totals = totals
        self._speed = speed
        self._clock = clock
        self._host = host
        self._host_trouble = host_trouble
        self._cameras = cameras
        self._began = time.monotonic()
        self._seq = 0
        self._subscribed = False
        self._was_ready = False
        self._refused_filters: tuple[str, ...] = ()
        self._asked: float | None = None  # when a status went out that did not come back yet
        self._foreign: float | None = None
        self._journal_note: str | None = None
        self._told: tuple[Condition, str] | None = None
        self._info_sent: payloads.Info | None = None
        self._changed = asyncio.Event()
        self.stopping = False

    # What the connection tells

    def on_connected(self) -> None:
        """Say everything anew: the broker may have forgotten what it retained."""
        self._asked = None
        self._info_sent = None
        self._tell()

    def on_subscribed(self, refused: tuple[str, ...]) -> None:
        """Note whether requests can reach us."""
        self._subscribed = True
        self._refused_filters = refused
        self._tell()

    def on_disconnected(self) -> None:
        """Note that nobody hears us."""
        self._subscribed = False
        self._asked = None

    def on_status(self, message: Incoming) -> None:
        """Read our own status topic: the echo of ours, an old will, or somebody else's."""
        try:
            body = json.loads(message.payload or b"")
            instance, state = body["instance"], body["state"]
        except (ValueError, TypeError, KeyError):
            instance, state = None, None
        if instance == self._identity.instance:
            if state != Condition.OFFLINE or self.stopping:
                self._asked = None
                return
        elif isinstance(instance, str) and state in _LIVE:
            if self._foreign is None:
                log.error("health.foreign_status", topic=message.topic)
            self._foreign = time.monotonic()
            return  # the next beat says ours; two that answered each other would never stop
        self._tell()  # an old will, or nonsense, is retained now instead of the truth

    def stop(self) -> None:
        """Say `stopping` from now on."""
        self.stopping = True
        self._changed.set()

    def note_journal(self, note: str | None) -> None:
        """Note why the journal could not be opened; None: it is open."""
        self._journal_note = note
        self._changed.set()

    # Judgement

    def judge(self) -> tuple[Condition, str]:
        """Return the state, and why it is so."""
        if self.stopping:
            return Condition.STOPPING, "asked to stop"
        faults = self._faults()
        if faults:
            return Condition.DEGRADED, "; ".join(faults)
        if self._engine.info is None or not self._subscribed:
            return Condition.STARTING, self._awaited()
        self._was_ready = True
        return Condition.READY, "an engine answers, requests are taken"

    def _awaited(self) -> str:
        """Return what a start waits for."""
        awaited = ["loading the model"] if self._engine.info is None else []
        if self._bus.session is not None:
            return awaited[0] if awaited else "subscribing"
        if self._bus.state.last_reason is not None:
            awaited.append(f"no connection to the broker: {self._bus.state.last_reason}")
        return "; ".join(awaited) or "connecting to the broker"

    def _faults(self) -> list[str]:
        engine = self._engine.status
        down = engine.state in {EngineState.LOADING, EngineState.BACKOFF}
        faults = [
            engine.trouble
            or (
                f"the engine is started again: {engine.last_reason}"
                if down and self._engine.info is not None
                else None
            ),
            self._journal.stats.trouble,
            self._journal_note,
            self._outbox.trouble,
            self._host_trouble(),
            self._cameras.trouble() if self._cameras is not None else None,
        ]
        if self._bus.state.stolen:
            faults.append(
                "another program connects with our client id: give each box its own mqtt.client_id"
            )
        if self._refused_filters:
            faults.append(
                f"the broker refuses the subscription to {', '.join(self._refused_filters)}: allow "
                "it in the broker's ACL"
            )
        now = time.monotonic()
        if self._asked is not None and now - self._asked > ECHO_S:
            faults.append(
                f"our own {self._topics.status} does not come back: allow this user to read and "
                "write it in the broker's ACL"
            )
        if self._foreign is not None and now - self._foreign < FOREIGN_S:
            faults.append(
                f"another edged writes {self._topics.status}: give each box its own device name"
            )
        if self._bus.session is None and self._was_ready:
            faults.append(f"no connection to the broker: {self._bus.state.last_reason}")
        return [fault for fault in faults if fault]

    @property
    def is_up(self) -> bool:
        """Whether a model is loaded and requests can come in: what systemd calls READY."""
        return self._engine.info is not None and self._subscribed and not self._refused_filters

    def stuck(self) -> str | None:
        """Return which part no longer turns, or None. The event loop turns if this is called."""
        if self._journal.stuck_s() > JOURNAL_STUCK_S:
            return "the journal's thread does not return"
        cameras = self._cameras.stuck() if self._cameras is not None else None
        return self._bus.stuck() or self._engine.stuck() or cameras

    # Saying it

    async def run(self) -> None:
        """Beat for ever; a change of state is told within a second."""
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= due:
                self._beat()
                due = max(due + self._identity.interval_s, now)
            elif self.judge() != self._told:
                self._tell()
            self._changed.clear()
            try:
                async with asyncio.timeout(min(0.5, max(0.0, due - now))):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _beat(self) -> None:
        self._bus.offer(
            Outgoing(
                topic=self._topics.health,
                payload=protocol.encode(self.heartbeat()),
                retain=True,
                expiry_s=self._expiry_s,
            )
        )
        self._tell()
        if self._cameras is not None:
            self._cameras.beat(self._bus, self._expiry_s)

    @property
    def _expiry_s(self) -> int:
        return max(1, round(EXPIRY_BEATS * self._identity.interval_s))

    def _tell(self) -> None:
        """Publish the status, and `info` if it has changed."""
        state, reason = told = self.judge()
        if told != self._told:
            log.info("health.state", state=str(state), reason=reason)
            self._told = told
        if self._bus.session is None:
            return
        if self._asked is None and self._subscribed:
            self._asked = time.monotonic()
        info = self._info()
        if self._info_sent is None or info != {**self._info_sent, "ts": info["ts"]}:
            self._info_sent = info
            self._outbox.post_state(
                Outgoing(topic=self._topics.info, payload=protocol.encode(info), qos=1, retain=True)
            )
        self._outbox.post_state(self.status(state, reason))

    def status(self, state: Condition, reason: str) -> Outgoing:
        """Return the retained status message for a state."""
        stamp = self._clock.stamp()
        body: payloads.Status = {
            "v": protocol.VERSION,
            "state": state,
            "instance": self._identity.instance,
            "reason": reason,
            "ts": stamp.wall,
            "clock_synced": stamp.synced,
            "interval_s": self._identity.interval_s,
        }
        return Outgoing(
            topic=self._topics.status,
            payload=protocol.encode(body),
            qos=1,
            retain=True,
            expiry_s=None if state is Condition.OFFLINE else self._expiry_s,
        )

    def _info(self) -> payloads.Info:
        identity, engine = self._identity, self._engine.info
        limits = identity.limits.copy()
        if engine is not None:
            limits["max_context"], limits["threads"] = engine.max_context, engine.threads
        return {
            "v": protocol.VERSION,
            "instance": identity.instance,
            "versions": identity.versions | (engine.versions if engine else {}),
            "model": engine.model if engine else identity.model,
            "provider": engine.provider if engine else None,
            "memory": engine.memory if engine else None,
            "capabilities": {
                "text": engine is not None,
                "vision": engine.vision if engine else False,
                "json_schema": engine.json_schema if engine else False,
            },
            "limits": limits,
            "topics": identity.topics,
            "warnings": [*identity.warnings, *self._journal_warning()],
            "ts": self._clock.stamp().wall,
        }

    def _journal_warning(self) -> list[str]:
        reset = self._journal.stats.reset
        if reset is None:
            return []
        return [f"the journal was damaged and set aside, its jobs are lost: {reset}"]

    def heartbeat(self) -> payloads.Heartbeat:
        """Return the heartbeat and count it."""
        state, reason = self.judge()
        stamp, engine, info = self._clock.stamp(), self._engine.status, self._engine.info
        bus = self._bus.state
        self._seq += 1
        body: payloads.Heartbeat = {
            "v": protocol.VERSION,
            "seq": self._seq,
            "instance": self._identity.instance,
            "state": state,
            "reason": reason,
            "ts": stamp.wall,
            "clock_synced": stamp.synced,
            "uptime_s": round(time.monotonic() - self._began, 1),
            "model": info.model if info else self._identity.model,
            "provider": info.provider if info else None,
            "threads": info.threads if info else None,
            "queue": {
                "depth": self._scheduler.depth,
                "oldest_s": round(self._scheduler.oldest_s(stamp), 1),
            },
            "outbox": {"depth": self._outbox.depth, "oldest_s": round(self._outbox.oldest_s, 1)},
            "totals": self._totals,
            "engine": {
                "state": engine.state,
                "restarts": engine.restarts,
                "last_reason": engine.last_reason,
                "rss_mb": engine.rss_mb,
                "sessions": engine.sessions,
                "frame_cache_mb": engine.frame_cache_mb,
                "frame_cache_hits": engine.frame_cache_hits,
            },
            "speed": self._speed.snapshot(),
            "host": self._host(),
            "mqtt": {
                "connected": bus.connected,
                "reconnects": bus.reconnects,
                "last_reason": bus.last_reason,
            },
        }
        if (current := self._dispatcher.current) is not None:
            key = current.job.key
            body["job"] = {
                "id": key.id,
                "stage": current.stage,
                "progress_age_s": round(time.monotonic() - current.moved, 1),
            }
            if key.client:
                body["job"]["client"] = key.client
        if self._cameras is not None and (cameras := self._cameras.heartbeat()):
            body["cameras"] = cameras
        return body
