"""Measures and prints a table; exits 0 whatever the numbers say, 1 if a measurement broke."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from tests.bench import machine
from tests.bench.cameras import cameras
from tests.bench.child import ROOT
from tests.bench.inference import MEASURES, inference
from tests.bench.report import Report
from tests.bench.scale import FULL, SMALL, SMOKE, Scale
from tests.bench.service import intake, rest
from tests.bench.vision import MEASURES as LOOKS
from tests.bench.vision import vision
from tests.kit.daemon import MODEL

RESULTS = ROOT / "bench-results"
#: The small model that sees.
VISION = ROOT / "tests/models/phi3v"
#: The measurements that need no model.
_SERVICE: dict[str, Callable[[Path, Scale, Report], None]] = {
    "intake": intake,
    "rest": rest,
    "cameras": cameras,
}
#: As the table's first column has them.
_LETTERS = dict(
    zip(
        "abcdefghijk",
        ("decode", "first-chunk", "heartbeat", "reuse", "intake", "rest", *LOOKS, "cameras"),
        strict=True,
    )
)


def measure(
    model: Path, scale: Scale, *, only: Collection[str] = (), folder: Path = RESULTS
) -> Report:
    """Measure in a new folder inside `folder`, which should lie on the disk that is meant.

    Without `only`, a vision model is measured with frames and another one with texts.
    """
    report = Report(
        {"when": time.strftime("%Y-%m-%d %H:%M:%S %z"), "machine": machine.facts()},
    )
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="run-", dir=folder))
    steps: dict[str, Callable[[], None]] = {}
    sees = json.loads((model / "genai_config.json").read_text())["model"]["type"] == "phi3v"
    if (not only and not sees) or set(only) & set(MEASURES):
        steps["inference"] = partial(inference, place, model, scale, report, only)
    if (not only and sees) or set(only) & set(LOOKS):
        steps["vision"] = partial(vision, place, model, scale, report, only)
    for name, step in _SERVICE.items():
        if not only or name in only:
            steps[name] = partial(step, place, scale, report)
    try:
        for name, run in steps.items():
            print(f"{name} …", flush=True)
            try:
                run()
            except Exception as error:  # noqa: BLE001  (the other measurements are still wanted)
                traceback.print_exc()
                report.broken[name] = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: the small one")
    parser.add_argument("--full", action="store_true", help="sizes for a model of real size")
    parser.add_argument("--smoke", action="store_true", help="as little as possible of everything")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help=", ".join(f"{letter} or {name}" for letter, name in _LETTERS.items()),
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    options = parser.parse_args(argv)
    only = [_LETTERS.get(name, name) for name in options.only]
    unknown = set(only) - set(_LETTERS.values())
    if unknown:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    small = VISION if set(only) & set(LOOKS) else MODEL
    model = (options.model or small).resolve()
    scale = SMOKE if options.smoke else FULL if options.full else SMALL
    signal.signal(signal.SIGTERM, _on_stop)  # so that nothing is left running
    began = time.perf_counter()
    report = measure(model, scale, only=only)
    report.facts["took_s"] = round(time.perf_counter() - began, 1)
    path = options.json or RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{model.name}.json"
    report.write(path)
    print(_summary(report), report.table(), _noise(report), f"written: {path}", sep="\n\n")
    for name, why in report.broken.items():
        print(f"BROKEN: {name}: {why}", file=sys.stderr)
    return 1 if report.broken else 0


def _on_stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _summary(report: Report) -> str:
    facts = report.facts["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v)
    box = f"{facts['cores']} cores, {facts['cpu']}, {facts['memory_mb']} MB, {facts['kernel']}"
    lines = [f"{box}, load {facts['load_at_start']:.2f} at the start", versions]
    if "model" in report.facts:
        model = report.facts["model"]
        lines.append(
            f"model {model['path']}: {model['bare_token_ms']:g} ms a token, "
            f"{model['bare_prefill_token_ms']:g} ms a token of prefill, "
            f"{model['threads']} threads, context {model['context']}; "
            f"edged loads in {model['edged_load_s']:g} s"
        )
    return "\n".join(lines)


def _noise(report: Report) -> str:
    """Say how much of the machine others used meanwhile: with much, the numbers mean little."""
    shares = ", ".join(
        f"{name} {statistics.median(values):.0%} (at most {max(values):.0%})"
        for name, values in report.noise.items()
    )
    return f"used by other programs meanwhile, of all cores: {shares or 'not measured'}"


if __name__ == "__main__":
    sys.exit(main())
