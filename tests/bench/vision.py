"""Measurements with frames: edged on a fused model against the stock pipeline on the same folder.

Both sides get the same PNG files, the same threads and the same question, and each has been started
afresh. They cannot be measured in turns: with a model of real size both do not fit into one
machine's memory. So edged goes first, all of it over MQTT, then the stock pipeline, once.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edged.models.record import FUSED_RECORD
from tests.bench.child import ROOT
from tests.bench.frames import encoded, written
from tests.bench.looks import SETTLE_S, Looks, Side, as_base64, tell
from tests.bench.machine import Peak, available_mb
from tests.bench.report import Report
from tests.bench.rig import Asker, Daemon, Trail, broker
from tests.bench.scale import Scale
from tests.bench.stock import Stock

#: Tokens of a frame of `SIZE` in the stock pipeline, whatever is asked for.
STOCK_FRAME = 1921
#: Tokens for the rest of such a prompt, and the answer.
_TEXT = 200
#: Tokens of context that edged gets: what it takes by default where memory allows it.
CONTEXT = 4096

_QUESTION = "What happens in these pictures? Answer in one short sentence."
_QUESTIONS = (
    "How many people are there?",
    "Is the gate open? Answer yes or no.",
    "What stands on the left side?",
    "What moves, and which way?",
    "Is anything there that should not be?",
)


@dataclass(slots=True)
class Edged:
    """edged with the model loaded, and its user."""

    looks: Looks
    daemon: Daemon
    asker: Asker
    broker_pid: int

    def ask(self, name: str, client: str, **body: Any) -> Trail:
        """Ask about frames; all of them must be looked at, in one crop each."""
        asked = {"detail": "low", "max_tokens": self.looks.scale.answer_tokens, **body}
        pids = {"daemon": self.daemon.pid, "engine": self.daemon.engine_pid}
        with self.looks.metered(name, broker=self.broker_pid, **pids):
            trail = self.asker.ask(self.daemon, client, **asked)
        frames = trail.final["frames"]
        if frames["dropped"] or any(frame["crops"] != 1 for frame in frames["used"]):
            raise RuntimeError(f"not the frames that were asked for: {frames}")
        timings, usage = trail.final["timings"], trail.final["usage"]
        self.looks.say(
            f"{name}: {len(frames['used'])} frames, first chunk after {trail.first('chunk'):.2f} s "
            f"(encoder {timings['encode_ms'] / 1e3:.2f}, prefill {timings['prefill_ms'] / 1e3:.2f} "
            f"of {usage['prompt_tokens'] - usage['cached_tokens']} tokens), "
            f"all after {trail.final_s:.2f} s"
        )
        return trail


@contextlib.contextmanager
def _edged(looks: Looks, context: int) -> Iterator[Edged]:
    place = looks.folder / f"edged-{context}"
    # more than edged would take of itself, so that it can have as long a context as the stock side
    limits = {"memory_mb": 0.9 * available_mb()} if context > CONTEXT else {}
    with (
        broker(place / "broker") as mosquitto,
        Daemon(
            place,
            mosquitto.port,
            model={"path": str(looks.model), "max_context": context},
            limits=limits,
        ) as daemon,
        Asker(mosquitto.port) as asker,
    ):
        began = time.perf_counter()
        info = asker.wait_ready(daemon, "vision")
        looks.threads = info["limits"]["threads"]
        facts = looks.report.facts.setdefault("vision", {"path": looks.model.name})
        facts[f"edged_{context}"] = {
            "load_s": round(time.perf_counter() - began, 2),
            "threads": looks.threads,
            "memory_plan_mb": info["memory"],
        }
        looks.say(f"edged is ready, context {context}")
        yield Edged(looks, daemon, asker, mosquitto.pid)


# The measurements -------------------------------------------------------------------------------


def _first_look(edged: Edged, name: str) -> Trail:
    """Ask about the frames for the first time, and note the most memory the engine takes for it."""
    looks = edged.looks
    engine = edged.daemon.engine_pid
    if engine is None:
        raise RuntimeError("there is no engine process")
    with Peak(engine) as peak:
        trail = edged.ask(name, looks.fresh_client(), prompt=_QUESTION, frames=looks.frames)
    looks.peaks[looks.stock_context if name == "memory" else looks.context] = peak.mb
    return trail


def _frames(edged: Edged) -> None:
    """(g) The time to the first token for frames that nobody has seen yet."""
    looks = edged.looks
    for _ in range(looks.scale.look_runs - len(looks.first)):
        client = looks.fresh_client()
        looks.first.append(edged.ask("frames", client, prompt=_QUESTION, frames=looks.frames))


def _window(edged: Edged) -> None:
    """(h) A steady camera: its ticks, and what they would be without a window."""
    looks = edged.looks
    least = len(looks.paths)
    window = {"camera": "door", "window": {"min": least, "max": least + looks.scale.ticks}}
    camera, client = "door", looks.fresh_client()
    pictures = [encoded(n, "JPEG", scene=1) for n in range(least + looks.scale.ticks)]
    for n, picture in enumerate(pictures):
        edged.asker.show(camera, picture)
        if n + 1 < least:
            continue
        time.sleep(SETTLE_S)  # a frame comes over another connection than the question about it
        if n + 1 == least:
            edged.asker.wait_frames(camera, least, edged.daemon)
        trail = edged.ask("window", client, prompt=_QUESTION, frames=window)
        if len(trail.final["frames"]["used"]) != n + 1:
            raise RuntimeError(f"tick {n + 1 - least} had {trail.final['frames']}")
        looks.windows.append(trail)
    for count, trails in ((least, looks.anew), (len(pictures), looks.anew_all)):
        frames = [{"image": as_base64(picture)} for picture in pictures[-count:]]
        for _ in range(looks.scale.look_runs if count == least else 1):
            trail = edged.ask("window", looks.fresh_client(), prompt=_QUESTION, frames=frames)
            trails.append(trail)
        if count == least:  # features kept, the session lost to somebody else's question
            owner = f"v{looks.clients}"
            other = [{"image": as_base64(pictures[0])}]
            edged.ask("window", looks.fresh_client(), prompt=_QUESTION, frames=other)
            looks.kept.append(edged.ask("window", owner, prompt=_QUESTION, frames=frames))


def _questions(edged: Edged) -> None:
    """(i) Questions about the same frames: in one job, and in a job each of other clients."""
    looks = edged.looks
    questions = list(_QUESTIONS[: looks.scale.questions])
    client = looks.fresh_client()
    looks.one_job = edged.ask("questions", client, questions=questions, frames=looks.frames)
    for question in questions:
        client = looks.fresh_client()
        trail = edged.ask("questions", client, prompt=question, frames=looks.frames)
        if trail.final["usage"]["cached_tokens"] > 32:  # the beginning of the template, perhaps
            raise RuntimeError(f"something was shared: {trail.final['usage']}")
        looks.many_jobs.append(trail)


def _stock(looks: Looks) -> None:
    looks.say(f"the stock pipeline, context {looks.stock_context}")
    with Stock(looks.model, threads=looks.threads, max_length=looks.stock_context) as stock:
        looks.say(f"  loaded in {stock.load_s:.1f} s")
        with looks.metered("stock", stock=stock.pid):
            looked = stock.look(looks.paths, _QUESTION, looks.scale.answer_tokens)
        looks.say(
            f"  first token after {looked.first_s:.1f} s, {looked.tokens} tokens, "
            f"at most {looked.peak_mb:.0f} MB"
        )
        looks.stock = Side(looked, stock.load_s, stock.encode(looks.paths[0]))


def _memory(looks: Looks) -> None:
    """(j) The same frames at the stock pipeline's context; its own is known from the start."""
    with _edged(looks, looks.stock_context) as edged:
        _first_look(edged, "memory")


_MEASURES: dict[str, Callable[[Edged], None]] = {
    "frames": _frames,
    "window": _window,
    "questions": _questions,
}
#: Their names, that of the memory included, which every start of edged gives.
MEASURES = (*_MEASURES, "memory")
#: Those that compare with the stock pipeline.
_AGAINST_STOCK = {"frames", "window", "memory"}


def vision(folder: Path, model: Path, scale: Scale, report: Report, only: Collection[str]) -> None:
    """Do (g) to (j), or some of them; what cannot be made does not stop the others."""
    wanted = [name for name in MEASURES if not only or name in only]
    looks = _prepared(folder / "vision", model, scale, report)
    with _edged(looks, looks.context) as edged:
        looks.first.append(_first_look(edged, "frames"))
        for name, measure in _MEASURES.items():
            if name in wanted and not _made(report, name, partial(measure, edged)):
                wanted.remove(name)
    if _AGAINST_STOCK & set(wanted):
        _made(report, "stock", partial(_stock, looks))
    if "memory" in wanted and looks.stock_context != looks.context:
        _made(report, f"memory at {looks.stock_context}", partial(_memory, looks))
    tell(looks, wanted)


def _made(report: Report, name: str, run: Callable[[], None]) -> bool:
    try:
        run()
    except RuntimeError as error:
        report.broken[name] = str(error)
        print(f"  BROKEN: {name}: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _prepared(folder: Path, model: Path, scale: Scale, report: Report) -> Looks:
    config = json.loads((model / "genai_config.json").read_text())["model"]
    if config["type"] != "phi3v":
        raise RuntimeError(f"{model} is no vision model")
    folder.mkdir(parents=True)
    longest = config["context_length"]
    count = min(scale.frames, (longest - _TEXT) // STOCK_FRAME)
    if model.is_relative_to(ROOT):  # nothing is written into the source tree
        model = Path(shutil.copytree(model, folder / model.name))
        subprocess.run([sys.executable, "-m", "edged", "models", "fuse", str(model)], check=True)
    if not (model / FUSED_RECORD).exists():
        raise RuntimeError(f"{model} is not fused: edged models fuse {model}")
    return Looks(
        folder,
        model,
        scale,
        report,
        context=min(CONTEXT, longest),
        stock_context=min(longest, -(-(count * STOCK_FRAME + _TEXT) // 4096) * 4096),
        paths=written(folder / "frames", count),
    )
