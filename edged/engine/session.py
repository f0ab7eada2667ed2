"""One live KV cache, kept between jobs: a job rewinds it to what it shares and appends the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edged.engine.backend import Desk
from edged.engine.sampling import Logits

#: Tokens. Past this a LongRoPE model has computed its cache anew with other rotary tables, and
#: going back from there is not the same as never having been there.
_FIRST_TABLE = 4096


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

    def took(self, tokens: int, seconds: float) -> None:
        """Note what a chunk has cost. Growth is at most twofold: one quick chunk proves little."""
        if tokens < self._least:  # the last bit of a prompt: mostly fixed cost
            return
        aimed = self._most if seconds <= 0 else int(self._aim_s * tokens / seconds)
        self.size = max(self._least, min(aimed, 2 * self.size, self._most))


class Session:
    """A generator, and what it holds.

    Args:
        make: makes a fresh generator for the whole planned context.
        chunks: the size of prefill's chunks; shared by all sessions of a process.
    """

    def __init__(self, make: Callable[[], Any], chunks: Chunks) -> None:
        self._make = make
        self._chunks = chunks
        self._generator: Any = None
        self._ids: list[int] = []
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

    def prefill(self, prompt: Sequence[int], client: str | None, desk: Desk) -> int:
        """Make the cache hold exactly this prompt; return how many of its tokens were there.

        Nothing is shared between clients: how fast an answer comes would tell one of them what
        the other has asked.

        Raises:
            JobStopped: the desk said so, between two chunks.
        """
        cached = self._rewind(prompt, client)
        total, done = len(prompt), cached
        size = min(self._chunks.size, total - done)
        desk.begin("prefill", work=size, done=done, total=total)
        while done < total:
            desk.check()
            began = time.perf_counter()
            self.append(prompt[done : done + size])
            self._chunks.took(size, time.perf_counter() - began)
            done += size
            after = min(self._chunks.size, total - done)
            desk.step(work=size, done=done, total=total, next_work=max(1, after))
            size = after
        return cached

    def append(self, ids: Sequence[int]) -> None:
        """Compute these tokens."""
        generator, self._generator = self._generator, None
        generator.append_tokens(np.asarray(ids, np.int32))
        # only now: after a failure inside, what the cache holds is anyone's guess
        self._generator = generator
        self._ids += ids
        self._crossed = self._crossed or len(self._ids) > _FIRST_TABLE

    def logits(self) -> Logits:
        """Return the logits after the last token, one row of our own."""
        logits: Logits = np.asarray(self._generator.get_logits(), np.float32).reshape(-1)
        return logits

    def _rewind(self, prompt: Sequence[int], client: str | None) -> int:
        """Keep the longest prefix that the cache shares; the last token is always computed anew."""
        if self._generator is None or self._crossed:
            self.drop()
            self._generator = self._make()
        shared = 0
        if client == self._client:
            most = min(len(self._ids), len(prompt) - 1)
            while shared < most and self._ids[shared] == prompt[shared]:
                shared += 1
        self._client = client
        if shared < len(self._ids):
            generator, self._generator = self._generator, None
            generator.rewind_to(shared)
            self._generator = generator
            del self._ids[shared:]
        return shared
