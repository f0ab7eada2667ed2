"""Training samples: many questions about the same frames, packed into one row of tokens.

The questions of a scene share its frames but do not see each other: each goes on from the frames as
if it were the only one, at the positions that it would have then. Prompts are made by edged's own
code, so that what is learned is what will be asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset

from edged.engine.prompts import STYLES, Prompts
from edged.engine.tokens import read_vocabulary
from edged.engine.vision.decode import Picture
from edged.engine.vision.transform import transform
from edged.models.fuse import OPERATOR_DOES
from edged.models.geometry import Geometry
from edged.ports import Turn
from edged.selftest.drawings import COLOURS, SHAPES
from edged.selftest.training import changes, reports
from edged.selftest.training.changes import CHANGES, EVENTS
from edged.selftest.training.network import CROP, FRAME_TOKENS, NAMES, SIDE
from edged.selftest.training.objects import Answered, chosen
from edged.selftest.training.questions import Asker
from edged.selftest.training.scenes import Scene, scene

GEOMETRY = Geometry(
    crop=CROP,
    tokens_a_side=SIDE,
    max_crops=1,
    mean=tuple(OPERATOR_DOES["mean"]),
    std=tuple(OPERATOR_DOES["std"]),
)
#: Stands for a frame's tokens in a row of ids.
FRAME = -1
#: How much it counts that a value ends under a schema: any of the tokens that end it is right.
ENDS = 0.5
_ENDS = ('"', '","', '"}', ",", ',"', "}")
#: Cells a side of the map that the encoder's finer teacher looks at.
FINE = 12
_COUNTS, _COUNT_WEIGHTS = (2, 3, 4, 5, 6, 7, 8), (15, 20, 38, 10, 7, 5, 5)


def names_index(colour: str, shape: str) -> int:
    """Return the number by which the teachers know a colour and a shape."""
    return [*COLOURS].index(colour) * len(SHAPES) + SHAPES.index(shape)  # type: ignore[arg-type]


class Writer:
    """Writes prompts and answers as token ids.

    Args:
        folder: where the tokenizer's files are.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        vocabulary = read_vocabulary(folder / "tokenizer.json")
        self._prompts = Prompts(self._encode, vocabulary, STYLES["phi3.5-vision"])
        self.end = vocabulary.controls["<|end|>"]
        #: Pieces of text are from `first` up to the control tokens; `again` has no other meaning.
        self.first, self.controls = 259, vocabulary.controls["<|endoftext|>"]
        self.again = vocabulary.controls["<|placeholder1|>"]
        #: Tokens that end a string, and those that end another value, [2, tokens].
        self.ends = torch.zeros(2, self._tokenizer.get_vocab_size(), dtype=torch.bool)
        for token, number in self._tokenizer.get_vocab().items():
            if token in _ENDS:
                self.ends[int(token[0] != '"'), number] = True

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def prompt(self, question: str, frames: int, system: str | None) -> list[int]:
        """Return a conversation's ids, `FRAME` for each token of a frame."""
        turns: list[Turn] = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": [*range(frames), question]})
        outline = self._prompts.outline(turns, None)
        return outline.fill(dict.fromkeys(range(frames), FRAME_TOKENS), FRAME)[0]

    def words(self, colour: str, shape: str) -> list[int]:
        """Return the tokens of a colour and of a shape, one each."""
        colours, shapes = self._encode(colour), self._encode(shape)
        if len(colours) != 1 or len(shapes) != 1:
            raise ValueError(f"{colour} {shape} are more than a token each")
        return [*colours, *shapes]

    def answer(self, answered: Answered) -> tuple[list[int], list[float]]:
        """Return an answer's ids, its end token included, and how much each counts.

        A schema lets no white space stand before an answer; the tokenizer puts some there. Of what
        it asks for only values are the model's choice, and that they end, not what comes then.
        """
        if answered.schema is None:
            ids = [*self._encode(f"<|assistant|>\n{answered.answer}")[1:], self.end]
            return ids, [1.0] * len(ids)
        whole = self._tokenizer.encode(f"\n{answered.answer}", add_special_tokens=False)
        choice = chosen(answered.answer)
        weights = []
        for number, (begin, end) in zip(whole.ids[2:], whole.offsets[2:], strict=True):
            counts = begin > 0 and any(choice[begin - 1 : end - 1])
            weights.append(0.0 if not counts else ENDS if self.ends[:, number].any() else 1.0)
        return [*whole.ids[2:], self.end], [*weights, 0.0]

    def numbers(self) -> list[int]:
        """Return the tokens of 0 to 999."""
        return [self._tokenizer.token_to_id(str(number)) for number in range(1000)]

    def text(self, text: str) -> list[int]:
        """Return a text's ids."""
        return self._encode(text)


@dataclass(eq=False, slots=True)
class Row:
    """One row of tokens."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    #: 0: seen by all; else a question's number.
    parts: list[int] = field(default_factory=list)
    #: 1 where the token counts, `ENDS` where it is an end, 0 where it was given.
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], part: int, begin: int, weights: Sequence[float]) -> None:
        """Put tokens at its end."""
        self.ids += ids
        self.positions += range(begin, begin + len(ids))
        self.parts += [part] * len(ids)
        self.weights += weights


def row(writer: Writer, asked: Sequence[Answered], frames: int, system: str | None = None) -> Row:
    """Return the row of questions about the same frames, or about none."""
    made, prompts = Row(), [writer.prompt(each.question, frames, system) for each in asked]
    shared = 0
    if frames:
        last = max(n for n, i in enumerate(prompts[0]) if i == FRAME) + 1
        shared = last
        made.add(prompts[0][:shared], 0, 0, [0.0] * shared)
    for n, (each, prompt) in enumerate(zip(asked, prompts, strict=True), 1):
        answer, weights = writer.answer(each)
        rest = prompt[shared:]
        made.add([*rest, *answer], n, shared, [*([0.0] * len(rest)), *weights])
    return made


def pixels(picture: Image.Image) -> NDArray[np.float32]:
    """Return a picture as the encoder takes it, [3, CROP, CROP]."""
    seen = Picture(image=picture, width=picture.width, height=picture.height)
    made: NDArray[np.float32] = transform(seen, 1, GEOMETRY).pixel_values[1]
    return made


def lessons(scene: Scene, frame: int, size: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Return what the encoder's teachers want of a frame.

    Returns:
        Names [FINE, FINE] (0: none) at the middles of things; names [9, NAMES], 1 where there is
        one; where in its cell it is [9, 3]: right, down, and 1 if that counts.
    """
    fine = np.zeros((FINE, FINE), np.int64)
    names = np.zeros((SIDE * SIDE, NAMES), np.float32)
    where = np.zeros((SIDE * SIDE, 3), np.float32)
    longer = max(size)
    for thing in scene.things:
        at = thing.path[frame]
        if at is None:
            continue
        x, y = (0.5 + (share - 0.5) * side / longer for share, side in zip(at, size, strict=True))
        name = names_index(thing.colour, thing.shape)
        fine[min(int(y * FINE), FINE - 1), min(int(x * FINE), FINE - 1)] = 1 + name
        row, column = min(int(y * SIDE), SIDE - 1), min(int(x * SIDE), SIDE - 1)
        cell = row * SIDE + column
        names[cell, name] = 1
        where[cell] += (x * SIDE - column - 0.5, y * SIDE - row - 0.5, 1.0)
    where[:, :2] /= np.maximum(where[:, 2:], 1)
    return fine, names, where.clip(max=1)


def watched(scene: Scene, frame: int) -> tuple[Any, Any, Any]:
    """Return what the decoder is to make of a frame after those before it.

    Returns:
        The index in `CHANGES` of each cell, [9]; of the scene so far, [4]: the index in `EVENTS`,
        the name of the thing that it happens to, from 1, or 0, the frame since when something is
        there or gone, or 0, the frame itself; how many there are of each shape and colour, [13].
    """
    cells = [CHANGES.index(each) for each in changes.cells(scene, frame, SIDE)]
    found = changes.so_far(scene, frame)
    name = 1 + names_index(found.thing.colour, found.thing.shape) if found.thing else 0
    there = [thing for thing in scene.things if thing.path[frame] is not None]
    counts = [sum(thing.shape == shape for thing in there) for shape in SHAPES]
    counts += [sum(thing.colour == colour for thing in there) for colour in COLOURS]
    return (
        np.array(cells),
        np.array([EVENTS.index(found.event), name, found.since, frame]),
        np.array(counts),
    )


@dataclass(eq=False, slots=True)
class Batch:
    """Rows, padded to the same length, and all their frames in order."""

    ids: torch.Tensor
    positions: torch.Tensor
    parts: torch.Tensor
    weights: torch.Tensor
    pixels: torch.Tensor | None
    fine: torch.Tensor | None
    names: torch.Tensor | None
    where: torch.Tensor | None
    #: See `watched`.
    changes: torch.Tensor | None
    events: torch.Tensor | None
    counts: torch.Tensor | None

    @property
    def truth(self) -> torch.Tensor:
        """What an encoder that is never wrong would see; see `Encoder.see`."""
        return torch.cat([20 * self.names - 10, self.where[..., :2]], -1)

    @property
    def mask(self) -> torch.Tensor:
        """[rows, 1, length, length]: what may look at what."""
        length = self.ids.shape[1]
        before = torch.ones(length, length, dtype=torch.bool).tril()
        query, key = self.parts[:, :, None], self.parts[:, None, :]
        return ((before & ((key == 0) | (key == query))) | torch.eye(length, dtype=torch.bool))[
            :, None
        ]


class Samples(IterableDataset[Batch]):
    """Batches without end, from a seed.

    Args:
        folder: where the tokenizer's files are.
        seed: the same seed gives the same batches.
        frames_only: scenes of one frame and no questions, for the encoder alone.
        drawn: false: no pictures, for the decoder alone.
    """

    def __init__(
        self, folder: Path, seed: int, *, frames_only: bool = False, drawn: bool = True
    ) -> None:
        self._folder, self._seed, self._drawn = folder, seed, drawn
        self._frames_only = frames_only

    def __iter__(self) -> Iterator[Batch]:
        writer, random = Writer(self._folder), Random(self._seed)
        while True:
            if self._frames_only:
                yield _look(random, 96)
            else:
                yield batch(writer, random, drawn=self._drawn)


def _look(random: Random, count: int) -> Batch:
    scenes = [scene(random, 1) for _ in range(count)]
    nothing = torch.zeros(0)
    return _with_frames([(nothing, nothing, nothing, nothing)], scenes, random)


def _copies(writer: Writer, random: Random) -> Row:
    """Return tokens without sense, each run of them followed by itself.

    To answer is to copy, most of the time: names, numbers, units. A decoder finds out how to copy
    much sooner where there is nothing else to do.
    """
    made = Row()
    for part in range(1, 5):
        run = random.choices(range(writer.first, writer.controls), k=random.randint(4, 16))
        again = [writer.again, *run]
        made.add(
            [*run, *again, *again, *again],
            part,
            0,
            [0.0] * len(run) + ([0.0] + [1.0] * len(run)) * 3,
        )
    return made


def copies(writer: Writer, random: Random) -> Batch:
    """Return a batch of tokens to copy."""
    return _with_frames(_padded([_copies(writer, random) for _ in range(14)]), [], random)


def _verdicts(writer: Writer, random: Random) -> Row:
    """Return ends of answers about readings: comparing is learned by comparing many."""
    made, kind = Row(), random.choices(("bare", "sentence", "json"), (50, 25, 25))[0]
    for part in range(1, 33):
        each = reports.report(random)
        if kind == "json":
            facts = each.facts
            told = {"value": facts["reading"], "limit": facts.get("limit", facts.get("floor"))}
            name = random.choice(("ok", "verdict", "alarm"))
            text = json.dumps({**told, name: facts[name]}, separators=(",", ":"))
            before = text[: text.rindex(":") + 1 + (name == "verdict")]
        else:
            text = each.sentence
            text = text if kind == "sentence" else text.partition(" reads ")[2]
            before = text[: text.rindex(":") + 1]
        given, ids = len(writer.text(before)), writer.text(text)
        weights = [float(n >= given) for n in range(len(ids))]
        if kind == "json":
            weights[given + 1 :] = [0.0] * (len(ids) - given - 1)
        made.add(ids, part, 0, weights)
    return made


def verdicts(writer: Writer, random: Random) -> Batch:
    """Return a batch of readings to compare with their limits."""
    return _with_frames(_padded([_verdicts(writer, random) for _ in range(10)]), [], random)


def batch(writer: Writer, random: Random, *, drawn: bool = True) -> Batch:
    """Return the next batch: copies, comparisons, reports, single frames, or several."""
    kind = random.random()
    rows: list[Row] = []
    if kind < 0.02:
        return copies(writer, random)
    if kind < 0.16:
        return verdicts(writer, random)
    if kind < 0.38:
        for _ in range(64):
            system = random.choice(reports.SYSTEMS) if random.random() < 0.1 else None
            refused = random.random() < 0.12
            asked = reports.refused(random, frames=False) if refused else reports.ask(random)
            rows.append(row(writer, [asked], 0, system))
        return _with_frames(_padded(rows), [], random)
    frames = 1 if kind < 0.67 else random.choices(_COUNTS, _COUNT_WEIGHTS)[0]
    scenes = []
    for _ in range(28 if frames == 1 else max(10, 80 // frames)):
        scenes.append(scene(random, frames))
        asker = Asker(scenes[-1], random)
        asked = [
            reports.refused(random, frames=True) if random.random() < 0.05 else asker.ask()
            for _ in range(5 if frames == 1 else 4)
        ]
        system = random.choice(reports.SYSTEMS) if random.random() < 0.1 else None
        rows.append(row(writer, asked, frames, system))
    return _with_frames(_padded(rows), scenes, random, drawn=drawn)


def _padded(rows: Sequence[Row]) -> list[tuple[torch.Tensor, ...]]:
    length = max(len(each.ids) for each in rows)

    def filled(values: Sequence[Any], fill: Any) -> list[Any]:
        return [*values, *[fill] * (length - len(values))]

    return [
        (
            torch.tensor(filled(each.ids, 0)),
            torch.tensor(filled(each.positions, 0)),
            torch.tensor(filled(each.parts, 10_000)),
            torch.tensor(filled(each.weights, 0.0)),
        )
        for each in rows
    ]


def _with_frames(
    rows: Sequence[tuple[torch.Tensor, ...]],
    scenes: Sequence[Scene],
    random: Random,
    *,
    drawn: bool = True,
) -> Batch:
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    if not scenes:
        return Batch(*columns, *([None] * 7))  # type: ignore[arg-type]
    seen, taught, so_far = [], [], []
    for each in scenes:
        for n in range(each.frames):
            if drawn:
                seen.append(torch.from_numpy(pixels(each.picture(n, random))))
            taught.append(lessons(each, n, each.ground.size))
            so_far.append(watched(each, n))
    fine, names, where = (torch.from_numpy(np.stack(each)) for each in zip(*taught, strict=True))
    shown = torch.stack(seen) if drawn else None
    rest = (torch.from_numpy(np.stack(each)) for each in zip(*so_far, strict=True))
    return Batch(*columns, shown, fine, names, where, *rest)  # type: ignore[arg-type]
