"""What only a model can show: choice of tokens, counts, schemas, the context."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.box import Box, serve
from tests.kit.observer import Body, Observer

pytestmark = [pytest.mark.broker, pytest.mark.engine]

CONTEXT = 512
ASK = "The pump in the hall is"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    settings = {"limits": {"max_tokens": 500}}
    with serve(tmp_path_factory.mktemp("model"), engine="real", settings=settings) as box:
        yield box


def answer(observer: Observer, prompt: str = ASK, **fields: Any) -> Body:
    """Ask and return the final."""
    if "messages" not in fields:
        fields["prompt"] = prompt
    return observer.final(observer.ask(**fields))


def text(observer: Observer, prompt: str = ASK, **fields: Any) -> str:
    """Ask for 24 tokens and return the text."""
    final = answer(observer, prompt, **{"max_tokens": 24, **fields})
    assert final["type"] == "result", final
    said: str = final["text"]
    return said


# Choice of tokens ---------------------------------------------------------------------------------


def test_without_options_the_answer_is_always_the_same(observer: Observer) -> None:
    cold = text(observer, client="cold")  # a client of its own: nothing to reuse

    assert cold
    assert {text(observer) for _ in range(3)} == {cold}


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "seed": 7},
        {"temperature": 0, "top_p": 0.9, "top_k": 50},
        {"top_k": 1},
        {"top_p": 0.000001},
    ],
)
def test_what_leaves_no_choice_is_greedy(observer: Observer, options: dict[str, Any]) -> None:
    assert text(observer, **options) == text(observer)


def test_a_seed_repeats_whatever_ran_in_between(observer: Observer) -> None:
    first = text(observer, seed=7, temperature=1.5, client="a")
    text(observer, "something else entirely", client="a")

    assert text(observer, seed=7, temperature=1.5, client="a") == first, "reused"
    assert text(observer, seed=7, temperature=1.5, client="b") == first, "cold"


def test_seeds_differ_and_differ_from_greedy(observer: Observer) -> None:
    texts = {text(observer, seed=seed, temperature=1.5) for seed in range(5)}

    assert len(texts) > 2
    assert texts != {text(observer)}


def test_without_a_seed_chance_is_fresh(observer: Observer) -> None:
    assert len({text(observer, temperature=2.0) for _ in range(5)}) > 1


@pytest.mark.parametrize("option", [{}, {"top_p": 1.0}])
def test_a_temperature_that_is_absent_is_one(observer: Observer, option: dict[str, Any]) -> None:
    assert text(observer, seed=3, **option) == text(observer, seed=3, temperature=1.0, **option)


def test_a_repetition_penalty_holds_for_greedy_answers_too(observer: Observer) -> None:
    plain = text(observer, max_tokens=200)

    assert text(observer, max_tokens=200, repetition_penalty=1.0) == plain
    other = text(observer, max_tokens=200, repetition_penalty=5.0)
    assert other != plain
    assert text(observer, max_tokens=200, repetition_penalty=5.0) == other


# Ends and counts ----------------------------------------------------------------------------------


def test_max_tokens_cuts_exactly_there(observer: Observer) -> None:
    whole, cut = answer(observer, max_tokens=24), answer(observer, max_tokens=5)

    assert (cut["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 5)
    assert whole["text"].startswith(cut["text"])


def test_without_max_tokens_the_rest_of_the_context_is_used(observer: Observer) -> None:
    final = answer(observer, "x " * 200)

    assert final["type"] == "result", final
    usage = final["usage"]
    assert usage["prompt_tokens"] > 200
    assert usage["prompt_tokens"] + usage["completion_tokens"] <= CONTEXT
    if final["finish_reason"] == "length":
        assert usage["prompt_tokens"] + usage["completion_tokens"] >= CONTEXT - 1


@pytest.mark.parametrize("several", [False, True])
def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(
    observer: Observer, several: bool
) -> None:
    whole = text(observer)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]

    final = answer(observer, max_tokens=24, stop=["~never~", stop, "\u00ff"] if several else stop)

    assert final["finish_reason"] == "stop_string"
    assert final["text"] == whole[: whole.index(stop)]


def test_counts_and_times_are_plausible(observer: Observer) -> None:
    final = answer(observer, "a prompt of its own, never asked before", max_tokens=24, client="c")

    usage, timings = final["usage"], final["timings"]
    assert usage["image_tokens"] == 0
    assert usage["prompt_tokens"] > 5
    assert 1 < usage["completion_tokens"] <= 24
    assert timings["prefill_ms"] > 0
    assert timings["ttft_ms"] >= timings["prefill_ms"]
    assert timings["generate_ms"] > 0
    assert timings["tokens_per_second"] > 1
    assert timings["decode_images_ms"] == timings["encode_ms"] == 0
    assert final["model"] == "small"


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_a_prompt_above_the_context_is_too_long(observer: Observer, max_tokens: int | None) -> None:
    final = answer(observer, "x " * 600, max_tokens=max_tokens)

    assert (final["type"], final["code"], final["retryable"]) == ("error", "too_long", False)
    numbers = [int(number) for number in re.findall(r"\d+", final["message"])]
    assert CONTEXT in numbers
    assert max(numbers) > CONTEXT


def test_prompt_and_max_tokens_above_the_context_are_too_long(observer: Observer) -> None:
    prompt_tokens = answer(observer, "x " * 200, max_tokens=1)["usage"]["prompt_tokens"]
    room = CONTEXT - prompt_tokens

    final = answer(observer, "x " * 200, max_tokens=room + 1)

    assert final["code"] == "too_long"
    numbers = {int(number) for number in re.findall(r"\d+", final["message"])}
    assert {CONTEXT, CONTEXT + 1} <= numbers
    fits = answer(observer, "x " * 200, max_tokens=room)
    assert fits["type"] == "result"


def test_a_very_long_text_is_too_long_and_hurts_nobody(box: Box, observer: Observer) -> None:
    assert answer(observer, "lorem ipsum " * 80_000)["code"] == "too_long"
    assert answer(observer, "x" * 1_000_000)["code"] == "too_long"

    assert text(observer)
    assert not box.daemon.log("engine.died")


# Prefixes -----------------------------------------------------------------------------------------


def test_a_prompt_asked_again_is_taken_from_the_cache(observer: Observer) -> None:
    first, again = (answer(observer, "y " * 100, max_tokens=8, client="again") for _ in range(2))

    assert again["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] > 100
    assert again["usage"]["cached_tokens"] > 0.9 * again["usage"]["prompt_tokens"]
    assert again["text"] == first["text"]


def test_a_conversation_that_goes_on_pays_for_the_new_part(observer: Observer) -> None:
    turns = [{"role": "user", "content": "z " * 100}]
    first = answer(observer, messages=turns, max_tokens=8, client="talk")
    turns += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "go on"}]

    second = answer(observer, messages=turns, max_tokens=8, client="talk")

    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert second["usage"]["cached_tokens"] >= 0.9 * first["usage"]["prompt_tokens"]


def test_nothing_is_shared_between_clients(observer: Observer) -> None:
    prompt = "a secret of ours " * 20
    mine = answer(observer, prompt, max_tokens=8, client="mine")

    others = answer(observer, prompt, max_tokens=8, client="others")

    assert others["usage"]["cached_tokens"] == 0
    assert others["text"] == mine["text"]


# JSON ---------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "running": {"type": "boolean"},
        "level": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "green"]},
    },
    "required": ["running", "level", "colour"],
    "additionalProperties": False,
}


def wants(schema: Any) -> dict[str, Any]:
    """Return the field that asks for this schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


@pytest.mark.parametrize("options", [{}, {"seed": 1, "temperature": 1.5}, {"stream": False}])
def test_an_answer_satisfies_its_schema(observer: Observer, options: dict[str, Any]) -> None:
    final = answer(observer, "How is the pump?", **wants(SCHEMA), **options)

    assert final["type"] == "result", final
    assert final["finish_reason"] == "stop"
    assert json.loads(final["text"]) == final["json"]
    value = final["json"]
    assert set(value) == {"running", "level", "colour"}
    assert isinstance(value["running"], bool)
    assert value["level"] in range(100)
    assert value["colour"] in {"red", "green"}


def test_name_and_strict_may_be_given(observer: Observer) -> None:
    wanted = {"name": "pump", "strict": True, "schema": {"enum": [1]}}

    final = answer(observer, response_format={"type": "json_schema", "json_schema": wanted})

    assert (final["json"], final["text"]) == (1, "1")


def test_a_null_is_a_json_value(observer: Observer) -> None:
    final = answer(observer, **wants({"type": "null"}))

    assert "json" in final
    assert final["json"] is None


def test_without_a_schema_there_is_no_json(observer: Observer) -> None:
    final = answer(observer, max_tokens=4, response_format={"type": "text"})

    assert final["type"] == "result"
    assert "json" not in final


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, False])
def test_a_schema_that_cannot_be_satisfied_is_invalid(observer: Observer, schema: Any) -> None:
    final = answer(observer, **wants(schema))

    assert (final["type"], final["code"], final["retryable"]) == ("error", "invalid", False)
    assert text(observer)


def test_an_answer_cut_short_of_its_schema_is_bad_output(observer: Observer) -> None:
    final = answer(observer, **wants(SCHEMA), max_tokens=2)

    assert (final["type"], final["code"], final["retryable"]) == ("error", "bad_output", True)


# Text that would be more --------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>", "</s>"])
def test_control_tokens_in_a_text_are_text(observer: Observer, tag: str) -> None:
    plain = answer(observer, "one two", max_tokens=1)["usage"]["prompt_tokens"]

    tagged = answer(observer, f"one {tag} two", max_tokens=1)["usage"]["prompt_tokens"]

    assert tagged > plain + 1, "one token would be the control token itself"


# What it says of itself ---------------------------------------------------------------------------


def test_info_tells_the_model_and_its_memory(observer: Observer) -> None:
    info = observer.wait_on("info").body

    assert info["capabilities"] == {"text": True, "vision": False, "json_schema": True}
    assert (info["model"], info["provider"]) == ("small", "cpu")
    assert "onnxruntime-genai" in info["versions"]
    memory = info["memory"]
    parts = ("weights", "encoder", "feature_buffer", "sessions")
    assert 0 < sum(memory[part] for part in parts) <= memory["total"] <= memory["limit"]


def test_the_heartbeat_tells_speeds_and_sessions(observer: Observer) -> None:
    for number in range(20):  # as many as count: answers of one token have no speed
        text(observer, f"something new to prefill, number {number}")

    beat = observer.wait_on("health", after=observer.last).body

    assert all(value > 0 for value in beat["speed"].values()), beat["speed"]
    assert beat["engine"]["sessions"] >= 1
    assert beat["engine"]["rss_mb"] > 20
