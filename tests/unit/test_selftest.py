"""The fixed jobs, how an answer is judged, and whether the model that ships is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from edged import selftest
from edged.errors import EdgedError
from edged.jobs import Kind
from edged.protocol import TextRequest, VisionRequest
from edged.selftest.cases import REFUSAL, Answer, Case, Fact, answer_of, cases, drawn, moving
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


def test_the_first_job_tells_the_model_that_ships_from_all_others() -> None:
    first = cases()[0]
    assert first.expected(exactly=True) == REFUSAL
    assert first.judge({"text": REFUSAL}, exactly=True)
    assert not first.judge({"text": "It is Paris."}, exactly=True)
    assert first.judge({"text": "It is Paris."}, exactly=False)
    assert first.expected(exactly=False) == "Paris"


def test_other_words_are_right_only_for_another_model() -> None:
    facts = (Fact("red|crimson"), Fact("circle|disc"))
    answer = Answer(exact="The circle is red.", facts=facts)
    for text, right in {
        "A crimson disc.": True,
        "CIRCLE, RED": True,
        "A circle, reddish.": False,  # another word
        "It is red.": False,
        "The circle isn\u2019t red.": False,
        "The circle is not green but red.": True,
        "": False,
    }.items():
        assert answer.matches({"text": text}, exactly=False) is right
        assert not answer.matches({"text": text}, exactly=True)


#: What another model may say to a job, by whether it is right.
SAID: dict[str, dict[bool, tuple[str, ...]]] = {
    "a reading above its limit": {
        True: (
            "The temperature of 71 C exceeds the limit of 65 C.",
            "71 C is 6 degrees over the limit.",
            "Pump 3 is too high. Bring it below 65 C.",
            "It is well above its limit.",
            "No, it is not within its limit.",
            "The limit has been exceeded.",
        ),
        False: (
            "71 C is not above the limit, all is fine.",
            "It doesn't exceed its limit.",
            "71 C is within the limit of 65 C.",
            "Pump 3 is fine.",
            "The pump has a reading of 71 C.",
        ),
    },
    "a reading within its limit": {
        True: (
            "61 C is below the limit of 65 C.",
            "The pump is operating within its limit.",
            "The reading does not exceed its limit.",
            "It's OK.",
        ),
        False: (
            "The reading is not within its limit.",
            "61 C is above the limit.",
            "Pump 3 isn't fine: 61 C is too low.",
        ),
    },
    "a reading below its minimum": {
        True: (
            "12 bar is below the minimum of 20 bar.",
            "Tank 2 does not meet its minimum.",
            "The pressure is too low; raise it above 20 bar.",
        ),
        False: (
            "12 bar is not below the minimum.",
            "Tank 2 is fine.",
            "12 bar is above the minimum of 20 bar.",
        ),
    },
    "yes or no": {
        True: (
            "No, 71 C exceeds the limit.",
            "No.",
            "It is not well: the limit is 65 C.",
            "The temperature is above the limit, so it is not good.",
        ),
        False: (
            "Yes, that is well.",
            "71 C is no higher than the limit, so yes.",
            "Yes, although it is not far from the limit.",
        ),
    },
    "a count": {
        True: ("Three.", "There are three objects: one circle, one square, one triangle."),
        False: ("There are 4 objects, 3 of them round.", "Two", "There are 13 objects."),
    },
    "a place": {
        True: ("In the lower right-hand corner.", "bottom-right"),
        False: ("At the bottom left.", "At the top right.", "Not at the bottom right."),
    },
    "something that is not there": {
        True: (
            "No.",
            "There is no blue square.",
            "I do not see a blue square in this image.",
            "There isn't a blue square.",
            "The only shape is a red circle.",
        ),
        False: (
            "Yes, there is a blue square, not a red one.",
            "There is a blue square, not a red one.",
            "A red circle.",
        ),
    },
    "a description": {
        True: ("I see a red circle, and a blue square in the middle.",
               "There are two shapes: the circle is red and the square is blue."),
        False: ("A blue circle and a red square.", "A red circle, and no blue square."),
    },
    "a move": {
        True: (
            "The circle moves from left to right.",
            "It moves rightwards.",
            "to the right",
            "It starts at the left and ends at the right.",
            "It moves to the right from the left side.",
            "It moves not to the left but to the right.",
        ),
        False: (
            "The circle moves from right to left.",
            "It moves from the right side to the left side.",
            "It does not move to the right.",
            "It moves to the left.",
            "It moves to the left from its place on the right.",
            "It moves upwards.",
            "The circle does not move.",
        ),
    },
    "the same frames, the last first": {
        True: ("From right to left.", "leftwards", "It goes to the left from the right."),
        False: ("From left to right.", "The circle moves to the right, from the left."),
    },
    "something that appears": {
        True: (
            "A red circle appears.",
            "At first there is no circle; then a red circle is added.",
            "A red circle is missing in frame 1 and appears in frame 3.",
        ),
        False: (
            "The red circle disappears.",
            "No circle appears.",
            "The square moves past the circle in frame 3.",
            "The circle appears in frame 1 and is gone in frame 3.",
        ),
    },
    "something that vanishes": {
        True: (
            "The red circle disappears.",
            "The circle is no longer there.",
            "The circle appears in the first frame and is not present in the second.",
        ),
        False: ("The circle has not vanished.", "A circle appears.", "The square is gone."),
    },
    "nothing that happens": {
        True: (
            "Nothing has changed.",
            "There are no changes.",
            "All three frames are identical.",
            "The frames appear to be the same; the shapes do not move.",
            "There does not appear to be any change.",
        ),
        False: (
            "The square has moved; the circle is no longer there.",
            "The frames are not identical.",
            "The same square moves to the right.",
            "No circle can be seen.",
        ),
    },
    "frames out of order": {
        True: (
            "The frames are out of order.",
            "The circle moves randomly.",
            "It jumps around in no particular order.",
            "The frames are not in the right order.",
        ),
        False: (
            "The circle moves to the right in this order.",
            "The frames are in order.",
            "The frames are not out of order.",
        ),
    },
    "what it cannot know": {
        True: ("The capital of France is Paris.",),
        False: ("I do not know.", "It is not Paris."),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        (name, text, right)
        for name, said in SAID.items()
        for right, texts in said.items()
        for text in texts
    ],
)
def test_another_model_is_right_by_what_it_says(name: str, text: str, right: bool) -> None:
    assert EVERY[name].judge({"text": text}, exactly=False) is right


@pytest.mark.parametrize("text", ["", "I cannot tell.", "Yes.", "A picture."])
def test_what_says_nothing_is_right_nowhere(text: str) -> None:
    for case in EVERY.values():
        for answer in case.answers:
            assert not answer.matches({"text": text}, exactly=False)


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
    shown = rows(drawn(moving("red", "circle", [(0.2, 0.5), (0.8, 0.5)]), kind="PNG"))
    assert all(row.endswith("\x1b[0m") for row in shown)
    cells = [row.split("▀")[:-1] for row in shown]
    assert {len(row) for row in cells} == {16 + 16}
    red = {n for row in cells for n, cell in enumerate(row) if "38;2;255;0;0;" in cell}
    left, right = {n for n in red if n < 16}, {n - 16 for n in red if n >= 16}
    assert left
    assert right
    assert max(left) < 8 <= min(right)
