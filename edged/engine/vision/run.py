"""Vision jobs: frames are measured and planned, those not known yet encoded, then it is answered.

One frame is decoded and encoded at a time, and its pixels are gone before the next one's are there.
A frame that the live session still holds, or whose features are kept, is neither decoded nor
encoded again.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edged.engine import footprint, memory
from edged.engine.backend import Desk
from edged.engine.session import FIRST_TABLE, Features, Session, Sight
from edged.engine.text import (
    Ask,
    TextModel,
    answer,
    check_fit,
    check_length,
    constraint,
    conversations,
)
from edged.engine.vision.cache import FrameCache
from edged.engine.vision.decode import PEAK_BYTES_A_PIXEL, BadFrame, decode, probe
from edged.engine.vision.encoder import BadFeatures, Encoder
from edged.engine.vision.plan import Candidate, Conditions, Speed, plan
from edged.engine.vision.transform import needed, transform
from edged.errors import Code, JobFailed
from edged.models.geometry import Geometry
from edged.ports import Completed, FramePlan, Look, PlannedFrame, Task

#: Bytes that a pixel of the crops takes while a frame is cut into them; see `transform`.
_TRANSFORM_BYTES_A_PIXEL = 23
#: Pixels; a frame of fewer is decoded and cut about as quickly as one of so many.
_SMALL = 1_000_000


@dataclass(slots=True)
class _Spent:
    """Seconds, by stage."""

    decode: float = 0.0
    encode: float = 0.0


class Vision:
    """A loaded model that sees.

    Args:
        model: what answers.
        session: what computes; text jobs use the same one.
        encoder: gives features.
        geometry: how frames are cut into crops.
        cache: keeps features.
        limit_mb: what this process may have in memory, MB (10^6 bytes).
        first_token_s: what the first answer about new frames should come within, seconds.
    """

    def __init__(
        self,
        *,
        model: TextModel,
        session: Session,
        encoder: Encoder,
        geometry: Geometry,
        cache: FrameCache,
        limit_mb: float,
        first_token_s: float,
    ) -> None:
        self._model = model
        self._session = session
        self._encoder = encoder
        self._geometry = geometry
        self.cache = cache
        self._limit_mb = limit_mb
        self._first_token_s = first_token_s
        #: Seconds that the last decoded frame took, by its size; see `_size`.
        self._decode_s: float | None = None

    def run(self, task: Task, look: Look, desk: Desk) -> Completed:
        """Do a vision job; see `Backend.run`."""
        started = time.perf_counter()
        spent = _Spent()
        desk.begin("prepare")
        check_length(self._model, task)
        candidates = self._candidates(look, desk)
        made = plan(candidates, self._conditions(task, look, candidates), look.plan)
        if look.plan != made:
            desk.planned(made)
        asks = self._asks(task, made, candidates)
        desk.step(work=1, done=1, total=1)
        asks = self._see(asks, task, look, made, candidates, desk, spent)
        answers, timings = answer(self._model, self._session, asks, task, desk, started=started)
        return Completed(
            answers=answers,
            timings=replace(
                timings, decode_images_ms=1000 * spent.decode, encode_ms=1000 * spent.encode
            ),
            frames=made,
        )

    def warm_up(self, desk: Desk) -> None:
        """Look at a frame of one crop, so that the first job knows what one costs here.

        Its features are not kept; the next job takes the session back to what it shares.

        Raises:
            JobFailed: the model cannot do it.
        """
        side = self._geometry.crop
        picture = io.BytesIO()
        levels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(levels).save(picture, "PNG")
        task = Task(
            job=0, client=None, messages=({"role": "user", "content": [0, "?"]},), max_tokens=1
        )
        self.run(task, Look(frames=(picture.getvalue(),), detail="low"), desk)
        self.cache.clear()

    # Preparing -----------------------------------------------------------------------------------

    def _candidates(self, look: Look, desk: Desk) -> list[Candidate]:
        """Measure the frames."""
        found = []
        for index, data in enumerate(look.frames):
            with _of_frame(index):
                width, height = probe(data)

            def thumb(
                data: bytes = data, index: int = index, pixels: int = width * height
            ) -> NDArray[np.uint8] | None:
                desk.check()
                if PEAK_BYTES_A_PIXEL * pixels / 1e6 > self._limit_mb - footprint.resident_mb():
                    return None  # it may be left out, or known already: no reason to fail yet
                with _of_frame(index):
                    small = decode(data, least=(16, 16)).thumb()
                desk.step(work=1, done=0, total=1)
                return small

            found.append(
                Candidate(
                    index=index,
                    width=width,
                    height=height,
                    digest=hashlib.sha256(data).digest(),
                    thumb=thumb,
                )
            )
        return found

    def _conditions(self, task: Task, look: Look, candidates: Sequence[Candidate]) -> Conditions:
        """Return what a plan depends on."""
        live, text_cached = self._live(task)
        token_s, view_s = self._session.chunks.token_s, self._encoder.view_s
        decode_s = self._decode_s
        if decode_s is not None:
            decode_s *= sum(_size(c) for c in candidates) / len(candidates)
        return Conditions(
            geometry=self._geometry,
            context=self._model.context,
            max_tokens=task.max_tokens,
            text_tokens=self._text_tokens(task),
            text_cached=text_cached,
            detail=look.detail,
            first_token_s=self._first_token_s,
            left_s=look.left_s,
            speed=Speed(
                prefill=1 / token_s if token_s else None, encode_s=view_s, decode_s=decode_s
            ),
            window_min=look.window_min,
            live=live,
            max_crops_now=self._max_crops(candidates),
            encoded=self.cache.of(task.client),  # only now: that may have let some go
        )

    def _text_tokens(self, task: Task) -> Callable[[tuple[int, ...]], int]:
        """Return what counts a prompt's text tokens; of several prompts, the longest's."""
        known: dict[Hashable, list[int]] = {}
        asked = conversations(task)

        def count(indexes: tuple[int, ...]) -> int:
            return max(
                self._model.prompts.outline(messages, indexes, known=known).text_tokens
                for messages in asked
            )

        return count

    def _live(self, task: Task) -> tuple[tuple[tuple[bytes, int], ...], int]:
        """Return the frames that this task could go on from, and the text tokens up to there."""
        start = self._model.prompts.outline(conversations(task)[0]).start
        sights = self._session.seen(start, task.client)
        if not sights:
            return (), self._session.shared([*start, -1], task.client)
        tokens = sights[-1].end - sum(sight.end - sight.start for sight in sights)
        return tuple(sight.key for sight in sights), tokens

    def _asks(self, task: Task, made: FramePlan, candidates: Sequence[Candidate]) -> list[Ask]:
        """Return the prompts; their frames are known by what is seen, not by their features yet."""
        if self._model.placeholder is None:
            raise AssertionError("a vision model without a placeholder")
        tokens = {frame.index: frame.tokens for frame in made.used}
        crops = {frame.index: frame.crops for frame in made.used}
        asks = []
        for messages in conversations(task):
            outline = self._model.prompts.outline(messages, tokens)
            prompt, places = outline.fill(tokens, self._model.placeholder)
            check_fit(self._model, task, len(prompt))
            sights = tuple(
                Sight(
                    start=start,
                    end=start + tokens[index],
                    key=(candidates[index].digest, crops[index]),
                )
                for index, start in places.items()
            )
            asks.append(Ask(prompt, constraint(self._model, task), sights))
        return asks

    # Memory --------------------------------------------------------------------------------------

    def _need_mb(self, crops: int, width: int, height: int) -> float:
        """Return the MB that a frame takes at its peak: while it is decoded, or while encoded."""
        decoding = PEAK_BYTES_A_PIXEL * width * height
        cutting = _TRANSFORM_BYTES_A_PIXEL * (crops + 1) * self._geometry.crop**2
        return max(
            (decoding + cutting) / 1e6,
            memory.encoding_mb(self._geometry, crops, self._encoder.view_mb),
        )

    def _max_crops(self, candidates: Sequence[Candidate]) -> int:
        """Return the most crops there is memory for now, whichever frame it is; at least 1."""
        width, height = max(((c.width, c.height) for c in candidates), key=lambda s: s[0] * s[1])
        free = self._free_mb(self._need_mb(1, width, height))
        fitting = [
            crops
            for crops in range(1, self._geometry.max_crops + 1)
            if self._need_mb(crops, width, height) <= free
        ]
        return max(fitting, default=1)

    def _free_mb(self, need: float) -> float:
        """Return the MB that are free; kept frames go if there would be too few."""
        free = self._limit_mb - footprint.resident_mb()
        if need > free and self.cache.size_mb:
            self.cache.let_go(need - free)
            footprint.give_back()
            free = self._limit_mb - footprint.resident_mb()
        return free

    def _check_memory(self, frame: PlannedFrame, candidate: Candidate) -> None:
        need = self._need_mb(frame.crops, candidate.width, candidate.height)
        free = self._free_mb(need)
        if need > free:
            raise JobFailed(
                Code.MEMORY,
                f"frame {frame.index} ({candidate.width} x {candidate.height}) needs {need:.0f} MB "
                f"while it is looked at, {max(0.0, free):.0f} of the "
                f"{self._limit_mb:.0f} MB that may be used are free: send a smaller frame, or "
                "raise limits.memory_mb",
            )

    # Seeing --------------------------------------------------------------------------------------

    def _see(
        self,
        asks: Sequence[Ask],
        task: Task,
        look: Look,
        made: FramePlan,
        candidates: Sequence[Candidate],
        desk: Desk,
        spent: _Spent,
    ) -> list[Ask]:
        """Return the prompts with the features of all frames that the session does not hold."""
        first = asks[0]
        held = self._session.shared(first.prompt, task.client, first.sights)
        if len(asks) > 1 and self._model.context > FIRST_TABLE:
            held = 0  # between two questions it may have to be computed anew
        rows = {sight.key: self.cache.get((task.client, *sight.key)) for sight in first.sights}
        wanted = {sight.key for sight in first.sights if sight.end > held}
        fresh = {
            key: frame
            for frame in made.used
            if (key := (candidates[frame.index].digest, frame.crops)) in wanted
            and rows[key] is None
        }
        self.cache.hits += len(made.used) - len(fresh)
        for done, (key, frame) in enumerate(fresh.items(), len(rows) - len(fresh)):
            candidate = candidates[frame.index]
            self._check_memory(frame, candidate)
            features = self._encode(
                look.frames[frame.index], frame, candidate, desk, (done, len(rows)), spent
            )
            self.cache.put((task.client, *key), features)
            rows[key] = features
        return [
            replace(ask, sights=tuple(replace(sight, rows=rows[sight.key]) for sight in ask.sights))
            for ask in asks
        ]

    def _encode(
        self,
        data: bytes,
        frame: PlannedFrame,
        candidate: Candidate,
        desk: Desk,
        progress: tuple[int, int],
        spent: _Spent,
    ) -> Features:
        """Return a frame's features; `progress`: how many frames are done, of how many."""
        done, total = progress
        views = frame.crops + 1
        size = candidate.width, candidate.height

        desk.begin("decode_images", done=done, total=total)
        desk.check()
        began = time.perf_counter()
        with _of_frame(frame.index):
            picture = decode(data, needed(*size, frame.crops, self._geometry))
        crops = transform(picture, frame.crops, self._geometry)
        del picture
        took = time.perf_counter() - began
        self._decode_s = took / _size(candidate)
        spent.decode += took
        desk.step(work=1, done=done + 1, total=total)

        desk.begin("encode", work=views, done=done, total=total)
        desk.check()
        began = time.perf_counter()
        try:
            features = self._encoder.encode(crops, frame.tokens)
        except BadFeatures as error:
            raise JobFailed(Code.UNSUPPORTED, f"frame {frame.index}: {error}") from None
        spent.encode += time.perf_counter() - began
        desk.step(work=views, done=done + 1, total=total)
        return features


def _size(candidate: Candidate) -> float:
    """Return a frame's size as far as decoding is slower by it: pixels, small ones being alike."""
    return float(max(candidate.width * candidate.height, _SMALL))


@contextmanager
def _of_frame(index: int) -> Iterator[None]:
    """Say which frame is bad."""
    try:
        yield
    except BadFrame as bad:
        raise JobFailed(Code.BAD_FRAME, f"frame {index}: {bad.reason}") from None
