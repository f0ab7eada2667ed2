"""Choosing the next token from the logits, in the daemon's way and not in the model folder's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edged.ports import Sampling

Logits = NDArray[np.float32]

#: Candidates that are looked at first when only `top_p` cuts: almost always enough, and sorting a
#: whole vocabulary of 200 000 takes longer than a small model's token.
_HEAD = 2048


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: how.
        prompt: the prompt's ids; the repetition penalty counts them, as genai's does.
        vocab_size: how many logits there are.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int) -> None:
        self._sampling = sampling
        self._penalty = np.float32(sampling.repetition_penalty)
        self._seen: NDArray[np.bool_] | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab_size, np.bool_)
            self._seen[np.asarray(prompt, np.int64)] = True
        seed = sampling.seed
        # any integer is a seed; numpy wants none below zero
        self._random = np.random.default_rng(None if seed is None else seed % (1 << 64))

    def choose(self, logits: Logits) -> int:
        """Return the next token; `logits` is one row and may be changed.

        Raises:
            ArithmeticError: the model gave no numbers to choose by.
        """
        if self._seen is not None:
            seen = np.flatnonzero(self._seen)
            values = logits[seen]
            logits[seen] = np.where(values < 0, values * self._penalty, values / self._penalty)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise ArithmeticError("the model gave no finite logits")
        token = best if self._sampling.temperature <= 0 else self._draw(logits, best)
        if self._seen is not None:
            self._seen[token] = True
        return token

    def _draw(self, logits: Logits, best: int) -> int:
        scaled = logits.astype(np.float64)
        scaled -= scaled[best]
        scaled /= self._sampling.temperature
        top_k, top_p = self._sampling.top_k, self._sampling.top_p
        weights = np.exp(scaled)
        whole = weights.sum()
        if 0 < top_k < scaled.size:
            ids = _largest(scaled, top_k)
            whole = weights[ids].sum()
        elif top_p < 1.0:
            ids = _head_holding(weights, top_p * whole)
        else:
            ids = np.arange(scaled.size)
        weights = weights[ids]
        if top_p < 1.0:
            kept = int(np.searchsorted(np.cumsum(weights), top_p * whole)) + 1
            ids, weights = ids[:kept], weights[:kept]
        sums = np.cumsum(weights)
        at = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(ids[min(at, ids.size - 1)])


def _largest(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the ids of the largest values, the largest first, equal ones by id."""
    ids = np.argpartition(values, values.size - count)[values.size - count :]
    return ids[np.lexsort((ids, -values[ids]))].astype(np.int64, copy=False)


def _head_holding(weights: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """Return the ids of the largest weights, the largest first, enough of them to hold `share`."""
    if weights.size > _HEAD:
        ids = _largest(weights, _HEAD)
        if weights[ids].sum() >= share:
            return ids
    return _largest(weights, weights.size)
