"""The one place that wires everything, and the daemon's life from start to stop."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import structlog

from edged import __version__, payloads
from edged.cameras.hub import CameraHub, bounds, camera_connection, same_user
from edged.clock import SystemClock
from edged.dispatcher import Dispatcher
from edged.engine.host import EngineHost
from edged.engine.messages import Order
from edged.errors import EdgedError, JournalUnavailable
from edged.health import Health, Identity
from edged.intake import Intake, Rules
from edged.jobs import MAX_DEATHS, Totals
from edged.journal import Journal
from edged.metrics import Speed
from edged.mqtt import Connection, MqttBus
from edged.outbox import Outbox
from edged.payloads import Condition
from edged.ports import Bus, Clock, Engine, Incoming, Outgoing, Session, Trace, no_trace
from edged.scheduler import Scheduler
from edged.sensors import Sensors
from edged.settings import MB, Settings, packet_bytes, read_password, warnings
from edged.statedir import StateDir
from edged.systemd import Notifier
from edged.tasks import Background
from edged.topics import Topics

#: QoS 1 requests the broker may have under way to us at once; as many of the largest size are held.
RECEIVE_MAXIMUM = 4
#: While the model loads, systemd is asked for this much more time, this often, seconds.
EXTEND_S, EXTEND_EVERY_S = 60.0, 10.0
JOURNAL_RETRY_S = 5.0
#: The engine's stage costs: their name in the journal, and the seconds between two writes.
HISTORY, HISTORY_S = "engine.history", 900.0
#: What the final of an open job may need in the journal: its frame, and its text and `json`.
FINAL_BYTES, FINAL_BYTES_A_TOKEN = 16_384, 32
#: How long a stop waits for each thing that should take no time, seconds.
PATIENCE_S = 3.0
#: All that together, and the engine's end, at most; systemd is asked for it beside `state.stop_s`.
STOP_S = 40.0

log = structlog.get_logger()


class App:
    """The daemon. `run` lives until a stop is asked for."""

    def __init__(
        self,
        settings: Settings,
        *,
        engine: Engine | None = None,
        engine_command: Sequence[str] | None = None,
        bus: Bus | None = None,
        camera_bus: Bus | None = None,
        clock: Clock | None = None,
        trace: Trace = no_trace,
    ) -> None:
        self.settings = settings
        self._engine_command = engine_command
        self.topics = Topics(settings.mqtt.base_topic, settings.device)
        self.instance = uuid.uuid4().hex
        self.totals, self.speed = Totals(), Speed()
        self._background = Background()
        self._notifier = Notifier()
        self._clock = clock = clock or SystemClock()
        self._stop = asyncio.Event()
        self._sensors = Sensors(state_dir=settings.state.dir)
        limits = settings.limits
        self.engine = engine = engine or self._engine_host()
        jobs = self._connection()
        self.bus = bus = bus or MqttBus(jobs)
        self.cameras = cameras = CameraHub(bounds=bounds(settings), topics=self.topics, clock=clock)
        frames_from = camera_connection(jobs, settings, self.topics)
        self._camera_bus = camera_bus or MqttBus(frames_from, sink=cameras.take)
        self._one_user = same_user(jobs, frames_from)
        self.journal = Journal(
            settings.state.dir / "journal.db",
            clock=clock,
            quota_bytes=int(limits.journal_mb * MB),
            results=limits.results,
            results_s=limits.results_s,
            max_final_bytes=FINAL_BYTES + FINAL_BYTES_A_TOKEN * limits.max_tokens,
            keep_frames=settings.state.frames,
            frames_bytes=int(settings.state.frames_mb * MB),
            trace=trace,
        )
        self.scheduler = Scheduler(limits.queue, self.speed, self._sensors.trouble)
        self.outbox = Outbox(
            bus, self.journal, self._background, replaced=self.totals.replaced, trace=trace
        )
        self.dispatcher = Dispatcher(
            engine=engine,
            cameras=cameras,
            journal=self.journal,
            scheduler=self.scheduler,
            outbox=self.outbox,
            bus=bus,
            totals=self.totals,
            speed=self.speed,
            clock=clock,
            stream_interval_s=settings.stream.interval_ms / 1e3,
            stream_bytes=settings.stream.max_bytes,
            trace=trace,
        )
        self.intake = Intake(
            rules=Rules(
                reply_prefixes=settings.mqtt.reply_prefixes,
                payload_bytes=int(limits.payload_mb * MB),
                max_frames=limits.frames,
                max_tokens=limits.max_tokens,
                model=settings.model.name,
                retained_seen=settings.mqtt.protocol == "5",
            ),
            topics=self.topics,
            bus=bus,
            journal=self.journal,
            scheduler=self.scheduler,
            outbox=self.outbox,
            engine=engine,
            cameras=cameras,
            totals=self.totals,
            clock=clock,
            background=self._background,
            cancel=self.dispatcher.cancel,
            trace=trace,
        )
        self.health = Health(
            identity=self._identity(),
            topics=self.topics,
            bus=bus,
            engine=engine,
            journal=self.journal,
            scheduler=self.scheduler,
            dispatcher=self.dispatcher,
            outbox=self.outbox,
            totals=self.totals,
            speed=self.speed,
            clock=clock,
            host=self._sensors.read,
            host_trouble=self._sensors.trouble,
            cameras=cameras,
        )

    def _engine_host(self) -> EngineHost:
        settings = self.settings
        order = Order(
            model=settings.model.name,
            path=_text(settings.model.path) or "",
            provider=settings.model.provider,
            threads=settings.model.threads,
            max_context=settings.model.max_context,
            max_tokens=settings.limits.max_tokens,
            memory_mb=settings.limits.memory_mb,
            first_token_s=settings.vision.first_token_s,
            frame_cache_mb=settings.vision.cache_mb,
        )
        return EngineHost(order, command=self._engine_command)

    def _connection(self) -> Connection:
        mqtt = self.settings.mqtt
        return Connection(
            host=mqtt.host,
            port=mqtt.port,
            client_id=mqtt.client_id,
            username=mqtt.username,
            password=_password(mqtt.password_file),
            tls=mqtt.tls,
            ca=_text(mqtt.ca),
            cert=_text(mqtt.cert),
            key=_text(mqtt.key),
            protocol=mqtt.protocol,
            keepalive_s=mqtt.keepalive_s,
            session_expiry_s=mqtt.session_expiry_s,
            receive_maximum=RECEIVE_MAXIMUM,
            maximum_packet_size=packet_bytes(self.settings),
            subscriptions=(
                *((topic, 1) for topic in self.topics.requests),
                (self.topics.status, 0),
            ),
            will=self._will,
        )

    def _will(self) -> Outgoing:
        return self.health.status(Condition.OFFLINE, "lost")

    def _identity(self) -> Identity:
        settings = self.settings
        limits = settings.limits.model_dump() | {"packet_bytes": packet_bytes(settings)}
        topics: payloads.InfoTopics = {
            "root": self.topics.root,
            "requests": list(self.topics.requests),
            "reply_prefixes": list(settings.mqtt.reply_prefixes),
        }
        if settings.cameras.max:
            topics["cameras"] = self.topics.camera_frames
        return Identity(
            instance=self.instance,
            interval_s=settings.health.interval_s,
            limits=cast("payloads.Limits", limits),
            topics=topics,
            warnings=tuple(warnings(settings)),
            versions={"edged": __version__, "python": platform.python_version()},
            model=settings.model.name,
        )

    # The bus's listener

    def on_connected(self, session: Session) -> None:
        """Say who we are, and send what waits."""
        self.outbox.on_connected(session)
        self.health.on_connected()

    def on_subscribed(self, refused: tuple[str, ...]) -> None:
        """Note that requests can reach us."""
        self.health.on_subscribed(refused)

    def on_disconnected(self, _reason: str) -> None:
        """Void what belonged to the connection."""
        self.intake.on_disconnected()
        self.outbox.on_disconnected()
        self.health.on_disconnected()

    def on_message(self, message: Incoming) -> None:
        """Give a message to whom it concerns."""
        if message.topic == self.topics.status:
            self.health.on_status(message)
        else:
            self.intake.on_message(message)

    # Life

    def stop(self) -> None:
        """Ask for the end: stop admitting, let the running job finish, say goodbye."""
        self._stop.set()

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            StateDirLocked: another edged uses the state directory.
            JournalTooNew: the journal was written by a newer edged.
        """
        for warning in warnings(self.settings):
            log.warning("settings.warning", reason=warning)
        log.info(
            "edged.starting", version=__version__, device=self.settings.device,
            root=self.topics.root, model=self.settings.model.name, instance=self.instance,
        )  # fmt: skip
        with StateDir(self.settings.state.dir):
            try:
                async with _signals(self.stop):
                    await self._serve()
            finally:
                await self.journal.close()
        log.info("edged.stopped")

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """End the daemon on an exception in a callback: what it left undone, nobody knows."""
        error = context.get("exception")
        if error is not None and "handle" in context:
            self._background.fail(error)
        else:
            loop.default_exception_handler(context)

    async def _serve(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_loop_error)
        opened = await self._open_journal()
        if opened and (history := await self.journal.get(HISTORY)) is not None:
            self.engine.recall(history)
        async with asyncio.TaskGroup() as tasks:
            work = [
                tasks.create_task(coroutine, name=name)
                for name, coroutine in {
                    "mqtt": self.bus.run(self),
                    "engine": self.engine.run(),
                    **({"cameras": self._run_cameras()} if self.settings.cameras.max else {}),
                    "dispatcher": self.dispatcher.run(),
                    "deadlines": self.dispatcher.expire(),
                    "outbox": self.outbox.run(),
                    "health": self.health.run(),
                    "systemd": self._notify(),
                    "background": self._background.watch(),
                    "history": self._keep_history(),
                    **({} if opened else {"journal": self._retry_journal()}),
                }.items()
            ]
            await self._stop.wait()
            await self._shut_down()
            for task in work:
                task.cancel()

    async def _shut_down(self) -> None:
        log.info("edged.stopping", running=self.dispatcher.current is not None)
        self._notifier.stopping()
        self._notifier.extend_timeout(self.settings.state.stop_s + STOP_S)
        self.intake.stopping = True
        self.health.stop()
        await self.cameras.close()  # jobs have their frames already
        await self.dispatcher.drain(self.settings.state.stop_s)
        await _patiently(self.dispatcher.idle())  # the engine answers within a chunk, or is ended
        await self.engine.close()
        await _patiently(self._store_history({}))
        # With a full disk these do not end: what they would store is found by the next start.
        await _patiently(self.dispatcher.idle())
        await _patiently(self._background.settle())
        if self.bus.session is not None:
            await _patiently(self.outbox.drained())
        await self.bus.close(self.health.status(Condition.OFFLINE, "stopped"), PATIENCE_S)

    async def _run_cameras(self) -> None:
        await self.cameras.run(self._camera_bus, self.bus if self._one_user else None)

    # The journal

    async def _open_journal(self) -> bool:
        try:
            opened = await self.journal.open()
        except JournalUnavailable as error:
            log.error("journal.unavailable", operation="open", reason=error.message)
            self.health.note_journal(f"the journal cannot be opened: {error.message}")
            return False
        self.health.note_journal(None)
        self.outbox.post_rows(opened.pending)
        for job in opened.jobs:
            self.scheduler.requeue(job)
        for job in opened.jobs:
            if job.deaths >= MAX_DEATHS:
                await self.dispatcher.end_dead(job, "the last time the whole daemon ended")
            else:
                self.intake.announce(job)
        if opened.jobs:
            log.info("journal.recovered", jobs=len(opened.jobs), finals=len(opened.pending))
        return True

    async def _keep_history(self) -> None:
        """Store now and then what the engine's stages cost, for the deadlines of the next start."""
        stored: dict[str, Any] = {}
        while True:
            await asyncio.sleep(HISTORY_S)
            stored = await self._store_history(stored)

    async def _store_history(self, stored: dict[str, Any]) -> dict[str, Any]:
        history = self.engine.history()
        if history != stored:
            with suppress(JournalUnavailable):  # a loss of comfort, no more
                await self.journal.put(HISTORY, history)
        return history

    async def _retry_journal(self) -> None:
        while True:
            await asyncio.sleep(JOURNAL_RETRY_S)
            if await self._open_journal():
                return

    # systemd

    async def _notify(self) -> None:
        """Tell systemd: more time while loading, ready, and that every part still turns."""
        ready = False
        extended = -EXTEND_EVERY_S
        interval = self._notifier.watchdog_interval()
        pause = min(interval or 1.0, 1.0)
        told = None
        fed = 0.0
        while True:
            now = time.monotonic()
            state, reason = self.health.judge()
            if (state, reason) != told:
                told = (state, reason)
                self._notifier.status(f"{state}: {reason}")
            if not ready and self.health.is_up:
                ready = True
                self._notifier.ready()
            elif not ready and now - extended >= EXTEND_EVERY_S and not self.health.stuck():
                extended = now
                self._notifier.extend_timeout(EXTEND_S)
            if interval is not None and now - fed >= interval:
                stuck = self.health.stuck()
                if stuck is None:
                    fed = now
                    self._notifier.watchdog()
                else:
                    log.error("watchdog.starved", reason=stuck)
            await asyncio.sleep(pause)


async def _patiently(event: Awaitable[object]) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(event, PATIENCE_S)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _password(path: Path | None) -> Callable[[], str | None]:
    """Return how to read the password at each connect: a rotated one is picked up."""

    def read() -> str | None:
        return None if path is None else read_password(path)

    return read


@asynccontextmanager
async def _signals(stop: Callable[[], None]) -> AsyncIterator[None]:
    """Stop on SIGTERM and SIGINT, at once on the second; SIGHUP is logged and ignored."""
    loop = asyncio.get_running_loop()
    asked = False

    def on_stop(number: signal.Signals) -> None:
        nonlocal asked
        if asked:
            log.warning("edged.killed", signal=number.name)
            os._exit(128 + number)
        asked = True
        log.info("edged.signal", signal=number.name)
        stop()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, on_stop, number)
    loop.add_signal_handler(
        signal.SIGHUP, lambda: log.warning("edged.signal", signal="SIGHUP", ignored=True)
    )
    try:
        yield
    finally:
        for number in (*numbers, signal.SIGHUP):
            loop.remove_signal_handler(number)


#: A bug ended the daemon; systemd starts it again (sysexits.h, EX_SOFTWARE).
EX_SOFTWARE = 70


def main(settings: Settings, **parts: Any) -> int:
    """Run the daemon; return its exit status.

    Raises:
        EdgedError: it cannot run as it is set up.
    """

    async def serve() -> None:
        await App(settings, **parts).run()

    try:
        asyncio.run(serve())
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if isinstance(cause, EdgedError):
            raise cause from None
        log.exception("edged.failed")
        return EX_SOFTWARE
    return 0
