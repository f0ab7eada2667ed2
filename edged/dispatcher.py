"""Takes one job after the other to the engine, streams what comes back, and ends each job once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import structlog

from edged import protocol
from edged.errors import (
    Code,
    EngineDied,
    FramesLost,
    JobFailed,
    JobGone,
    JobStopped,
    JournalUnavailable,
    Refused,
)
from edged.jobs import MAX_DEATHS, Job, Kind, Outcome, Totals
from edged.journal import Journal
from edged.metrics import Speed
from edged.outbox import Outbox
from edged.ports import (
    Bus,
    Clock,
    Completed,
    Delta,
    Engine,
    FramePlan,
    FrameSource,
    Look,
    Outgoing,
    Planned,
    Progress,
    Stage,
    Task,
    Trace,
    no_trace,
)
from edged.scheduler import Scheduler

#: At most one `progress` event a job in this many seconds.
PROGRESS_S = 1.0
#: Pauses between tries to store something on a full or failing disk, seconds.
STORE_RETRY_S = (0.2, 1.0, 5.0, 15.0)

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Current:
    """The job the engine works on, and how far it is."""

    job: Job
    started: float = field(default_factory=time.monotonic)
    stage: Stage = "prepare"
    moved: float = field(default_factory=time.monotonic)
    #: Its final is, or is being, stored: what the engine still says is of no use.
    ended: bool = False

    def is_over(self) -> bool:
        """Return `ended`, which may change during any await."""
        return self.ended


class Dispatcher:
    """The only one that talks to the engine and the only one that ends accepted jobs."""

    def __init__(
        self,
        *,
        engine: Engine,
        cameras: FrameSource,
        journal: Journal,
        scheduler: Scheduler,
        outbox: Outbox,
        bus: Bus,
        totals: Totals,
        speed: Speed,
        clock: Clock,
        stream_interval_s: float,
        stream_bytes: int,
        trace: Trace = no_trace,
    ) -> None:
        self._engine = engine
        self._cameras = cameras
        self._journal = journal
        self._scheduler = scheduler
        self._outbox = outbox
        self._bus = bus
        self._totals = totals
        self._speed = speed
        self._clock = clock
        self._stream_interval_s = stream_interval_s
        self._stream_bytes = stream_bytes
        self._trace = trace
        self._stopping = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.current: Current | None = None

    # The way of a job

    async def run(self) -> None:
        """Work on jobs until `drain`."""
        while True:
            await self._scheduler.wait()
            try:
                await self._engine.wait_ready()
            except JobStopped:
                return  # the engine is closed, which only a stop does: what waits is for later
            if self._stopping:
                return
            job = self._scheduler.take()
            if job is None:
                continue
            self.current = Current(job)
            self._idle.clear()
            try:
                await self._work(self.current)
            finally:
                self.current = None
                self._idle.set()

    async def _work(self, current: Current) -> None:
        job = current.job
        attempt = await self._store(
            lambda: self._journal.start(job.seq), "start", gone=job.starts + 1
        )
        current.job = job = self._running(job).evolve(starts=attempt)
        self._scheduler.update(job)
        if current.is_over():
            self._scheduler.done(job)
            return
        self._trace("after_attempt_mark")
        queue_s = self._clock.stamp().since(job.arrived)
        self._tell(job, "started", attempt=attempt, queue_ms=round(queue_s * 1e3, 1))
        began = time.monotonic()
        try:
            await self._execute(current, queue_s)
        except JobFailed as error:
            await self.end(current.job, error.code, error.message, error.retry_after_s)
        except JobStopped:
            if (
                not current.is_over()
            ):  # only a stop of the daemon leaves a stopped job without a final
                await self._store(lambda: self._journal.release(job.seq), "release", gone=None)
                self._scheduler.requeue(self._running(job))
        except EngineDied as death:
            await self._died(current, death)
        finally:
            if current.is_over():
                self._scheduler.done(job, time.monotonic() - began)
            else:
                self._scheduler.charge(job.key.client, time.monotonic() - began)

    async def _execute(self, current: Current, queue_s: float) -> None:
        job = current.job
        request = _request(job)
        task = await self._task(job, request)
        if current.is_over():
            return
        chunks = _Chunks(
            partial(self._say_chunk, current), self._stream_interval_s, self._stream_bytes
        )
        told = 0.0
        updates = self._engine.execute(task)
        try:
            async for update in updates:
                current.moved = time.monotonic()
                if isinstance(update, Progress):
                    current.stage = update.stage
                    if (
                        request.stream
                        and not current.is_over()
                        and update.stage in {"decode_images", "encode", "prefill"}
                        and current.moved - told >= PROGRESS_S
                    ):
                        told = current.moved
                        self._say_progress(current, update)
                elif isinstance(update, Delta):
                    current.stage = "token"
                    if request.stream and not current.is_over():
                        chunks.add(update.text, update.question)
                elif isinstance(update, Planned):
                    await self._keep_plan(current, update.plan)
                else:
                    chunks.flush()
                    await self._complete(current, request, update, queue_s)
        finally:
            chunks.close()
            await updates.aclose()  # type: ignore[attr-defined]

    async def _task(self, job: Job, request: protocol.TextRequest | protocol.StoredVision) -> Task:
        """Return what the engine is asked.

        Raises:
            JobFailed: the job's frames are lost.
        """
        text = Task(
            job=job.seq,
            client=job.key.client,
            messages=(),
            sampling=request.sampling(),
            max_tokens=request.max_tokens,
            stop=request.stops(),
            schema=request.schema_wanted(),
        )
        if isinstance(request, protocol.TextRequest):
            return replace(text, messages=request.conversation())
        frames = await self._frames(job)
        camera = request.camera
        return replace(
            text,
            messages=request.conversation(len(frames)),
            questions=tuple(request.questions or ()),
            look=Look(
                frames=frames,
                detail=request.detail,
                window_min=camera.window.min if camera and camera.window else None,
                left_s=job.left_s(self._clock.stamp()),
                plan=None if job.plan is None else protocol.plan_of(job.plan),
            ),
        )

    async def _frames(self, job: Job) -> tuple[bytes, ...]:
        frames: tuple[bytes, ...] = ()
        why = "the journal has lost the job"
        try:
            frames = await self._store(lambda: self._journal.frames(job.seq), "frames", gone=frames)
        except FramesLost as error:
            why = error.message
        if not frames:
            message = f"the frames of this job are lost ({why}): send it again"
            raise JobFailed(Code.DEAD, message)
        return frames

    async def _keep_plan(self, current: Current, plan: FramePlan) -> None:
        """Journal what becomes of the frames: a later attempt sees the same ones."""
        job = self._running(current.job)
        kept = asdict(plan)
        if current.is_over() or job.plan == kept:
            return
        await self._store(lambda: self._journal.plan(job.seq, kept), "plan", gone=None)
        current.job = job = self._running(job).evolve(plan=kept)
        self._scheduler.update(job)

    async def _complete(
        self,
        current: Current,
        request: protocol.TextRequest | protocol.StoredVision,
        completed: Completed,
        queue_s: float,
    ) -> None:
        self._trace("after_infer")
        job = self._running(current.job)
        self._speed.learn(job, completed)
        info = self._engine.info
        run = protocol.Run(
            attempt=job.starts, queue_ms=queue_s * 1e3, model=info.model if info else ""
        )
        if isinstance(request, protocol.StoredVision):
            run = replace(
                run, frames=completed.frames, moments=request.moments,
                several=request.questions is not None,
            )  # fmt: skip
            self._move_window(job, request, completed.frames)
        final = protocol.result_event(job.key, completed.answers, completed.timings, run)
        usage = protocol.usage_of(completed.answers)
        await self._end(
            job, final, Outcome.COMPLETED,
            finish_reason=completed.answers[-1].finish_reason, prompt_tokens=usage.prompt_tokens,
            image_tokens=usage.image_tokens,
            cached_tokens=usage.cached_tokens, completion_tokens=usage.completion_tokens,
            ttft_ms=round(completed.timings.ttft_ms, 1),
            tokens_per_second=round(completed.timings.tokens_per_second, 2),
        )  # fmt: skip

    def _move_window(
        self, job: Job, request: protocol.StoredVision, frames: FramePlan | None
    ) -> None:
        """Let the next job of a window leave out what did not fit into this one."""
        camera = request.camera
        if frames is None or not frames.used or camera is None or camera.window is None:
            return
        first = frames.used[0].index
        since = request.moments[first]
        if first > 0 and since is not None:
            self._cameras.trim(camera.choice(), job.key.client, since)

    async def _died(self, current: Current, death: EngineDied) -> None:
        job = self._running(current.job)
        if current.is_over():
            return
        if self._stopping:
            await self._store(lambda: self._journal.release(job.seq), "release", gone=None)
            self._scheduler.requeue(job)
            return
        deaths = await self._store(
            lambda: self._journal.died(job.seq, str(death.reason)), "died", gone=job.deaths + 1
        )
        job = self._running(job).evolve(deaths=deaths)
        log.warning("job.engine_died", **job.log_context(), deaths=deaths, reason=str(death))
        if current.is_over():
            return
        if deaths >= MAX_DEATHS:
            await self.end_dead(job, f"the last time: {death}")
        else:
            self._scheduler.requeue(job)

    def _running(self, job: Job) -> Job:
        """Return the job with what others have learned of it meanwhile (its reply topics)."""
        return self._scheduler.find(job.key) or job

    # Ends

    async def end(
        self, job: Job, code: Code, message: str, retry_after_s: float | None = None
    ) -> None:
        """End a job with an `error` final, whether it waits or runs."""
        outcome = {
            Code.EXPIRED: Outcome.EXPIRED,
            Code.CANCELLED: Outcome.CANCELLED,
            Code.DEAD: Outcome.DEAD,
        }.get(code, Outcome.FAILED)
        final = protocol.error_event(job.key, code, message, retry_after_s)
        # What a model wrote, or a schema says, may stand in these two codes' messages.
        private = code in {Code.BAD_OUTPUT, Code.INVALID}
        await self._end(job, final, outcome, code=str(code), reason=None if private else message)

    async def end_dead(self, job: Job, detail: str) -> None:
        """Give a job up that has ended the engine, or the daemon, too often."""
        message = (
            f"the engine ended {MAX_DEATHS} times on this job, it is not tried again; {detail}"
        )
        await self.end(job, Code.DEAD, message)

    async def cancel(self, job: Job) -> None:
        """End a job because its client wants it to; silent if it is ending already."""
        if self.current is None or self.current.job.key != job.key or not self.current.ended:
            await self.end(job, Code.CANCELLED, "cancelled on request")

    async def _end(self, job: Job, final: bytes, outcome: Outcome, **details: Any) -> None:
        current = self.current
        mine = current if current is not None and current.job.key == job.key else None
        if mine is not None:
            if mine.ended:
                return
            mine.ended = True  # from here on nobody else ends it
            if outcome in {Outcome.CANCELLED, Outcome.EXPIRED}:
                self._engine.stop(job.seq)
        else:
            self._scheduler.done(job)
        rows: tuple[int, ...] | None = await self._store(
            lambda: self._journal.finish(job.seq, final, outcome), "finish", gone=None
        )
        if rows is None:
            self._post(job, final)  # as good as it can be done without its row
        elif rows:
            self._outbox.post_rows(rows)
        else:
            return
        self._totals.ended(outcome)
        lived = self._clock.stamp().since(job.arrived)
        log.info(
            "job.finished", **job.log_context(), outcome=str(outcome), attempt=job.starts,
            total_ms=round(lived * 1e3, 1), **details,
        )  # fmt: skip

    async def _store(self, operation: Callable[[], Awaitable[T]], what: str, *, gone: T) -> T:
        """Do this on the journal, again and again while it cannot be done.

        `gone` is the answer if the journal has lost the job: damage made it start anew.
        """
        tries = 0
        while True:
            try:
                return await operation()
            except JobGone as error:
                log.error("job.gone", operation=what, reason=error.message)
                return gone
            except JournalUnavailable as error:
                pause = STORE_RETRY_S[min(tries, len(STORE_RETRY_S) - 1)]
                tries += 1
                log.error(
                    "journal.unavailable", operation=what, reason=error.message, retry_s=pause
                )
                await asyncio.sleep(pause)

    async def expire(self) -> None:
        """End jobs as their deadlines pass, for ever."""
        while True:
            for job in self._scheduler.expired(self._clock.stamp()):
                current = self.current
                if current is not None and current.job.key == job.key and current.is_over():
                    continue
                await self.end(
                    job, Code.EXPIRED, f"the deadline of {job.deadline_s:g} s has passed"
                )
            left = self._scheduler.next_deadline_s(self._clock.stamp())
            await asyncio.sleep(0.25 if left is None else min(0.25, max(0.01, left)))

    async def drain(self, timeout_s: float) -> None:
        """Take no more jobs; the running one has this long, then it is for the next start."""
        self._stopping = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            if self.current is not None:
                self._engine.stop(self.current.job.seq)

    async def idle(self) -> None:
        """Wait until no job is in work."""
        await self._idle.wait()

    # Events

    def _tell(self, job: Job, kind: str, **fields: Any) -> None:
        self._post(job, protocol.event(job.key, kind, **fields))

    def _post(self, job: Job, payload: bytes) -> None:
        for reply in job.replies:
            self._outbox.post(
                Outgoing(topic=reply.topic, payload=payload, qos=1, correlation=reply.correlation)
            )

    def _offer(self, job: Job, kind: str, **fields: Any) -> None:
        payload = protocol.event(job.key, kind, **fields)
        for reply in job.replies:
            self._bus.offer(
                Outgoing(topic=reply.topic, payload=payload, correlation=reply.correlation)
            )

    def _say_chunk(self, current: Current, seq: int, delta: str, question: int | None) -> None:
        if current.is_over():
            return  # no chunk is sent after the final
        job = self._running(current.job)
        self._offer(job, "chunk", attempt=job.starts, seq=seq, delta=delta, question=question)

    def _say_progress(self, current: Current, update: Progress) -> None:
        job = self._running(current.job)
        self._offer(
            job, "progress", attempt=job.starts, stage=update.stage, done=update.done,
            total=update.total, question=update.question,
        )  # fmt: skip


def _request(job: Job) -> protocol.TextRequest | protocol.StoredVision:
    try:
        if job.kind is Kind.VISION:
            return protocol.validate(protocol.StoredVision, job.request)
        return protocol.validate(protocol.TextRequest, job.request)
    except Refused as refusal:  # journaled by a version with other rules
        raise JobFailed(refusal.code, refusal.message) from None


class _Chunks:
    """Gathers deltas: the first goes at once, then one chunk an interval, or when it is large.

    A chunk is of one question.
    """

    def __init__(
        self, send: Callable[[int, str, int | None], None], interval_s: float, max_bytes: int
    ) -> None:
        self._send = send
        self._interval_s = interval_s
        self._max_bytes = max_bytes
        self._parts: list[str] = []
        self._size = 0
        self._seq = 0
        self._question: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, text: str, question: int | None) -> None:
        if question != self._question:
            self.flush()
            self._question = question
        self._parts.append(text)
        self._size += len(text.encode())
        if self._timer is None or self._size >= self._max_bytes:
            self.flush()
            self._arm()

    def _arm(self) -> None:
        self.close()
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._due)

    def _due(self) -> None:
        self._timer = None
        if self._parts:
            self.flush()
            self._arm()

    def flush(self) -> None:
        """Send what there is."""
        if self._parts:
            text = "".join(self._parts)
            self._parts.clear()
            self._size = 0
            self._send(self._seq, text, self._question)
            self._seq += 1

    def close(self) -> None:
        """Stop the timer; what was not flushed is not sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
