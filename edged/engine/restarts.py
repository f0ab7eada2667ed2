"""When an engine process that has ended is started again, and when that is too often."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """The numbers: seconds, and how many deaths within `window_s` are too many."""

    first_s: float = 1.0
    longest_s: float = 60.0
    many: int = 5
    window_s: float = 600.0


class Restarts:
    """Counts ends of engine processes, and says how long to wait after each."""

    def __init__(
        self, clock: Callable[[], float], backoff: Backoff, random_: random.Random
    ) -> None:
        self._clock = clock
        self._backoff = backoff
        self._random = random_
        self._in_a_row = 0
        self._deaths: deque[float] = deque()
        #: Engine processes started after the first one, for whatever reason.
        self.count = 0

    def died(self) -> float:
        """Note a death (or a failed load); return the seconds to wait before the next start.

        Between half and all of a doubling time, so that boxes that share a power line or a broker
        do not all load a model in the same second.
        """
        self._deaths.append(self._clock())
        doubled = self._backoff.first_s * 2.0 ** min(self._in_a_row, 30)
        self._in_a_row += 1
        return min(doubled, self._backoff.longest_s) * self._random.uniform(0.5, 1.0)

    def worked(self) -> None:
        """Note that a loaded engine did some work: the next death is a first one again."""
        self._in_a_row = 0

    @property
    def recent(self) -> int:
        """Deaths within the window."""
        while self._deaths and self._deaths[0] < self._clock() - self._backoff.window_s:
            self._deaths.popleft()
        return len(self._deaths)

    @property
    def too_many(self) -> str | None:
        """What to say when the engine dies too often, or None."""
        recent = self.recent
        if recent <= self._backoff.many:
            return None
        return f"the engine ended {recent} times in {self._backoff.window_s / 60:.0f} minutes"
