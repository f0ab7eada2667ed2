"""Text jobs: a prompt, a prefill, tokens until one of the ways to end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edged.engine.backend import Desk
from edged.engine.prompts import Prompts
from edged.engine.sampling import Logits, Sampler
from edged.engine.session import Session
from edged.engine.stops import StopFilter
from edged.engine.tokens import Detokenizer, Vocabulary
from edged.errors import Code, JobFailed
from edged.ports import Answer, Completed, Task, Timings, Usage

Finish = Literal["stop", "length", "stop_string"]
Schema = dict[str, Any] | bool


class Constraint(Protocol):
    """What an answer has to be; `edged.engine.guidance` makes it of a JSON schema."""

    def narrow(self, logits: Logits) -> None:
        """Put the tokens that cannot come next at minus infinity."""
        ...

    def accept(self, token: int) -> None:
        """Go on past a token."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing more can come."""
        ...

    def value(self, text: str) -> Any:
        """Return the answer as a value, or raise JobFailed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """What a text job needs of a loaded model."""

    prompts: Prompts
    vocabulary: Vocabulary
    #: How many logits there are.
    vocab_size: int
    eos_ids: frozenset[int]
    #: Tokens.
    context: int
    max_tokens: int
    #: Compiles a schema; None where guidance is not installed.
    compile: Callable[[Schema], Constraint] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """An answer's tokens, ended."""

    text: str
    finish_reason: Finish
    tokens: int
    #: `time.perf_counter()` of the first token and of the end.
    first_at: float
    ended_at: float


def run_text(model: TextModel, session: Session, task: Task, desk: Desk) -> Completed:
    """Do a text job; see `Backend.run`."""
    started = time.perf_counter()
    desk.begin("prepare")
    prompt = prepare(model, task)
    constraint = _constraint(model, task)
    desk.step(work=1, done=1, total=1)

    prefill_at = time.perf_counter()
    cached = session.prefill(prompt, task.client, desk)
    prefilled_at = time.perf_counter()

    decoded = decode(model, session, prompt, task, desk, constraint=constraint)
    usage = Usage(prompt_tokens=len(prompt), cached_tokens=cached, completion_tokens=decoded.tokens)
    generating = decoded.ended_at - decoded.first_at
    return Completed(
        answers=(finish(decoded, usage, constraint),),
        timings=Timings(
            prefill_ms=1000 * (prefilled_at - prefill_at),
            ttft_ms=1000 * (decoded.first_at - started),
            generate_ms=1000 * generating,
            # the first token came with the prefill
            tokens_per_second=(decoded.tokens - 1) / generating if generating > 0 else 0.0,
        ),
    )


def prepare(model: TextModel, task: Task) -> list[int]:
    """Return the prompt's ids, known to fit.

    Raises:
        JobFailed: it does not fit the context, or has text that cannot be encoded.
    """
    size = sum(len(m["content"].encode("utf-8", "replace")) for m in task.messages)
    least = size // max(1, model.vocabulary.longest)
    if least >= model.context:  # far too long: do not even tokenize it
        raise JobFailed(
            Code.TOO_LONG,
            f"the prompt has at least {least} tokens, the context {model.context}: shorten it",
        )
    prompt = model.prompts.build(task.messages)
    if len(prompt) >= model.context:
        raise JobFailed(
            Code.TOO_LONG,
            f"the prompt has {len(prompt)} tokens, the context {model.context}: shorten it",
        )
    if task.max_tokens is not None and len(prompt) + task.max_tokens > model.context:
        raise JobFailed(
            Code.TOO_LONG,
            f"the prompt's {len(prompt)} tokens and max_tokens {task.max_tokens} are "
            f"{len(prompt) + task.max_tokens}, the context has {model.context}: shorten the "
            "prompt, or lower or leave out max_tokens",
        )
    return prompt


def decode(
    model: TextModel,
    session: Session,
    prompt: list[int],
    task: Task,
    desk: Desk,
    *,
    constraint: Constraint | None = None,
    question: int | None = None,
) -> Decoded:
    """Generate one answer after the prompt that the session holds.

    Raises:
        JobStopped: the desk said so, between two tokens.
    """
    budget = min(model.max_tokens, model.context - len(prompt))
    if task.max_tokens is not None:
        budget = min(budget, task.max_tokens)
    sampler = Sampler(task.sampling, prompt, model.vocab_size)
    detokenizer = Detokenizer(model.vocabulary)
    stops = StopFilter(task.stop)
    texts: list[str] = []
    ended: Finish | None = None
    count, first_at = 0, 0.0
    desk.begin("token", total=budget)
    while True:
        desk.check()
        logits = session.logits()
        if constraint is not None:
            constraint.narrow(logits)
        token = sampler.choose(logits)
        count += 1
        first_at = first_at or time.perf_counter()
        if token in model.eos_ids:
            text, ended = "", "stop"
        else:
            text = stops.push(detokenizer.feed(token))
            if constraint is not None:
                constraint.accept(token)
            if constraint is not None and constraint.finished:
                ended = "stop"
            elif count >= budget:
                ended = "length"
        if ended is not None:
            text += stops.push(detokenizer.flush()) + stops.flush()
        if stops.hit:
            ended = "stop_string"
        texts.append(text)
        desk.step(work=1, done=count, total=budget, text=text, question=question)
        if ended is not None:
            return Decoded(
                text="".join(texts),
                finish_reason=ended,
                tokens=count,
                first_at=first_at,
                ended_at=time.perf_counter(),
            )
        session.append([token])


def finish(decoded: Decoded, usage: Usage, constraint: Constraint | None) -> Answer:
    """Return the answer, looked at if it had a schema to satisfy.

    Raises:
        JobFailed: it does not satisfy it.
    """
    if constraint is None:
        return Answer(text=decoded.text, finish_reason=decoded.finish_reason, usage=usage)
    return Answer(
        text=decoded.text,
        finish_reason=decoded.finish_reason,
        usage=usage,
        json=constraint.value(decoded.text),
        has_json=True,
    )


def _constraint(model: TextModel, task: Task) -> Constraint | None:
    if task.schema is None:
        return None
    if model.compile is None:
        raise JobFailed(
            Code.UNSUPPORTED, "response_format json_schema: llguidance is not installed here"
        )
    return model.compile(task.schema)
