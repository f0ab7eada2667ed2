"""What is measured with frames, what came of it, and its rows in the table."""

from __future__ import annotations

import base64
import contextlib
import statistics
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.frames import SIZE
from tests.bench.machine import Meter
from tests.bench.report import TOO_FAST, Goal, Report, Row
from tests.bench.rig import Trail
from tests.bench.scale import Scale
from tests.bench.stock import Looked

#: Seconds of edged's work on new frames from which on the goals apply.
SLOW_ENOUGH_S = 3.0
#: A runtime's threads spin for a moment after their work.
SETTLE_S = 0.2


@dataclass(frozen=True, slots=True)
class Side:
    """The stock side of all comparisons."""

    looked: Looked
    load_s: float
    #: Of the encoder alone, run by onnxruntime: crops and seconds.
    encoder: tuple[int, float]

    @property
    def encoder_s(self) -> float:
        """What the encoder took of it, by its cost for a crop."""
        crops, seconds = self.encoder
        return self.looked.crops * seconds / crops


@dataclass(slots=True)
class Looks:
    """What is measured with frames, and what came of it."""

    folder: Path
    model: Path
    scale: Scale
    report: Report
    #: Tokens of context: edged's, and the stock pipeline's.
    context: int
    stock_context: int
    paths: list[Path]
    threads: int = 0
    clients: int = 0
    #: The most memory of edged's engine, MB, by its context.
    peaks: dict[int, float] = field(default_factory=dict)
    first: list[Trail] = field(default_factory=list)
    windows: list[Trail] = field(default_factory=list)
    anew: list[Trail] = field(default_factory=list)
    anew_all: list[Trail] = field(default_factory=list)
    kept: list[Trail] = field(default_factory=list)
    one_job: Trail | None = None
    many_jobs: list[Trail] = field(default_factory=list)
    stock: Side | None = None
    uses: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def frames(self) -> list[dict[str, str]]:
        """The frames, as a request has them."""
        return [{"image": as_base64(path.read_bytes())} for path in self.paths]

    @property
    def exempt(self) -> str:
        """Why the goals do not apply, if they do not."""
        return TOO_FAST if self.first[0].first("chunk") < SLOW_ENOUGH_S else ""

    def fresh_client(self) -> str:
        """Return a client that nobody has been: it shares no session and no features."""
        self.clients += 1
        return f"v{self.clients}"

    def say(self, what: str) -> None:
        """Tell how far it is."""
        print(f"  {time.strftime('%H:%M:%S')} {what}", flush=True)

    @contextlib.contextmanager
    def metered(self, name: str, **pids: int | None) -> Iterator[None]:
        """Note what the machine did meanwhile."""
        time.sleep(SETTLE_S)
        with Meter({each: pid for each, pid in pids.items() if pid is not None}) as meter:
            yield
        self.uses.setdefault(name, []).append(meter.use.as_dict())


def as_base64(data: bytes) -> str:
    """Return bytes as JSON can hold them."""
    return base64.b64encode(data).decode("ascii")


# What is reported -------------------------------------------------------------------------------


def tell(looks: Looks, made: Collection[str]) -> None:
    """Put into the report what came of the measurements that could be made.

    Where the stock pipeline could not run, edged's own numbers are told without a comparison.
    """
    rows = {
        "frames": _frame_rows, "window": _window_rows, "questions": _question_rows,
        "memory": _memory_rows,
    }  # fmt: skip
    for name in made:
        looks.report.rows += rows[name](looks)
    for name, uses in looks.uses.items():
        looks.report.noise[name] = [use["others"] for use in uses]
    stock = looks.stock
    trails = {
        "frames": looks.first,
        "window": looks.windows,
        "anew": looks.anew,
        "anew_all": looks.anew_all,
        "kept": looks.kept,
        "one_job": [looks.one_job] if looks.one_job else [],
        "many_jobs": looks.many_jobs,
    }
    looks.report.details["vision"] = {
        "frames": {
            "count": len(looks.paths),
            "size": SIZE,
            "png_bytes": [path.stat().st_size for path in looks.paths],
        },
        "context": looks.context,
        "stock_context": looks.stock_context,
        "engine_peak_mb": looks.peaks,
        "stock": None if stock is None else asdict(stock) | {"encoder_s": stock.encoder_s},
        "jobs": {name: [_facts(trail) for trail in each] for name, each in trails.items()},
        "use": looks.uses,
    }


def _facts(trail: Trail) -> dict[str, Any]:
    return {
        "first_chunk_s": round(trail.first("chunk"), 4),
        "final_s": round(trail.final_s, 4),
        "usage": trail.final["usage"],
        "timings": trail.final["timings"],
        "frames": len(trail.final["frames"]["used"]),
    }


def _firsts(trails: list[Trail]) -> list[float]:
    return [trail.first("chunk") for trail in trails]


def _timing(trails: list[Trail], name: str) -> list[float]:
    return [trail.final["timings"][name] / 1e3 for trail in trails]


def _encoder_share(trails: list[Trail]) -> list[float]:
    return [t.final["timings"]["encode_ms"] / t.final["timings"]["ttft_ms"] for t in trails]


def _frame_rows(looks: Looks) -> list[Row]:
    stock, count = looks.stock, len(looks.paths)
    ours = _firsts(looks.first)
    tokens = looks.first[0].final["usage"]["prompt_tokens"]
    what = f"{count} frames of {SIZE[0]}x{SIZE[1]}, detail low"
    rows = [
        Row(key="", what=f"  edged, publish to first chunk, context {looks.context}", values=ours,
            unit="s", note=f"{tokens} tokens"),
        Row(key="", what="  of it the encoder", values=_timing(looks.first, "encode_ms"), unit="s",
            note=f"{2 * count} views"),
        Row(key="", what="  of it the prefill", values=_timing(looks.first, "prefill_ms"),
            unit="s"),
        Row(key="", what="  the encoder's share", values=_encoder_share(looks.first)),
    ]  # fmt: skip
    if stock is None:
        return rows
    looked = stock.looked
    return [
        Row(key="g", what=f"{what}: first token, stock / edged",
            values=[looked.first_s / each for each in ours], goal=Goal(">=", 6),
            exempt=looks.exempt),
        *rows,
        Row(key="", what=f"  stock, PNG files to first token, context {looks.stock_context}",
            values=[looked.first_s], unit="s", note=f"{looked.tokens} tokens"),
        Row(key="", what="  of it the encoder, by its cost alone for a frame",
            values=[stock.encoder_s], unit="s", note=f"{looked.crops} views"),
        Row(key="", what="  its share", values=[stock.encoder_s / looked.first_s]),
    ]  # fmt: skip


def _window_rows(looks: Looks) -> list[Row]:
    count, stock = len(looks.paths), looks.stock
    ticks = _firsts(looks.windows[1:])
    anew = statistics.median(_firsts(looks.anew))
    new = [t.final["usage"] for t in looks.windows[1:]]
    rows = [
        Row(key="h", what=f"a steady camera's tick: {count} frames computed anew / the new one",
            values=[anew / each for each in ticks], goal=Goal(">=", 3), exempt=looks.exempt),
    ]  # fmt: skip
    if stock is not None:
        rows += [
            Row(key="h", what=f"  stock with {count} frames / the new one",
                values=[stock.looked.first_s / each for each in ticks], goal=Goal(">=", 20),
                exempt=looks.exempt),
        ]  # fmt: skip
    return [
        *rows,
        Row(key="", what="  a tick after the first, publish to first chunk", values=ticks,
            unit="s"),
        Row(key="", what="  tokens it computed",
            values=[float(u["prompt_tokens"] - u["cached_tokens"]) for u in new]),
        Row(key="", what="  the encoder's share", values=_encoder_share(looks.windows[1:])),
        Row(key="", what=f"  the first tick, {count} frames", values=_firsts(looks.windows[:1]),
            unit="s"),
        Row(key="", what=f"  {count} frames anew, of another client", values=_firsts(looks.anew),
            unit="s"),
        Row(key="", what=f"  {count + len(ticks)} frames anew, as the last tick had",
            values=_firsts(looks.anew_all), unit="s"),
        Row(key="", what=f"  {count} frames anew, their features kept", values=_firsts(looks.kept),
            unit="s"),
    ]  # fmt: skip


def _question_rows(looks: Looks) -> list[Row]:
    if looks.one_job is None:
        raise RuntimeError("the questions were not asked")
    asked, count = len(looks.many_jobs), len(looks.paths)
    many = sum(trail.final_s for trail in looks.many_jobs)
    return [
        Row(key="i", what=f"{asked} questions on {count} frames: {asked} jobs / one job",
            values=[many / looks.one_job.final_s], goal=Goal(">=", 4), exempt=looks.exempt,
            note=f"{looks.scale.answer_tokens} tokens an answer; a client each, nothing shared"),
        Row(key="", what="  one job, publish to result", values=[looks.one_job.final_s], unit="s"),
        Row(key="", what=f"  {asked} jobs, the sum of that", values=[many], unit="s"),
    ]  # fmt: skip


def _memory_rows(looks: Looks) -> list[Row]:
    stock, peaks = looks.stock, looks.peaks
    rows = []
    if stock is not None:
        theirs = stock.looked.peak_mb
        rows += [
            Row(key="j", what="peak memory of the engine / of stock, each at its context",
                values=[peaks[looks.context] / theirs], goal=Goal("<=", 0.6), exempt=looks.exempt,
                note=f"{looks.context} and {looks.stock_context} tokens"),
        ]  # fmt: skip
        if len(peaks) > 1:
            at = f"  both at {looks.stock_context}"
            rows.append(Row(key="", what=at, values=[peaks[looks.stock_context] / theirs]))
        rows.append(Row(key="", what="  stock", values=[theirs], unit="MB"))
    rows += [
        Row(key="", what=f"  engine, context {context}", values=[mb], unit="MB")
        for context, mb in peaks.items()
    ]
    return rows
