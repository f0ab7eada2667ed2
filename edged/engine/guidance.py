"""Answers that satisfy a JSON schema: the tokens that may come next, then a look at the whole."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import llguidance.numpy
import numpy as np
from jsonschema.validators import validator_for
from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]
from referencing.exceptions import Unresolvable

from edged.engine.sampling import Logits
from edged.engine.text import Schema
from edged.errors import Code, JobFailed

#: Of a schema: characters of JSON, and levels.
MAX_SCHEMA = 65_536
MAX_DEPTH = 64
#: Characters of a compiler's message that go to the requester.
_MESSAGE = 300
#: Seconds of CPU. guidance runs a pattern as an automaton; the check runs it with backtracking,
#: which a pattern may turn into hours.
_CHECK_S = 3.0
#: Our word is the last one: a schema may carry options of its own for llguidance, and with white
#: space left to it a weak model spends its whole budget on that.
_OPTIONS: Any = {"whitespace_flexible": False, "lenient": False}


class Guidance:
    """Compiles schemas for one tokenizer."""

    def __init__(self, tokenizer: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.read_text("utf-8"), n_vocab=vocab_size, eos_token=list(eos_ids)
        )
        self._limits = llguidance.LLParserLimits(verbose_errors=False)

    def compile(self, schema: Schema) -> Constraint:
        """Return what keeps one answer to a schema.

        Raises:
            JobFailed: the schema is wrong, too large, or beyond what guidance can do.
        """
        schema = _checked(schema)
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        except ValueError as error:
            raise _invalid(str(error)) from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _invalid(matcher.get_error())
        return Constraint(matcher, self._vocab_size, schema)


class Constraint:
    """Keeps one answer to its schema."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocab_size: int, schema: dict[str, Any]
    ) -> None:
        self._matcher = matcher
        self._schema = schema
        self._mask = llguidance.numpy.allocate_token_bitmask(1, vocab_size)

    def narrow(self, logits: Logits) -> None:
        """Put the tokens that cannot come next at minus infinity."""
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._mask)
        bits = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little", count=logits.size)
        logits[bits == 0] = -np.inf
        if self._matcher.is_error():
            raise JobFailed(Code.BAD_OUTPUT, _line(f"guidance: {self._matcher.get_error()}"))

    def accept(self, token: int) -> None:
        """Go on past a token."""
        if not self._matcher.consume_token(token):
            raise JobFailed(Code.BAD_OUTPUT, _line(f"guidance: {self._matcher.get_error()}"))

    @property
    def finished(self) -> bool:
        """Whether nothing more can come."""
        return bool(self._matcher.is_stopped())

    def value(self, text: str) -> Any:
        """Return the answer as a value.

        Raises:
            JobFailed: it is no JSON, or not what the schema asks for.
        """
        try:
            value = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise JobFailed(
                Code.BAD_OUTPUT,
                _line(f"the answer is no whole JSON: {error}; a larger max_tokens may help"),
            ) from None
        if not _storable(value):
            raise JobFailed(
                Code.BAD_OUTPUT, "the answer has a number or text that JSON cannot hold"
            )
        try:
            with _cpu_limit(_CHECK_S):
                wrong = jsonschema.exceptions.best_match(
                    _validator(self._schema).iter_errors(value)
                )
        except (Unresolvable, RecursionError) as unknown:
            raise _invalid(f"it refers to something unknown: {unknown}") from None
        except TimeoutError:
            raise _invalid("an answer takes too long to check against it") from None
        if wrong is not None:
            raise JobFailed(
                Code.BAD_OUTPUT, _line(f"the answer does not satisfy its schema: {wrong.message}")
            )
        return value


def _checked(schema: Schema) -> dict[str, Any]:
    if schema is False:
        raise _invalid("nothing satisfies the schema `false`")
    if schema is True:
        return {}
    if _depth(schema) > MAX_DEPTH:
        raise _invalid(f"it is more than {MAX_DEPTH} levels deep")
    if len(json.dumps(schema)) > MAX_SCHEMA:
        raise _invalid(f"it is longer than {MAX_SCHEMA} characters")
    schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    try:
        validator_for(schema, default=jsonschema.Draft202012Validator).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise _invalid(f"{error.json_path}: {error.message}") from None
    except (Unresolvable, RecursionError) as error:
        raise _invalid(str(error)) from None
    return schema


def _validator(schema: dict[str, Any]) -> Any:
    """Return a validator that fetches nothing, whatever the schema refers to."""
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    return kind(schema, registry=REGISTRY)


@contextlib.contextmanager
def _cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the middle of what takes longer; this process has one Python thread."""

    def ring(_number: int, _frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _depth(value: Any) -> int:
    deepest, stack = 0, [(value, 1)]
    while stack and deepest <= MAX_DEPTH:
        inner, level = stack.pop()
        deepest = max(deepest, level)
        if isinstance(inner, dict):
            stack += [(each, level + 1) for each in inner.values()]
        elif isinstance(inner, list):
            stack += [(each, level + 1) for each in inner]
    return deepest


def _storable(value: Any) -> bool:
    """Tell whether a parsed answer can be written as JSON in UTF-8 again."""
    stack = [value]
    while stack:
        inner = stack.pop()
        if isinstance(inner, dict):
            stack += [*inner.keys(), *inner.values()]
        elif isinstance(inner, list):
            stack += inner
        elif isinstance(inner, float):
            if not math.isfinite(inner):
                return False
        elif isinstance(inner, str):
            try:
                inner.encode()
            except UnicodeEncodeError:
                return False
    return True


def _invalid(message: str) -> JobFailed:
    return JobFailed(
        Code.INVALID, _line(f"response_format: this JSON schema cannot be used: {message}")
    )


def _line(message: str) -> str:
    return " ".join(message.split())[:_MESSAGE]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
