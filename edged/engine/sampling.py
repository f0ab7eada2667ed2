"""Choosing the next token from the logits, in the daemon's way and not in the model folder's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edged.ports import Sampling

Logits = NDArray[np.float32]
Weights = NDArray[np.float64]

#: Below the best logit, at temperature 1: e^-25 is 1.4e-11.
_NEGLIGIBLE = 25.0


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
        temperature = self._sampling.temperature
        # Of 200 000 tokens all but some hundreds are less likely than 1 in 10^10: left out before
        # the arithmetic, which would take as long as a small model's token.
        ids = np.flatnonzero(logits >= logits[best] - np.float32(_NEGLIGIBLE * temperature))
        weights = np.exp((logits[ids].astype(np.float64) - logits[best]) / temperature)
        if 0 < self._sampling.top_k < weights.size:
            kept = _largest(weights, self._sampling.top_k)
            ids, weights = ids[kept], weights[kept]
        if self._sampling.top_p < 1.0:
            kept = _nucleus(weights, self._sampling.top_p)
            ids, weights = ids[kept], weights[kept]
        sums = np.cumsum(weights)
        at = int(np.searchsorted(sums, self._random.random() * sums[-1], side="right"))
        return int(ids[min(at, ids.size - 1)])


def _largest(weights: Weights, count: int) -> NDArray[np.int64]:
    """Return where the largest weights stand, in order; of equal ones at the border the first."""
    border = np.partition(weights, weights.size - count)[weights.size - count]
    above = np.flatnonzero(weights > border)
    equal = np.flatnonzero(weights == border)[: count - above.size]
    return np.sort(np.concatenate((above, equal)))


def _nucleus(weights: Weights, share: float) -> NDArray[np.int64]:
    """Return where the fewest weights stand that hold a share of the whole, in order."""
    whole = weights.sum()
    # All that are smaller than this hold less than the rest of the share: they need no sorting,
    # and there are very many of them.
    worth = np.flatnonzero(weights >= (1.0 - share) * whole / weights.size)
    falling = np.sort(weights[worth])[::-1]
    count = int(np.searchsorted(np.cumsum(falling), share * whole)) + 1
    return worth[_largest(weights[worth], min(count, worth.size))]
