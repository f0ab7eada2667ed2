"""The daemon's side of the engine: a process kept loaded, given tasks, killed when it hangs."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from edged.engine import messages
from edged.engine.deadlines import Deadlines, Limits
from edged.engine.process import EngineProcess, worker_command
from edged.engine.restarts import Backoff, Restarts
from edged.engine.wire import BadMessage, TooLarge
from edged.errors import Code, DeathReason, EdgedError, EngineDied, JobFailed, JobStopped
from edged.models.folder import fingerprint
from edged.ports import (
    Completed,
    Delta,
    EngineInfo,
    EngineState,
    EngineStatus,
    FramePlan,
    Planned,
    Progress,
    Task,
    Update,
)

#: Seconds an ending process gets to end by itself, and a killed one until we say it is stuck.
_END_S = 5.0
_KILLED_S = 30.0
#: Seconds past a deadline after which the watchdog is told: killing does not seem to work here.
_OVERDUE_S = 60.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recycle:
    """How much an engine process may grow over its size after the warm-up, before it is replaced.

    The larger of the two counts. Its size between jobs is meant, without the frames that it keeps:
    what a job took and gave back does not count. Native libraries leak; a fresh process is cheap
    between jobs.
    """

    share: float = 0.25
    mb: float = 512.0


@dataclass(slots=True, eq=False)
class _Work:
    """A task on its way through the engine."""

    task: Task
    #: When it was asked for.
    since: float
    #: What becomes of its frames, as soon as that is decided; whether the engine decided it.
    plan: FramePlan | None = None
    planned: bool = False
    updates: asyncio.Queue[Update | EdgedError] = field(default_factory=asyncio.Queue)
    #: `stop` was called.
    stop: bool = False
    #: Nobody reads the updates any more.
    abandoned: bool = False


@dataclass(frozen=True, slots=True)
class _Ending:
    """How a process's life ended. `reason` is None when we wanted it so."""

    reason: DeathReason | None
    detail: str
    #: It could say itself why the model cannot be loaded.
    refused: bool = False

    def __str__(self) -> str:
        if self.reason is None or self.refused:
            return self.detail
        return f"{self.reason}: {self.detail}"


class EngineHost:
    """Implements `edged.ports.Engine` with a child process.

    Args:
        order: what to load.
        command: runs an engine process; `--socket FD --parent PID` is added. Default: the real one.
        clock: seconds, monotonic.
        limits: the numbers of the stage deadlines.
        backoff: the numbers of the restarts.
        recycle: how much a process may grow.
        history: what `history()` returned in an earlier start, or None.
        ping_s: seconds of silence after which an idle engine is asked for a sign of life.
        random_: the jitter.
    """

    def __init__(
        self,
        order: messages.Order,
        *,
        command: Sequence[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        limits: Limits | None = None,
        backoff: Backoff | None = None,
        recycle: Recycle | None = None,
        history: Mapping[str, Any] | None = None,
        ping_s: float = 15.0,
        random_: random.Random | None = None,
    ) -> None:
        self._order = order
        self._command = tuple(command or worker_command())
        self._clock = clock
        self._limits = limits or Limits()
        self._tick = min(1.0, self._limits.floor_s / 20)
        self._deadlines = Deadlines(clock, self._limits, history)
        self._restarts = Restarts(clock, backoff or Backoff(), random_ or random.Random())  # noqa: S311
        self._recycle = recycle or Recycle()
        self._ping_s = ping_s

        self._state = EngineState.LOADING
        self._info: EngineInfo | None = None
        self._last_reason: str | None = None
        self._trouble: str | None = None
        self._kept = messages.Kept()

        self._process: EngineProcess | None = None
        self._works: dict[int, _Work] = {}
        self._running: _Work | None = None
        self._heard = clock()
        self._pings = 0
        self._base_mb: float | None = None
        #: Why we end the process that lives: a deadline, a recycling, rubbish it said.
        self._sentence: _Ending | None = None
        self._killed_at: float | None = None
        self._closing = False
        self._began = False
        self._over = False
        self._broken: str | None = None
        self._changed = asyncio.Event()

    # The port --------------------------------------------------------------------------------

    @property
    def status(self) -> EngineStatus:
        """How the engine is."""
        process = self._process
        return EngineStatus(
            state=self._state,
            restarts=self._restarts.count,
            last_reason=self._last_reason,
            trouble=self._trouble or self._too_many(),
            rss_mb=None if process is None else process.rss_mb(),
            sessions=self._kept.sessions,
            frame_cache_mb=self._kept.cache_mb,
            frame_cache_hits=self._kept.cache_hits,
        )

    @property
    def info(self) -> EngineInfo | None:
        """What is loaded; the last loaded one while it restarts, None before the first load."""
        return self._info

    @property
    def pid(self) -> int | None:
        """The engine's process id, None while there is no process."""
        return None if self._process is None else self._process.pid

    def history(self) -> dict[str, Any]:
        """Return what the stages have cost on this box, for the next start's `recall`."""
        return self._deadlines.export()

    def recall(self, history: Mapping[str, Any]) -> None:
        """Take in what `history` returned in an earlier start; call it before `run`."""
        self._deadlines = Deadlines(self._clock, self._limits, history)

    async def wait_ready(self) -> EngineInfo:
        """Wait until a task can be executed."""
        while True:
            if self._closing or self._over:
                raise JobStopped("the engine is being stopped")
            if self._info is not None and self._state in (EngineState.IDLE, EngineState.BUSY):
                return self._info
            await self._changed.wait()

    async def execute(self, task: Task) -> AsyncGenerator[Update, None]:
        """Work on a task and yield what happens; the last update is `Completed`.

        It waits for its turn, and for the engine while that restarts; a death before the engine has
        the task is none of this task's. Leaving early stops the task.
        """
        work = self._works[task.job] = _Work(task, self._clock())
        try:
            await self._turn(work)
            self._give(work)
            while True:
                update = await work.updates.get()
                if isinstance(update, EdgedError):
                    raise update
                yield update
                if isinstance(update, Completed):
                    return
        finally:
            if self._works.get(task.job) is work:
                del self._works[task.job]
            if self._running is work:  # its updates are dropped; its end makes room for the next
                work.abandoned = True
                self._send_stop(work)

    def stop(self, job: int) -> None:
        """Ask for this task's end, between two chunks of prefill or two tokens."""
        work = self._works.get(job)
        if work is None or work.stop:
            return
        work.stop = True
        if self._running is work:
            self._send_stop(work)
        self._notify()

    def stuck(self) -> str | None:
        """Return why the watchdog should no longer be fed on the engine's account, or None."""
        if self._broken is not None:
            return self._broken
        if not self._began or self._over or self._process is None:
            return None
        now = self._clock()
        if self._killed_at is not None and now - self._killed_at > _KILLED_S:
            return f"the engine process does not end, {now - self._killed_at:.0f} s after SIGKILL"
        left = self._deadlines.left()
        if left is not None and left < -_OVERDUE_S:
            return f"an engine stage is {-left:.0f} s overdue and its process was not killed"
        return None

    async def run(self) -> None:
        """Keep an engine loaded, starting it again with backoff when it ends, until `close`."""
        self._began = True
        try:
            while not self._closing:
                ending = await self._live()
                delay = self._mourn(ending)
                if delay > 0:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._until_closing(), delay)
        except Exception as error:
            self._broken = f"the engine's keeper ended: {type(error).__name__}: {error}"
            raise
        finally:
            self._over = True
            self._state = EngineState.BACKOFF
            self._lose(JobStopped("the engine is being stopped"))
            self._notify()

    async def close(self) -> None:
        """End the process and `run`."""
        self._closing = True
        self._notify()
        if not self._began or self._over:
            return
        process = self._process
        if process is not None:
            if self._state is EngineState.IDLE:
                process.send({"t": "quit"})
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._until_over(), _END_S)
            process.kill()
        await self._until_over()

    # One process's life ----------------------------------------------------------------------

    async def _live(self) -> _Ending:
        """Start a process, load the model, serve tasks; return how it ended."""
        self._begin_life()
        print_ = await asyncio.to_thread(fingerprint, self._order.path)
        self._deadlines.use(print_)
        try:
            process = await EngineProcess.start(self._command)
        except OSError as error:
            return _Ending(DeathReason.EXIT, f"it cannot be started: {error}", refused=True)
        self._process = process
        _log.info("engine.started", pid=process.pid)
        try:
            self._deadlines.begin("load")
            process.send(messages.load(self._order))
            if self._closing:
                process.kill()
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch(process), name="edged.engine.watch")
                await self._listen(process)
                # it has closed its end; what is left to it is to end
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _END_S)
                self._kill(process)
                status = await process.wait()
                watch.cancel()
        finally:
            self._deadlines.rest()
            process.kill()
            await asyncio.shield(process.wait())
            self._process = None
        if self._sentence is not None:
            return self._sentence
        return _Ending(*process.epitaph(status))

    def _begin_life(self) -> None:
        self._state = EngineState.LOADING
        self._sentence = self._killed_at = self._base_mb = None
        self._kept = messages.Kept()

    async def _listen(self, process: EngineProcess) -> None:
        """Take what the process says until it closes its end."""
        try:
            async for message in process.messages():
                self._heard = self._clock()
                self._hear(process, message)
        except BadMessage as error:
            self._condemn(process, _Ending(DeathReason.GARBAGE, error.message))

    async def _watch(self, process: EngineProcess) -> None:
        """Kill the process when its stage is overdue; ask for a sign of life when it is idle."""
        while True:
            before = self._clock()
            await asyncio.sleep(self._tick)
            late = self._clock() - before - self._tick
            if late > self._tick / 2:  # we stood still ourselves: nobody could have been heard
                self._deadlines.excuse(late)
            if self._overdue():
                # what it said meanwhile may lie unread: the loop reads between these passes
                for _ in range(16):
                    await asyncio.sleep(0)
                if self._overdue():
                    self._condemn(process, _Ending(DeathReason.DEADLINE, self._deadlines.killed()))
                    return
            idle = self._state is EngineState.IDLE and self._deadlines.running is None
            if idle and self._clock() - self._heard >= self._ping_s:
                self._pings += 1
                process.send({"t": "ping", "n": self._pings})
                self._deadlines.begin("ping")

    def _overdue(self) -> bool:
        left = self._deadlines.left()
        return left is not None and left < 0

    def _condemn(self, process: EngineProcess, sentence: _Ending) -> None:
        """Kill the process, and remember why."""
        if self._sentence is None:
            self._sentence = sentence
        self._kill(process)

    def _kill(self, process: EngineProcess) -> None:
        if self._killed_at is None:
            self._killed_at = self._clock()
        process.kill()

    # What the process says -------------------------------------------------------------------

    def _hear(self, process: EngineProcess, message: messages.FromEngine) -> None:
        match message:
            case messages.Loaded():
                self._loaded(process, message)
            case messages.LoadFailed():
                text = (
                    message.message
                    if message.hint is None
                    else (f"{message.message}; {message.hint}")
                )
                self._sentence = _Ending(DeathReason.EXIT, text, refused=True)
            case messages.Pong():
                if self._deadlines.running is not None and self._deadlines.running[0] == "ping":
                    self._deadlines.rest()
            case messages.Begin():
                work = self._work_of(message.job)
                self._deadlines.begin(message.stage, message.work)
                self._tell(work, Progress(message.stage, message.done, message.total))
            case messages.Step():
                work = self._work_of(message.job)
                self._check_question(work, message)
                self._deadlines.done(message.stage, max(0.0, message.took), message.work)
                self._deadlines.begin(message.stage, message.next)
                self._tell(
                    work, Progress(message.stage, message.done, message.total, message.question)
                )
                if message.text:
                    self._tell(work, Delta(message.text, message.question))
            case messages.Planned():
                work = self._work_of(message.job)
                self._plan(work, message.plan)
                self._tell(work, Planned(message.plan))
            case messages.Done():
                self._check_done(self._work_of(message.job), message)
                completed = Completed(
                    answers=message.answers, timings=message.timings, frames=message.frames
                )
                self._finish(process, message.job, completed, message)
            case messages.Failed():
                failed = JobFailed(Code(message.code), message.message)
                self._finish(process, message.job, failed, message)
            case messages.Stopped():
                stopped = JobStopped("the task was stopped")
                self._finish(process, message.job, stopped, message)

    def _loaded(self, process: EngineProcess, message: messages.Loaded) -> None:
        if self._state is not EngineState.LOADING:
            raise BadMessage("loaded, again")
        running = self._deadlines.running
        took = 0.0 if running is None else running[1]
        self._deadlines.done("load", took)
        self._deadlines.end_task()
        self._info = message.info
        self._kept = message.kept()
        self._base_mb = self._size_mb(process)
        self._trouble = None
        self._state = EngineState.IDLE
        _log.info(
            "engine.loaded",
            pid=process.pid,
            model=message.info.model,
            provider=message.info.provider,
            threads=message.info.threads,
            max_context=message.info.max_context,
            took_s=round(took, 3),
        )
        self._notify()

    def _work_of(self, job: int) -> _Work:
        work = self._running
        if work is None or work.task.job != job:
            raise BadMessage(f"about job {job}, which it does not have")
        return work

    def _plan(self, work: _Work, plan: FramePlan) -> None:
        """Take note of a task's plan, if it can be one."""
        look = work.task.look
        if look is None or len(plan.used) + len(plan.dropped) != len(look.frames):
            frames = 0 if look is None else len(look.frames)
            raise BadMessage(f"a plan for other frames than the {frames} it was given")
        if work.planned:
            raise BadMessage("planned, again")
        work.plan, work.planned = plan, True

    def _check_question(self, work: _Work, message: messages.Step) -> None:
        questions = len(work.task.questions)
        question = message.question
        known = question is None if not questions else question in range(questions)
        # the part that all questions share is nobody's, but text is always somebody's
        if not known and (question is not None or message.text):
            raise BadMessage(f"about question {question} of {questions}")

    def _check_done(self, work: _Work, message: messages.Done) -> None:
        if len(message.answers) != max(1, len(work.task.questions)):
            raise BadMessage(f"{len(message.answers)} answers")
        if message.frames != work.plan:
            raise BadMessage("other frames than were planned")

    def _tell(self, work: _Work, update: Update | EdgedError) -> None:
        if not work.abandoned:
            work.updates.put_nowait(update)

    def _finish(
        self, process: EngineProcess, job: int, end: Completed | EdgedError, kept: messages.Kept
    ) -> None:
        work = self._work_of(job)
        self._running = None
        self._kept = kept.kept()
        self._deadlines.end_task()
        self._restarts.worked()
        self._tell(work, end)
        grown = self._grown(process)
        if grown is None:
            self._state = EngineState.IDLE
        else:
            self._state = EngineState.LOADING
            self._sentence = _Ending(None, f"recycled: {grown}")
            process.send({"t": "quit"})
            self._deadlines.begin("ping")  # it has to end
        self._notify()

    def _grown(self, process: EngineProcess) -> str | None:
        """Return how much the process has grown, if that is too much."""
        now, base = self._size_mb(process), self._base_mb
        if now is None or base is None:
            return None
        bound = max(base * self._recycle.share, self._recycle.mb)
        if now - base <= bound:
            return None
        return f"{now:.0f} MB of memory, {base:.0f} MB after the warm-up"

    def _size_mb(self, process: EngineProcess) -> float | None:
        """Return how large the process is without the frames that it may keep."""
        size = process.rss_mb()
        if size is None:
            return None
        return size - min(self._kept.cache_mb, self._order.frame_cache_mb)

    # Tasks -----------------------------------------------------------------------------------

    async def _turn(self, work: _Work) -> None:
        """Wait until the engine is loaded and free."""
        while not (self._state is EngineState.IDLE and self._running is None):
            if work.stop or self._closing or self._over:
                break
            await self._changed.wait()
        if work.stop or self._closing or self._over:
            raise JobStopped("the task was stopped before the engine began")

    def _give(self, work: _Work) -> None:
        process = self._process
        if process is None:
            raise AssertionError("idle without a process")
        task = work.task
        if task.look is not None:
            work.plan = task.look.plan
            if task.look.left_s is not None:  # it may have waited long for its turn
                left = max(0.0, task.look.left_s - (self._clock() - work.since))
                task = replace(task, look=replace(task.look, left_s=left))
        try:
            process.send(messages.run(task), messages.body(task))
        except TooLarge as error:
            raise JobFailed(
                Code.MEMORY, f"the engine cannot be given this job: {error.message}"
            ) from None
        self._running = work
        self._state = EngineState.BUSY
        self._deadlines.begin("prepare")

    def _send_stop(self, work: _Work) -> None:
        if self._process is not None:
            self._process.send({"t": "stop", "job": work.task.job})

    def _mourn(self, ending: _Ending) -> float:
        """Take note of a process's end; return the seconds to wait before the next start."""
        self._state = EngineState.BACKOFF
        if self._closing:
            return 0.0
        self._restarts.count += 1
        self._last_reason = str(ending)
        if ending.reason is None:
            _log.info("engine.recycled", why=ending.detail)
            return 0.0
        delay = self._restarts.died()
        self._trouble = ending.detail if ending.refused else f"restarting after {ending}"
        _log.error(
            "engine.load_failed" if ending.refused else "engine.died",
            reason=str(ending.reason),
            detail=ending.detail,
            again_in_s=round(delay, 1),
            deaths=self._restarts.recent,
        )
        self._lose(EngineDied(ending.reason, ending.detail))
        self._notify()
        return delay

    def _lose(self, error: EdgedError) -> None:
        """Tell the running task, if there is one, that it will not get an answer."""
        work, self._running = self._running, None
        if work is not None:
            self._tell(work, error)

    def _too_many(self) -> str | None:
        many = self._restarts.too_many
        return None if many is None else f"{many}, at last: {self._last_reason}"

    # Waiting ---------------------------------------------------------------------------------

    def _notify(self) -> None:
        """Wake everybody who waits for some change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _until_closing(self) -> None:
        while not self._closing:
            await self._changed.wait()

    async def _until_over(self) -> None:
        while not self._over:
            await self._changed.wait()
