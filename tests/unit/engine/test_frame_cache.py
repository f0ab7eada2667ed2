from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edged.engine.vision.cache import FrameCache


def rows(kilobytes: int) -> Any:
    return np.zeros((kilobytes, 250), np.float32)


def key(what: int, client: str | None = "c", crops: int = 1) -> tuple[str | None, bytes, int]:
    return client, bytes([what]), crops


def test_what_was_used_last_is_kept() -> None:
    cache = FrameCache(0.010)
    for what in range(3):
        cache.put(key(what), rows(4))
    assert cache.of("c") == {(b"\1", 1), (b"\2", 1)}
    assert cache.get(key(0)) is None
    assert cache.get(key(1)) is not None  # now the last used
    cache.put(key(3), rows(4))
    assert cache.of("c") == {(b"\1", 1), (b"\3", 1)}
    assert cache.size_mb == 0.008


def test_a_frame_is_known_by_client_bytes_and_crops() -> None:
    cache = FrameCache(1)
    cache.put(key(1), rows(1))
    for other in (key(2), key(1, "d"), key(1, None), key(1, crops=2)):
        assert cache.get(other) is None
    assert cache.of("d") == set()


def test_what_is_too_large_is_not_kept_and_costs_nothing_else() -> None:
    cache = FrameCache(0.010)
    cache.put(key(1), rows(4))
    cache.put(key(2), rows(11))
    assert cache.of("c") == {(b"\1", 1)}
    none = FrameCache(0)
    none.put(key(1), rows(1))
    assert none.size_mb == 0


def test_it_can_be_emptied() -> None:
    cache = FrameCache(1)
    cache.put(key(1), rows(4))
    cache.hits += 1
    cache.clear()
    assert (cache.size_mb, cache.hits, cache.of("c")) == (0, 0, set())


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 12)), max_size=40))
def test_it_never_takes_more_than_it_may(puts: list[tuple[int, int]]) -> None:
    cache = FrameCache(0.010)
    for what, kilobytes in puts:
        cache.put(key(what), rows(kilobytes))
        kept = [cache.get(key(n)) for n in range(10)]
        held = sum(features.nbytes for features in kept if features is not None)
        assert cache.size_mb == held / 1e6 <= 0.010
