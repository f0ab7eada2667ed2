"""Questions about scenes, in many wordings, each with the one answer that is right.

The wording of a question is free, that of an answer is not: so an answer is right or wrong as a
whole. A question may be answered by a sentence or by a JSON object; a schema may ask for any of the
keys here in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import ClassVar

from edged.selftest.drawings import COLOURS, SHAPES
from edged.selftest.training import objects
from edged.selftest.training.objects import Answered, Facts
from edged.selftest.training.scenes import Scene, Thing

#: A question, its answer, and the facts in it.
Made = tuple[str, str, Facts]

REFUSAL = "I can only see simple shapes and check readings."


def place(words: tuple[str, ...]) -> str:
    """Return where something is, as an answer says it: "at the top left"."""
    if words == ("centre",):
        return "in the centre"
    return f"{'on' if words[0] in ('left', 'right') else 'at'} the {' '.join(words)}"


def listed(parts: list[str]) -> str:
    """Return "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def a(name: str) -> str:
    """Return a name with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def upper(sentence: str) -> str:
    """Return it with a capital."""
    return sentence[0].upper() + sentence[1:]


class Asker:
    """Asks about one scene.

    Args:
        scene: what there is to see.
        random: what chance is drawn from.
    """

    def __init__(self, scene: Scene, random: Random) -> None:
        self.scene = scene
        self.random = random
        self.happens = dict(self._happenings())

    # What is so ----------------------------------------------------------------------------------

    def _happenings(self) -> list[tuple[Thing, str]]:
        """Return what happens to whom, as clauses without their subject."""
        scene = self.scene
        found = []
        for thing, direction in scene.movers:
            if scene.happening == "move":
                way = direction if direction in ("up", "down") else f"to the {direction}"
                clause = f"moves {way}"
            elif scene.happening == "jumble":
                clause = "jumps about: the frames are out of order"
            else:
                verb = "appears" if scene.happening == "appear" else "vanishes"
                clause = f"{verb} in frame {(scene.since or 0) + 1}"
            found.append((thing, clause))
        return sorted(found, key=lambda each: each[0].name)

    def event(self) -> str:
        """Return what happens in all frames, without a capital and a full stop."""
        if not self.happens:
            return "nothing changes"
        article = a if self.scene.happening == "appear" else "the {}".format
        return listed([f"{article(t.name)} {clause}" for t, clause in self.happens.items()])

    def describe(self, frame: int = 0) -> str | None:
        """Return all that is in a frame; None if a thing stands between two places."""
        there = []
        for thing in self.scene.things:
            if thing.path[frame] is not None:
                words = thing.place(frame)
                if words is None:
                    return None
                there.append((words, thing))
        if not there:
            return "nothing"
        there.sort(key=lambda each: (_order(each[0]), each[1].name))
        return listed([f"{a(thing.name)} {place(words)}" for words, thing in there])

    def _ref(self, thing: Thing, *, full: bool = False) -> str:
        """Return words by which one thing can be told from the others."""
        others = [each for each in self.scene.things if each is not thing]
        ways = [thing.name]
        if not full and all(each.shape != thing.shape for each in others):
            ways += [thing.shape] * 2
        if not full and all(each.colour != thing.colour for each in others):
            ways.append(f"{thing.colour} {self._of('object', 'shape', 'thing', 'figure', 'one')}")
        return self.random.choice(ways)

    def _of(self, *words: str) -> str:
        return self.random.choice(words)

    def _some(self) -> Thing | None:
        unique = [
            thing
            for thing in self.scene.things
            if sum(each.name == thing.name for each in self.scene.things) == 1
        ]
        return self.random.choice(unique) if unique else None

    def _missing(self) -> str:
        """Return the name of something that is not there, often like something that is."""
        names = {thing.name for thing in self.scene.things}
        # sorted: the order of a set of strings is another in every process
        colours = sorted({t.colour for t in self.scene.things} | {self._of(*COLOURS)})
        shapes = sorted({t.shape for t in self.scene.things} | {self._of(*SHAPES)})
        near = [f"{colour} {shape}" for colour in colours for shape in shapes]
        absent = [name for name in near if name not in names]
        if not absent:
            absent = [n for c in COLOURS for s in SHAPES if (n := f"{c} {s}") not in names]
        return self.random.choice(absent)

    def _here(self) -> str:
        if self.scene.frames == 1:
            return self._of("in the picture", "in the frame", "here", "in this image", "in the image",
                            "in the photo", "there")  # fmt: skip
        return self._of("in the frames", "here", "in these pictures", "in the pictures", "there")

    # Sentences -----------------------------------------------------------------------------------

    def ask(self) -> Answered:
        """Return a question about the scene, answered by a sentence or by JSON."""
        makers = self._single if self.scene.frames == 1 else self._several
        names, weights = zip(*((name, weight) for name, weight in makers.items()), strict=True)
        while True:
            name = self.random.choices(names, weights)[0]
            if name == "whole":
                whole = self._whole()
                if whole is not None:
                    return whole
                continue
            made: Made | None = getattr(self, f"_{name}")()
            if made is None:
                continue
            question, answer, facts = made
            if facts and self.random.random() < 0.22:
                return objects.about(self.random, name, style(self.random, question), answer, facts)
            return Answered(kind=name, question=style(self.random, question), answer=answer)

    _single: ClassVar[Mapping[str, int]] = {
        "colour": 12, "shape": 8, "describe": 14, "where": 18, "count": 16, "is_there": 10,
        "is_colour": 6, "is_place": 11, "is_at": 5, "whole": 14,
    }  # fmt: skip
    _several: ClassVar[Mapping[str, int]] = {
        "happens": 20, "way": 16, "moves": 8, "is_moving": 12, "appears": 10, "vanishes": 10,
        "when": 9, "changed": 9, "in_order": 4, "frames": 2, "colour": 4, "is_there": 3, "count": 3,
        "where": 3, "whole": 14,
    }  # fmt: skip

    def _colour(self) -> Made | None:
        if self.random.random() < 0.07:
            shape = self._of(*SHAPES)
            if all(t.shape != shape for t in self.scene.things):
                return f"What {self._c()} is the {shape}?", f"There is no {shape}.", {}
        thing = self._some()
        if thing is None:
            return None
        same = [each for each in self.scene.things if each.shape == thing.shape]
        if len(same) > 1:
            return None
        word: str = thing.shape
        if len(self.scene.things) == 1 and self.random.random() < 0.3:
            word = self._of("object", "shape", "thing", "figure")
        question = self._of(
            f"What {self._c()} is the {word}?", f"Which {self._c()} does the {word} have?",
            f"What is the {self._c()} of the {word}?", f"Name the {self._c()} of the {word}.",
            f"Tell me the {word}'s {self._c()}.", f"The {word} is what {self._c()}?",
            f"Which {self._c()} is the {word}?", f"What {self._c()} is the {word} {self._here()}?",
            f"{self._c()} of the {word}?", f"What {self._c()} has the {word}?",
        )  # fmt: skip
        facts = {"colour": thing.colour, "shape": thing.shape, "name": thing.name}
        return question, f"The {thing.shape} is {thing.colour}.", facts

    def _c(self) -> str:
        return self._of("colour", "color")

    def _shape(self) -> Made | None:
        thing = self._some()
        if thing is None or sum(t.colour == thing.colour for t in self.scene.things) > 1:
            return None
        kind = self._of("object", "shape", "thing", "figure", "one")
        word = f"{thing.colour} {kind}"
        if len(self.scene.things) == 1 and self.random.random() < 0.5:
            word = self._of("object", "figure", "thing")
        question = self._of(
            f"What shape is the {word}?", f"Which shape does the {word} have?",
            f"What is the {word}?", f"What is the shape of the {word}?", f"What kind of shape is the {word}?",
            f"Name the shape of the {word}.", f"The {word}: what shape is it?",
        )  # fmt: skip
        facts = {"shape": thing.shape, "colour": thing.colour, "name": thing.name}
        return question, f"It is a {thing.shape}.", facts

    def _describe(self) -> Made | None:
        if len(self.scene.things) > 3 and self.random.random() < 0.7:
            return None
        there = self.describe()
        if there is None:
            return None
        question = self._of(
            "What do you see?", f"What is {self._here()}?", f"What can you see {self._here()}?",
            "Describe the picture.", "Describe this image.", "Describe the frame.", "Describe what you see.",
            f"What does the {self._of('picture', 'image', 'frame', 'camera')} show?",
            f"List the {self._of('objects', 'shapes', 'things')} {self._here()}.",
            f"Which {self._of('objects', 'shapes', 'things')} are {self._here()}?",
            f"What {self._of('objects', 'shapes')} do you see, and where?",
            f"What {self._of('objects', 'shapes')} can you see?",
            f"Is there anything {self._here()}?", "What is there?", "Tell me what you see.",
        )  # fmt: skip
        if question.startswith("Is"):
            answer = "No, nothing." if there == "nothing" else f"Yes, {there}."
        else:
            answer = "I see nothing." if there == "nothing" else f"{upper(there)}."
        return question, answer, {}

    def _where(self) -> Made | None:
        thing = self._some()
        if thing is None:
            if self.random.random() < 0.3:
                missing = self._missing()
                return f"Where is the {missing}?", f"There is no {missing}.", {}
            return None
        if self.random.random() < 0.06:
            missing = self._missing()
            return f"Where is the {missing}?", f"There is no {missing}.", {}
        frame, when = 0, ""
        if self.scene.frames > 1:
            frame = self.random.choice((0, self.scene.frames - 1))
            if len(set(thing.path)) > 1 or self.random.random() < 0.5:
                when = f" in the {'first' if frame == 0 else 'last'} frame"
        words = thing.place(frame)
        if words is None:
            return None
        ref = self._ref(thing)
        question = self._of(
            f"Where is the {ref}{when}?", f"Where do you see the {ref}{when}?",
            f"In which part of the picture is the {ref}{when}?", f"At what place is the {ref}{when}?",
            f"Where in the {self._of('picture', 'image', 'frame')} is the {ref}{when}?",
            f"What is the {self._of('position', 'place', 'location')} of the {ref}{when}?",
            f"Locate the {ref}{when}.", f"Which corner or side is the {ref} at{when}?",
        )  # fmt: skip
        facts = {"place": " ".join(words), "shape": thing.shape, "colour": thing.colour}
        return question, f"The {thing.name} is {place(words)}.", facts

    def _count(self) -> Made | None:
        if any(None in thing.path for thing in self.scene.things):
            return None
        things = list(self.scene.things)
        word, words = "object", self._of("objects", "shapes", "things", "figures")
        kind = self.random.random()
        if kind < 0.35:
            word = self._of(*SHAPES) if self.random.random() < 0.2 or not things else (
                self.random.choice(things).shape)  # fmt: skip
            things = [t for t in things if t.shape == word]
            words = f"{word}es" if word == "cross" else f"{word}s"
        elif kind < 0.55:
            colour = self._of(*COLOURS) if self.random.random() < 0.2 or not things else (
                self.random.choice(things).colour)  # fmt: skip
            things = [t for t in things if t.colour == colour]
            word, words = f"{colour} object", f"{colour} {words}"
        plural = f"{word}es" if word == "cross" else f"{word}s"
        question = self._of(
            f"How many {words} are {self._here()}?", f"How many {words} do you see?",
            f"Count the {words}.", f"How many {words} can you see {self._here()}?",
            f"What is the number of {words}?", f"Number of {words}?", f"How many {words}?",
        ).replace("are there?", "are there?")  # fmt: skip
        count = len(things)
        answer = f"There is 1 {word}." if count == 1 else f"There are {count or 'no'} {plural}."
        return question, answer, {"count": count}

    def _is_there(self) -> Made | None:
        if any(None in thing.path for thing in self.scene.things):
            return None
        names = {t.name for t in self.scene.things}
        shapes, colours = (
            {t.shape for t in self.scene.things},
            {t.colour for t in self.scene.things},
        )
        yes = bool(names) and self.random.random() < 0.5
        kind = self._of("name", "name", "shape", "colour")
        if kind == "name":
            what = self._of(*sorted(names)) if yes else self._missing()
            found = what in names
        elif kind == "shape":
            what = self._of(*sorted(shapes)) if yes else self._of(*SHAPES)
            found = what in shapes
        else:
            colour = self._of(*sorted(colours)) if yes else self._of(*COLOURS)
            what, found = f"{colour} object", colour in colours
        question = self._of(
            f"Is there {a(what)} {self._here()}?", f"Is there {a(what)}?", f"Do you see {a(what)}?",
            f"Can you see {a(what)} {self._here()}?", f"Is {a(what)} {self._here()}?",
            f"Does the {self._of('picture', 'image', 'frame')} show {a(what)}?", f"Any {what} {self._here()}?",
        ).replace("there there", "there")  # fmt: skip
        answer = f"Yes, there is {a(what)}." if found else f"No, there is no {what}."
        return question, answer, {"answer": found}

    def _is_colour(self) -> Made | None:
        thing = self._some()
        if thing is None or sum(t.shape == thing.shape for t in self.scene.things) > 1:
            return None
        asked = thing.colour if self.random.random() < 0.5 else self._of(*COLOURS)
        question = self._of(f"Is the {thing.shape} {asked}?", f"Does the {thing.shape} look {asked}?",
                            f"Would you say that the {thing.shape} is {asked}?",
                            f"Is it {a(asked)} {thing.shape}?")  # fmt: skip
        word = "Yes" if asked == thing.colour else "No"
        facts = {"answer": asked == thing.colour, "colour": thing.colour}
        return question, f"{word}, the {thing.shape} is {thing.colour}.", facts

    def _is_place(self) -> Made | None:
        thing = self._some()
        words = thing.place(0) if thing else None
        if thing is None or words is None:
            return None
        right = self.random.random() < 0.5
        options = ("left", "right", "top", "bottom", "centre", "top left", "top right", "bottom left",
                   "bottom right")  # fmt: skip
        asked = " ".join(words) if right else self._of(*options)
        # of what stands in a corner, the side it is at is right as well
        found = set(asked.split()) <= set(words) and (asked != "centre" or words == ("centre",))
        said = asked.replace("centre", self._of("centre", "center", "middle"))
        said = f"in the {said}" if asked == "centre" else f"{self._of('on', 'at', 'in')} the {said}"
        ref = self._ref(thing)
        question = self._of(f"Is the {ref} {said}?", f"Do you see the {ref} {said}?",
                            f"Is the {ref} {said} of the {self._of('picture', 'image', 'frame')}?")  # fmt: skip
        facts = {"answer": found, "place": " ".join(words)}
        return question, f"{'Yes' if found else 'No'}, the {thing.name} is {place(words)}.", facts

    def _is_at(self) -> Made | None:
        where = self._of("top left", "top right", "bottom left", "bottom right", "centre", "top", "bottom",
                         "left", "right")  # fmt: skip
        things = self.scene.things
        if self.random.random() < 0.7 and things:
            words = self.random.choice(things).place(0)
            where = where if words is None else " ".join(words)
        there = []
        for thing in things:
            words = thing.place(0)
            # of what stands in a corner nobody knows whether it is meant by the side
            if words is None or set(where.split()) < set(words):
                return None
            if " ".join(words) == where:
                there.append(thing)
        if len(there) > 1:
            return None
        said = where.replace("centre", self._of("centre", "center", "middle"))
        question = self._of(f"What is {self._of('in', 'at')} the {said}?", f"What do you see in the {said}?",
                            f"Which {self._of('object', 'shape', 'thing')} is {self._of('in', 'at')} the {said}?")  # fmt: skip
        facts = (
            {"name": there[0].name, "colour": there[0].colour, "shape": there[0].shape}
            if there
            else {}
        )
        return question, f"{upper(a(there[0].name))}." if there else "Nothing.", facts

    # Several frames ------------------------------------------------------------------------------

    def _happens(self) -> Made:
        question = self._of(
            "What happens?", f"What happens {self._here()}?", "What changed?", "What changes?",
            "What changed between the frames?", "What is different?", "Describe what happens.",
            "What is going on?", "Describe the change.", "What happened?",
            "Describe what happens between the first and the last frame.",
            "What is the difference between the first frame and the last?", "What do you see happening?",
            "What changes from frame to frame?", "Tell me what changed.", "What does the camera show?",
            "Describe these frames.", "What do you see?", "Describe the frames.", "Summarise what happens.",
        )  # fmt: skip
        return question, f"{upper(self.event())}.", self._event_facts()

    def _way(self) -> Made | None:
        thing = self._actor()
        if thing is None:
            return None
        ref = self._ref(thing)
        question = self._of(
            f"Which way does the {ref} move?", f"Which way is the {ref} moving?", f"Which way does the {ref} go?",
            f"In which direction does the {ref} move?", f"What direction is the {ref} moving in?",
            f"Where does the {ref} move?", f"Where is the {ref} going?", f"Where is the {ref} moving to?",
            f"Which direction does the {ref} go in?", f"How does the {ref} move?", f"What does the {ref} do?",
            f"In what direction is the {ref} moving?", f"What direction does the {ref} move?",
            f"What is the direction of the {ref}?", f"Where does the {ref} go?", f"Which direction is the {ref} moving?",
        )  # fmt: skip
        if (
            self.scene.happening in ("appear", "vanish")
            and thing in self.happens
            and "do?" in question
        ):
            return question, f"The {thing.name} {self.happens[thing]}.", {}
        way = dict(self.scene.movers).get(thing)
        facts = {"direction": way or "none", "moved": self._moving(thing) != "does not move"}
        return question, f"The {thing.name} {self._moving(thing)}.", facts

    def _actor(self) -> Thing | None:
        if self.scene.movers and self.random.random() < 0.8:
            return self.random.choice(self.scene.movers)[0]
        return self._some()

    def _moving(self, thing: Thing) -> str:
        if self.scene.happening in ("move", "jumble") and thing in self.happens:
            return self.happens[thing]
        return "does not move"

    def _moves(self) -> Made:
        question = self._of(
            "Does anything move?", "Is anything moving?", "What moves?", "What is moving?", "Did something move?",
            "Which object moves?", "Which shape moves?", "Is there any movement?", "Do you see any motion?",
            "What moved?", f"Is something moving {self._here()}?", "Which thing moves, and where?",
        )  # fmt: skip
        moves = self.scene.happening in ("move", "jumble")
        text = self.event() if moves else "nothing moves"
        if question.startswith(("What", "Which")):
            return question, f"{upper(text)}.", self._event_facts()
        return question, f"{'Yes' if moves else 'No'}, {text}.", {"answer": moves}

    def _is_moving(self) -> Made | None:
        thing = self._actor()
        if thing is None:
            return None
        ref = self._ref(thing)
        true = dict(self.scene.movers).get(thing) if self.scene.happening == "move" else None
        kind = self._of("way", "way", "way", "at all", "still")
        if kind == "way":
            asked = (
                true
                if true and self.random.random() < 0.5
                else self._of("left", "right", "up", "down")
            )
            way = (
                f"{self._of('to the ', '')}{asked}"
                if asked in ("left", "right")
                else self._of(asked, f"{asked}wards")
            )
            question = self._of(f"Is the {ref} moving {way}?", f"Does the {ref} move {way}?",
                                f"Is the {ref} going {way}?", f"Did the {ref} move {way}?")  # fmt: skip
            yes = asked == true
        elif kind == "at all":
            question = self._of(
                f"Does the {ref} move?", f"Is the {ref} moving?", f"Did the {ref} move?"
            )
            yes = self._moving(thing) != "does not move"
        else:
            question = self._of(f"Does the {ref} stand still?", f"Does the {ref} stay where it is?",
                                f"Is the {ref} still?")  # fmt: skip
            yes = self._moving(thing) == "does not move"
        return question, f"{'Yes' if yes else 'No'}, it {self._moving(thing)}.", {"answer": yes}

    def _appears(self) -> Made:
        question = self._of(
            "What appears?", "What appeared?", "What is new?", "Does anything appear?", "Did something appear?",
            "Which object appears?", "Did anything new come?", "Has something new appeared?", "What came into the picture?",
            "Which shape appears, and when?", "What was added?", "Does a new object appear?",
        )  # fmt: skip
        return self._said(question, "appear", "nothing appears")

    def _vanishes(self) -> Made:
        question = self._of(
            "What vanishes?", "What vanished?", "What disappears?", "What disappeared?", "Does anything vanish?",
            "Does anything disappear?", "Did something disappear?", "Which object vanishes?", "What is gone?",
            "What is missing in the end?", "Did anything go away?", "Which shape disappears, and when?",
            "What was removed?", "Is anything gone?", "What left the picture?",
        )  # fmt: skip
        return self._said(question, "vanish", "nothing vanishes")

    def _said(self, question: str, happening: str, none: str) -> Made:
        so = self.scene.happening == happening
        text = self.event() if so else none
        if question.startswith(("What", "Which")):
            return question, f"{upper(text)}.", self._event_facts() if so else {}
        return question, f"{'Yes' if so else 'No'}, {text}.", {"answer": so}

    def _when(self) -> Made | None:
        if self.scene.happening not in ("appear", "vanish"):
            return None
        thing = self.scene.movers[0][0]
        ref = self._ref(thing)
        verb = self._of("appear", "show up", "come") if self.scene.happening == "appear" else (
            self._of("vanish", "disappear", "go away"))  # fmt: skip
        question = self._of(
            f"In which frame does the {ref} {verb}?", f"When does the {ref} {verb}?", f"At which frame does the {ref} {verb}?",
            f"In what frame did the {ref} {verb}?", "Which frame is the first after the change?",
            f"In which frame does it {verb}?", "In which frame does something change?", "When did it change?",
            "In which frame does the change happen?",
        )  # fmt: skip
        since = (self.scene.since or 0) + 1
        return question, f"In frame {since}.", {"frame": since}

    def _changed(self) -> Made:
        question = self._of(
            "Did anything change?", "Does anything change?", "Has anything changed?", "Is anything different?",
            "Is there a change?", "Did something happen?", "Are the frames all the same?", "Are all frames alike?",
            "Are the frames identical?", "Does everything stay the same?", "Did nothing change?",
        )  # fmt: skip
        same = question.startswith(("Are", "Does everything", "Did nothing"))
        yes = bool(self.happens) != same
        return question, f"{'Yes' if yes else 'No'}, {self.event()}.", {"answer": yes}

    def _in_order(self) -> Made | None:
        if self.scene.happening not in ("move", "jumble"):
            return None
        question = self._of("Are the frames in order?", "Are the frames in the right order?",
                            "Is the order of the frames right?", "Are the pictures in order?",
                            "Were the frames shuffled?", "Are the frames out of order?")  # fmt: skip
        ordered = self.scene.happening == "move"
        yes = ordered == ("in" in question.split() or "right?" in question)
        answer = (
            f"{'Yes' if yes else 'No'}, the frames are {'in order' if ordered else 'out of order'}."
        )
        return question, answer, {"answer": yes}

    def _frames(self) -> Made:
        question = self._of("How many frames are there?", "How many frames do you see?", "How many pictures are there?",
                            "Count the frames.")  # fmt: skip
        return question, f"There are {self.scene.frames} frames.", {"count": self.scene.frames}

    # JSON ----------------------------------------------------------------------------------------

    def _event_facts(self) -> Facts:
        """Return the facts of what happens; those of one thing only if it happens to one."""
        kind = self.scene.happening
        movers = self.scene.movers
        facts: Facts = {
            "event": kind,
            "changed": bool(movers),
            "moved": kind in ("move", "jumble"),
            "appeared": kind == "appear",
            "vanished": kind == "vanish",
        }
        if len(movers) <= 1:
            thing, way = movers[0] if movers else (None, None)
            facts |= {
                "direction": way or "none",
                "shape": thing.shape if thing else "none",
                "colour": thing.colour if thing else "none",
                "name": thing.name if thing else "none",
                "frame": 0 if self.scene.since is None else self.scene.since + 1,
            }
        return facts

    def _thing_facts(self, thing: Thing) -> Facts:
        words = thing.place(0)
        facts = {"shape": thing.shape, "colour": thing.colour, "name": thing.name}
        return facts if words is None else {**facts, "place": " ".join(words)}

    def _whole(self) -> Answered | None:
        """Return a wish for a JSON object about all that is to be seen."""
        if self.scene.frames > 1:
            return objects.whole(self.random, self._event_facts(), several=True)
        things = [(thing.place(0), thing) for thing in self.scene.things]
        if len(things) == 1 and self.random.random() < 0.75:
            return objects.whole(
                self.random, {**self._thing_facts(things[0][1]), "count": 1}, several=False
            )
        if len(things) > 3 or any(words is None for words, _ in things):
            return None
        things.sort(key=lambda each: (_order(each[0] or ()), each[1].name))
        return objects.several(self.random, [self._thing_facts(thing) for _, thing in things])


def _order(words: tuple[str, ...]) -> tuple[int, int]:
    """Return a place's rank in reading order."""
    row = next((n for n, word in enumerate(("top", None, "bottom")) if word in words), 1)
    column = next((n for n, word in enumerate(("left", None, "right")) if word in words), 1)
    return row, column


_BEFORE = (
    "Please answer: ",
    "Look closely. ",
    "Tell me: ",
    "Question: ",
    "Hi. ",
    "Look at this. ",
    "Answer briefly: ",
)
_AFTER = (" Answer in one sentence.", " Answer briefly.", " Please be brief.", " Thanks.", " Answer in one short sentence.",
          " Keep it short.", " Please answer.")  # fmt: skip


def style(random: Random, question: str) -> str:
    """Return a question as somebody in a hurry, or somebody polite, would write it."""
    kind = random.random()
    if kind < 0.08:
        question = question.lower()
    elif kind < 0.13:
        question = question.rstrip("?.")
    elif kind < 0.16:
        question = question.lower().rstrip("?.")
    kind = random.random()
    if kind < 0.03:
        question = f"{random.choice(_BEFORE)}{question}"
    elif kind < 0.08:
        question = f"{question}{random.choice(_AFTER)}"
    return question
