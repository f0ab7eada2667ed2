"""Strict parsing: what may come in, and that everything else is refused in words that help."""

import hashlib
import json
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import Code, Refused
from edged.jobs import Key
from edged.ports import Answer, Sampling, Timings, Usage
from edged.protocol import (
    MAX_VALUES,
    CancelRequest,
    Run,
    TextRequest,
    digest,
    encode,
    error_event,
    event,
    parse_json,
    refused_event,
    result_event,
    validate,
)


def refusal(payload: bytes | str) -> str:
    with pytest.raises(Refused) as caught:
        parse_json(payload if isinstance(payload, bytes) else payload.encode())
    assert caught.value.code is Code.INVALID
    return caught.value.message


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"a":1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a":"\xff"}', "not UTF-8 (byte 6)"),
        (b'{"a":1,"a":2}', "'a' stands twice"),
        (b'{"a":{"b":1,"b":1}}', "'b' stands twice"),
        (b'{"a":NaN}', "NaN is not JSON"),
        (b'{"a":Infinity}', "Infinity is not JSON"),
        (b'{"a":-Infinity}', "-Infinity is not JSON"),
        (b'{"a":1e999}', "too large"),
        (b'{"a":' + b"9" * 5000 + b"}", "too large for 64 bits"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b'{"\\udc00":1}', "surrogate"),
        (b'{"a":"x\\u0000y"}', "NUL"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "levels deep"),
        (b"[" * 49_000, "levels deep"),
        (b'{"a":' + b"[" * 49_000, "levels deep"),
        (b"[" * 100_000, "values"),
        (b'{"a":[' + b"[]," * (MAX_VALUES + 1) + b"[]]}", "values"),
    ],
)
def test_bad_json_is_refused_with_the_reason(payload: bytes, said: str) -> None:
    assert said in refusal(payload)


def test_ten_megabytes_of_brackets_do_not_hold_the_loop() -> None:
    payload = b'{"a":[' + b"[]," * 3_300_000 + b"[]]}"
    began = time.process_time()
    assert "values" in refusal(payload)
    assert time.process_time() - began < 1.0  # the plain parse takes longer and 500 MB


def test_commas_in_a_long_text_are_no_values() -> None:
    text = '",[{' * 100_000
    assert parse_json(encode({"prompt": text})) == {"prompt": text}


@pytest.mark.parametrize("text", ['\\"', '\\\\"', "\\\\", '\\\\\\",'])
def test_values_are_told_from_texts_whatever_is_escaped(text: str) -> None:
    long = text.replace('\\"', '"').replace("\\\\", "\\") * 50_000 + ",[{" * 10_000
    body = {"a": long, "b": [0] * (MAX_VALUES - 5), long[:9]: long}
    assert parse_json(encode(body)) == body
    body["c"] = [[]] * 6
    assert "values" in refusal(encode(body))


def test_escapes_do_not_hold_the_loop() -> None:
    payload = b'{"prompt":"' + b'\\",' * 2_600_000 + b'"}'

    def least(read: Callable[[bytes], object]) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            read(payload)
            times.append(time.process_time() - began)
        return min(times)

    assert least(parse_json) < 4 * least(json.loads)  # a pattern for texts: six times as long


@given(st.binary(max_size=200))
def test_any_bytes_are_an_object_or_a_refusal(payload: bytes) -> None:
    try:
        parsed = parse_json(payload)
    except Refused as error:
        refused = error
    else:
        assert isinstance(parsed, dict)
        return
    assert refused.code is Code.INVALID
    refused.message.encode()


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
fields = st.sampled_from(["prompt", "id", "stop", "seed", "messages", "x"])


@given(st.dictionaries(fields, json_values))
def test_any_object_is_a_request_or_a_refusal(body: dict[str, object]) -> None:
    try:
        request = validate(TextRequest, parse_json(json.dumps(body).encode()))
    except Refused as error:
        refused = error
    else:
        assert request.conversation()[-1]["role"] == "user"
        return
    assert refused.code is Code.INVALID
    assert "Traceback" not in refused.message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": ""}, "id: must be 1 to 64 characters"),
        ({"id": "a/b"}, "id: must be"),
        ({"id": "a\n"}, "id: must be"),
        ({"id": "x" * 65}, "id: must be"),
        ({"id": 7}, "id: "),
        ({"v": 2}, "v: "),
        ({"v": True}, "v: "),
        ({"prompt": ""}, "prompt: "),
        ({"prompt": 5}, "prompt: "),
        ({"prompt": None}, "exactly one"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user", "content": "x"}]}, "exactly one"),
        ({"promt": "x"}, "unknown field 'promt', did you mean prompt?"),
        ({"frames": []}, "unknown field 'frames'"),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": True}, "max_tokens: "),
        ({"max_tokens": 5.0}, "max_tokens: "),
        ({"max_tokens": "5"}, "max_tokens: "),
        ({"temperature": -1}, "temperature: "),
        ({"temperature": True}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"top_p": 1.5}, "top_p: "),
        ({"top_k": 0}, "top_k: "),
        ({"seed": -1}, "seed: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"stop": ""}, "stop: "),
        ({"stop": []}, "stop: "),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: "),
        ({"stream": 1}, "stream: "),
        ({"priority": 10}, "priority: "),
        ({"priority": -1}, "priority: "),
        ({"deadline_s": 0}, "deadline_s: "),
        ({"deadline_s": "soon"}, "deadline_s: "),
        ({"reply_to": 5}, "reply_to: "),
        ({"response_format": {"type": "json_schema"}}, "response_format: "),
        ({"response_format": {"type": "json_object"}}, "response_format.type: "),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "schema: "),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(Refused) as caught:
        validate(TextRequest, {"prompt": "hello"} | change)
    assert caught.value.code is Code.INVALID
    assert said in caught.value.message
    assert "input_value" not in caught.value.message


def test_a_refusal_never_repeats_a_value() -> None:
    with pytest.raises(Refused) as caught:
        validate(TextRequest, {"prompt": ["my secret"], "priority": "my secret"})
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "hi"}],
        [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}],
        [{"role": "user", "content": ""}],
        [{"role": "robot", "content": "hi"}],
        [{"role": "user", "content": "hi", "name": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_messages_that_are_no_conversation_are_refused(messages: list[object]) -> None:
    with pytest.raises(Refused):
        validate(TextRequest, {"messages": messages})


def test_an_image_on_the_text_topic_names_the_other_topic() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(Refused, match="request/vision"):
        validate(TextRequest, {"messages": [{"role": "user", "content": [part]}]})


def test_system_and_prompt_become_a_conversation() -> None:
    request = validate(TextRequest, {"system": "be short", "prompt": "hi"})
    assert request.conversation() == (
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "hi"},
    )


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = validate(TextRequest, {"messages": [{"role": "user", "content": parts}]})
    assert request.conversation() == ({"role": "user", "content": "ab"},)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, Sampling()),
        ({"repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
        ({"temperature": 0, "seed": 3, "top_p": 0.5}, Sampling()),
        ({"temperature": 0.7}, Sampling(temperature=0.7)),
        ({"seed": 3}, Sampling(temperature=1.0, seed=3)),
        ({"top_k": 4, "top_p": 0.9}, Sampling(temperature=1.0, top_k=4, top_p=0.9)),
    ],
)
def test_greedy_unless_chance_is_asked_for(fields: dict[str, object], sampling: Sampling) -> None:
    assert validate(TextRequest, {"prompt": "x"} | fields).sampling() == sampling


def test_the_digest_ignores_order_and_reply_to_only() -> None:
    body = {"prompt": "x", "seed": 1}
    same = digest("text", {"seed": 1, "prompt": "x", "reply_to": "edged/reply/a"})
    assert digest("text", body) == same
    assert digest("vision", body) != same
    assert digest("text", body | {"seed": 2}) != same


def test_cancel_needs_an_id_and_nothing_else() -> None:
    assert validate(CancelRequest, {"id": "a", "v": 1}).id == "a"
    for body in ({}, {"id": "a", "prompt": "x"}, {"id": None}):
        with pytest.raises(Refused):
            validate(CancelRequest, body)


def test_events_carry_the_envelope_and_leave_out_what_is_absent() -> None:
    assert json.loads(event(Key(None, "a"), "started", attempt=1, eta_s=None)) == {
        "v": 1, "id": "a", "type": "started", "attempt": 1,
    }  # fmt: skip
    named = json.loads(error_event(Key("pump", "a"), Code.DEAD, "m"))
    assert named == {
        "v": 1, "id": "a", "type": "error", "client": "pump", "code": "dead", "message": "m",
        "retryable": False,
    }  # fmt: skip
    told = refused_event("text", None, None, Refused(Code.QUEUE_FULL, "m", retry_after_s=3.0))
    assert json.loads(told) == {
        "v": 1, "type": "refused", "request": "text", "code": "queue_full", "message": "m",
        "retryable": True, "retry_after_s": 3.0,
    }  # fmt: skip


def test_a_result_says_what_it_took_and_its_hash() -> None:
    answer = Answer(
        text='{"a":"é"}', finish_reason="stop", json={"a": "é"}, has_json=True,
        usage=Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=3),
    )  # fmt: skip
    run = Run(attempt=2, queue_ms=12.3, model="phi")
    body = json.loads(result_event(Key(None, "a"), [answer], Timings(ttft_ms=1.5), run))
    assert body["json"] == {"a": "é"}
    assert body["sha256"] == hashlib.sha256(answer.text.encode()).hexdigest()
    assert body["usage"] == {
        "prompt_tokens": 9, "image_tokens": 0, "cached_tokens": 4, "completion_tokens": 3,
    }  # fmt: skip
    assert body["timings"]["queue_ms"] == 12.3
    assert body["timings"]["ttft_ms"] == 1.5
    assert body["attempt"] == 2
