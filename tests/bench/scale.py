"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Repetitions, and the sizes of what is repeated."""

    decode_runs: int = 7
    #: Seconds of decoding in one run, and the bounds of its tokens.
    decode_s: float = 2.0
    decode_tokens: tuple[int, int] = (32, 256)
    first_runs: int = 21
    reuse_runs: int = 5
    #: Of the shared system prompt.
    system_tokens: int = 500
    prefill_runs: int = 1
    prefill_s: float = 60.0
    flood_runs: int = 3
    flood_s: float = 8.0
    disk_s: float = 1.0
    #: Repetitions end after this many seconds, if there are three: for a machine that is busy.
    most_s: float = 300.0
    rest_s: float = 30.0
    #: Frames of a vision job, as many of them as the stock pipeline's context has room for.
    frames: int = 4
    look_runs: int = 3
    #: Ticks of a steady camera after the first.
    ticks: int = 4
    questions: int = 5
    #: Of an answer about frames.
    answer_tokens: int = 16
    camera_s: float = 20.0
    camera_flood_s: float = 14.0


SMALL = Scale()
FULL = Scale(
    decode_runs=25, decode_s=1.5, decode_tokens=(32, 128), first_runs=31, reuse_runs=3, look_runs=2,
)  # fmt: skip
#: Whether it runs at all.
SMOKE = Scale(
    decode_runs=1, decode_s=0.1, decode_tokens=(8, 8), first_runs=1, reuse_runs=1,
    system_tokens=60, prefill_s=0.1, flood_runs=1, flood_s=0.3, disk_s=0.05, rest_s=0.3,
    look_runs=1, ticks=1, questions=2, answer_tokens=4, camera_s=1.0, camera_flood_s=1.0,
)  # fmt: skip
