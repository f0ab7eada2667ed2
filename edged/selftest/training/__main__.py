"""Make the small model: learn its vocabulary, train it, quantise it, fuse it.

    python3 -m venv /tmp/train
    /tmp/train/bin/pip install 'edged[train]'
    /tmp/train/bin/python -m edged.selftest.training OUT --work WORK

`OUT` is then a model's folder like any other; `python -m edged.selftest.training.evaluate OUT` says
how good it is. What is in `WORK` is not made again: a run that was cut off goes on there after the
encoder, or after the training.

By the time of its steps it takes two and a half hours on two cores (bfloat16 in hardware) that do
nothing else. From start to end it was run with `--length 0.15` alone: `model/README.md`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch

from edged.models.fuse import fuse
from edged.selftest.training import reports
from edged.selftest.training.export import export, write
from edged.selftest.training.network import Decoder, Encoder, Shape
from edged.selftest.training.questions import Asker
from edged.selftest.training.scenes import scene
from edged.selftest.training.train import Plan, train
from edged.selftest.training.vocabulary import Vocabulary, phi3_vocabulary

SEED = 20_240_423
#: Pieces of the vocabulary, numbers and control tokens not counted.
PIECES = 1500


def corpus() -> Iterator[str]:
    """Yield what the vocabulary is learned from: questions and answers as in the training."""
    random = Random(SEED)
    for turn in range(2500):
        frames = 1 if turn % 3 == 0 else random.choice((2, 3, 4, 6))
        asker = Asker(scene(random, frames), random)
        for _ in range(4):
            asked = asker.ask()
            yield asked.question
            yield asked.answer
        for _ in range(2):
            asked = reports.ask(random)
            yield asked.question
            yield asked.answer
        asked = reports.refused(random, frames=turn % 2 == 0)
        yield asked.question
        if turn % 10 == 0:
            yield asked.answer
    for system in reports.SYSTEMS:
        yield from [system] * 20


def rows(vocabulary: Vocabulary) -> int:
    """Return the rows of the embedding: more than there are tokens, as in the real models."""
    padded = -(-vocabulary.size // 32) * 32
    return padded if padded > vocabulary.size else padded + 32


def _keep(work: Path, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's files, unless there are weights that know another vocabulary."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), vocabulary.files)
        told = {name: (Path(scratch) / name).read_bytes() for name in vocabulary.files}
    if (work / "weights.pt").exists():
        kept = {name: (work / name).read_bytes() for name in told if (work / name).exists()}
        if kept != told:
            raise ValueError(f"{work / 'weights.pt'} knows another vocabulary: remove it")
    write(work, vocabulary.files)


def make(out: Path, work: Path, plan: Plan) -> None:
    """Make the model's folder.

    Args:
        out: the folder; what was there is replaced.
        work: for the weights, which stay there, and the same model unrounded.
        plan: how long the training is.
    """
    torch.manual_seed(SEED)
    vocabulary = phi3_vocabulary(corpus(), PIECES, whole=True)
    _keep(work, vocabulary)
    shape = Shape(vocabulary=rows(vocabulary))
    encoder, decoder = Encoder(shape.hidden), Decoder(shape)
    train(work, encoder, decoder, plan=plan, seed=SEED)
    for folder, precision in ((out, "int4"), (work / "unrounded", "fp32")):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as scratch:
            export(folder, Path(scratch), encoder, decoder, vocabulary, precision)
        fuse(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(json.dumps({"made": str(folder), "bytes": size}))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m edged.selftest.training")
    parser.add_argument("out", type=Path, help="the model's folder; one that is there is replaced")
    parser.add_argument(
        "--work",
        type=Path,
        required=True,
        help="another folder, which keeps the weights and the model before INT4",
    )
    parser.add_argument(
        "--length", type=float, default=1.0, help="share of the steps; shorter is worse"
    )
    options = parser.parse_args()
    out, work = options.out.resolve(), options.work.resolve()
    if out.exists() and not (out / "genai_config.json").exists() and any(out.iterdir()):
        parser.error(f"{out} is no model's folder, and would be replaced: name another")
    if work.is_relative_to(out):
        parser.error(f"{work} is in {out}, which will be replaced: name another")
    work.mkdir(parents=True, exist_ok=True)
    make(out, work, Plan().times(options.length))


if __name__ == "__main__":
    main()
