"""An engine process without a model, which does what its prompt says: for tests of what it breaks.

    EngineHost(order, command=faulty_command())

The last user message is the script: commands, one after the other, each a word that begins with `!`
and its values. A message that does not begin with `!` is echoed word by word. Commands:

    !say WORDS        answer with these words
    !tokens N MS      answer with N words, MS milliseconds each
    !prefill N MS     prefill N chunks, MS milliseconds each
    !sleep S          be in `prepare` for S seconds, listening to nobody
    !spin             hold the GIL for ever
    !segv, !abort     end by that signal
    !exit N           end with that status
    !leak MB          grow by that much and keep it
    !oom              allocate until an allocation fails, under a limit of its own
    !garbage          write stray bytes to the daemon
    !lie              report on a job that it does not have
    !deaf N MS        like `!tokens`, but never listen for a stop
    !fail CODE        fail with this code
    !schema-bad       fail as an answer that misses its schema does

Options of the command line break the load instead: `--fail-load TEXT`, `--segv-on-load`,
`--spin-on-load`, `--garbage-on-load`, `--slow-load S`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edged.engine.worker import main as worker_main
from edged.errors import Code, EdgedError, JobFailed
from edged.ports import Answer, Completed, EngineInfo, Task, Timings, Usage

if TYPE_CHECKING:  # large: not before the process is tethered
    from edged.engine.backend import Desk
    from edged.engine.messages import Order
    from edged.engine.wire import Pipe

#: Tokens: what this engine says its context is; a token is a word.
CONTEXT = 4096

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

    @property
    def sessions(self) -> int:
        """How many KV caches live: one, as if."""
        return 1

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
        return EngineInfo(
            model=order.model,
            provider="cpu",
            threads=1,
            max_context=CONTEXT,
            vision=False,
            json_schema=True,
            memory={"total": 1.0, "limit": 2.0},
            versions={"edged.engine.faulty": "1"},
        )

    def run(self, task: Task, desk: Desk) -> Completed:
        """Do what the last user message says."""
        started = time.perf_counter()
        desk.begin("prepare")
        script = task.messages[-1]["content"]
        if "\0" in script:
            raise JobFailed(Code.INVALID, "a prompt must not contain NUL")
        prompt = sum(len(message["content"].split()) for message in task.messages)
        self._fits(prompt, task.max_tokens)
        desk.step(work=1, done=1, total=1)
        words: list[str] = []
        wait, deaf = 0.0, False
        commands = _COMMAND.split(script)[1:] if script.startswith("!") else []
        for command in commands:
            name, *values = command.split()
            match name:
                case "say":
                    words += values
                case "tokens" | "deaf":
                    words += [f"w{n}" for n in range(int(values[0]))]
                    wait, deaf = float(values[1]) / 1000, name == "deaf"
                case "prefill":
                    self._prefill(desk, int(values[0]), float(values[1]) / 1000)
                case _:
                    self._break(name, values, task)
        if not commands:
            words = script.split()
            self._prefill(desk, 1, 0.0)
        return self._answer(task, desk, words, wait, started=started, prompt=prompt, deaf=deaf)

    def _fits(self, prompt: int, max_tokens: int | None) -> None:
        wanted = prompt + (1 if max_tokens is None else max_tokens)
        if wanted > CONTEXT:
            raise JobFailed(
                Code.TOO_LONG, f"prompt and answer need {wanted} tokens, the context has {CONTEXT}"
            )

    def _prefill(self, desk: Desk, chunks: int, wait: float) -> None:
        desk.begin("prefill", work=64, total=chunks * 64)
        for done in range(1, chunks + 1):
            desk.check()
            time.sleep(wait)
            desk.step(work=64, done=done * 64, total=chunks * 64, next_work=64)
        desk.check()

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
                lie = {"t": "stopped", "job": task.job + 1, "sessions": 1}
                self._pipe.send(lie)
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

    def _answer(
        self,
        task: Task,
        desk: Desk,
        words: list[str],
        wait: float,
        *,
        started: float,
        prompt: int,
        deaf: bool,
    ) -> Completed:
        most = min(self._max_tokens, CONTEXT - prompt)
        if task.max_tokens is not None:
            most = min(most, task.max_tokens)
        cut = len(words) > most
        words = words[:most]
        desk.begin("token", total=len(words))
        text, first = "", 0.0
        for done, word in enumerate(words, 1):
            if not deaf:
                desk.check()
            if wait:
                time.sleep(wait)
            piece = word if not text else f" {word}"
            text += piece
            first = first or time.perf_counter() - started
            desk.step(work=1, done=done, total=len(words), text=piece)
        usage = Usage(prompt_tokens=prompt, completion_tokens=len(words))
        answer = Answer(text=text, finish_reason="length" if cut else "stop", usage=usage)
        taken = time.perf_counter() - started
        return Completed(
            answers=(answer,),
            timings=Timings(ttft_ms=first * 1000, generate_ms=(taken - first) * 1000),
        )


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
    parser.add_argument("--slow-load", type=float, default=0.0, metavar="SECONDS")
    return worker_main(argv, FaultBackend, parser)


if __name__ == "__main__":
    sys.exit(main())
