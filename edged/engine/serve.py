"""The engine process once it runs: loads what the daemon says and does its tasks."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict

from edged.engine import messages
from edged.engine.backend import Backend
from edged.engine.exits import EXIT_BUG, EXIT_LOAD, EXIT_OOM
from edged.engine.wire import Pipe
from edged.errors import EdgedError, JobFailed, JobStopped
from edged.ports import Task

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
    pipe.send(asdict(messages.Loaded(info=info, sessions=backend.sessions)))
    while True:
        word = pipe.receive().parse()
        match word["t"]:
            case "ping":
                pipe.send(asdict(messages.Pong(n=word["n"])))
            case "run":
                status = _do(pipe, backend, messages.task_from(word))
                if status is not None:
                    return status
            case "quit":
                return 0
            case _:  # a stop that came after its job's end
                continue


def _do(pipe: Pipe, backend: Backend, task: Task) -> int | None:
    """Do one task and report its end; return an exit status if the process is to be given up."""
    desk = PipeDesk(pipe, task.job)
    try:
        completed = backend.run(task, desk)
    except JobFailed as failed:
        end = messages.Failed(
            job=task.job, code=failed.code, message=failed.message, sessions=backend.sessions
        )
        pipe.send(asdict(end))
    except JobStopped:
        pipe.send(asdict(messages.Stopped(job=task.job, sessions=backend.sessions)))
    except EOFError:
        raise
    except MemoryError:
        return EXIT_OOM
    except Exception as error:  # noqa: BLE001  (what a broken model does next is anyone's guess)
        if any(words in str(error) for words in _NO_MEMORY):
            return EXIT_OOM
        traceback.print_exc()
        return EXIT_BUG
    else:
        done = messages.Done(
            job=task.job,
            answers=completed.answers,
            timings=completed.timings,
            sessions=backend.sessions,
        )
        pipe.send(asdict(done))
    return 0 if desk.quit else None


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
