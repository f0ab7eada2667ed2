"""Answers that are JSON objects, as a schema may ask for them.

A schema names its fields and spells its values as it likes: here each fact has several names and
spellings, and any choice of facts may be asked for in any order. Under a schema the first token of
an answer is not the model's choice, nor is any name of a field: so it does not learn them there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

#: Facts by their names, the one that was asked for first.
Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question and its one right answer."""

    #: What is asked for; a JSON answer's begins with `json`.
    kind: str
    question: str
    answer: str
    #: The JSON schema of the request; None: there is none.
    schema: dict[str, Any] | None = field(default=None, repr=False)


#: What a schema decides: the names of fields, and what opens their values.
_DECIDED = re.compile(r'[{,]*"\w+":(?:\[|"?)')


def chosen(answer: str) -> list[bool]:
    """Return of each character of a JSON answer whether it is the model's choice under a schema.

    Values are, and the character after each, for there the value could have gone on; and whether a
    list begins at all, and goes on.
    """
    choice = [True] * len(answer)
    for found in _DECIDED.finditer(answer):
        begin = found.start()
        begin += answer[begin] != "{" or answer[begin - 1 : begin] == "["
        choice[begin : found.end()] = [False] * (found.end() - begin)
    return choice


_NAMES: Mapping[str, tuple[str, ...]] = {
    "answer": ("answer", "answer", "result"),
    "colour": ("colour", "color"),
    "shape": ("shape",),
    "name": ("object", "name"),
    "place": ("place", "position"),
    "count": ("count", "number"),
    "event": ("event",),
    "direction": ("direction",),
    "frame": ("frame",),
    "changed": ("changed",),
    "moved": ("moved", "moving"),
    "appeared": ("appeared",),
    "vanished": ("vanished",),
    # of reports
    "device": ("device", "name"),
    "reading": ("value", "reading"),
    "limit": ("limit", "max"),
    "floor": ("limit", "min"),
    "unit": ("unit",),
    "ok": ("ok", "within_limit"),
    "alarm": ("alarm",),
    "verdict": ("verdict", "status"),
}
_EVENTS: Mapping[str, str] = {
    "still": "none", "move": "moved", "appear": "appeared", "vanish": "vanished", "jumble": "shuffled",
}  # fmt: skip
_VERDICTS = ("ok", "high", "low")
_PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom",
           "bottom right")  # fmt: skip
_DIRECTIONS = ("left", "right", "up", "down", "none")
#: Facts that an answer may be without more words, as the question says which one it is.
_ANSWERS = {"answer", "colour", "shape", "place", "count", "direction", "frame", "event", "verdict"}
_SENTENCES = ("summary", "description", "sentence", "reason", "text")


class Form:
    """One schema's names and spellings.

    Args:
        random: what chance is drawn from.
        free: without a schema, which leaves the spellings to the model.
    """

    def __init__(self, random: Random, *, free: bool) -> None:
        self._random = random
        self._centre, self._words = "centre", False
        if free:
            return
        self._centre = random.choice(("centre", "center"))
        self._words = random.random() < 0.25  # yes and no instead of true and false

    def value(self, name: str, fact: Any) -> tuple[Any, dict[str, Any]]:
        """Return a fact as this form spells it, and the schema of its field."""
        if isinstance(fact, bool):
            if self._words:
                return "yes" if fact else "no", {"enum": ["yes", "no"]}
            return fact, {"type": "boolean"}
        if isinstance(fact, int | float):
            return fact, {"type": "integer" if isinstance(fact, int) else "number"}
        if name == "event":
            return _EVENTS[fact], {"enum": [*_EVENTS.values()]}
        if name == "verdict":
            return fact, {"enum": [*_VERDICTS]}
        if name == "place":
            return self._place(fact), {"enum": [self._place(each) for each in _PLACES]}
        if name == "direction":
            return fact, {"enum": [*_DIRECTIONS]}
        return fact, {"type": "string"}

    def _place(self, words: str) -> str:
        return words.replace("centre", self._centre)

    def fill(self, facts: Facts) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return an object of these facts, and its schema."""
        made, schema = {}, {}
        for name, fact in facts.items():
            key = self._random.choice(_NAMES.get(name, (name,)))
            if key in made:
                key = name
            if key in made:
                continue
            made[key], schema[key] = self.value(name, fact)
        return made, _closed(schema)


def _closed(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": [*fields],
        "additionalProperties": False,
    }


def _chosen(random: Random, facts: Facts, least: int) -> Facts:
    """Return some of the facts, in any order."""
    names = random.sample([*facts], random.randint(min(least, len(facts)), min(5, len(facts))))
    return {name: facts[name] for name in names}


_AS_JSON = (
    "Answer as JSON with the {keys}.", "As JSON, please, with the {keys}.", "Use JSON: {names}.",
    "Give a JSON object with {names}.", "Return JSON with the {keys}.", "JSON with {names}, please.",
)  # fmt: skip
_WISHES = (
    "Describe the picture.", "Describe what you see.", "What do you see?", "Fill in the form.",
    "Report what you see.", "Answer in JSON.", "Describe it as JSON.", "What is in the picture?",
    "Give the facts.", "Report.", "What is there?",
)  # fmt: skip
_SEVERAL_WISHES = (
    "Describe what happens.", "What happens?", "What changed?", "Fill in the form.", "Report the change.",
    "Answer in JSON.", "Describe it as JSON.", "What is different?", "Report.", "Give the facts.",
    "What do you see?",
)  # fmt: skip


def is_free(random: Random) -> bool:
    """Tell by chance whether the next object is to be without a schema."""
    return random.random() < 0.25


def answered(
    random: Random,
    kind: str,
    question: str,
    made: dict[str, Any],
    schema: dict[str, Any],
    *,
    free: bool,
) -> Answered:
    """Return the question with a JSON answer: by a schema, or because it asks for its fields."""
    answer = json.dumps(made, ensure_ascii=False, separators=(",", ":"))
    if not free:
        return Answered(kind=f"json_{kind}", question=question, answer=answer, schema=schema)
    keys = [*made]
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    wish = random.choice(_AS_JSON).format(
        names=names, keys=f"{'keys' if len(keys) > 1 else 'key'} {names}"
    )
    asked = f"{question} {wish}" if question[-1:] in "?." else f"{question}. {wish}"
    return Answered(kind=f"json_{kind}", question=asked, answer=answer)


def about(random: Random, kind: str, question: str, answer: str, facts: Facts) -> Answered:
    """Return a question about one fact with an object for its answer."""
    first = next(iter(facts))
    if random.random() < 0.55:
        chosen: Facts = {first: facts[first]}
    else:
        chosen = _chosen(random, facts, 1)
    free = is_free(random)
    made, schema = Form(random, free=free).fill(chosen)
    if [*chosen] == [first] and first in _ANSWERS and random.random() < 0.45:
        (value,), (wanted,) = made.values(), schema["properties"].values()
        key = random.choice(_NAMES["answer"])
        made, schema = {key: value}, _closed({key: wanted})
    if random.random() < 0.08:
        key = random.choice(_SENTENCES)
        made = {**made, key: answer}
        schema = _closed({**schema["properties"], key: {"type": "string"}})
    return answered(random, kind, question, made, schema, free=free)


def given(random: Random, kind: str, question: str, facts: Facts) -> Answered:
    """Return a question with an object of these facts for its answer, in this order."""
    free = is_free(random)
    made, schema = Form(random, free=free).fill(facts)
    return answered(random, kind, question, made, schema, free=free)


def whole(random: Random, facts: Facts, *, several: bool) -> Answered:
    """Return a wish for an object about all there is."""
    wish = random.choice(_SEVERAL_WISHES if several else _WISHES)
    return given(random, "whole", wish, _chosen(random, facts, 2))


def several(random: Random, facts: Sequence[Facts]) -> Answered:
    """Return a wish for a list of all things; without a schema, a list of their names."""
    free = is_free(random)
    form = Form(random, free=free)
    names = random.sample(["shape", "colour", "place"], random.randint(2, 3))
    key = random.choice(("objects", "objects", "things", "items", "shapes"))
    made: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    if random.random() < 0.4:
        count = random.choice(("count", "number", "total"))
        made[count], fields[count] = len(facts), {"type": "integer"}
    if free or random.random() < 0.2:
        made[key] = [each["name"] for each in facts]
        fields[key] = {"type": "array", "items": {"type": "string"}}
    else:
        state = random.getstate()
        made[key] = []
        inner: dict[str, Any] = form.fill({n: facts[0][n] for n in names})[1] if facts else {}
        for each in facts:
            random.setstate(state)  # all have the same keys
            value, inner = form.fill({name: each[name] for name in names})
            made[key].append(value)
        fields[key] = {"type": "array", "items": inner}
    return answered(random, "list", random.choice(_WISHES), made, _closed(fields), free=free)
