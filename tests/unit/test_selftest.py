"""The fixed jobs, how an answer is judged, and whether the model is the one that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from edged import selftest
from edged.errors import EdgedError
from edged.jobs import Kind
from edged.protocol import TextRequest, VisionRequest
from edged.selftest.cases import Answer, Case, answer_of, cases, drawn, moving
from edged.selftest.showing import rows

EVERY = {case.name: case for case in cases()}


# The files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_bytes(name.encode())
    selftest.pin(folder, tmp_path / "pin")
    return folder


def test_a_model_as_it_was_made_is_taken(folder: Path, tmp_path: Path) -> None:
    assert selftest.verify(folder, tmp_path / "pin") == folder
    assert (tmp_path / "pin").read_text().count("\n") == 2


@pytest.mark.parametrize("how", ["changed", "shorter", "missing"])
def test_a_damaged_file_is_named_with_the_remedy(folder: Path, tmp_path: Path, how: str) -> None:
    path = folder / "model.onnx.data"
    match how:
        case "changed":
            path.write_bytes(path.read_bytes().replace(b"m", b"n", 1))
        case "shorter":
            path.write_bytes(b"")
        case _:
            path.unlink()
    with pytest.raises(EdgedError) as error:
        selftest.verify(folder, tmp_path / "pin")
    assert str(path) in error.value.message
    assert "pip install" in (error.value.hint or "")


def test_without_a_pin_nothing_is_taken(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgedError, match="cannot be read"):
        selftest.verify(folder, tmp_path / "nowhere")
    (tmp_path / "pin").write_text("")
    with pytest.raises(EdgedError, match="names no file"):
        selftest.verify(folder, tmp_path / "pin")


# The jobs ----------------------------------------------------------------------------------------


def test_the_jobs_are_valid_and_always_the_same() -> None:
    assert len(EVERY) == len(cases()) >= 20
    assert [case.request for case in cases()] == [case.request for case in EVERY.values()]
    for case in EVERY.values():
        kind = VisionRequest if case.kind is Kind.VISION else TextRequest
        kind.model_validate({"v": 1, "id": "a", **case.request})


def result(case: Case) -> dict[str, object]:
    """Return a result with just the right answers."""
    answers: list[dict[str, object]] = [
        {"text": "{}", "json": each.exact} if isinstance(each.exact, dict) else {"text": each.exact}
        for each in case.answers
    ]
    return {"answers": answers} if "questions" in case.request else answers[0]


@pytest.mark.parametrize("case", EVERY.values(), ids=lambda case: case.name)
def test_the_right_answer_has_the_facts_too(case: Case) -> None:
    right = result(case)
    assert case.judge(right, exactly=True)
    if case.name != "what it cannot know":
        assert case.judge(right, exactly=False)
    assert answer_of(right) == case.expected(exactly=True)
    for other in EVERY.values():
        if other.expected(exactly=True) != case.expected(exactly=True):
            assert not case.judge(result(other), exactly=True)


def test_other_words_are_right_only_for_another_model() -> None:
    answer = Answer(exact="The circle is red.", facts=(("red", "crimson"), ("circle", "disc")))
    for text, right in {
        "A crimson disc.": True,
        "CIRCLE, RED": True,
        "A circle, reddish.": False,  # another word
        "It is red.": False,
        "": False,
    }.items():
        assert answer.matches({"text": text}, exactly=False) is right
        assert not answer.matches({"text": text}, exactly=True)


def test_json_is_compared_by_value() -> None:
    answer = Answer(exact={"device": "pump 3", "ok": False})
    assert answer.matches({"text": "", "json": {"ok": False, "device": "pump 3"}}, exactly=True)
    other = {"text": "", "json": {"device": "Pump 3", "ok": False}}
    assert answer.matches(other, exactly=False)
    assert not answer.matches(other, exactly=True)
    assert not answer.matches({"text": "", "json": {"device": "pump 3", "ok": 0}}, exactly=False)
    assert not answer.matches({"text": '{"device": "pump 3", "ok": false}'}, exactly=True)


# Frames on a terminal ----------------------------------------------------------------------------


def test_frames_are_shown_side_by_side() -> None:
    frames = drawn(moving("red", "circle", [(0.2, 0.5), (0.8, 0.5)]))
    shown = rows(frames, colours=False)
    assert {len(row) for row in shown} == {16 + 2 + 16}
    left, right = (["".join(row[n : n + 16]) for row in shown] for n in (0, 18))
    assert all("r" not in row[8:] for row in left)
    assert all("r" not in row[:8] for row in right)
    assert any("r" in row for row in left)
    assert any("r" in row for row in right)
    coloured = rows(frames, colours=True)
    assert len(coloured) == len(shown)
    assert all(row.endswith("\x1b[0m") for row in coloured)
    assert "255;0;0" in "".join(coloured) or "254;0;0" in "".join(coloured)
