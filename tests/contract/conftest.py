"""Fixtures of the contract tests: a box for each module, a judging observer for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.box import Box
from tests.kit.observer import Observer


@pytest.fixture
def observer(box: Box) -> Iterator[Observer]:
    """An observer of the module's `box`; at the end everything it saw must hold the contract."""
    with box.observer() as observer:
        yield observer
        observer.check()
