"""How long a stage of the engine's work may take before it counts as hung.

Pure arithmetic with an injected clock. The box's own past sets the limit: a Pi that needs minutes
for a prefill is not hung, and one that needed seconds so far and now minutes is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edged.engine.messages import Stage

#: Tasks whose slowest step is remembered.
RECENT = 20
#: Models whose past is kept.
MODELS = 4
#: The smallest work a step's cost is spread over: a step has a fixed cost too, and a prefill of one
#: token says little about one of 512.
_LEAST_WORK: dict[Stage, int] = {"prefill": 32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers, all seconds but `factor`."""

    #: No stage is given less.
    floor_s: float = 60.0
    #: How many times the slowest recent cost.
    factor: float = 10.0
    #: Without a past of this model on this box.
    first_load_s: float = 900.0
    first_s: float = 300.0
    #: What doubling after kills ends at.
    longest_s: float = 3600.0


@dataclass(slots=True)
class _Past:
    """What one stage of one model has cost: seconds a unit of work, the slowest of each task."""

    slowest: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    #: The slowest of the running task.
    current: float | None = None
    #: Kills since this stage last succeeded.
    kills: int = 0


@dataclass(slots=True)
class _Running:
    stage: Stage
    began: float
    limit: float


class Deadlines:
    """The clock that runs against the engine while it is in a stage."""

    def __init__(
        self,
        clock: Callable[[], float],
        limits: Limits | None = None,
        history: Mapping[str, Any] | None = None,
    ) -> None:
        self._clock = clock
        self._limits = limits or Limits()
        self._models: dict[str, dict[Stage, _Past]] = {}
        self._model = ""
        self._running: _Running | None = None
        self._take(history or {})

    def use(self, model: str) -> None:
        """Go on with the past of this model (its fingerprint)."""
        past = self._models.pop(model, {})
        self._models[model] = past  # the most recent is the last
        while len(self._models) > MODELS:
            del self._models[next(iter(self._models))]
        self._model = model

    def limit(self, stage: Stage, work: int = 1) -> float:
        """Return how many seconds a step of this size may take."""
        past = self._past(stage)
        costs = list(past.slowest)
        if past.current is not None:
            costs.append(past.current)
        if costs:
            units = max(work, _LEAST_WORK.get(stage, 1))
            limit = max(self._limits.floor_s, self._limits.factor * max(costs) * units)
        elif stage == "ping":
            limit = self._limits.floor_s
        else:
            limit = self._limits.first_load_s if stage == "load" else self._limits.first_s
        doubled = min(math.ldexp(limit, past.kills), self._limits.longest_s)
        return max(limit, doubled)

    def begin(self, stage: Stage, work: int = 1) -> None:
        """Start the clock for a step of this size."""
        self._running = _Running(stage, self._clock(), self.limit(stage, work))

    def done(self, stage: Stage, took: float, work: int = 1) -> None:
        """Note that a step took this long; the clock stands until the next `begin`."""
        past = self._past(stage)
        cost = took / max(work, _LEAST_WORK.get(stage, 1))
        past.current = cost if past.current is None else max(past.current, cost)
        past.kills = 0
        self._running = None

    def rest(self) -> None:
        """Stop the clock: the engine has nothing to do."""
        self._running = None

    def end_task(self) -> None:
        """Close the books of a task (or a load)."""
        self._running = None
        for past in self._models.get(self._model, {}).values():
            if past.current is not None:
                past.slowest.append(past.current)
                past.current = None

    def excuse(self, seconds: float) -> None:
        """Give back time in which the daemon itself stood still and could not have listened."""
        if self._running is not None:
            self._running.began += seconds

    def left(self) -> float | None:
        """Return the seconds until the running step is overdue; None when nothing runs."""
        if self._running is None:
            return None
        return self._running.began + self._running.limit - self._clock()

    @property
    def running(self) -> tuple[Stage, float] | None:
        """The stage that runs and the seconds its present step has taken."""
        if self._running is None:
            return None
        return self._running.stage, self._clock() - self._running.began

    def killed(self) -> str:
        """Note that the running stage was overdue and its process killed; return what to say."""
        if self._running is None:
            return "no stage was running"
        running, self._running = self._running, None
        self._past(running.stage).kills += 1
        return f"{running.stage} took longer than {running.limit:.0f} s"

    def export(self) -> dict[str, Any]:
        """Return the past, small and fit for JSON, for the next start on this box."""
        return {
            model: {
                stage: {"slowest": [round(cost, 6) for cost in past.slowest], "kills": past.kills}
                for stage, past in stages.items()
                if past.slowest or past.kills
            }
            for model, stages in self._models.items()
            if model
        }

    def _past(self, stage: Stage) -> _Past:
        return self._models.setdefault(self._model, {}).setdefault(stage, _Past())

    def _take(self, history: Mapping[Any, Any]) -> None:
        """Believe a stored past as far as it makes sense: it may come from another version."""
        for model, stages in list(history.items())[-MODELS:]:
            if not isinstance(model, str) or not isinstance(stages, Mapping):
                continue
            past = self._models.setdefault(model, {})
            for stage in ("load", "prepare", "decode_images", "encode", "prefill", "token"):
                stored = stages.get(stage)
                if not isinstance(stored, Mapping):
                    continue
                costs = stored.get("slowest")
                kills = stored.get("kills")
                past[stage] = _Past(
                    deque(
                        (float(c) for c in costs if _sane(c)) if isinstance(costs, list) else (),
                        maxlen=RECENT,
                    ),
                    kills=min(kills, 16) if isinstance(kills, int) and kills > 0 else 0,
                )


def _sane(cost: object) -> bool:
    return isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < 1e6
