"""MATRIX.md names tests that exist, and says something about every fault."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
MATRIX = (Path(__file__).parent / "MATRIX.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`((?:\w+/)+\w+\.py)::(\w+)`", MATRIX)
    assert len(named) > 60
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not (TESTS / path).exists()
        or not re.search(rf"^(?:async )?def {name}\(", (TESTS / path).read_text(), re.MULTILINE)
    ]
    assert not missing


def test_every_fault_has_a_row_with_a_test_or_an_admission() -> None:
    rows = re.findall(r"^\| (F\d+) \|(.+)\|$", MATRIX, re.MULTILINE)
    assert [name for name, _ in rows] == [f"F{number}" for number in range(1, 41)]
    for name, row in rows:
        assert "::" in row or "not covered yet: " in row, name
