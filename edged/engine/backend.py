"""What a backend is: the thing in the engine process that knows a model."""

from __future__ import annotations

from typing import Protocol

from edged.engine.messages import JobStage, Order
from edged.ports import Completed, EngineInfo, FramePlan, Task


class Desk(Protocol):
    """Where a backend reports how a job goes, and hears that it should stop.

    A stage is begun, then its steps are done one by one. Whoever watches kills the process when a
    step takes far longer than such steps did before, so nothing long may happen outside a stage.
    """

    def begin(self, stage: JobStage, *, work: int = 1, done: int = 0, total: int = 1) -> None:
        """Begin a stage whose first step has the size `work`.

        That is what its cost grows with: tokens; in `decode_images` frames; in `encode` crops, the
        global view counted; else 1. `done` and `total` are for those who wait: tokens or frames.
        """
        ...

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
        """Report a step as done, with the text it gave; the next one has the size `next_work`."""
        ...

    def planned(self, plan: FramePlan) -> None:
        """Tell what becomes of each of the job's frames.

        Once; and not if the plan that its `Look` has is kept, as it is while it can be.
        """
        ...

    def check(self) -> None:
        """Look for a word from the daemon.

        Raises:
            JobStopped: this job is to end here.
        """
        ...


class Backend(Protocol):
    """A model in this process. One thread, one job at a time."""

    def load(self, order: Order) -> EngineInfo:
        """Load the model and warm it up.

        Raises:
            EdgedError: it cannot be loaded; message and hint say why and what to do.
        """
        ...

    def run(self, task: Task, desk: Desk) -> Completed:
        """Do a job.

        Raises:
            JobFailed: it cannot be done; the backend is as good as before.
            JobStopped: the desk said so.
            MemoryError: no memory is left; the process is to be given up.
        """
        ...

    @property
    def sessions(self) -> int:
        """How many KV caches live."""
        ...

    @property
    def frame_cache(self) -> tuple[float, int]:
        """How many MB the kept frames take, and how often one was found there since the load."""
        ...
