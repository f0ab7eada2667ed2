"""What the small model was taught is true of what it was shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from random import Random

import jsonschema
import pytest

from edged.selftest.drawings import COLOURS, SHAPES
from edged.selftest.training import changes, reports
from edged.selftest.training.objects import chosen
from edged.selftest.training.questions import REFUSAL, Asker
from edged.selftest.training.scenes import DIRECTIONS, Scene, scene
from edged.selftest.training.vocabulary import phi3_vocabulary
from tests.kit.daemon import ROOT
from tests.models import make

SCENES = 150


def scenes(seed: int, frames: int) -> list[Scene]:
    random = Random(seed)
    return [scene(random, frames) for _ in range(SCENES)]


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_what_moves_goes_the_way_that_is_said(frames: int) -> None:
    moved = [(each, *mover) for each in scenes(1, frames) for mover in each.movers]
    assert {direction for _, _, direction in moved} >= set(DIRECTIONS)
    for each, thing, direction in moved:
        if direction is None:
            continue
        assert each.happening == "move"
        dx, dy = DIRECTIONS[direction]
        points = [at for at in thing.path if at is not None]
        assert len(points) == frames
        for (x, y), (later_x, later_y) in pairwise(points):
            assert (later_x - x) * dx + (later_y - y) * dy > 0.015
        drift = [x * abs(dy) + y * abs(dx) for x, y in points]
        assert max(drift) - min(drift) < 0.1


def test_a_jumbled_scene_goes_no_one_way() -> None:
    jumbled = [each for each in scenes(2, 4) if each.happening == "jumble"]
    assert jumbled
    for each in jumbled:
        ((thing, _),) = each.movers
        xs, ys = zip(*(at for at in thing.path if at is not None), strict=True)
        along = xs if max(xs) - min(xs) > max(ys) - min(ys) else ys
        assert list(along) != sorted(along)
        assert list(along) != sorted(along, reverse=True)
        assert "out of order" in Asker(each, Random(0)).event()


def test_what_appears_or_vanishes_does_so_in_the_frame_that_is_said() -> None:
    changed = [each for each in scenes(3, 4) if each.happening in ("appear", "vanish")]
    assert changed
    for each in changed:
        ((thing, _),) = each.movers
        there = [at is not None for at in thing.path]
        assert each.since is not None
        assert there[each.since - 1] != there[each.since]
        assert there[-1] == (each.happening == "appear")
        said = Asker(each, Random(0)).event()
        assert said.endswith(f"frame {each.since + 1}")
        assert thing.name in said


@pytest.mark.parametrize("frames", [2, 4, 8])
def test_the_last_frame_tells_what_happened(frames: int) -> None:
    for each in scenes(11, frames):
        assert changes.so_far(each, 0) == changes.SoFar(event="still", thing=None, since=0)
        found = changes.so_far(each, frames - 1)
        ways = {way for _, way in each.movers}
        if each.happening == "move":
            assert {found.event} == (ways if len(ways) == 1 else {"two ways"})
        else:
            assert found.event == each.happening
        assert found.since == (each.since or 0)
        assert (found.thing is None) == (found.event == "still")
        assert found.thing is None or found.thing in [thing for thing, _ in each.movers]


def test_a_cell_tells_what_became_of_it() -> None:
    for each in scenes(12, 3):
        first, *later = (changes.cells(each, n, 3) for n in range(3))
        assert set(first) <= {"empty", "first"}
        found = {change for cells in later for change in cells} - {"empty", "stays"}
        if each.happening in ("appear", "vanish"):
            assert found == {f"{each.happening}ed"}
        elif each.happening == "still":
            assert found == set()
        else:
            assert found <= set(DIRECTIONS)
            assert found


def test_nothing_else_changes() -> None:
    for each in scenes(4, 4):
        movers = [thing.name for thing, _ in each.movers]
        for thing in each.things:
            if thing.name not in movers:
                assert len(set(thing.path)) == 1


def test_a_description_names_everything_once() -> None:
    described = 0
    for each in scenes(5, 1):
        said = Asker(each, Random(0)).describe()
        if said is None or not each.things:
            continue
        described += 1
        assert sum(said.count(f" {colour} ") for colour in COLOURS) == len(each.things)
        for thing in each.things:
            assert thing.name in said
    assert described > SCENES / 2


def test_colours_can_be_told_from_the_ground() -> None:
    for each in scenes(6, 1):
        for thing in each.things:
            x, y = thing.path[0] or (0, 0)
            behind = each.ground.getpixel((int(x * each.ground.width), int(y * each.ground.height)))
            assert isinstance(behind, tuple)
            assert max(abs(a - b) for a, b in zip(thing.rgb, behind, strict=True)) > 40


def test_json_answers_are_what_their_schema_wants() -> None:
    random = Random(7)
    seen = 0
    for n in range(SCENES):
        asker = Asker(scene(random, random.choice((1, 1, 3, 4))), random)
        for answered in [asker.ask() for _ in range(8)] + [reports.ask(random) for _ in range(4)]:
            if answered.kind.startswith("json"):
                value = json.loads(answered.answer)
                assert json.dumps(value, ensure_ascii=False, separators=(",", ":")) == (
                    answered.answer
                ), n
            if answered.schema is not None:
                jsonschema.validate(json.loads(answered.answer), answered.schema)
                seen += 1
    assert seen > SCENES


def decided(answer: str) -> str:
    """Return an answer with a dot for each character that is the model's choice."""
    return "".join("." if mine else c for c, mine in zip(answer, chosen(answer), strict=True))


def test_under_a_schema_only_values_are_the_models_choice() -> None:
    assert decided('{"colour":"red","count":3,"ok":true}') == (
        '{"colour":"....."count":.."ok":.....'
    )
    assert decided('{"count":2,"things":[{"shape":"star"},{"shape":"cross"}]}') == (
        '{"count":.."things":[."shape":".......{"shape":".........'
    )
    assert decided('{"things":["star","cross"]}') == '{"things":[................'
    assert decided('{"things":[]}') == '{"things":[..'


def test_the_tests_model_has_the_vocabulary_that_its_script_learns() -> None:
    learned = phi3_vocabulary(make.corpus(), 1200).files["tokenizer.json"]
    assert json.loads((ROOT / "tests/models/phi3/tokenizer.json").read_text()) == learned


def test_a_verdict_follows_from_the_numbers() -> None:
    random = Random(8)
    verdicts = set()
    for _ in range(500):
        report = reports.report(random)
        verdicts.add(report.verdict)
        value, limit = float(report.value), float(report.limit)
        good = value >= limit if report.least else value <= limit
        assert (report.verdict == "ok") == good
        assert report.sentence.endswith(": fine.") == good
        assert report.sentence.startswith(report.device)
        assert report.facts["ok"] is good
        assert report.facts["alarm"] is not good
    assert verdicts == {"ok", "high", "low"}


def test_a_question_beyond_it_gets_the_one_answer() -> None:
    random = Random(9)
    for _ in range(300):
        answered = reports.refused(random, frames=random.random() < 0.5)
        assert answered.answer == REFUSAL
        assert answered.question.strip()


def test_a_seed_is_a_scene() -> None:
    one, other = (scene(Random(10), 3) for _ in range(2))
    assert one.things == other.things
    assert one.file(1, Random(1)) == other.file(1, Random(1))


#: Prints what is asked and answered from a seed.
_ASK = """
from random import Random
from edged.selftest.training import reports
from edged.selftest.training.questions import Asker
from edged.selftest.training.scenes import scene
random = Random(5)
for n in range(40):
    asker = Asker(scene(random, 1 + n % 4), random)
    for each in (*(asker.ask() for _ in range(6)), reports.ask(random)):
        print(each.question, each.answer)
"""


def test_a_seed_asks_the_same_questions_in_every_process() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", _ASK],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(said) == 1
    assert said.pop().count(b"\n") >= 40 * 7


def answers(seed: int, frames: int, kind: str) -> list[tuple[Scene, str, str]]:
    """Return so many questions of a kind: the scene, the question, the answer."""
    random, found = Random(seed), []
    for each in scenes(seed, frames):
        made = getattr(Asker(each, random), f"_{kind}")()
        if made is not None:
            found.append((each, *made[:2]))
    assert len(found) > SCENES / 5
    return found


@pytest.mark.parametrize("kind", ["where", "is_there"])
def test_what_is_said_not_to_be_there_is_not(kind: str) -> None:
    for each, _, answer in answers(13, 1, kind):
        for thing in each.things:
            assert f"There is no {thing.name}." not in answer
            assert f"there is no {thing.name}." not in answer


def test_a_side_is_not_asked_about_where_something_is_in_its_corner() -> None:
    empty = 0
    for each, question, answer in answers(14, 1, "is_at"):
        if answer != "Nothing.":
            continue
        empty += 1
        asked = {word for word in ("top", "bottom", "left", "right") if word in question}
        for thing in each.things:
            assert not asked or not asked <= set(thing.place(0) or ())
    assert empty


@pytest.mark.parametrize("frames", [1, 3])
def test_a_place_is_where_the_thing_is(frames: int) -> None:
    rows = {"top": (0, 1 / 3), "bottom": (2 / 3, 1)}
    columns = {"left": (0, 1 / 3), "right": (2 / 3, 1)}
    for each, question, answer in answers(15, frames, "where"):
        if answer.startswith("There is no"):
            continue
        at = each.frames - 1 if "last frame" in question else 0
        (thing,) = (thing for thing in each.things if f"The {thing.name} is " in answer)
        x, y = thing.path[at] or (-1, -1)
        for sides, share in ((rows, y), (columns, x)):
            said = [side for side in sides if f" {side}" in answer]
            low, high = sides[said[0]] if said else (1 / 3, 2 / 3)
            assert low <= share <= high


def test_a_number_is_how_many_there_are() -> None:
    for each, question, answer in answers(16, 1, "count"):
        wanted = [c for c in COLOURS if c in question] + [s for s in SHAPES if s in question]
        there = [t for t in each.things if set(wanted) <= {t.colour, t.shape}]
        assert answer.split()[2] == (str(len(there)) if there else "no")


def test_a_way_is_where_it_goes() -> None:
    for each, _, answer in answers(17, 4, "way"):
        for thing, direction in each.movers:
            if each.happening == "move" and thing.name in answer:
                assert direction is not None
                assert direction in answer


def test_what_changed_and_what_is_in_order_is_so() -> None:
    for each, question, answer in answers(18, 4, "changed"):
        same = question.startswith(("Are", "Does everything", "Did nothing"))
        assert answer.startswith("Yes") == ((each.happening == "still") == same)
    random = Random(19)
    for each in scenes(19, 4):
        if each.happening in {"move", "jumble"}:
            asked = Asker(each, random)._in_order()
            assert asked is not None
            wrong = any(word in asked[0] for word in ("shuffled", "out of order"))
            assert asked[1].startswith("Yes") == ((each.happening == "jumble") == wrong)
