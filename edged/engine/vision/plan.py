"""Which of a job's frames the model sees, and how closely: decided before anything is encoded.

Every number is exact and known beforehand: a frame's tokens follow from its size and its crops, the
text's from the tokenizer. A plan never exceeds the context.

**Crops.** `low`: one a frame. `high`: as many as fit, 16 for a single frame and 4 for each of
several at most (the advice of Phi-3.5-vision's model card). `auto`: of these, as many as let the
first token come in time: `first_token_s`, or half of what is left to the deadline if that is less.
Counted are the frames to decode, the crops to encode (a global view each among them) and the tokens
to prefill, at the speeds seen here; what is encoded or in the live session already costs nothing.
Until the speeds are known it is one crop, which is how they become known. One crop a frame is the
least, however slow; frames are never dropped for time. All frames whose crops are decided together
have the same budget.

**Too much for the context.** First fewer crops, down to one. Then frames that hardly differ from
the one before them go, the likeliest first. Then frames are left out evenly, the first and the last
staying. Those of a job come evenly in time, so their places stand for times. Of a last pair the
newer one stays. Not even that one: `too_long`. A client's `max_tokens` is part of the sum. Without
one, `ANSWER_RESERVE` tokens are left for the answer; for the sake of a last frame at one crop less.

**The live session.** Its frames keep their places and crops if a plan can go on from them, so that
only frames after them cost anything: with `auto` and a list of frames that begins like it, unless
one of them was seen in more crops than each of so many may have; with a window that holds its
frames in a row. Frames of a window that are older than that row have moved
out of it. (`low` keeps only what has one crop, `high` only what has at least the crops it would
give.) New frames of a window get no more crops than the live ones have, so that frames look alike.

**A window's cost.** A tick decodes, encodes and prefills the frames that came since the last one,
and prefills the question; a steady camera's tick is one frame. When the context is full, or the
live frames have left the camera's buffer, the window begins anew: its newest `window_min` frames
are prefilled, which is the largest tick of a steady camera, and only the one new frame of them is
encoded as long as the others' features are cached. With `auto` a window that begins takes more than
one crop a frame only if as many frames again will fit, so that it begins anew at every
`window_min` + 1 ticks at the soonest, and a tick's prefill is below two frames on average. `high`
fills the context and begins anew sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edged.engine.vision.transform import grid, grid_of
from edged.errors import Code, JobFailed
from edged.models.geometry import Geometry
from edged.ports import Detail, DroppedFrame, FramePlan, PlannedFrame

#: Tokens for an answer whose length the client did not limit.
ANSWER_RESERVE = 128
#: Crops a frame, if several are looked at together.
_SEVERAL = 4
#: Mean difference of two thumbs, in grey levels of 255: below it is noise, and light that changes.
_ALIKE = 4.0

_MOVED_ON = "the window has moved on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A frame of the job."""

    #: From 0, in the request's order.
    index: int
    #: Pixels, upright.
    width: int
    height: int
    #: SHA-256 of the frame's bytes.
    digest: bytes
    #: Makes a small grey picture of it, to find near-duplicates; called only if frames must go.
    #: None, or a thumb that is None: never a near-duplicate.
    thumb: Callable[[], NDArray[np.uint8] | None] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What work costs on this box; None where it is not known yet."""

    #: Tokens a second.
    prefill: float | None = None
    #: Seconds a crop; a global view is one.
    encode_s: float | None = None
    #: Seconds a frame.
    decode_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Everything but the frames that a plan depends on."""

    geometry: Geometry
    #: Tokens of a prompt and its answer.
    context: int
    #: As the client gave it.
    max_tokens: int | None = None
    #: The exact tokens of the prompt without its frames' own, if the frames of these indexes are in
    #: it; called with ascending indexes, once for each choice of frames at most.
    text_tokens: Callable[[tuple[int, ...]], int] = field(repr=False)
    #: How many of them, at the beginning, are in the live session.
    text_cached: int = 0
    detail: Detail = "auto"
    #: Seconds.
    first_token_s: float = 30.0
    left_s: float | None = None
    speed: Speed = Speed()
    #: How many of the newest frames a window begins anew with; None: no window.
    window_min: int | None = None
    #: Digest and crops of the frames in the live session, after the same text, in order.
    live: tuple[tuple[bytes, int], ...] = ()
    #: The (digest, crops) whose features are kept.
    encoded: Container[tuple[bytes, int]] = frozenset()
    #: Crops of a frame, its global view not counted, for which the encoder has memory.
    max_crops_now: int | None = None


def plan(
    candidates: Sequence[Candidate], conditions: Conditions, kept: FramePlan | None = None
) -> FramePlan:
    """Decide what becomes of a job's frames.

    Args:
        candidates: in time order, their indexes counting from 0; at least one.
        conditions: what it depends on.
        kept: the plan of an earlier start; it is used as it is if it can be.

    Raises:
        JobFailed: too_long; not even one frame at one crop fits.
    """
    if kept is not None and check(kept, candidates, conditions):
        return kept
    planner = _Planner(conditions)
    if conditions.window_min is None:
        return planner.chosen(candidates)
    return planner.growing(candidates, conditions.window_min)


def check(kept: FramePlan, candidates: Sequence[Candidate], conditions: Conditions) -> bool:
    """Tell whether an earlier plan is one for these frames and this model, and fits."""
    named = sorted([f.index for f in kept.used] + [f.index for f in kept.dropped])
    by_index = {c.index: c for c in candidates}
    if not kept.used or named != sorted(by_index):
        return False
    indexes = tuple(f.index for f in kept.used)
    if list(indexes) != sorted(indexes):
        return False
    geometry = conditions.geometry
    for frame in kept.used:
        candidate = by_index[frame.index]
        cells = grid_of(candidate.width, candidate.height, frame.crops, geometry)
        if cells is None or frame.crops > geometry.max_crops:
            return False
        if geometry.tokens(*cells) != frame.tokens:
            return False
    total = conditions.text_tokens(indexes) + sum(f.tokens for f in kept.used)
    return total + (conditions.max_tokens or 1) <= conditions.context


@dataclass(frozen=True, slots=True)
class _Fit:
    """A frame with its crops decided."""

    candidate: Candidate
    crops: int
    tokens: int
    #: It is in the live session, at its place.
    live: bool = False


class _Planner:
    def __init__(self, conditions: Conditions) -> None:
        self._given = conditions
        self._geometry = conditions.geometry
        self._texts: dict[tuple[int, ...], int] = {}
        answer = conditions.max_tokens
        #: Tokens of a prompt; and if nothing else fits, where an answer may become short.
        self._room = conditions.context - (ANSWER_RESERVE if answer is None else answer)
        self._last_room = conditions.context - (1 if answer is None else answer)

    # The two kinds of jobs -----------------------------------------------------------------------

    def chosen(self, candidates: Sequence[Candidate]) -> FramePlan:
        """Plan for frames that the client chose."""
        if self._given.detail == "auto":
            shared = self._shared(candidates, 0)
            going_on = self._go_on(candidates, shared)
            limit = self._limit(len(candidates))  # one frame alone may have had more
            if going_on is not None and all(n <= limit for _, n in self._given.live[:shared]):
                return _result(going_on, {})
        return self._anew(candidates, {}, ahead=0)

    def growing(self, candidates: Sequence[Candidate], least: int) -> FramePlan:
        """Plan for a camera's growing window."""
        start, shared = self._run(candidates)
        if shared:
            row = candidates[start:]
            most = max(crops for _, crops in self._given.live[:shared])
            going_on = self._go_on(row, shared, most=most)
            if going_on is not None and self._close_enough(going_on[:shared], row):
                return _result(going_on, dict.fromkeys(range(start), _MOVED_ON))
        least = max(1, least)
        start = max(0, len(candidates) - least)
        reason = f"{_MOVED_ON}: it begins anew with the newest {least}"
        ahead = least if self._given.detail == "auto" else 0
        return self._anew(candidates[start:], dict.fromkeys(range(start), reason), ahead=ahead)

    # Going on from the live session --------------------------------------------------------------

    def _run(self, candidates: Sequence[Candidate]) -> tuple[int, int]:
        """Return where in the candidates the live frames begin, and how many are there in a row."""
        best = (0, 0)
        for start in range(len(candidates)):
            shared = self._shared(candidates, start)
            if shared > best[1]:
                best = (start, shared)
        return best

    def _shared(self, candidates: Sequence[Candidate], start: int) -> int:
        """Return how many candidates, from there on, are the live session's first frames."""
        shared = 0
        for candidate, (digest, crops) in zip(candidates[start:], self._given.live, strict=False):
            if candidate.digest != digest or self._exactly(candidate, crops) is None:
                break
            shared += 1
        return shared

    def _go_on(
        self, row: Sequence[Candidate], shared: int, most: int | None = None
    ) -> list[_Fit] | None:
        """Keep the live ones' crops and decide the others'; None if not all of them fit."""
        if not shared:
            return None
        live = [self._exactly(c, n) for c, (_, n) in zip(row, self._given.live, strict=False)]
        head = [fit for fit in live[:shared] if fit is not None]
        limit = self._limit(len(row))
        return self._crops(head, row[shared:], limit if most is None else min(limit, most))

    def _close_enough(self, live: Sequence[_Fit], row: Sequence[Candidate]) -> bool:
        """Tell whether the live frames are looked at as closely as the job asks."""
        if self._given.detail == "auto":
            return True
        fresh = self._crops([], row, self._limit(len(row)))
        if self._given.detail == "low" or fresh is None:
            return all(fit.crops == 1 for fit in live)
        return all(fit.crops >= new.crops for fit, new in zip(live, fresh, strict=False))

    def _exactly(self, candidate: Candidate, crops: int) -> _Fit | None:
        cells = grid_of(candidate.width, candidate.height, crops, self._geometry)
        if cells is None or crops > self._geometry.max_crops:
            return None
        return _Fit(candidate, crops, self._geometry.tokens(*cells), live=True)

    # Deciding anew -------------------------------------------------------------------------------

    def _anew(
        self, candidates: Sequence[Candidate], dropped: dict[int, str], ahead: int
    ) -> FramePlan:
        """Decide every frame's crops, leaving out frames only if one crop each is too much."""
        limit = self._limit(len(candidates))
        fits = self._crops([], candidates, limit, ahead=ahead)
        if fits is None:
            row = self._drop(candidates, dropped)
            fits = self._crops([], row, self._limit(len(row)), ahead=ahead)
            if fits is None:
                fits = [self._at(row[0], 1)]  # into the reserve
        return _result(fits, dropped)

    def _drop(self, candidates: Sequence[Candidate], dropped: dict[int, str]) -> list[Candidate]:
        """Return frames that fit at one crop each, and note why the others do not stay.

        Raises:
            JobFailed: too_long.
        """
        row = list(candidates)
        pictures = [_thumb(c) for c in row] if len(row) > 2 else []
        while len(row) > 2 and not self._fit_at_one(row):
            likeness = [_difference(pictures[n - 1], pictures[n]) for n in range(1, len(row) - 1)]
            least = min(likeness)
            if least >= _ALIKE:
                break
            at = 1 + likeness.index(least)
            gone = row.pop(at)
            pictures.pop(at)
            dropped[gone.index] = (
                f"no room in the context, and hardly different from frame {row[at - 1].index}"
            )
        for count in range(len(row), 0, -1):
            chosen = _evenly(row, count)
            if self._fit_at_one(chosen):
                break
        else:
            chosen = row[-1:]
            needed = self._total([self._at(chosen[0], 1)])
            if needed > self._last_room:
                raise self._too_long(needed)
        stay = {c.index for c in chosen}
        plural = "frame fits" if len(chosen) == 1 else "frames fit"
        for candidate in row:
            if candidate.index not in stay:
                dropped[candidate.index] = f"no room in the context: {len(chosen)} {plural}"
        return chosen

    def _fit_at_one(self, row: Sequence[Candidate]) -> bool:
        return self._total([self._at(c, 1) for c in row]) <= self._room

    def _crops(
        self, head: list[_Fit], row: Sequence[Candidate], limit: int, ahead: int = 0
    ) -> list[_Fit] | None:
        """Return the head, and the row with the largest common budget that fits and is in time.

        Args:
            head: frames whose crops are decided.
            row: the frames after them.
            limit: the largest budget, crops.
            ahead: for so many more frames like those of the row room is left, if more than one crop
                each is given for it.

        Returns:
            None if one crop each is too much for the context.
        """
        for budget in range(limit if row else 1, 0, -1):
            fits = head + [self._at(c, budget) for c in row]
            total = self._total(fits)
            growth = 0
            if ahead and row and budget > 1:
                growth = ahead * (max(f.tokens for f in fits) + self._separator(row))
            if total + growth <= self._room and (budget == 1 or self._in_time(fits, total)):
                return fits
        return None

    def _separator(self, row: Sequence[Candidate]) -> int:
        """Return the text tokens that one more frame brings along, about."""
        alone, both = (row[0].index,), tuple(c.index for c in row)
        more = max(1, len(row) - 1)
        return max(1, -(-(self._text(both) - self._text(alone)) // more))

    def _in_time(self, fits: Sequence[_Fit], total: int) -> bool:
        """Tell whether the first token comes soon enough; always, unless that is what is asked."""
        given, speed = self._given, self._given.speed
        if given.detail != "auto":
            return True
        fresh = [f for f in fits if not f.live]
        if not fresh:
            return True
        if speed.prefill is None or speed.encode_s is None or speed.prefill <= 0:
            return False
        target = given.first_token_s
        if given.left_s is not None:
            target = min(target, given.left_s / 2)
        unknown = [f for f in fresh if (f.candidate.digest, f.crops) not in given.encoded]
        cached = given.text_cached + sum(f.tokens for f in fits if f.live)
        seconds = (
            max(0, total - cached) / speed.prefill
            + sum(f.crops + 1 for f in unknown) * speed.encode_s
            + len(unknown) * (speed.decode_s or 0.0)
        )
        return seconds <= target

    def _at(self, candidate: Candidate, budget: int) -> _Fit:
        width, height = candidate.width, candidate.height
        rows, columns = grid(width, height, budget, self._geometry)
        return _Fit(candidate, rows * columns, self._geometry.tokens(rows, columns))

    def _limit(self, frames: int) -> int:
        """Return the most crops a frame may have, one of so many."""
        limit = 1
        if self._given.detail != "low":
            limit = self._geometry.max_crops
            if frames > 1:
                limit = min(limit, _SEVERAL)
        if self._given.max_crops_now is not None:
            limit = min(limit, self._given.max_crops_now)
        return max(1, limit)

    # Sums ----------------------------------------------------------------------------------------

    def _total(self, fits: Sequence[_Fit]) -> int:
        """Return the tokens of the whole prompt."""
        return self._text(tuple(f.candidate.index for f in fits)) + sum(f.tokens for f in fits)

    def _text(self, indexes: tuple[int, ...]) -> int:
        if indexes not in self._texts:
            self._texts[indexes] = self._given.text_tokens(indexes)
        return self._texts[indexes]

    def _too_long(self, needed: int) -> JobFailed:
        context, answer = self._given.context, self._given.max_tokens
        if answer is None:
            return JobFailed(
                Code.TOO_LONG,
                f"the text and one frame at its smallest are {needed} tokens, the context has "
                f"{context}: shorten the text",
            )
        return JobFailed(
            Code.TOO_LONG,
            f"the text, one frame at its smallest and max_tokens {answer} are {needed + answer} "
            f"tokens, the context has {context}: shorten the text, or lower or leave out "
            "max_tokens",
        )


def _result(fits: Sequence[_Fit], dropped: dict[int, str]) -> FramePlan:
    return FramePlan(
        used=tuple(PlannedFrame(f.candidate.index, f.crops, f.tokens) for f in fits),
        dropped=tuple(DroppedFrame(index, dropped[index]) for index in sorted(dropped)),
    )


def _evenly(row: Sequence[Candidate], count: int) -> list[Candidate]:
    """Return so many of a row, evenly spread, the first and the last too; if one, the last."""
    if count == 1:
        return [row[-1]]
    steps = count - 1
    return [row[(2 * n * (len(row) - 1) + steps) // (2 * steps)] for n in range(count)]


def _thumb(candidate: Candidate) -> NDArray[np.uint8] | None:
    return candidate.thumb() if candidate.thumb is not None else None


def _difference(one: NDArray[np.uint8] | None, other: NDArray[np.uint8] | None) -> float:
    """Return the mean difference of two thumbs, grey levels; infinite if it cannot be told."""
    if one is None or other is None or one.shape != other.shape:
        return float("inf")
    return float(np.abs(one.astype(np.int16) - other).mean())
