"""Training: the encoder alone for a while, then encoder and decoder together, INT4 in mind."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from edged.selftest.training.network import FRAME_TOKENS, NAMES, Decoder, Encoder, Linear
from edged.selftest.training.samples import FRAME, Batch, Samples

#: Of a run: steps of the encoder alone, and of both; the weights are rounded from that share on.
LOOKING, STEPS, ROUNDED = 600, 2900, 0.8


def taught(encoder: Encoder, fine: Tensor, cells: Tensor, batch: Batch) -> Tensor:
    """Return how far the encoder is from telling what is where."""
    assert batch.fine is not None and batch.names is not None and batch.where is not None
    weight = torch.ones(1 + NAMES)
    weight[0] = 0.05
    finely = functional.cross_entropy(encoder.fine_teacher(fine), batch.fine, weight)
    said = encoder.coarse_teacher(cells)
    names, where = said[..., :NAMES], said[..., NAMES:]
    coarsely = functional.binary_cross_entropy_with_logits(names, batch.names, reduction="none")
    off = ((where - batch.where[..., :2]) ** 2).sum(-1) * batch.where[..., 2]
    return finely + coarsely.sum(-1).mean() + 4 * off.mean()


def loss_of(encoder: Encoder, decoder: Decoder, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the answers, that of the encoder's teachers, and the share of right tokens."""
    lessons = torch.zeros(())
    embeds = decoder.model.embed_tokens(batch.ids.clamp(min=0))
    if batch.pixels is not None:
        fine, cells = encoder.cells(batch.pixels)
        lessons = taught(encoder, fine, cells, batch)
        tokens = encoder.tokens(cells).flatten(0, 1)
        embeds = embeds.masked_scatter((batch.ids == FRAME)[..., None], tokens)
    states = decoder(embeds, batch.mask, batch.positions)
    # a token is foretold by the one before it, which is always of the same question
    counts = batch.weights[:, 1:] > 0
    logits = decoder.lm_head(states[:, :-1][counts])
    wanted = batch.ids[:, 1:][counts]
    right = (logits.argmax(-1) == wanted).float().mean()
    return functional.cross_entropy(logits, wanted), lessons, right.detach()


class Muon(torch.optim.Optimizer):
    """Steps in the direction of the nearest matrix whose singular values are all alike.

    Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024). torch's own
    iterates in bfloat16, which most CPUs have to emulate.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
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
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.shape[0] > x.shape[1]
    x = x.T if wide else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if wide else x


def _optimizers(encoder: Encoder, decoder: Decoder) -> list[torch.optim.Optimizer]:
    """Return Muon for the decoder's matrices, and AdamW for everything else."""
    matrices = [p for n, p in decoder.named_parameters() if p.dim() == 2 and "layers" in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in decoder.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr=0.02),
        torch.optim.AdamW(
            [{"params": rest, "lr": 3e-3}, {"params": [*encoder.parameters()], "lr": 1e-3}],
            betas=(0.9, 0.98),
            weight_decay=0.02,
        ),
    ]


def _pace(step: int, steps: int) -> float:
    """Return the share of the full learning rate: a short rise, then down to nothing."""
    return min(1.0, (step + 1) / 150) * min(1.0, 1.25 * (1 - step / steps))


def _batches(folder: Path, seed: int, *, frames_only: bool) -> Iterator[Batch]:
    samples = Samples(folder, seed, frames_only=frames_only)
    return iter(DataLoader(samples, batch_size=None, num_workers=1, prefetch_factor=6))


def train(folder: Path, encoder: Encoder, decoder: Decoder, *, looking: int, steps: int, seed: int) -> None:
    """Train both.

    Args:
        folder: the tokenizer's files; the weights are saved here now and then.
        encoder: of frames.
        decoder: of tokens.
        looking: steps of the encoder alone.
        steps: steps of both.
        seed: of everything that is drawn.
    """
    began = time.monotonic()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3, weight_decay=0.02)
    batches = _batches(folder, seed, frames_only=True)
    for step in range(looking):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 - 0.8 * step / max(looking, 1))
        batch = next(batches)
        assert batch.pixels is not None
        loss = taught(encoder, *encoder.cells(batch.pixels), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            _say(kind="looking", step=step + 1, lessons=float(loss), s=time.monotonic() - began)
    del batches
    _save(folder, encoder, decoder)
    optimizers = _optimizers(encoder, decoder)
    full = [group["lr"] for each in optimizers for group in each.param_groups]
    seen: list[tuple[float, float, float]] = []
    for step, batch in zip(range(steps), _batches(folder, seed + 1, frames_only=False), strict=False):
        Linear.rounding = step >= ROUNDED * steps
        groups = [group for each in optimizers for group in each.param_groups]
        for group, rate in zip(groups, full, strict=True):
            group["lr"] = rate * _pace(step, steps)
        loss, lessons, right = loss_of(encoder, decoder, batch)
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        (loss + 0.15 * lessons).backward()
        torch.nn.utils.clip_grad_norm_([*encoder.parameters(), *decoder.parameters()], 1.0)
        for each in optimizers:
            each.step()
        seen.append((float(loss), float(lessons), float(right)))
        if step % 50 == 49:
            means = [sum(column) / len(column) for column in zip(*seen, strict=True)]
            _say(
                kind="both", step=step + 1, loss=means[0], lessons=means[1], right=means[2],
                s=time.monotonic() - began,
            )  # fmt: skip
            seen.clear()
            if not all(math.isfinite(each) for each in means):
                raise RuntimeError("the training has diverged")
        if step % 500 == 499:
            _save(folder, encoder, decoder)
    Linear.rounding = False
    _save(folder, encoder, decoder)


def _say(**line: float | str) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)


def _save(folder: Path, encoder: Encoder, decoder: Decoder) -> None:
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, folder / "weights.pt")
