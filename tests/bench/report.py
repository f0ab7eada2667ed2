"""What a measurement gives: rows, each with a value, its spread, and a goal it meets or misses."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

TOO_FAST = "model too fast for the goal"


@dataclass(frozen=True, slots=True)
class Goal:
    """What a value should be."""

    sign: Literal["<=", "<", ">="]
    bound: float

    def met(self, value: float) -> bool:
        """Return whether a value is as it should be."""
        if self.sign == ">=":
            return value >= self.bound
        return value < self.bound if self.sign == "<" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Its value is the median of `values`, or the worst of them."""

    key: str
    what: str
    values: Sequence[float]
    unit: str = ""
    goal: Goal | None = None
    #: The value is the largest, not the median.
    worst: bool = False
    #: Why the goal does not apply to this run, if it does not.
    exempt: str = ""
    note: str = ""

    @property
    def value(self) -> float:
        """What is compared with the goal."""
        return max(self.values) if self.worst else statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """`met`, `missed`, why neither, or nothing without a goal."""
        if self.goal is None:
            return ""
        return self.exempt or ("met" if self.goal.met(self.value) else "missed")

    def as_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return {
            "key": self.key,
            "what": self.what,
            "unit": self.unit,
            "value": self.value,
            "statistic": "worst" if self.worst else "median",
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
            "goal": str(self.goal) if self.goal else None,
            "verdict": self.verdict or None,
            "note": self.note or None,
        }


@dataclass(slots=True)
class Report:
    """A whole run."""

    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    #: What is of interest beside the rows, by the measurement's name.
    details: dict[str, Any] = field(default_factory=dict)
    #: Of the machine, used by programs that are not part of it, by the measurement's name.
    noise: dict[str, Sequence[float]] = field(default_factory=dict)
    #: Measurements that could not be made, and why.
    broken: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """Return the rows for people."""
        head = ("", "what", "value", "spread", "n", "goal", "")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        right = {2, 3, 4}
        return "\n".join(
            "  ".join(
                cell.rjust(width) if column in right else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def write(self, path: Path) -> None:
        """Write it all as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {
            "facts": self.facts,
            "rows": [row.as_dict() for row in self.rows],
            "noise": {name: list(shares) for name, shares in self.noise.items()},
            "details": self.details,
            "broken": self.broken,
        }
        path.write_text(json.dumps(body, indent=1) + "\n")


def _cells(row: Row) -> tuple[str, ...]:
    low, high = min(row.values), max(row.values)
    spread = f"{_short(low)} .. {_short(high)}" if len(row.values) > 1 else ""
    value = f"{_short(row.value)} {row.unit}".rstrip()
    tail = "; ".join(filter(None, (row.verdict, row.note)))
    goal = str(row.goal) if row.goal else ""
    return row.key, row.what, value, spread, str(len(row.values)), goal, tail


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
