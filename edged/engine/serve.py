"""The engine process once it runs: loads what the daemon says and does its tasks."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from edged.engine import footprint, messages
from edged.engine.backend import Backend
from edged.engine.exits import EXIT_BUG, EXIT_LOAD, EXIT_OOM
from edged.engine.wire import Packet, Pipe
from edged.errors import EdgedError, JobFailed, JobStopped
from edged.ports import FramePlan, Task

#: How native libraries word a failed allocation; they raise it as a plain RuntimeError.
_NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory", "CUDA failure 2:")


def serve(pipe: Pipe, make_backend: Callable[[], Backend]) -> int:
    """Load what the daemon says and do its tasks; return the exit status."""
    order = pipe.receive().parse()
    if order["t"] != "load":
        return EXIT_BUG
    try:
        backend = make_backend()
        info = backend.load(messages.order_from(order))
    except MemoryError:
        return EXIT_OOM
    except EdgedError as error:
        pipe.send(asdict(messages.LoadFailed(message=error.message, hint=error.hint)))
        return EXIT_LOAD
    pipe.send(asdict(messages.Loaded(info=info, **_kept(backend))))
    while True:
        status = _obey(pipe, backend, pipe.receive())
        if status is not None:
            return status


def _obey(pipe: Pipe, backend: Backend, packet: Packet) -> int | None:
    """Do what one message says; return an exit status if the process is to end."""
    word = packet.parse()
    match word["t"]:
        case "ping":
            pipe.send(asdict(messages.Pong(n=word["n"])))
        case "run":
            task = messages.task_from(word, packet.body)
            saw = task.look is not None
            del packet, word
            desk = PipeDesk(pipe, task.job)
            end = _do(backend, task, desk)
            if isinstance(end, int):
                return end
            # the daemon looks at our size when it hears of the end: what was the job's is gone then
            del task
            if saw:
                footprint.give_back()
            pipe.send(asdict(end))
            return 0 if desk.quit else None
        case "quit":
            return 0
        case _:  # a stop that came after its job's end
            pass
    return None


def _do(
    backend: Backend, task: Task, desk: PipeDesk
) -> messages.Done | messages.Failed | messages.Stopped | int:
    """Do one task; return its end, or an exit status if the process is to be given up."""
    try:
        completed = backend.run(task, desk)
    except JobFailed as failed:
        return messages.Failed(
            job=task.job, code=failed.code, message=failed.message, **_kept(backend)
        )
    except JobStopped:
        return messages.Stopped(job=task.job, **_kept(backend))
    except EOFError:
        raise
    except MemoryError:
        return EXIT_OOM
    except Exception as error:  # noqa: BLE001  (what a broken model does next is anyone's guess)
        if any(words in str(error) for words in _NO_MEMORY):
            return EXIT_OOM
        traceback.print_exc()
        return EXIT_BUG
    return messages.Done(
        job=task.job,
        answers=completed.answers,
        timings=completed.timings,
        frames=completed.frames,
        **_kept(backend),
    )


def _kept(backend: Backend) -> dict[str, Any]:
    cache_mb, cache_hits = backend.frame_cache
    return {"sessions": backend.sessions, "cache_mb": cache_mb, "cache_hits": cache_hits}


class PipeDesk:
    """The desk of one job: its words go to the daemon."""

    def __init__(self, pipe: Pipe, job: int) -> None:
        self._pipe = pipe
        self._job = job
        self._stage: messages.JobStage = "prepare"
        self._since = time.perf_counter()
        #: The daemon wants this process to end.
        self.quit = False

    def begin(
        self, stage: messages.JobStage, *, work: int = 1, done: int = 0, total: int = 1
    ) -> None:
        """Begin a stage."""
        self._stage = stage
        self._since = time.perf_counter()
        begin = messages.Begin(job=self._job, stage=stage, work=work, done=done, total=total)
        self._pipe.send(asdict(begin))

    def step(
        self,
        *,
        work: int,
        done: int,
        total: int,
        next_work: int = 1,
        text: str = "",
        question: int | None = None,
    ) -> None:
        """Report a step."""
        now = time.perf_counter()
        # one a token: written out, because asdict costs as much as a small model's token
        self._pipe.send(
            {
                "t": "step",
                "job": self._job,
                "stage": self._stage,
                "work": work,
                "took": now - self._since,
                "next": next_work,
                "done": done,
                "total": total,
                "text": text,
                "question": question,
            }
        )
        self._since = now

    def planned(self, plan: FramePlan) -> None:
        """Tell what becomes of the frames."""
        self._pipe.send(asdict(messages.Planned(job=self._job, plan=plan)))

    def check(self) -> None:
        """Hear the daemon, and stop if it says so."""
        stopped = False
        while (packet := self._pipe.poll()) is not None:
            word = packet.parse()
            match word["t"]:
                case "stop":
                    stopped = stopped or word["job"] == self._job
                case "ping":
                    self._pipe.send(asdict(messages.Pong(n=word["n"])))
                case "quit":
                    self.quit = stopped = True
                case _:
                    continue
        if stopped:
            raise JobStopped("the daemon said so")
