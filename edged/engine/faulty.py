"""An engine process without a model, which does what its prompt says: for tests of what it breaks.

    EngineHost(order, command=faulty_command())

The last user message is the script: commands, one after the other, each a word that begins with `!`
and its values. A message that does not begin with `!` is echoed word by word. With questions, each
question is a script with an answer of its own. Commands:

    !say WORDS        answer with these words
    !tokens N MS      answer with N words, MS milliseconds each
    !prefill N MS     prefill N chunks, MS milliseconds each
    !sleep S          be in `prepare` for S seconds, listening to nobody
    !spin             hold the GIL for ever
    !segv, !abort     end by that signal
    !exit N           end with that status
    !leak MB          grow by that much and keep it
    !peak MB          grow by that much for the length of the job
    !oom              allocate until an allocation fails, under a limit of its own
    !garbage          write stray bytes to the daemon
    !lie              report on a job that it does not have
    !tell JSON        send the daemon this message (JSON without blanks)
    !claim JSON       send the daemon this message, then hang
    !deaf N MS        like `!tokens`, but never listen for a stop
    !fail CODE        fail with this code
    !schema-bad       fail as an answer that misses its schema does

A job with frames decodes each, tells its plan unless it was given one, and encodes what it has not
kept from earlier jobs, before the rest of its script. A frame costs 313 tokens and is never looked
into; the oldest that do not fit into the context are dropped. Commands about frames:

    !frames           answer with the first 16 hex digits of each frame's SHA-256, in their order
    !plan             answer with the plan as JSON
    !drop N           drop frame N, if the plan is still to be made
    !decode N MS      decode N frames instead, MS milliseconds each, before the plan
    !encode N MS      encode N frames instead, MS milliseconds each, after the plan

Options of the command line break the load instead: `--fail-load TEXT`, `--segv-on-load`,
`--spin-on-load`, `--garbage-on-load`, `--slow-load S`. With `--no-vision` it sees nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from edged.engine.worker import main as worker_main
from edged.errors import Code, EdgedError, JobFailed
from edged.ports import (
    Answer,
    Completed,
    DroppedFrame,
    EngineInfo,
    FramePlan,
    PlannedFrame,
    Task,
    Timings,
    Turn,
    Usage,
)

if TYPE_CHECKING:  # large: not before the process is tethered
    from edged.engine.backend import Desk
    from edged.engine.messages import JobStage, Order
    from edged.engine.wire import Pipe

#: Tokens: what this engine says its context is; a token is a word.
CONTEXT = 4096
#: Tokens of a frame: one crop and the global view.
FRAME_TOKENS = 313
#: MB that a kept frame counts as.
FRAME_MB = 1.0
#: What it says of its eyes when started with `--no-vision`.
NO_VISION = "this engine sees nothing; start it without --no-vision"

_COMMAND = re.compile(r"(?:^|\s)!(?=[a-z])")
_STRAY = b"\x00\xff not a message at all \x00" * 8


def faulty_command(*options: str) -> tuple[str, ...]:
    """Return the command that runs this engine, with options that break its load."""
    return sys.executable, "-P", "-m", "edged.engine.faulty", *options


class FaultBackend:
    """See the module."""

    def __init__(self, options: argparse.Namespace, pipe: Pipe) -> None:
        self._options = options
        self._pipe = pipe
        self._kept: list[bytes] = []
        self._max_tokens = CONTEXT
        self._cache_mb = 0.0
        #: Digests of the frames that are kept, the oldest first.
        self._seen: dict[str, None] = {}
        self._hits = 0

    @property
    def sessions(self) -> int:
        """How many KV caches live: one, as if."""
        return 1

    @property
    def frame_cache(self) -> tuple[float, int]:
        """What the kept frames take, as if, and how often one was found."""
        return len(self._seen) * FRAME_MB, self._hits

    def load(self, order: Order) -> EngineInfo:
        """Load nothing, or fail as the options say."""
        if self._options.slow_load:
            time.sleep(self._options.slow_load)
        if self._options.garbage_on_load:
            self._pipe.send_raw(_STRAY)
        if self._options.segv_on_load:
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._options.spin_on_load:
            _hold_gil()
        if self._options.fail_load is not None:
            raise EdgedError(self._options.fail_load, hint="do something about it")
        self._max_tokens = order.max_tokens
        self._cache_mb = order.frame_cache_mb
        return EngineInfo(
            model=order.model,
            provider="cpu",
            threads=1,
            max_context=CONTEXT,
            vision=not self._options.no_vision,
            json_schema=True,
            memory={"total": 1.0, "limit": 2.0},
            versions={"edged.engine.faulty": "1"},
            no_vision=NO_VISION if self._options.no_vision else None,
        )

    def run(self, task: Task, desk: Desk) -> Completed:
        """Do what the last user message says, or each of the questions."""
        job = _Job(task, desk)
        desk.begin("prepare")
        if task.look is not None and self._options.no_vision:
            raise JobFailed(Code.UNSUPPORTED, NO_VISION)
        if any("\0" in script.text for script in job.scripts):
            raise JobFailed(Code.INVALID, "a prompt must not contain NUL")
        self._fits(job.prompt, task.max_tokens)
        desk.step(work=1, done=1, total=1)
        self._look(job)
        answers = tuple(self._answer(job, script) for script in job.scripts)
        taken = time.perf_counter() - job.started
        return Completed(
            answers=answers,
            timings=Timings(
                decode_images_ms=job.spent.get("decode_images", 0.0) * 1000,
                encode_ms=job.spent.get("encode", 0.0) * 1000,
                prefill_ms=job.spent.get("prefill", 0.0) * 1000,
                ttft_ms=job.first * 1000,
                generate_ms=(taken - job.first) * 1000,
            ),
            frames=job.plan,
        )

    def _fits(self, prompt: int, max_tokens: int | None) -> None:
        wanted = prompt + (1 if max_tokens is None else max_tokens)
        if wanted > CONTEXT:
            raise JobFailed(
                Code.TOO_LONG, f"prompt and answer need {wanted} tokens, the context has {CONTEXT}"
            )

    # Frames ----------------------------------------------------------------------------------

    def _look(self, job: _Job) -> None:
        """Decode, plan and encode."""
        look = job.task.look
        decode, encode = job.asked("decode"), job.asked("encode")
        if decode is None:
            decode = (0 if look is None else len(look.frames)), 0.0
        job.stage("decode_images", *decode)
        new = 0
        if look is not None:
            job.plan = look.plan
            if job.plan is None:
                job.plan = self._plan(job, len(look.frames))
                job.desk.planned(job.plan)
            new = self._new(job, job.plan)
        job.stage("encode", *((new, 0.0) if encode is None else encode), work=2)

    def _plan(self, job: _Job, frames: int) -> FramePlan:
        """Use every frame that was not to be dropped, as far as they fit."""
        room = CONTEXT - job.prompt - (job.task.max_tokens or 1)
        unwanted = {int(values[0]) for name, values in job.commands if name == "drop"}
        wanted = [index for index in range(frames) if index not in unwanted]
        fit = wanted[-(room // FRAME_TOKENS) :] if room >= FRAME_TOKENS else []
        return FramePlan(
            used=tuple(PlannedFrame(index, 1, FRAME_TOKENS) for index in fit),
            dropped=tuple(
                DroppedFrame(index, "as the prompt asked" if index in unwanted else "no room")
                for index in range(frames)
                if index not in fit
            ),
        )

    def _new(self, job: _Job, plan: FramePlan) -> int:
        """Return how many frames are not kept from earlier jobs; they are now."""
        new = 0
        for frame in plan.used:
            digest = job.digests[frame.index]
            if digest in self._seen:
                self._hits += 1
                continue
            new += 1
            self._seen[digest] = None
            while len(self._seen) * FRAME_MB > self._cache_mb:
                del self._seen[next(iter(self._seen))]
        return new

    # Scripts ---------------------------------------------------------------------------------

    def _answer(self, job: _Job, script: _Script) -> Answer:
        words: list[str] = []
        wait, deaf = 0.0, False
        for name, values in script.commands:
            match name:
                case "say":
                    words += values
                case "tokens" | "deaf":
                    words += [f"w{n}" for n in range(int(values[0]))]
                    wait, deaf = float(values[1]) / 1000, name == "deaf"
                case "prefill":
                    n, ms = values
                    job.stage("prefill", int(n), float(ms) / 1000, script, work=64)
                case "frames":
                    words += job.digests
                case "plan":
                    plan = None if job.plan is None else asdict(job.plan)
                    words.append(json.dumps(plan, separators=(",", ":")))
                case "drop" | "decode" | "encode":  # it was done before
                    pass
                case "peak":
                    job.borrowed += [b"x" * (32768 + n % 2) for n in range(int(values[0]) * 32)]
                    self._kept.append(bytes(1000))  # what comes after it is free in the midst
                case _:
                    self._break(name, values, job.task)
        if not script.commands:
            words = script.text.split()
            job.stage("prefill", 1, 0.0, script, work=64)
        return self._say(job, script, words, wait, deaf=deaf)

    def _break(self, name: str, values: list[str], task: Task) -> None:
        match name:
            case "sleep":
                time.sleep(float(values[0]))
            case "spin":
                _hold_gil()
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "abort":
                os.kill(os.getpid(), signal.SIGABRT)
            case "exit":
                os._exit(int(values[0]))
            case "leak":
                self._kept.append(os.urandom(1) * (int(values[0]) * 1_000_000))
            case "oom":
                self._run_out()
            case "garbage":
                self._pipe.send_raw(_STRAY)
                time.sleep(3600)
            case "lie":
                self._pipe.send({"t": "stopped", "job": task.job + 1})
                time.sleep(3600)
            case "tell" | "claim":
                self._pipe.send(json.loads(values[0]))
                if name == "claim":
                    time.sleep(3600)
            case "fail":
                raise JobFailed(Code(values[0]), "as the prompt asked")
            case "schema-bad":
                raise JobFailed(Code.BAD_OUTPUT, "the answer does not satisfy its schema")
            case _:
                raise JobFailed(Code.INVALID, f"no such command: !{name}")

    def _run_out(self) -> None:
        """Allocate under RLIMIT_AS until an allocation really fails."""
        used = int(open("/proc/self/statm", encoding="ascii").read().split()[0])  # noqa: PTH123, SIM115
        limit = used * resource.getpagesize() + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while True:
            self._kept.append(bytes(8 << 20))

    def _say(
        self, job: _Job, script: _Script, words: list[str], wait: float, *, deaf: bool
    ) -> Answer:
        prompt = script.prompt + job.image_tokens if script.first else script.prompt
        most = min(self._max_tokens, CONTEXT - job.prompt - job.image_tokens)
        if job.task.max_tokens is not None:
            most = min(most, job.task.max_tokens)
        cut = len(words) > most
        words = words[:most]
        job.desk.begin("token", total=len(words))
        text = ""
        for done, word in enumerate(words, 1):
            if not deaf:
                job.desk.check()
            if wait:
                time.sleep(wait)
            piece = word if not text else f" {word}"
            text += piece
            job.first = job.first or time.perf_counter() - job.started
            job.desk.step(work=1, done=done, total=len(words), text=piece, question=script.question)
        usage = Usage(
            prompt_tokens=prompt,
            image_tokens=job.image_tokens if script.first else 0,
            completion_tokens=len(words),
        )
        return Answer(text=text, finish_reason="length" if cut else "stop", usage=usage)


class _Script:
    """What is to be done for one answer."""

    def __init__(self, text: str, question: int | None, prompt: int) -> None:
        self.text = text
        self.question = question
        self.first = not question
        #: Tokens that this answer is the first to need.
        self.prompt = prompt
        parts = _COMMAND.split(text)[1:] if text.startswith("!") else []
        self.commands = [(name, values) for name, *values in map(str.split, parts)]


class _Job:
    """A task as it is done."""

    def __init__(self, task: Task, desk: Desk) -> None:
        self.task = task
        self.desk = desk
        self.started = time.perf_counter()
        #: Seconds until the first token, and by stage.
        self.first = 0.0
        self.spent: dict[str, float] = {}
        self.plan: FramePlan | None = None
        self.borrowed: list[bytes] = []
        frames = () if task.look is None else task.look.frames
        self.digests = [hashlib.sha256(frame).hexdigest()[:16] for frame in frames]
        shared = sum(len(_text(message).split()) for message in task.messages)
        if task.questions:
            self.scripts = [
                _Script(question, n, len(question.split()) + (0 if n else shared))
                for n, question in enumerate(task.questions)
            ]
        else:
            self.scripts = [_Script(_text(task.messages[-1]), None, shared)]
        #: Tokens of the longest prompt, frames not counted.
        self.prompt = shared + max(
            (len(question.split()) for question in task.questions), default=0
        )

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """The commands of all scripts."""
        return [command for script in self.scripts for command in script.commands]

    @property
    def image_tokens(self) -> int:
        """The tokens of the frames that are used."""
        return 0 if self.plan is None else sum(frame.tokens for frame in self.plan.used)

    def asked(self, name: str) -> tuple[int, float] | None:
        """Return the number and the seconds that a command asks for."""
        for command, values in self.commands:
            if command == name:
                return int(values[0]), float(values[1]) / 1000
        return None

    def stage(
        self,
        name: JobStage,
        steps: int,
        wait: float,
        script: _Script | None = None,
        *,
        work: int = 1,
    ) -> None:
        """Be in a stage for so many steps, each of so many seconds."""
        began = time.perf_counter()
        unit = work if name == "prefill" else 1
        question = None if script is None else script.question
        if steps:
            self.desk.begin(name, work=work, total=steps * unit)
        for done in range(1, steps + 1):
            self.desk.check()
            time.sleep(wait)
            self.desk.step(
                work=work,
                done=done * unit,
                total=steps * unit,
                next_work=work,
                question=question,
            )
        if steps:
            self.desk.check()
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began


def _text(message: Turn) -> str:
    """Return a message's text, without its frames."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(part for part in content if isinstance(part, str)).strip()


def _hold_gil() -> None:
    """Never return, and never let another thread of this process run Python."""
    libc = ctypes.PyDLL(None)
    while True:
        libc.pause()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the engine process."""
    parser = argparse.ArgumentParser(prog="edged.engine.faulty")
    parser.add_argument("--fail-load", metavar="TEXT")
    parser.add_argument("--segv-on-load", action="store_true")
    parser.add_argument("--spin-on-load", action="store_true")
    parser.add_argument("--garbage-on-load", action="store_true")
    parser.add_argument("--no-vision", action="store_true")
    parser.add_argument("--slow-load", type=float, default=0.0, metavar="SECONDS")
    return worker_main(argv, FaultBackend, parser)


if __name__ == "__main__":
    sys.exit(main())
