"""`edged selftest`: the fixed jobs, end to end, over a broker; says which answers are right."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edged import selftest
from edged.client import Client
from edged.conversation import Audience, Conversation, Job, filters
from edged.errors import Code
from edged.jobs import Kind
from edged.sandbox import Child, StartBroker, choose_broker, need_engine, private, until_ended
from edged.selftest.cases import Case, answer_of, cases
from edged.settings import Settings
from edged.terminal import Screen, one_line, printable

#: What each part may take, seconds: with the small model, and with any other on a small box.
READY_S, JOB_S = 180.0, 180.0
REMOTE_READY_S, REMOTE_JOB_S = 600.0, 900.0
#: Another device's heartbeat, which says what memory it takes, is waited for so long, seconds.
BEAT_S = 30.0

_VERSION = 1
#: Characters of an answer that are shown, and of a reason, which may end with what to do.
_SHOWN, _REASON_SHOWN = 200, 600
#: What a device says of a model that was not made to see. If it does not see for any other reason,
#: a graph that is missing or stale, or no room for a frame, its set-up is at fault.
_TEXT_MODEL = "the loaded model has no vision"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one case."""

    name: str
    kind: Kind
    #: None: it was left out.
    ok: bool | None
    #: Text, a JSON object, or one of them for each question; None: there is no result.
    answer: Any
    expected: Any
    #: What is wrong besides the answer, or why it was left out.
    reason: str | None = None
    ttft_ms: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `--json` prints, a version in front of it."""

    model: str | None
    ok: bool
    #: Every answer had to be that of the model that ships; else the facts in it were looked for.
    exact: bool
    cases: list[Outcome]
    right: int
    wrong: int
    left_out: int
    ttft_ms_p50: float | None
    tokens_per_second_p50: float | None
    #: Of the engine's process, if it ran for this alone.
    peak_memory_mb: float | None
    #: Of another device's engine, as its heartbeats said meanwhile: the largest.
    memory_mb: float | None
    seconds: float
    versions: Mapping[str, str]


def main(settings: Settings | None, *, broker: str = "auto", as_json: bool = False) -> int:
    """Run all cases; return 0 if every answer was right, else 1.

    Args:
        settings: of the device to try, which must run; None: one of its own, for this.
        broker: which one is started then, see `edged.sandbox.choose_broker`.
        as_json: print one JSON object instead of lines for people.

    Raises:
        BrokerUnreachable: with the reason.
        EdgedError: something is not installed, is damaged, or did not start.
    """
    if settings is not None:
        work = _configured(settings, as_json=as_json)
    else:
        need_engine()
        work = _own(selftest.verify(), choose_broker(broker), as_json=as_json)
    return asyncio.run(until_ended(work))


async def _own(model: Path, start_broker: StartBroker, *, as_json: bool) -> int:
    async with private("selftest", model, start_broker) as place:
        trial = _Trial(place.settings, exact=True, as_json=as_json, daemon=place.daemon)
        trial.say(
            f"the model that ships with edged, over a broker of its own ({place.broker.name}, "
            f"MQTT {place.broker.protocol})"
        )
        return await trial.run(READY_S, JOB_S)


async def _configured(settings: Settings, *, as_json: bool) -> int:
    trial = _Trial(settings, exact=None, as_json=as_json)
    mqtt = settings.mqtt
    trial.say(f"the device {settings.device}, over the broker at {mqtt.host}:{mqtt.port}")
    return await trial.run(REMOTE_READY_S, REMOTE_JOB_S)


class _Beats(Audience):
    """Hears how much memory the engine takes."""

    def __init__(self) -> None:
        self.heard = False
        self.memory_mb: float | None = None

    def beat(self, beat: dict[str, Any]) -> None:
        """Keep the largest."""
        self.heard = True
        engine = beat.get("engine")
        size = engine.get("rss_mb") if isinstance(engine, dict) else None
        if isinstance(size, int | float):
            self.memory_mb = max(self.memory_mb or 0.0, float(size))


class _Trial:
    """All cases, one after the other.

    Args:
        settings: of the device.
        exact: its model is the one that ships; None: its first answer tells whether. The settings
            may be of another box, which knows nothing of its model, and `info` has only a name.
        as_json: nothing is for people.
        daemon: its process, if it runs for this alone.
    """

    def __init__(
        self, settings: Settings, *, exact: bool | None, as_json: bool, daemon: Child | None = None
    ) -> None:
        self._settings = settings
        self._exact = exact
        self._as_json = as_json
        self._daemon = daemon
        self._screen = Screen()
        self._beats = _Beats()
        self._peak_mb: float | None = None
        self._reason: str | None = None  # that was shown last

    def say(self, text: str) -> None:
        """Tell people something."""
        if not self._as_json:
            self._screen.line(printable(text))

    async def run(self, ready_s: float, job_s: float) -> int:
        """Run them, tell, and return the exit status."""
        began = time.monotonic()
        every = cases()
        outcomes = []
        async with Client(self._settings, "selftest", *filters(self._settings)) as client:
            talk = Conversation(self._settings, client, self._beats, self._daemon)
            self._screen.status("waiting until it is ready …")
            await talk.ready(ready_s)
            self._beats.heard = False
            for number, case in enumerate(every, 1):
                self._screen.status(f"{number} of {len(every)}: {case.name} …")
                outcome = await self._outcome(talk, case, job_s)
                outcomes.append(outcome)
                self._tell(outcome)
            await self._hear(talk)
            report = self._report(outcomes, talk.info, time.monotonic() - began)
        self._sum_up(report)
        return 0 if report.ok else 1

    async def _outcome(self, talk: Conversation, case: Case, job_s: float) -> Outcome:
        job = talk.ask(f"selftest-{uuid.uuid4().hex}", case.kind, case.request)
        await talk.finish(job, job_s)
        self._measure()
        if not job.ended:
            talk.cancel(job)
        fault, result = job.fault(), job.final or {}
        if self._exact is None:
            self._meet(exact=fault is None and case.judge(result, exactly=True))
        exactly = bool(self._exact)
        expected = case.expected(exactly=exactly)
        if fault is not None:
            left_out = case.kind is Kind.VISION and _is_text_model(job)
            return Outcome(
                name=case.name, kind=case.kind, ok=None if left_out else False, answer=None,
                expected=expected, reason=fault,
            )  # fmt: skip
        timings = result.get("timings") or {}
        return Outcome(
            name=case.name, kind=case.kind, ok=case.judge(result, exactly=exactly),
            answer=answer_of(result), expected=expected, ttft_ms=timings.get("ttft_ms"),
            tokens_per_second=timings.get("tokens_per_second"),
        )  # fmt: skip

    def _meet(self, *, exact: bool) -> None:
        self._exact = exact
        if not exact:
            self.say(
                "it does not answer as the model that ships with edged: this is a smoke test, "
                "which looks for the facts in each answer, whatever its words"
            )

    def _measure(self) -> None:
        """Look at the engine's memory, before it may be another process."""
        if self._daemon is None:
            return
        mine = _children_peak_mb(self._daemon.process.pid)
        if mine is not None:
            self._peak_mb = max(self._peak_mb or 0.0, mine)

    async def _hear(self, talk: Conversation) -> None:
        """Wait for another device's heartbeat, if none came while it worked."""
        if self._daemon is None and not self._beats.heard:
            self._screen.status("waiting for a heartbeat, which says how much memory it takes …")
            apart = talk.presence.interval_s or 0.0
            await talk.until(lambda: self._beats.heard, min(apart + 1.0, BEAT_S))

    def _report(self, outcomes: list[Outcome], info: Mapping[str, Any], seconds: float) -> Report:
        right, wrong, left_out = (
            sum(each.ok is ok for each in outcomes) for ok in (True, False, None)
        )
        model, versions = info.get("model"), info.get("versions")
        return Report(
            model=model if isinstance(model, str) else None,
            ok=wrong == 0 and right > 0,
            exact=bool(self._exact),
            cases=outcomes,
            right=right,
            wrong=wrong,
            left_out=left_out,
            ttft_ms_p50=_median([each.ttft_ms for each in outcomes]),
            tokens_per_second_p50=_median([each.tokens_per_second for each in outcomes]),
            peak_memory_mb=None if self._peak_mb is None else round(self._peak_mb, 1),
            memory_mb=None if self._daemon else self._beats.memory_mb,
            seconds=round(seconds, 2),
            versions=versions if isinstance(versions, dict) else {},
        )

    # What is shown

    def _tell(self, outcome: Outcome) -> None:
        if self._as_json:
            return
        word, colour = {True: ("right", "32"), False: ("WRONG", "1;31"), None: ("-", "2")}[
            outcome.ok
        ]
        pace = ""
        if outcome.ttft_ms is not None and outcome.tokens_per_second is not None:
            pace = f"  [{outcome.ttft_ms:.0f} ms, {outcome.tokens_per_second:.0f} tokens/s]"
        what = one_line(_written(outcome.answer), _SHOWN)
        if outcome.reason is not None:
            same = outcome.reason == self._reason
            what = "the same" if same else one_line(outcome.reason, _REASON_SHOWN)
        self._reason = outcome.reason
        head = self._screen.style(f"{word:<6}", colour)
        self._screen.line(f"{head} {outcome.name}: {what}{self._screen.dim(pace)}")
        if outcome.ok is False and outcome.reason is None:
            self._screen.line(f"       expected: {one_line(_written(outcome.expected), _SHOWN)}")

    def _sum_up(self, report: Report) -> None:
        if self._as_json:
            body = {"v": _VERSION, **asdict(report)}
            self._screen.line(json.dumps(body, ensure_ascii=False))
            return
        counts = f"{report.right} right, {report.wrong} wrong"
        if report.left_out:
            counts += f", {report.left_out} left out"
        self._screen.line(self._screen.style(f"{counts}, in {report.seconds:.1f} s",
                                             "1;32" if report.ok else "1;31"))  # fmt: skip
        if report.left_out:
            self.say("its model is one for text: it was asked about frames, and none was looked at")
        parts = []
        if report.ttft_ms_p50 is not None:
            parts.append(f"the first token after {report.ttft_ms_p50:.0f} ms")
        if report.tokens_per_second_p50 is not None:
            parts.append(f"{report.tokens_per_second_p50:.0f} tokens a second (medians)")
        if report.peak_memory_mb is not None:
            parts.append(f"the engine took {report.peak_memory_mb:.0f} MB at most")
        if report.memory_mb is not None:
            parts.append(f"the engine took {report.memory_mb:.0f} MB by its heartbeats")
        versions = " ".join(f"{name} {version}" for name, version in report.versions.items())
        self.say(", ".join([f"model {report.model}", *parts]))
        self.say(versions)


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return " | ".join(map(_written, value))
    return json.dumps(value, ensure_ascii=False)


def _is_text_model(job: Job) -> bool:
    """Return whether a job about frames was not done because no model for frames is set."""
    end = job.refused or job.final or {}
    return end.get("code") == Code.UNSUPPORTED and end["message"].startswith(_TEXT_MODEL)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 1) if known else None


def _children_peak_mb(pid: int) -> float | None:
    """Return the MB (10^6 bytes) that the children of a process had resident at their peak."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            for child in path.read_text("ascii").split():
                found += re.findall(
                    r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{child}/status").read_text("utf-8"), re.M
                )
        except OSError:  # it has just ended, or this kernel does not tell
            continue
    return sum(map(int, found)) * 1024 / 1e6 if found else None
