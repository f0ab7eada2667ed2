"""Which job is next: a bounded queue with priorities, fair between clients.

Pure logic on the event loop; nothing here waits for disk, broker or engine.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING

from edged.errors import Code, Refused
from edged.jobs import Job, Key, Stamp

if TYPE_CHECKING:
    from edged.metrics import Speed

#: One place in this many is kept back for clients that hold few.
RESERVED_ONE_IN = 8

_BY_SEQ = attrgetter("seq")


class Scheduler:
    """The jobs that wait, and the one that runs.

    Order: higher `priority` first; within a priority the client that has had the least engine time;
    within a client the oldest. Engine time is counted as in start-time fair queueing (Goyal 1996):
    a client that comes back after a pause starts level with the others and has saved up nothing.

    Args:
        limit: how many jobs may wait.
        speed: what jobs took here.
        trouble: tells why the box should be spared, if it should; then half as many may wait.
    """

    def __init__(
        self, limit: int, speed: Speed, trouble: Callable[[], str | None] = lambda: None
    ) -> None:
        self._limit = limit
        self._speed = speed
        self._trouble = trouble
        self._jobs: dict[Key, Job] = {}
        #: priority -> client -> waiting jobs, oldest first
        self._lines: defaultdict[int, dict[str | None, list[Job]]] = defaultdict(dict)
        self._held: defaultdict[str | None, int] = defaultdict(int)  # places, promised or taken
        self._promised = 0  # places of jobs on their way to the journal
        self._served: dict[str | None, float] = {}  # engine seconds, by client
        self._with_deadline: dict[Key, Job] = {}
        self._running: Job | None = None
        self._arrived = asyncio.Event()

    # Admission

    def reserve(self, client: str | None) -> None:
        """Keep a place for a job that is on its way into the journal.

        Raises:
            Refused: `queue_full`; with the time after which a place is likely.
        """
        taken, held = len(self._jobs) + self._promised, self._held.get(client, 0)
        trouble = self._trouble()
        limit = self._limit if trouble is None else max(1, self._limit // 2)
        spare = limit // RESERVED_ONE_IN
        if taken >= (limit if held < spare else limit - spare):
            typical = self._speed.typical_s()
            half = f" now, because {trouble}" if trouble else ""
            kept = f", {spare} of them kept for clients with few jobs" if spare else ""
            raise Refused(
                Code.QUEUE_FULL,
                f"{taken} jobs wait, {held} of them yours; the queue takes {limit}{half}{kept}. "
                "Send it again later",
                retry_after_s=max(0.1, round(typical, 1)) if typical else 10.0,
            )
        self._promised += 1
        self._held[client] += 1

    def give_up(self, client: str | None) -> None:
        """Free a reserved place whose job did not come to be."""
        self._promised -= 1
        self._leave(client)

    def admit(self, job: Job) -> None:
        """Put a job that the journal has on the place that was reserved for it."""
        self.give_up(job.key.client)
        self.requeue(job)

    def requeue(self, job: Job) -> None:
        """Put a job back that was accepted earlier, whatever the limit."""
        self._end_run(job)
        client = job.key.client
        if not self._held.get(client):
            self._served[client] = max(self._served.get(client, 0.0), self._level())
        self._held[client] += 1
        self._jobs[job.key] = job
        insort(self._lines[job.priority].setdefault(client, []), job, key=_BY_SEQ)
        if job.deadline_s is not None:
            self._with_deadline[job.key] = job
        self._arrived.set()

    def _level(self) -> float:
        active = {client for client, count in self._held.items() if count}
        if self._running is not None:
            active.add(self._running.key.client)
        return min((self._served.get(client, 0.0) for client in active), default=0.0)

    def _leave(self, client: str | None) -> None:
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]

    def _end_run(self, job: Job) -> None:
        if self._running is not None and self._running.key == job.key:
            self._running = None
            self._with_deadline.pop(job.key, None)

    def _take(self, key: Key) -> Job | None:
        job = self._jobs.pop(key, None)
        if job is None:
            return None
        lines = self._lines[job.priority]
        line = lines[key.client]
        line.remove(job)
        if not line:
            del lines[key.client]
        self._with_deadline.pop(key, None)
        self._leave(key.client)
        return job

    # The way out

    async def wait(self) -> None:
        """Wait until a job waits."""
        while not self._jobs:
            self._arrived.clear()
            await self._arrived.wait()

    def take(self) -> Job | None:
        """Make the next job the running one; None if none waits."""
        if not self._jobs:
            return None
        lines = self._lines[max(priority for priority, line in self._lines.items() if line)]
        best = min(lines, key=lambda client: (self._served.get(client, 0.0), lines[client][0].seq))
        job = lines[best][0]
        self._take(job.key)
        self._running = job
        if job.deadline_s is not None:
            self._with_deadline[job.key] = job
        return job

    def done(self, job: Job, engine_s: float = 0.0) -> None:
        """Take a job out, whether it ran or waited, and charge its client's engine time."""
        self.charge(job.key.client, engine_s)
        self._take(job.key)
        self._end_run(job)
        if not self._jobs and self._running is None:
            self._served.clear()  # nobody left to be fair to; this bounds the table

    def charge(self, client: str | None, engine_s: float) -> None:
        """Count engine time that a client's job has used."""
        self._served[client] = self._served.get(client, 0.0) + engine_s

    # What others ask

    @property
    def running(self) -> Job | None:
        """The job that the engine works on."""
        return self._running

    @property
    def depth(self) -> int:
        """How many accepted jobs wait, the running one not counted."""
        return len(self._jobs)

    @property
    def waiting(self) -> Iterator[Job]:
        """The jobs that wait, in no particular order."""
        return iter(self._jobs.values())

    def find(self, key: Key) -> Job | None:
        """Return a job that waits or runs."""
        if self._running is not None and self._running.key == key:
            return self._running
        return self._jobs.get(key)

    def update(self, job: Job) -> None:
        """Replace what is known of a job: its reply topics, its counts."""
        if self._running is not None and self._running.key == job.key:
            self._running = job
        elif (old := self._jobs.get(job.key)) is not None:
            self._jobs[job.key] = job
            line = self._lines[job.priority][job.key.client]
            line[line.index(old)] = job
        if job.key in self._with_deadline:
            self._with_deadline[job.key] = job

    def place(self, job: Job) -> tuple[int, float | None]:
        """Return how many jobs are ahead, and the seconds until this one likely ends.

        Ahead are the running one, those of higher priority, its client's earlier ones and, one for
        each of these and for itself, the other clients': turns are taken about evenly. None:
        nothing has been measured yet.
        """
        if self._running is not None and self._running.key == job.key:
            return 0, self._speed.estimate_s(job)
        client = job.key.client
        lines = self._lines[job.priority]
        mine = bisect_left(lines.get(client, []), job.seq, key=_BY_SEQ)
        served = self._served.get(client, 0.0)
        ahead = mine + (self._running is not None)
        for priority, others in self._lines.items():
            if priority > job.priority:
                ahead += sum(map(len, others.values()))
        for other, line in lines.items():
            if other != client:
                turns = mine + (self._served.get(other, 0.0) <= served)
                ahead += min(len(line), turns)
        typical, own = self._speed.typical_s(), self._speed.estimate_s(job)
        return ahead, None if typical is None or own is None else ahead * typical + own

    def oldest_s(self, now: Stamp) -> float:
        """Return how long the oldest waiting job has waited, in seconds."""
        return max((now.since(job.arrived) for job in self._jobs.values()), default=0.0)

    def expired(self, now: Stamp) -> list[Job]:
        """Return the jobs, waiting or running, whose deadline has passed."""
        return [
            job
            for job in self._with_deadline.values()
            if (left := job.left_s(now)) is not None and left <= 0
        ]

    def next_deadline_s(self, now: Stamp) -> float | None:
        """Return the seconds to the nearest deadline of a waiting or running job."""
        lefts = (job.left_s(now) for job in self._with_deadline.values())
        return min((left for left in lefts if left is not None), default=None)
