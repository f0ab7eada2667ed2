"""One live KV cache, kept between jobs: a job rewinds it to what it shares and appends the rest.

A vision model has an input that is no token: a buffer of image features with a row for each
position of the context, which the graph reads where the token is the placeholder. The cache holds
what was computed from those rows, so positions are the same only if the same part of the same frame
stood there, not if the same token did.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.engine.backend import Desk
from edged.engine.sampling import Logits

#: Tokens. Past this a LongRoPE model has computed its cache anew with other rotary tables, and
#: going back from there is not the same as never having been there.
FIRST_TABLE = 4096

#: Image features, [tokens, hidden size], in the model's own number type.
Features = NDArray[Any]


class Chunks:
    """How many tokens of a prefill are computed in one call: about two seconds' worth here.

    That is how long a stop or a sign of life may take to be heard.
    """

    def __init__(self, *, aim_s: float = 2.0, first: int = 64, least: int = 16, most: int = 512):
        self._aim_s = aim_s
        self._least = least
        self._most = most
        #: Tokens of the next chunk.
        self.size = first
        self._tokens = self._seconds = 0.0

    def took(self, tokens: int, seconds: float) -> None:
        """Note what a chunk has cost. Growth is at most twofold: one quick chunk proves little."""
        if tokens < self._least:  # the last bit of a prompt: mostly fixed cost
            return
        # each chunk counts half as much as the one after it, and a larger one more
        self._tokens = self._tokens / 2 + tokens
        self._seconds = self._seconds / 2 + seconds
        aimed = self._most if seconds <= 0 else int(self._aim_s * tokens / seconds)
        self.size = max(self._least, min(aimed, 2 * self.size, self._most))

    @property
    def token_s(self) -> float | None:
        """Seconds that a token took lately; None before that is known."""
        return self._seconds / self._tokens if self._seconds > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """A frame in a prompt: the positions from `start` to before `end` are its tokens."""

    start: int
    end: int
    #: What is seen there: SHA-256 of a frame's bytes, and in how many crops. Of two sights with one
    #: key, row n shows the same.
    key: tuple[bytes, int]
    #: A row for each position; None where the session is known to hold them all.
    rows: Features | None = None


class Session:
    """A generator, and what it holds.

    Args:
        make: makes a fresh generator for the whole planned context; one that reads `features`, if
            there are any.
        chunks: the size of prefill's chunks; shared by all sessions of a process.
        features: the live buffer of image features, [context, hidden size], all zero; None without
            vision. Every generator reads this very memory. Rows beyond the frames that the cache
            holds are zero: what an earlier job looked at is not left lying there.
        rewinds: whether the generator can go back to a shorter prompt. Genai's own vision type
            cannot; it begins anew.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        chunks: Chunks,
        *,
        features: Features | None = None,
        rewinds: bool = True,
    ) -> None:
        self._make = make
        self._rewinds = rewinds
        #: The size of prefill's chunks, and what they have cost.
        self.chunks = chunks
        self._features = features
        self._generator: Any = None
        self._ids: list[int] = []
        self._sights: tuple[Sight, ...] = ()
        self._client: str | None = None
        self._crossed = False

    @property
    def alive(self) -> bool:
        """Whether there is a cache."""
        return self._generator is not None

    def drop(self) -> None:
        """Give the cache up."""
        self._generator = None
        self._ids = []
        self._crossed = False
        self._forget(0)

    def shared(
        self, prompt: Sequence[int], client: str | None, sights: Sequence[Sight] = ()
    ) -> int:
        """Return how many of a prompt's tokens need not be computed; the last one always is.

        Nothing is shared between clients: how fast an answer comes would tell one of them what
        the other has asked.
        """
        if self._generator is None or self._crossed or client != self._client:
            return 0
        most = min(len(self._ids), len(prompt) - 1)
        for held, new in zip(self._sights, sights, strict=False):
            if (held.start, held.end, held.key) != (new.start, new.end, new.key):
                most = min(most, held.start, new.start)
                break
        shared = 0
        while shared < most and self._ids[shared] == prompt[shared]:
            shared += 1
        return shared if self._rewinds or shared == len(self._ids) else 0

    def seen(self, start: Sequence[int], client: str | None) -> tuple[Sight, ...]:
        """Return the frames that the cache holds whole, if a prompt can go on from them.

        Args:
            start: the ids before the prompt's first frame.
            client: who asks; see `shared`.
        """
        if not self._sights or self.shared([*start, -1], client) < len(start):
            return ()
        if self._sights[0].start != len(start):
            return ()
        return tuple(sight for sight in self._sights if sight.end <= len(self._ids))

    def prefill(
        self,
        prompt: Sequence[int],
        client: str | None,
        desk: Desk,
        *,
        sights: Sequence[Sight] = (),
        question: int | None = None,
    ) -> int:
        """Make the cache hold exactly this prompt; return how many of its tokens were there.

        Args:
            prompt: its ids.
            client: who asks; see `shared`.
            desk: where each chunk is reported.
            sights: the frames in it, in order. Those that end within what is shared need no rows.
            question: the index that the steps are reported with.

        Raises:
            JobStopped: the desk said so, between two chunks.
        """
        cached = self._rewind(prompt, client, sights)
        try:
            self._go_on(prompt, cached, desk, question)
        finally:  # what was seen is in the buffer now; the rows are the caller's to keep
            self._sights = tuple(replace(sight, rows=None) for sight in self._sights)
        return cached

    def append(self, ids: Sequence[int]) -> None:
        """Compute these tokens."""
        generator, self._generator = self._generator, None
        generator.append_tokens(np.asarray(ids, np.int32))
        # only now: after a failure inside, what the cache holds is anyone's guess
        self._generator = generator
        self._ids += ids
        self._crossed = self._crossed or len(self._ids) > FIRST_TABLE

    def logits(self) -> Logits:
        """Return the logits after the last token, one row of our own."""
        logits: Logits = np.asarray(self._generator.get_logits(), np.float32).reshape(-1)
        return logits

    def _go_on(self, prompt: Sequence[int], done: int, desk: Desk, question: int | None) -> None:
        """Compute the rest of a prompt of which so many tokens are there, in chunks."""
        total = len(prompt)
        size = min(self.chunks.size, total - done)
        desk.begin("prefill", work=size, done=done, total=total)
        while done < total:
            desk.check()
            began = time.perf_counter()
            self._show(done, done + size)
            self.append(prompt[done : done + size])
            self.chunks.took(size, time.perf_counter() - began)
            done += size
            after = min(self.chunks.size, total - done)
            desk.step(work=size, done=done, total=total, next_work=max(1, after), question=question)
            size = after

    def _rewind(self, prompt: Sequence[int], client: str | None, sights: Sequence[Sight]) -> int:
        """Keep the longest prefix that the cache shares with a prompt."""
        shared = self.shared(prompt, client, sights)
        if self._generator is None or self._crossed or not (self._rewinds or shared):
            self.drop()
            self._generator = self._make()
        self._client = client
        if shared < len(self._ids):
            generator, self._generator = self._generator, None
            generator.rewind_to(shared)
            self._generator = generator
            del self._ids[shared:]
        self._forget(shared)
        self._sights = tuple(sights)
        return shared

    def _show(self, start: int, end: int) -> None:
        """Write the features of the frames between two positions, where the graph reads them."""
        for sight in self._sights:
            first, last = max(start, sight.start), min(end, sight.end)
            if first >= last:
                continue
            if self._features is None or sight.rows is None:
                raise AssertionError(f"no features for the positions {first} to {last}")
            self._features[first:last] = sight.rows[first - sight.start : last - sight.start]

    def _forget(self, position: int) -> None:
        """Zero the rows of what was seen from a position on."""
        for sight in self._sights:
            if self._features is not None and sight.end > position:
                self._features[max(position, sight.start) : sight.end] = 0
        self._sights = tuple(sight for sight in self._sights if sight.start < position)
