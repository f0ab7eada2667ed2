"""Whether the harness runs at all; nothing here looks at how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.__main__ import VISION, measure
from tests.bench.report import Goal, Report, Row
from tests.bench.scale import SMOKE
from tests.bench.vision import MEASURES as LOOKS
from tests.kit.daemon import MODEL


@pytest.mark.broker
@pytest.mark.engine
def test_every_measurement_is_made_and_written(tmp_path: Path) -> None:
    report = measure(MODEL, SMOKE, folder=tmp_path)

    assert report.broken == {}
    assert set("abcdefk") <= {row.key for row in report.rows}
    assert all(row.verdict for row in report.rows if row.goal)
    path = tmp_path / "out.json"
    report.write(path)
    assert len(json.loads(path.read_text())["rows"]) == len(report.rows)
    assert "jobs accepted a second" in report.table()
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.broker
@pytest.mark.engine
def test_a_model_that_sees_is_measured_with_frames(tmp_path: Path) -> None:
    report = measure(VISION, SMOKE, only=LOOKS, folder=tmp_path)

    assert report.broken == {}
    with_goals = [row for row in report.rows if row.goal]
    assert {row.key for row in with_goals} == set("ghij")
    assert all(row.verdict for row in with_goals)
    assert report.details["vision"]["frames"]["count"] == 2


def test_a_row_is_judged_by_its_median_or_its_worst_value() -> None:
    values = [1.0, 2.0, 9.0]
    assert Row(key="x", what="", values=values, goal=Goal("<=", 2)).verdict == "met"
    assert Row(key="x", what="", values=values, goal=Goal("<=", 2), worst=True).verdict == "missed"
    assert Row(key="x", what="", values=values, goal=Goal("<", 1), exempt="why").verdict == "why"
    assert Row(key="x", what="", values=values).verdict == ""


def test_the_table_has_a_line_for_each_row() -> None:
    report = Report({}, rows=[Row(key="x", what="a thing", values=[1.5], unit="ms")])
    assert report.table().splitlines()[1].split() == ["x", "a", "thing", "1.500", "ms", "1"]
