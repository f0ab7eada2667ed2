"""Answers: a prompt, a prefill, tokens until one of the ways to end. A text job is nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from edged.engine.backend import Desk
from edged.engine.prompts import Prompts, asked, text_bytes
from edged.engine.sampling import Logits, Sampler
from edged.engine.session import Session, Sight
from edged.engine.stops import StopFilter
from edged.engine.tokens import Detokenizer, Vocabulary
from edged.errors import Code, JobFailed
from edged.ports import Answer, Completed, Task, Timings, Turn, Usage

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
    #: The id that stands for a frame's tokens, which must never be said; None without vision.
    placeholder: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """An answer's tokens, ended."""

    text: str
    finish_reason: Finish
    tokens: int
    #: `time.perf_counter()` of the first token and of the end.
    first_at: float
    ended_at: float


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt to be answered, and the frames in it."""

    prompt: list[int]
    #: What the answer has to be; it serves one answer.
    constraint: Constraint | None
    sights: tuple[Sight, ...] = ()


def run_text(model: TextModel, session: Session, task: Task, desk: Desk) -> Completed:
    """Do a text job; see `Backend.run`."""
    started = time.perf_counter()
    desk.begin("prepare")
    check_length(model, task)
    asks = []
    for messages in conversations(task):
        prompt = model.prompts.build(messages)
        check_fit(model, task, len(prompt))
        asks.append(Ask(prompt, constraint(model, task)))
    desk.step(work=1, done=1, total=1)
    answers, timings = answer(model, session, asks, task, desk, started=started)
    return Completed(answers=answers, timings=timings)


def conversations(task: Task) -> list[tuple[Turn, ...]]:
    """Return the conversations that a task wants answered: one for each of its questions."""
    if not task.questions:
        return [task.messages]
    return [asked(task.messages, question) for question in task.questions]


def check_length(model: TextModel, task: Task) -> None:
    """Look at how long the texts are, before anything is tokenized.

    Raises:
        JobFailed: they are far too long.
    """
    size = text_bytes(task.messages) + max(
        (len(question.encode("utf-8", "replace")) for question in task.questions), default=0
    )
    least = size // max(1, model.vocabulary.longest)
    if least >= model.context:
        raise JobFailed(
            Code.TOO_LONG,
            f"the prompt has at least {least} tokens, the context {model.context}: shorten it",
        )


def check_fit(model: TextModel, task: Task, tokens: int) -> None:
    """Look at whether a prompt of so many tokens leaves room for its answer.

    Raises:
        JobFailed: it does not.
    """
    if tokens >= model.context:
        raise JobFailed(
            Code.TOO_LONG,
            f"the prompt has {tokens} tokens, the context {model.context}: shorten it",
        )
    if task.max_tokens is not None and tokens + task.max_tokens > model.context:
        raise JobFailed(
            Code.TOO_LONG,
            f"the prompt's {tokens} tokens and max_tokens {task.max_tokens} are "
            f"{tokens + task.max_tokens}, the context has {model.context}: shorten the "
            "prompt, or lower or leave out max_tokens",
        )


def answer(
    model: TextModel,
    session: Session,
    asks: Sequence[Ask],
    task: Task,
    desk: Desk,
    *,
    started: float,
) -> tuple[tuple[Answer, ...], Timings]:
    """Answer prompts that fit, one after the other; what they share is computed once.

    The first answer's usage is that of its whole prompt, a later one's that of what its prompt has
    beyond what it shares with the one before it.

    Args:
        model: the loaded model.
        session: what computes.
        asks: in order; the task's questions, if it has any, else one.
        task: how to answer.
        desk: where it is reported.
        started: `time.perf_counter()` when the engine's work began.

    Raises:
        JobFailed: an answer does not satisfy its schema.
        JobStopped: the desk said so.
    """
    answers: list[Answer] = []
    prefill_s, generate_s, later, first_at = 0.0, 0.0, 0, 0.0
    for index, ask in enumerate(asks):
        question = index if task.questions else None
        began = time.perf_counter()
        cached = session.prefill(
            ask.prompt, task.client, desk, sights=ask.sights, question=question
        )
        prefill_s += time.perf_counter() - began
        decoded = decode(
            model, session, ask.prompt, task, desk, constraint=ask.constraint, question=question
        )
        # even if it had to be computed anew, what it shares with the one before is counted there
        counted = _shared(asks[index - 1].prompt, ask.prompt) if answers else 0
        usage = Usage(
            prompt_tokens=len(ask.prompt) - counted,
            image_tokens=sum(max(0, sight.end - max(counted, sight.start)) for sight in ask.sights),
            cached_tokens=max(0, cached - counted),
            completion_tokens=decoded.tokens,
        )
        answers.append(finish(decoded, usage, ask.constraint))
        first_at = first_at or decoded.first_at
        generate_s += decoded.ended_at - decoded.first_at
        later += decoded.tokens - 1  # the first one came with the prefill
    return tuple(answers), Timings(
        prefill_ms=1000 * prefill_s,
        ttft_ms=1000 * (first_at - started),
        generate_ms=1000 * generate_s,
        tokens_per_second=later / generate_s if generate_s > 0 else 0.0,
    )


def _shared(before: Sequence[int], after: Sequence[int]) -> int:
    """Return how many ids two prompts about the same frames begin with alike."""
    pairs = enumerate(zip(before, after, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(before), len(after)))


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
        if model.placeholder is not None:
            logits[model.placeholder] = -np.inf
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


def constraint(model: TextModel, task: Task) -> Constraint | None:
    """Return what keeps one answer to the task's schema; None if it has none.

    Raises:
        JobFailed: the schema cannot be compiled, or nothing here can.
    """
    if task.schema is None:
        return None
    if model.compile is None:
        raise JobFailed(
            Code.UNSUPPORTED, "response_format json_schema: llguidance is not installed here"
        )
    return model.compile(task.schema)
