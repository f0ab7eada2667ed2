"""Training: encoder and decoder, each alone for a while, then together, INT4 in mind."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from edged.selftest.drawings import COLOURS, SHAPES
from edged.selftest.training.changes import CHANGES
from edged.selftest.training.network import NAMES, Decoder, Encoder, Linear, Watcher
from edged.selftest.training.samples import (
    ENDS,
    FRAME,
    Batch,
    Samples,
    Writer,
    copies,
    verdicts,
)

#: Shares of the full rate once the decoder can copy: with more it learns less.
_COMPARING, _ANSWERING = 0.3, 0.15
#: How much it counts what the decoder makes of the frames before it is asked.
_WATCHING = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many steps each stage of a training takes."""

    #: The encoder alone.
    looking: int = 4000
    #: The decoder alone: copying, at most; comparing; answering about what it is told.
    copying: int = 600
    comparing: int = 400
    answering: int = 8000
    #: The decoder on what the encoder sees; the second half with its weights rounded.
    together: int = 2500

    def times(self, share: float) -> Plan:
        """Return a shorter plan, or a longer one; copying takes what it takes."""
        steps = {name: round(share * count) for name, count in asdict(self).items()}
        return Plan(**{**steps, "copying": self.copying})


def taught(encoder: Encoder, fine: Tensor, seen: Tensor, batch: Batch) -> Tensor:
    """Return how far the encoder is from seeing what is where."""
    weight = torch.ones(1 + NAMES)
    weight[0] = 0.05
    finely = functional.cross_entropy(encoder.teacher(fine), batch.fine, weight)
    names, where = seen[..., :NAMES], seen[..., NAMES:]
    coarsely = functional.binary_cross_entropy_with_logits(names, batch.names, reduction="none")
    off = ((where - batch.where[..., :2]) ** 2).sum(-1) * batch.where[..., 2]
    return finely + coarsely.sum(-1).mean() + 4 * off.mean()


@dataclass(eq=False, slots=True)
class Pupil:
    """What is taught to answer."""

    encoder: Encoder
    decoder: Decoder
    watcher: Watcher
    #: See `Writer`.
    ends: Tensor

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of the answers and of what is watched, and the share of right tokens.

        Where a batch has no pictures, the decoder is told what is in them. Products are in
        bfloat16: five times as fast where the CPU has them.
        """
        embeds = self.decoder.model.embed_tokens(batch.ids.clamp(min=0))
        frames = batch.ids == FRAME
        if batch.names is not None:
            self.encoder.eval()
            with torch.no_grad():
                seen = batch.truth if batch.pixels is None else self.encoder.see(batch.pixels)[1]
            tokens = self.encoder.tokens(seen).flatten(0, 1)
            embeds = embeds.masked_scatter(frames[..., None], tokens)
        # a token is foretold by the one before it, which is always of the same question
        weights = functional.pad(batch.weights[:, 1:], (0, 1))
        counts = weights > 0
        with torch.autocast("cpu", torch.bfloat16):
            states, given = self.decoder(embeds, batch.mask, batch.positions, counts)
            logits = self.decoder.lm_head(states).float()
        wanted = batch.ids.roll(-1, 1)[counts]
        off = _off(logits, wanted, weights[counts] == ENDS, self.ends)
        right = (off < math.log(2)).float().mean()
        loss = off.mean()
        if batch.names is not None:
            loss = loss + _WATCHING * _watched(self.watcher, given, frames, batch)
        return loss, right


def _off(logits: Tensor, wanted: Tensor, ending: Tensor, ends: Tensor) -> Tensor:
    """Return how unlikely each wanted token is; of one that ends a value, any like it."""
    likely = logits.log_softmax(-1)
    off = -likely.gather(1, wanted[:, None])[:, 0]
    alike = ends[ends[1, wanted[ending]].long()]
    alike = functional.pad(alike, (0, logits.shape[1] - ends.shape[1]))
    off[ending] = -likely[ending].masked_fill(~alike, -math.inf).logsumexp(-1)
    return off


def _watched(watcher: Watcher, given: list[Tensor], frames: Tensor, batch: Batch) -> Tensor:
    """Return how far the decoder is from knowing what the watcher asks."""
    weight = torch.ones(len(CHANGES))
    weight[0] = 0.1  # most cells are empty
    cells, answers, counts = watcher(given, frames)
    loss = torch.zeros(())
    for view in cells.unbind(1):
        loss = loss + functional.cross_entropy(view.flatten(0, 1), batch.changes.flatten(), weight)
    for answer, wanted in zip(answers, batch.events.unbind(1), strict=True):
        loss = loss + functional.cross_entropy(answer, wanted)
    return loss + functional.cross_entropy(counts.flatten(0, 1), batch.counts.flatten())


class Muon(torch.optim.Optimizer):
    """Steps in the direction of the nearest matrix whose singular values are all alike.

    Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # noqa: ARG002  (torch's own signature)
        """Take a step."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if not state:
                    state["mean"] = torch.zeros_like(matrix)
                state["mean"].lerp_(matrix.grad, 1 - group["momentum"])
                ahead = matrix.grad.lerp(state["mean"], group["momentum"])
                rows, columns = matrix.shape
                matrix.mul_(1 - 0.01 * group["lr"])
                matrix.add_(_levelled(ahead), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def _levelled(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values drawn to 1, by five Newton-Schulz steps."""
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if wide else x).float()


def _optimizers(pupil: Pupil) -> list[torch.optim.Optimizer]:
    """Return Muon for the decoder's matrices, and AdamW for what else it reads."""
    encoder, decoder = pupil.encoder, pupil.decoder
    matrices = [p for n, p in decoder.named_parameters() if p.dim() == 2 and "layers" in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in decoder.parameters() if id(p) not in chosen]
    read = [encoder.table, encoder.place, encoder.sub_gn, encoder.glb_gn]
    other = [*rest, *read, *pupil.watcher.parameters()]
    adam = torch.optim.AdamW(other, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.02)
    return [Muon(matrices, lr=0.02), adam]


def _batches(folder: Path, seed: int, **kind: bool) -> Iterator[Batch]:
    samples = Samples(folder, seed, **kind)
    return iter(DataLoader(samples, batch_size=None, num_workers=1, prefetch_factor=6))


def train(folder: Path, encoder: Encoder, decoder: Decoder, *, plan: Plan, seed: int) -> None:
    """Train both.

    Args:
        folder: the tokenizer's files; the weights are saved here, and those that are here already
            are taken.
        encoder: of frames.
        decoder: of tokens.
        plan: how long.
        seed: of everything that is drawn.
    """
    writer = Writer(folder)
    weights, seeing = folder / "weights.pt", folder / "encoder.pt"
    if weights.exists():
        saved = torch.load(weights)
        encoder.load_state_dict(saved["encoder"])
        decoder.load_state_dict(saved["decoder"])
        return
    if seeing.exists():
        encoder.load_state_dict(torch.load(seeing))
    else:
        _look(encoder, _batches(folder, seed, frames_only=True), plan.looking)
        _save(encoder.state_dict(), seeing)
    decoder.number(torch.tensor(writer.numbers()))
    pupil = Pupil(encoder, decoder, Watcher(decoder.shape.hidden), writer.ends)
    _copy(pupil, writer, Random(seed + 1), plan.copying)
    words = torch.tensor([writer.words(colour, shape) for colour in COLOURS for shape in SHAPES])
    encoder.name(decoder.model.embed_tokens(words).sum(1))
    _compare(pupil, writer, Random(seed + 2), plan.comparing)
    course = _Course(pupil, plan.answering + plan.together)
    course.run("answering", _batches(folder, seed + 3, drawn=False), plan.answering)
    half = plan.together // 2
    batches = _batches(folder, seed + 4)
    course.run("together", batches, half)
    course.run("rounded", batches, plan.together - half, rounded=True)
    _save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, weights)


def _look(encoder: Encoder, batches: Iterator[Batch], steps: int) -> None:
    """Teach the encoder what is where.

    The rate has to go down to nothing: with the full one a frame in ten is seen wrongly that at the
    end is seen right.
    """
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2.5e-3, weight_decay=0.02)
    tally = _Tally("looking")
    for step, batch in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 2.5e-3 * min(1, (step + 1) / 100) * _fall(step, steps)
        fine, seen = encoder.see(batch.pixels)
        loss = taught(encoder, fine, seen, batch)
        _step([optimizer], loss, clip=None)
        whole = ((seen[..., :NAMES] > 0) == (batch.names > 0)).all(-1).all(-1)
        tally.add(step, loss=loss, frames=whole.float().mean())


def _copy(pupil: Pupil, writer: Writer, random: Random, steps: int) -> None:
    """Teach the decoder to copy, until it can.

    To answer is to copy, most of the time; where there is nothing else to do it is found out within
    300 steps, and not within 1000 among the questions.
    """
    optimizers = _optimizers(pupil)
    tally = _Tally("copying")
    lately = [0.0] * 10
    for step in range(steps):
        _set(optimizers, min(1, (step + 1) / 30))
        loss, right = pupil.loss(copies(writer, random))
        _step(optimizers, loss)
        tally.add(step, loss=loss, right=right)
        lately = [*lately[1:], float(right)]
        if sum(lately) > 0.9 * len(lately):
            return
    raise RuntimeError("the decoder has not learned to copy")


def _compare(pupil: Pupil, writer: Writer, random: Random, steps: int) -> None:
    """Teach the decoder to compare numbers, without forgetting how to copy."""
    optimizers = _optimizers(pupil)
    tally = _Tally("comparing")
    for step in range(steps):
        _set(optimizers, _COMPARING * min(1, (step + 1) / 15))
        made = copies(writer, random) if step % 6 == 5 else verdicts(writer, random)
        loss, right = pupil.loss(made)
        _step(optimizers, loss)
        tally.add(step, loss=loss, right=right)


class _Course:
    """Teaches the decoder to answer; of the encoder only the tokens change, not what it sees.

    Args:
        pupil: what is taught.
        steps: how many there will be in all; the rate goes down to nothing over them.
    """

    def __init__(self, pupil: Pupil, steps: int) -> None:
        self._pupil = pupil
        self._optimizers = _optimizers(pupil)
        self._done, self._steps = 0, steps

    def run(
        self, stage: str, batches: Iterator[Batch], steps: int, *, rounded: bool = False
    ) -> None:
        """Take some of the steps; `rounded`: with the weights as INT4 will have them."""
        tally = _Tally(stage)
        Linear.rounding = rounded
        for step, batch in zip(range(steps), batches, strict=False):
            begun = min(1, (self._done + 1) / 40)
            _set(self._optimizers, _ANSWERING * begun * _fall(self._done, self._steps))
            loss, right = self._pupil.loss(batch)
            _step(self._optimizers, loss)
            tally.add(step, loss=loss, right=right)
            self._done += 1
        Linear.rounding = False


def _fall(step: int, steps: int) -> float:
    """Return the share of the full rate: from 1 down to 0 as a cosine does it."""
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


def _set(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for each in optimizers:
        for group in each.param_groups:
            group["lr"] = share * group.setdefault("full", group["lr"])


def _step(
    optimizers: list[torch.optim.Optimizer], loss: Tensor, *, clip: float | None = 1.0
) -> None:
    for each in optimizers:
        each.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        taught = [p for each in optimizers for group in each.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(taught, clip)
    for each in optimizers:
        each.step()


class _Tally:
    """Says now and then how it goes."""

    def __init__(self, stage: str, every: int = 50) -> None:
        self._stage, self._every = stage, every
        self._began = time.monotonic()
        self._seen: list[dict[str, float]] = []

    def add(self, step: int, **numbers: Tensor) -> None:
        self._seen.append({name: float(number.detach()) for name, number in numbers.items()})
        if (step + 1) % self._every:
            return
        means = {n: sum(each[n] for each in self._seen) / len(self._seen) for n in numbers}
        self._seen.clear()
        line = {n: round(mean, 4) for n, mean in means.items()}
        seconds = round(time.monotonic() - self._began)
        print(
            json.dumps({"stage": self._stage, "step": step + 1, **line, "s": seconds}), flush=True
        )
        if not all(map(math.isfinite, means.values())):
            raise RuntimeError("the training has diverged")


def _save(weights: Mapping[str, object], path: Path) -> None:
    """Save weights so that they are there as a whole or not at all."""
    new = path.with_suffix(".new")
    torch.save(weights, new)
    new.replace(path)
