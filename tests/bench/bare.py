"""The bare onnxruntime-genai loop that edged is compared with, in a process of its own.

Nothing of edged is in it. It is as quick as such a loop can be: one generator is kept and rewound,
so that no run pays for a fresh cache. The parent talks to it in lines of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.child import Child


@dataclass(frozen=True, slots=True)
class Ran:
    """A run of the loop. Seconds from its start, with the prompt's tokenization left out."""

    #: Until the first text was there.
    first_s: float
    #: Tokens generated until then.
    first_tokens: int
    total_s: float
    tokens: int
    prefill_s: float
    text: str

    @property
    def token_s(self) -> float:
        """Seconds a token after the first text."""
        return (self.total_s - self.first_s) / max(1, self.tokens - self.first_tokens)


class Bare(Child):
    """The process, as the bench sees it."""

    def __init__(self, model: Path, *, threads: int, max_length: int) -> None:
        env = {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        super().__init__("tests.bench.bare", "the bare loop", env=env)
        self._order = {"model": str(model), "threads": threads, "max_length": max_length}
        self.load_s = 0.0

    def greet(self) -> None:
        """Let it load the model."""
        self.load_s = self.ask(self._order)["load_s"]

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a conversation by the model's own template."""
        ids: list[int] = self.ask({"encode": list(messages)})["ids"]
        return ids

    def run(self, ids: Sequence[int], tokens: int) -> Ran:
        """Generate so many tokens, greedily, from an empty cache."""
        return Ran(**self.ask({"run": list(ids), "tokens": tokens}))


class _Loop:
    """In the process."""

    def __init__(self, model: str, threads: int, max_length: int) -> None:
        import onnxruntime_genai as og  # noqa: PLC0415  (the parent must not load it)

        config = og.Config(model)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = og.Model(config)
        self._tokenizer = og.Tokenizer(self._model)
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, do_sample=False)
        self._generator = og.Generator(self._model, params)
        self._used = False

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        return [int(i) for i in self._tokenizer.encode(text)]

    def run(self, ids: list[int], tokens: int) -> dict[str, Any]:
        generator, stream = self._generator, self._tokenizer.create_stream()
        if self._used:
            generator.rewind_to(0)
        self._used = True
        texts: list[str] = []
        count = first_tokens = 0
        first_s = 0.0
        began = time.perf_counter()
        generator.append_tokens(ids)
        prefilled = time.perf_counter()
        while count < tokens and not generator.is_done():
            generator.generate_next_token()
            count += 1
            text = stream.decode(generator.get_next_tokens()[0])
            if text and not first_tokens:
                first_s, first_tokens = time.perf_counter() - began, count
            texts.append(text)
        return {
            "first_s": first_s,
            "first_tokens": first_tokens,
            "total_s": time.perf_counter() - began,
            "tokens": count,
            "prefill_s": prefilled - began,
            "text": "".join(texts),
        }


def main() -> None:
    """Serve the parent."""

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    began = time.perf_counter()
    loop = _Loop(**json.loads(sys.stdin.readline()))
    say({"load_s": time.perf_counter() - began})
    for line in sys.stdin:
        question = json.loads(line)
        if "encode" in question:
            say({"ids": loop.encode(question["encode"])})
        else:
            say(loop.run(question["run"], question["tokens"]))


if __name__ == "__main__":
    main()
