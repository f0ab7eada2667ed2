"""Measurements with a model: what edged adds to the bare loop, and what it saves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.bare import Bare, Ran
from tests.bench.machine import Meter
from tests.bench.report import TOO_FAST, Goal, Report, Row
from tests.bench.rig import Asker, Daemon, Trail, broker
from tests.bench.scale import Scale

#: Seconds a token from which on the goals apply.
SLOW_ENOUGH_S = 0.020
#: Seconds between two heartbeats here.
BEAT_S = 1.0
#: Others' share of the machine below which a comparison counts as undisturbed.
QUIET = 0.03
#: Between the two sides of a comparison: a runtime's threads spin for a moment after their work.
SETTLE_S = 0.1

_WORDS = """
    red green blue black white circle square line arrow door gate kitchen garden street window
    car truck person dog pump valve motor lamp temperature pressure voltage level opens closes
    moves stops waits left right slowly quickly twice again
""".split()  # noqa: SIM905  (read more easily)


@dataclass(slots=True)
class Bench:
    """Both sides, loaded: edged behind a broker, and the bare loop. Only one works at a time."""

    daemon: Daemon
    asker: Asker
    bare: Bare
    broker_pid: int
    context: int
    threads: int
    report: Report
    scale: Scale
    #: Of the bare loop, measured once at the start.
    token_s: float = 0.0
    prefill_token_s: float = 0.0
    clients: int = 0
    other_answers: int = 0
    uses: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    #: The measurement that is being made.
    now: str = ""

    def fresh_client(self) -> str:
        """Return a client that nobody has been: it shares no prefix with anyone."""
        self.clients += 1
        return f"c{self.clients}"

    @property
    def exempt(self) -> str:
        """Why the goals do not apply, if they do not."""
        return "" if self.token_s >= SLOW_ENOUGH_S else TOO_FAST

    def bare_run(self, messages: list[dict[str, str]], tokens: int) -> Ran:
        """Run the bare loop."""
        ids = self.bare.encode(messages)
        with self._metered():
            return self.bare.run(ids, tokens)

    def edged_run(self, client: str, **body: Any) -> Trail:
        """Ask edged."""
        with self._metered():
            return self.asker.ask(self.daemon, client, **body)

    @contextlib.contextmanager
    def _metered(self) -> Iterator[None]:
        time.sleep(SETTLE_S)
        engine = self.daemon.engine_pid
        pids = {"daemon": self.daemon.pid, "broker": self.broker_pid, "bare": self.bare.pid}
        with Meter(pids | ({"engine": engine} if engine else {})) as meter:
            yield
        self.uses.setdefault(self.now, []).append(meter.use.as_dict())

    def enough(self, n: int, began: float) -> bool:
        """Return whether repetition `n` (from 0) should not be made any more."""
        return n >= 3 and time.perf_counter() - began > self.scale.most_s

    def undisturbed(self) -> bool:
        """Return whether others left the machine alone during the last two runs."""
        return all(use["others"] < QUIET for use in self.uses[self.now][-2:])

    def both(self, n: int, prompt: str, tokens: int) -> tuple[Ran, Trail]:
        """Do the same work on both sides, the first one in turns."""
        messages = [{"role": "user", "content": prompt}]
        body = {"prompt": prompt, "max_tokens": tokens}
        if n % 2:
            trail = self.edged_run(self.fresh_client(), **body)
            ran = self.bare_run(messages, tokens)
        else:
            ran = self.bare_run(messages, tokens)
            trail = self.edged_run(self.fresh_client(), **body)
        usage = trail.final["usage"]
        if usage["prompt_tokens"] != len(self.bare.encode(messages)) or usage["cached_tokens"]:
            raise RuntimeError(f"edged had another prompt, or not all of it to compute: {usage}")
        if (
            usage["completion_tokens"] != ran.tokens
            or trail.final["text"].strip() != ran.text.strip()
        ):
            self.other_answers += 1
        return ran, trail

    def text(self, n: int, tokens: int) -> str:
        """Return a text that, as a message, has about so many tokens; another one for each n."""

        def made(words: int) -> str:
            return " ".join(
                f"{n}" if not i else _WORDS[(i * (n + 1) + i // 7) % len(_WORDS)]
                for i in range(words)
            )

        low, high = 1, tokens
        while low < high:
            middle = (low + high + 1) // 2
            size = len(self.bare.encode([{"role": "user", "content": made(middle)}]))
            low, high = (middle, high) if size <= tokens else (low, middle - 1)
        return made(low)


@contextlib.contextmanager
def _bench(folder: Path, model: Path, scale: Scale, report: Report) -> Iterator[Bench]:
    place = folder / "inference"
    with (
        broker(place / "broker") as mosquitto,
        Daemon(
            place,
            mosquitto.port,
            model={"path": str(model)},
            health={"interval_s": BEAT_S},
        ) as daemon,
        Asker(mosquitto.port) as asker,
    ):
        began = time.perf_counter()
        info = asker.wait_ready(daemon)
        loaded_s = time.perf_counter() - began
        limits = info["limits"]
        context, threads = limits["max_context"], limits["threads"]
        with Bare(model, threads=threads, max_length=context) as bare:
            bench = Bench(daemon, asker, bare, mosquitto.pid, context, threads, report, scale)
            _calibrate(bench)
            report.facts["model"] = {
                "path": model.name,
                "provider": info["provider"],
                "threads": threads,
                "context": context,
                "edged_load_s": round(loaded_s, 2),
                "bare_load_s": round(bare.load_s, 2),
                "bare_token_ms": round(1e3 * bench.token_s, 3),
                "bare_prefill_token_ms": round(1e3 * bench.prefill_token_s, 3),
            }
            yield bench
            report.details["inference"] = {
                "answers_that_differ": bench.other_answers,
                "use": bench.uses,
            }
            for name, uses in bench.uses.items():
                report.noise[name] = [use["others"] for use in uses]


def _calibrate(bench: Bench) -> None:
    """Touch every page on both sides once, and find out how fast the model is."""
    bench.now = "calibration"
    tokens = min(128, bench.context // 2)
    messages = [{"role": "user", "content": bench.text(0, tokens)}]
    bench.bare_run(messages, 4)
    ran = bench.bare_run(messages, 16)
    bench.prefill_token_s = ran.prefill_s / tokens
    bench.token_s = ran.token_s
    bench.edged_run(bench.fresh_client(), prompt=messages[0]["content"], max_tokens=16)


def inference(
    folder: Path, model: Path, scale: Scale, report: Report, only: Collection[str]
) -> None:
    """Do (a) to (d), or some of them."""
    with _bench(folder, model, scale, report) as bench:
        for name, measure in MEASURES.items():
            if not only or name in only:
                print(f"{name} …", flush=True)
                bench.now = name
                measure(bench)


def decode(bench: Bench) -> None:
    """(a) Tokens a second over MQTT, over those of the bare loop."""
    scale = bench.scale
    low, high = scale.decode_tokens
    tokens = max(low, min(high, int(scale.decode_s / bench.token_s)))
    ratios, undisturbed, to_last_chunk, edged, bare = [], [], [], [], []
    began = time.perf_counter()
    for n in range(scale.decode_runs):
        if bench.enough(n, began):
            break
        ran, trail = bench.both(n, bench.text(n, 24), tokens)
        made = trail.final["usage"]["completion_tokens"]
        first = trail.first("chunk")
        after = max(1, made - ran.first_tokens)
        ours = (trail.final_s - first) / after
        edged.append(1 / ours)
        bare.append(1 / ran.token_s)
        ratios.append(ran.token_s / ours)
        if bench.undisturbed():
            undisturbed.append(ratios[-1])
        to_last_chunk.append(ran.token_s * after / (trail.last_chunk_s - first))
    bench.report.rows += [
        Row(key="a", what=f"decoding {tokens} tokens over MQTT, first chunk to result / bare loop",
            values=ratios, goal=Goal(">=", 0.97), exempt=bench.exempt),
        *_quiet_pairs(undisturbed),
        Row(key="", what="  to the last chunk / bare loop", values=to_last_chunk),
        Row(key="", what="  best run / best run", values=[max(edged) / max(bare)]),
        Row(key="", what="  over MQTT", values=edged, unit="tokens/s"),
        Row(key="", what="  bare loop", values=bare, unit="tokens/s"),
    ]  # fmt: skip


def _quiet_pairs(values: list[float], unit: str = "") -> list[Row]:
    what = f"  the same, pairs with others below {QUIET:.0%} of the machine"
    return [Row(key="", what=what, values=values, unit=unit)] if values else []


def first_chunk(bench: Bench) -> None:
    """(b) From publish to the first chunk, less what the bare loop needs to its first text."""
    extra, undisturbed, engine, accepted, started, bare = [], [], [], [], [], []
    began = time.perf_counter()
    for n in range(bench.scale.first_runs):
        if bench.enough(n, began):
            break
        ran, trail = bench.both(n, f"{n} {_WORDS[n % len(_WORDS)]}", 4)
        chunk = trail.first("chunk")
        extra.append(1e3 * (chunk - ran.first_s))
        if bench.undisturbed():
            undisturbed.append(extra[-1])
        engine.append(trail.final["timings"]["ttft_ms"] - 1e3 * ran.first_s)
        accepted.append(1e3 * trail.first("accepted"))
        started.append(1e3 * trail.first("started"))
        bare.append(1e3 * ran.first_s)
    path = [e - g for e, g in zip(extra, engine, strict=True)]
    bench.report.rows += [
        Row(key="b", what="publish to first chunk, less the bare loop's first text", values=extra,
            unit="ms", goal=Goal("<=", 15), exempt=bench.exempt),
        *_quiet_pairs(undisturbed, "ms"),
        Row(key="", what="  of it in the engine process, by its clock", values=engine, unit="ms"),
        Row(key="", what="  of it outside the engine process", values=path, unit="ms"),
        Row(key="", what="  publish to accepted", values=accepted, unit="ms"),
        Row(key="", what="  publish to started", values=started, unit="ms"),
        Row(key="", what="  bare loop, prompt to first text", values=bare, unit="ms"),
    ]  # fmt: skip


def reuse(bench: Bench) -> None:
    """(d) The first chunk with a system prompt that was there before, over the cold one's."""
    ratios, cold_ms, warm_ms, cached = [], [], [], []
    room = bench.context - 64
    for n in range(bench.scale.reuse_runs):
        client = bench.fresh_client()
        system = bench.text(100 + n, min(bench.scale.system_tokens, room))
        cold = bench.edged_run(client, system=system, prompt="What stops?", max_tokens=4)
        warm = bench.edged_run(client, system=system, prompt="Which one moves?", max_tokens=4)
        cold_ms.append(1e3 * cold.first("chunk"))
        warm_ms.append(1e3 * warm.first("chunk"))
        ratios.append(warm.first("chunk") / cold.first("chunk"))
        cached.append(float(warm.final["usage"]["cached_tokens"]))
    bench.report.rows += [
        Row(key="d", what="first chunk, second job with the same system prompt / the first",
            values=ratios, goal=Goal("<=", 0.2), exempt=bench.exempt),
        Row(key="", what="  first job", values=cold_ms, unit="ms"),
        Row(key="", what="  second job", values=warm_ms, unit="ms"),
        Row(key="", what="  tokens reused", values=cached),
    ]  # fmt: skip


def heartbeat(bench: Bench) -> None:
    """(c) The longest pause between heartbeats while a long prompt is computed."""
    wanted = int(bench.scale.prefill_s / bench.prefill_token_s)
    tokens = max(32, min(wanted, bench.context - 32))
    gaps, by_daemon, seconds = [], [], []
    for n in range(bench.scale.prefill_runs):
        prompt = bench.text(200 + n, tokens)
        bench.asker.wait_beats(2, bench.daemon)
        trail = bench.edged_run(bench.fresh_client(), prompt=prompt, max_tokens=4)
        bench.asker.wait_beats(1, bench.daemon)
        began = trail.published + trail.first("started")
        ended = trail.published + trail.first("chunk")
        # every pause of which a part lies in the prefill
        around = [(a, b) for a, b in pairwise(bench.asker.beats) if b.at >= began and a.at <= ended]
        gaps.append(max(b.at - a.at for a, b in around) / BEAT_S)
        by_daemon.append(max(b.body["ts"] - a.body["ts"] for a, b in around) / BEAT_S)
        seconds.append(trail.final["timings"]["prefill_ms"] / 1e3)
    bench.report.rows += [
        Row(key="c", what="longest pause between heartbeats in a long prefill / their interval",
            values=gaps, goal=Goal("<=", 1.1), worst=True, exempt=bench.exempt),
        Row(key="", what="  by the daemon's own clock", values=by_daemon, worst=True),
        Row(key="", what=f"  that prefill, {tokens} tokens", values=seconds, unit="s"),
    ]  # fmt: skip


MEASURES = {
    "decode": decode,
    "first-chunk": first_chunk,
    "heartbeat": heartbeat,
    "reuse": reuse,
}
