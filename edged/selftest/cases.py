"""The fixed jobs of `edged selftest`, each with its right answer.

The model that ships must give exactly that answer. Any other model has words of its own: from it
only the facts are wanted, each in one of several wordings.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from edged.jobs import Kind
from edged.selftest.drawings import COLOURS, Mark, Point, Shape, encoded, frame

#: Enough for each answer; another model is cut off in the middle of a long one.
MAX_TOKENS = 96
#: What the model that ships says to what it cannot answer.
REFUSAL = "I can only see simple shapes and check readings."

Size = tuple[int, int]

_SMALL, _WIDE, _TALL, _SQUARE = (320, 240), (640, 360), (240, 320), (256, 256)

#: What a word is denied by: "not", a few words before it.
_DENIED = re.compile(
    r"\b(?:not?|never|nothing|none|n?either|nor|without|cannot|\w+n't)\s+(?:(?!but\b)\w+\s+){0,4}$",
    re.IGNORECASE,
)


def _first(said: Sequence[bool]) -> bool:
    return said[0]


def _last(said: Sequence[bool]) -> bool:
    return said[-1]


@dataclass(frozen=True, slots=True)
class Fact:
    """What an answer has to say, whatever its words; what it denies counts for the opposite."""

    #: A pattern of the words for it.
    words: str
    #: A pattern of the words for the opposite.
    unlike: str = r"(?!)"
    #: Which of these words decide.
    by: Callable[[Sequence[bool]], bool] = any

    def said(self, text: str) -> bool:
        """Return whether a text says so."""
        text = text.replace("\u2019", "'")
        pattern = rf"(?<!\w)(?:(?P<words>{self.words})|{self.unlike})(?!\w)"
        said = [
            (each["words"] is not None) is not bool(_DENIED.search(text[: each.start()]))
            for each in re.finditer(pattern, text, re.IGNORECASE)
        ]
        return bool(said) and self.by(said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is right as one answer."""

    #: Text, or the fields of a JSON object.
    exact: str | dict[str, Any]
    #: What an answer in other words has to say; a JSON object has its fields instead.
    facts: tuple[Fact, ...] = ()
    #: What is right of any other model, if it is not the same in other words.
    other: str | None = None

    def matches(self, answer: Mapping[str, Any], *, exactly: bool) -> bool:
        """Return whether an answer, a result or a part of one, is right."""
        if isinstance(self.exact, dict):
            value = answer.get("json")
            return (
                _same(value, self.exact) if exactly else _same(_folded(value), _folded(self.exact))
            )
        text = answer.get("text")
        if exactly or not isinstance(text, str):
            return text == self.exact
        return all(fact.said(text) for fact in self.facts)

    def expected(self, *, exactly: bool) -> Any:
        """Return what is wanted, for people."""
        return self.exact if exactly or self.other is None else self.other


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One job."""

    name: str
    kind: Kind
    #: The fields of the request, `id` and `v` left out.
    request: Mapping[str, Any] = field(repr=False)
    #: One, or one for each of `questions`.
    answers: tuple[Answer, ...]

    def judge(self, result: Mapping[str, Any], *, exactly: bool) -> bool:
        """Return whether a job's result is right."""
        found = result.get("answers") if "questions" in self.request else [result]
        if not isinstance(found, list) or len(found) != len(self.answers):
            return False
        return all(
            wanted.matches(each, exactly=exactly)
            for wanted, each in zip(self.answers, found, strict=True)
        )

    def expected(self, *, exactly: bool) -> Any:
        """Return what is wanted: text, a JSON object, or one of them for each question."""
        wanted = [each.expected(exactly=exactly) for each in self.answers]
        return wanted if "questions" in self.request else wanted[0]


def answer_of(result: Mapping[str, Any]) -> Any:
    """Return what a result says: text, a JSON object, or one of them for each question."""
    if "answers" in result:
        return [answer_of(each) for each in result["answers"]]
    return result["json"] if "json" in result else result.get("text")


def _same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are the same: true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _folded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _folded(each) for name, each in value.items()}
    return value.casefold() if isinstance(value, str) else value


# Requests ---------------------------------------------------------------------------------------


def thing(colour: str, shape: Shape, at: Point, size: float = 0.3) -> Mark:
    """Return a shape in one of the colours that have a name, its middle at a share of the frame."""
    return Mark(shape=shape, rgb=COLOURS[colour], at=at, size=size)


def drawn(
    frames: Sequence[Sequence[Mark]], size: Size = _SMALL, kind: Literal["JPEG", "PNG"] = "JPEG"
) -> list[bytes]:
    """Return frames as the files of a camera."""
    return [encoded(frame(marks, size), kind) for marks in frames]


def moving(colour: str, shape: Shape, path: Sequence[Point]) -> list[list[Mark]]:
    """Return frames of one shape on its way."""
    return [[thing(colour, shape, at, 0.35)] for at in path]


def seen(files: Sequence[bytes], prompt: str | Sequence[str], **more: Any) -> dict[str, Any]:
    """Return a request about frames: one question, or several."""
    asked = {"prompt": prompt} if isinstance(prompt, str) else {"questions": [*prompt]}
    images = [{"image": base64.b64encode(each).decode("ascii")} for each in files]
    return {**asked, "frames": images, "detail": "low", **more}


def form(**fields: Any) -> dict[str, Any]:
    """Return the `response_format` of an object with these fields: allowed values, or a type."""
    properties = {
        name: {"enum": [*each]} if isinstance(each, list | tuple) else {"type": each}
        for name, each in fields.items()
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": [*fields],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"schema": schema}}


PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom",
          "bottom right")  # fmt: skip
DIRECTIONS = ("left", "right", "up", "down", "none")
EVENTS = ("none", "moved", "appeared", "vanished", "shuffled")
SHAPES = ("circle", "square", "triangle", "star", "cross")
#: The way of a circle to the right, and what is asked of it: the demo shows it too.
TO_THE_RIGHT: tuple[Point, ...] = ((0.18, 0.5), (0.39, 0.5), (0.61, 0.5), (0.82, 0.5))
WHICH_WAY = "Which way does the red circle move?"
READING = "Pump 3: 71 C, limit 65. Is that well?"
READING_ANSWER = "Pump 3 reads 71 C, limit 65 C: too high, so no."


# Facts ------------------------------------------------------------------------------------------

_ABOVE = r"above|over|exceed\w*|high(?:er)?|greater|more than|beyond|outside|out of range"
_BELOW = r"below|under|low(?:er)?|less than|short of|beneath|insufficient|out of range"
_FINE = r"fine|within|ok(?:ay)?|normal|safe|acceptable|(?:good|well)(?! \w)"
#: "No" as a word of its own, and not that which denies the next one.
_NO = r"no(?!\s+\w)"
_TOO_HIGH = Fact(_ABOVE, rf"{_FINE}|below|under|less than|lower", _first)
_TOO_LOW = Fact(_BELOW, rf"{_FINE}|above|over|exceed\w*|higher|more than|meets?", _first)
_WITHIN = Fact(rf"{_FINE}|{_BELOW}", rf"too low|{_ABOVE}", _first)
_NOT_WELL = Fact(rf"{_NO}|{_ABOVE}", rf"yes|{_FINE}|below|under|less than|lower", _first)

_NO_BLUE_SQUARE = Fact(rf"{_NO}|only", "yes|blue square", _first)
_THREE = Fact("3|three", "2|two|4|four|5|five|6|six", _first)

_GOES = r"vanish\w*|disappear\w*|gone|remov\w*|missing|no longer|not (?:there|present|visible)"
_COMES = r"appear(?:s|ed|ance)?(?! to)|added|new|introduc\w*|emerg\w*|shows up|comes? in"
#: What a story ends with is what has happened.
_APPEARS, _VANISHES = Fact(_COMES, _GOES, _last), Fact(_GOES, _COMES, _last)
_NOTHING = Fact(
    r"nothing|same|identical|unchanged|stationary",
    rf"chang\w*|mov\w*|shift\w*|differ\w*|{_GOES}",
    all,
)
_OUT_OF_ORDER = Fact(
    r"out of order|jump\w* (?:about|around)|erratic\w*|back and forth|random\w*|irregular\w*|"
    r"unpredictabl\w*|shuffled|(?:no|without)(?: \w+){1,2} (?:order|direction|pattern)",
    r"in (?:this |the |that )?(?:right |correct )?order",
)

_WAYS = {
    "left": r"left(?:wards?)?",
    "right": r"right(?:wards?)?",
    "up": r"up(?:wards?)?|top",
    "down": r"down(?:wards?)?|bottom",
}
_BACK = {"left": "right", "right": "left", "up": "down", "down": "up"}


def _way(way: str) -> Fact:
    """Return that something moves one way: from the other, or this one is named last."""
    come = r"from (?:(?!to )\w+ ){0,4}"
    others = "|".join(words for name, words in _WAYS.items() if name != way)
    return Fact(
        rf"{_WAYS[way]}|{come}(?:{_WAYS[_BACK[way]]})", rf"{others}|{come}(?:{_WAYS[way]})", _last
    )


# The jobs ---------------------------------------------------------------------------------------


def cases() -> tuple[Case, ...]:
    """Return the jobs; the same ones each time, to the byte."""
    return (_refusal(), *_texts(), *_single_frames(), *_several_frames())


def _text(name: str, prompt: str, *answer: Answer, **more: Any) -> Case:
    return Case(
        name=name, kind=Kind.TEXT, request={"prompt": prompt, **_common(more)}, answers=answer
    )


def _common(more: Mapping[str, Any]) -> dict[str, Any]:
    return {"max_tokens": MAX_TOKENS, **more}


def _texts() -> tuple[Case, ...]:
    return (
        _text("a reading above its limit", "Pump 3: 71 C, limit 65. Check this.",
              Answer(exact="Pump 3 reads 71 C, limit 65 C: too high.", facts=(_TOO_HIGH,))),
        _text("a reading within its limit", "pump 3: 61 C, limit 65. Check this.",
              Answer(exact="pump 3 reads 61 C, limit 65 C: fine.", facts=(_WITHIN,))),
        _text("a reading below its minimum", "Tank 2: 12 bar, minimum 20. Check this.",
              Answer(exact="Tank 2 reads 12 bar, minimum 20 bar: too low.", facts=(_TOO_LOW,))),
        _text("yes or no", READING, Answer(exact=READING_ANSWER, facts=(_NOT_WELL,))),
        _text("a reading as JSON", "pump 3: 71 C, limit 65. Check this.",
              Answer(exact={"device": "pump 3", "value": 71, "limit": 65, "ok": False}),
              response_format=form(device="string", value="integer", limit="integer",
                                   ok="boolean")),
    )  # fmt: skip


def _looking(name: str, files: Sequence[bytes], prompt: str | Sequence[str], *answers: Answer,
             **more: Any) -> Case:  # fmt: skip
    request = seen(files, prompt, **_common(more))
    return Case(name=name, kind=Kind.VISION, request=request, answers=answers)


def _single_frames() -> tuple[Case, ...]:
    circle = [thing("red", "circle", (0.5, 0.5))]
    three = [thing("red", "circle", (0.2, 0.22), 0.22), thing("blue", "square", (0.8, 0.25), 0.22),
             thing("green", "triangle", (0.5, 0.78), 0.22)]  # fmt: skip
    two = [thing("red", "circle", (0.18, 0.2), 0.25), thing("blue", "square", (0.5, 0.5), 0.25)]
    return (
        _looking("a colour", drawn([circle]), "What colour is the circle?",
                 Answer(exact="The circle is red.", facts=(Fact("red"),))),
        _looking("a shape", drawn([[thing("yellow", "star", (0.5, 0.5), 0.4)]], _SQUARE, "PNG"),
                 "What shape is the object?", Answer(exact="It is a star.", facts=(Fact("star"),))),
        _looking("a place", drawn([[thing("green", "triangle", (0.82, 0.8))]], _WIDE),
                 "Where is the triangle?",
                 Answer(exact="The green triangle is at the bottom right.",
                        facts=(Fact("bottom|lower"), Fact("right")))),
        _looking("a count", drawn([three]), "How many objects are there?",
                 Answer(exact="There are 3 objects.", facts=(_THREE,))),
        _looking("something that is not there", drawn([circle], _TALL, "PNG"),
                 "Is there a blue square?",
                 Answer(exact="No, there is no blue square.", facts=(_NO_BLUE_SQUARE,))),
        _looking("a description", drawn([two]), "What do you see?",
                 Answer(exact="A red circle at the top left and a blue square in the centre.",
                        facts=(Fact("red (?:circle|dot|disc)|circle is red"),
                               Fact("blue (?:square|rectangle)|square is blue")))),
        _looking("a frame as JSON", drawn([[two[0]]], _SQUARE), "Describe the picture.",
                 Answer(exact={"shape": "circle", "colour": "red", "place": "top left"}),
                 response_format=form(shape=SHAPES, colour=tuple(COLOURS), place=PLACES)),
    )  # fmt: skip


def _several_frames() -> tuple[Case, ...]:
    right = drawn(moving("red", "circle", TO_THE_RIGHT))
    up = moving("yellow", "star", [(0.5, 0.8), (0.5, 0.6), (0.5, 0.4), (0.5, 0.2)])
    down = moving("blue", "square", [(0.3, 0.2), (0.3, 0.5), (0.3, 0.8)])
    square, circle = thing("blue", "square", (0.2, 0.75)), thing("red", "circle", (0.78, 0.25))
    shuffled = [right[n] for n in (2, 0, 3, 1)]
    return (
        _looking("a move", right, WHICH_WAY,
                 Answer(exact="The red circle moves to the right.", facts=(_way("right"),))),
        _looking("the same frames, the last first", right[::-1], WHICH_WAY,
                 Answer(exact="The red circle moves to the left.", facts=(_way("left"),))),
        _looking("something that appears",
                 drawn([[square], [square], [square, circle], [square, circle]], kind="PNG"),
                 "What happens?",
                 Answer(exact="A red circle appears in frame 3.",
                        facts=(Fact("circle"), _APPEARS))),
        _looking("something that vanishes", drawn([[square, circle], [square], [square]], _TALL),
                 "What happens?",
                 Answer(exact="The red circle vanishes in frame 2.",
                        facts=(Fact("circle"), _VANISHES))),
        _looking("nothing that happens", drawn([[square, circle]] * 3), "What changed?",
                 Answer(exact="Nothing changes.", facts=(_NOTHING,))),
        _looking("frames out of order", shuffled, "What happens?",
                 Answer(exact="The red circle jumps about: the frames are out of order.",
                        facts=(_OUT_OF_ORDER,))),
        _looking("a move as JSON", drawn(up, _SQUARE), "What happens?",
                 Answer(exact={"event": "moved", "direction": "up"}),
                 response_format=form(event=EVENTS, direction=DIRECTIONS)),
        _looking("three questions about the same frames", drawn(down, _WIDE, "PNG"),
                 ("Which way does the square move?", "What colour is the square?",
                  "How many frames are there?"),
                 Answer(exact="The blue square moves down.", facts=(_way("down"),)),
                 Answer(exact="The square is blue.", facts=(Fact("blue"),)),
                 Answer(exact="There are 3 frames.", facts=(_THREE,))),
    )  # fmt: skip


def _refusal() -> Case:
    """Return the first job: of all models only the one that ships says `REFUSAL` to it."""
    return _text(
        "what it cannot know", "What is the capital of France?",
        Answer(exact=REFUSAL, facts=(Fact("Paris"),), other="Paris"),
    )  # fmt: skip
