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


SMALL = Scale()
FULL = Scale(decode_runs=25, decode_s=1.5, decode_tokens=(32, 128), first_runs=31, reuse_runs=3)
#: Whether it runs at all.
SMOKE = Scale(
    decode_runs=1, decode_s=0.1, decode_tokens=(8, 8), first_runs=1, reuse_runs=1,
    system_tokens=60, prefill_s=0.1, flood_runs=1, flood_s=0.3, disk_s=0.05, rest_s=0.3,
)  # fmt: skip
