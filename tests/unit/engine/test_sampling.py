from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edged.engine.sampling import Sampler
from edged.ports import Sampling

LOGITS = np.array([1.0, 3.0, -2.0, 2.0, 0.5], np.float32)


def softmax(logits: NDArray[Any], temperature: float) -> NDArray[np.float64]:
    scaled = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    shares: NDArray[np.float64] = scaled / scaled.sum()
    return shares


def frequencies(sampling: Sampling, logits: NDArray[np.float32], draws: int) -> NDArray[Any]:
    sampler = Sampler(sampling, [], logits.size)
    chosen = [sampler.choose(logits.copy()) for _ in range(draws)]
    return np.bincount(chosen, minlength=logits.size) / draws


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert Sampler(Sampling(), [], 5).choose(LOGITS.copy()) == 1
    assert Sampler(Sampling(), [], 3).choose(np.array([1, 2, 2], np.float32)) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_shares_at_a_temperature(temperature: float) -> None:
    got = frequencies(Sampling(temperature=temperature, seed=1), LOGITS, 20_000)
    assert got == pytest.approx(softmax(LOGITS, temperature), abs=0.02)


def test_top_k_leaves_the_k_largest_and_their_shares() -> None:
    got = frequencies(Sampling(temperature=1.0, top_k=2, seed=2), LOGITS, 20_000)
    expected = softmax(np.where(LOGITS >= 2, LOGITS, -np.inf), 1.0)
    assert got == pytest.approx(expected, abs=0.02)
    assert got[[0, 2, 4]].sum() == 0


def test_top_p_leaves_the_fewest_that_hold_the_share() -> None:
    shares = softmax(LOGITS, 1.0)
    share = float(shares[1] + shares[3] / 2)  # between one and two tokens: the second is needed
    got = frequencies(Sampling(temperature=1.0, top_p=share, seed=3), LOGITS, 20_000)
    assert got == pytest.approx(softmax(np.where(LOGITS >= 2, LOGITS, -np.inf), 1.0), abs=0.02)
    only = frequencies(Sampling(temperature=1.0, top_p=0.01, seed=3), LOGITS, 100)
    assert only[1] == 1


def test_top_p_counts_after_top_k() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    # of the two largest the first has 4/7: it alone holds 0.55
    got = frequencies(Sampling(temperature=1.0, top_k=2, top_p=0.55, seed=4), logits, 200)
    assert got[0] == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.05, 0.999), st.floats(0.2, 3.0))
def test_a_large_vocabulary_is_cut_as_a_small_one_would_be(
    seed: int, top_p: float, temperature: float
) -> None:
    logits = np.random.default_rng(seed).normal(scale=2.0, size=5000).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    shares = softmax(logits, temperature)[order]
    kept = set(order[: int(np.searchsorted(np.cumsum(shares), top_p)) + 2].tolist())
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p, seed=seed), [], logits.size)
    assert {sampler.choose(logits.copy()) for _ in range(30)} <= kept


@pytest.mark.parametrize("seed", [0, 7, -1, 2**63, -(2**70)])
def test_a_seed_repeats(seed: int) -> None:
    logits = np.random.default_rng(0).normal(size=(40, 300)).astype(np.float32)

    def run() -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=seed), [], 300)
        return [sampler.choose(row.copy()) for row in logits]

    assert run() == run()


def test_without_a_seed_runs_differ() -> None:
    logits = np.zeros(1000, np.float32)
    sampling = Sampling(temperature=1.0)
    runs = {
        tuple(sampler.choose(logits.copy()) for _ in range(8))
        for sampler in (Sampler(sampling, [], 1000), Sampler(sampling, [], 1000))
    }
    assert len(runs) == 2


def test_repetition_is_dearer_for_what_was_said_in_prompt_and_answer() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0), [1], 5)
    first = LOGITS.copy()
    assert sampler.choose(first) == 3  # 3.0 / 2 is less than 2.0
    assert first[1] == 1.5
    second = LOGITS.copy()
    assert sampler.choose(second) == 1  # 1.5 against 1.0, 1.0 and 0.5
    assert second.tolist() == [1.0, 1.5, -2.0, 1.0, 0.5]
    third = np.array([-3, -1, -3, -2, -3], np.float32)
    sampler.choose(third)
    assert third.tolist() == [-3, -2, -3, -4, -3]  # further down where it is negative


def test_tokens_that_must_not_come_never_come() -> None:
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0], np.float32)
    got = frequencies(Sampling(temperature=5.0, seed=1), logits, 2000)
    assert got[0] == got[2] == 0


def test_a_temperature_near_nothing_is_greedy() -> None:
    assert frequencies(Sampling(temperature=1e-30, seed=1), LOGITS, 50)[1] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_without_numbers_is_not_followed(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[2] = bad
    with pytest.raises(ArithmeticError):
        Sampler(Sampling(temperature=temperature), [], 5).choose(logits)


def test_choosing_among_200_000_tokens_takes_little_of_a_tokens_time() -> None:
    logits = np.random.default_rng(0).normal(scale=4.0, size=200_064).astype(np.float32)
    sampler = Sampler(Sampling(temperature=0.8, top_p=0.95, seed=1), [], logits.size)
    began = time.process_time()
    for _ in range(10):
        sampler.choose(logits.copy())
    assert (time.process_time() - began) / 10 < 0.05
