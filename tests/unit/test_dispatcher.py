"""The dispatcher, where it cannot be reached from outside."""

from __future__ import annotations

from typing import Any, cast

import pytest

from edged.dispatcher import Dispatcher
from edged.errors import Code, FramesLost, JobFailed, JobGone, Loss
from edged.jobs import Job, Key, Kind, Stamp

NOW = Stamp(boot_id="b", boottime=1.0, wall=1.0, synced=True, ran=1.0)
JOB = Job(
    seq=1, key=Key(None, "x"), kind=Kind.VISION, request={}, digest=b"", replies=(), priority=5,
    arrived=NOW, deadline_s=None, frames=2,
)  # fmt: skip


class Lossy:
    """A journal that does not have a job's frames."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def frames(self, seq: int) -> tuple[bytes, ...]:
        raise self.error


@pytest.mark.parametrize("error", [FramesLost(Loss.MISSING, "gone"), JobGone("job 1 is gone")])
async def test_a_job_whose_frames_are_lost_never_reaches_the_engine(error: Exception) -> None:
    names = ("engine", "cameras", "scheduler", "outbox", "bus", "totals", "speed", "clock")
    others = cast("Any", dict.fromkeys(names))
    dispatcher = Dispatcher(
        journal=cast("Any", Lossy(error)), stream_interval_s=1.0, stream_bytes=1, **others
    )
    with pytest.raises(JobFailed, match="frames of this job are lost") as caught:
        await dispatcher._frames(JOB)
    assert caught.value.code is Code.DEAD
