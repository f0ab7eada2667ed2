"""What is not taken: refused by name and code, at once, to the right address; on both protocols."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.box import Box, Protocol, serve
from tests.kit.observer import Body, Name, Observer, Seen

pytestmark = pytest.mark.broker

#: Bytes of limits.payload_mb, and the packet limit that follows from it.
PAYLOAD = 200_000
PACKET = 200_000 * 5 // 4 + 65536


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    protocol: Protocol = request.param
    with serve(
        tmp_path_factory.mktemp("refusals"),
        protocol=protocol,
        settings={"limits": {"payload_mb": PAYLOAD / 1e6}},
    ) as box:
        yield box


@pytest.fixture
def busy(box: Box, observer: Observer) -> Iterator[None]:
    """The engine works on something all the while."""
    name = observer.ask("!deaf 2 100 !tokens 600 20")
    observer.event(name, "started")
    yield
    observer.cancel(name)


def refused(observer: Observer, payload: bytes | Body, topic: str = "request/text") -> Seen:
    """Publish this and return the refusal."""
    count = len(observer.events(None, "refused"))
    observer.send(topic, payload)
    return observer.event(None, "refused", count=count + 1)


def took_s(observer: Observer, refusal: Seen) -> float:
    """Return the seconds from the newest request to this refusal, both as the observer got them."""
    return refusal.at - observer.requests()[-1].seen.at


# JSON ---------------------------------------------------------------------------------------------

NOT_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n",
    "text": b"hello",
    "half": b'{"prompt":"x"',
    "two": b'{"prompt":"x"}{"prompt":"x"}',
    "trailing comma": b'{"prompt":"x",}',
    "comment": b'{"prompt":"x"} // why',
    "single quotes": b"{'prompt':'x'}",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 30_000,
    "deep and closed": b'{"prompt":"x","stop":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "just too deep": b'{"prompt":"x","stop":' + b"[" * 40 + b"]" * 40 + b"}",
    "many values": b'{"prompt":"x","stop":[' + b"[]," * 60_000 + b"[]]}",
    "many numbers": b'{"prompt":"x","stop":[' + b"1," * 90_000 + b"1]}",
    "many keys": json.dumps({f"k{n}": 0 for n in range(15_000)}).encode(),
    "a duplicate after many": b"{"
    + b",".join(b'"k%d":0' % min(n, 8998) for n in range(9000))
    + b"}",
    "escaped quotes without an end": b'{"prompt":"' + b'\\"' * 60_000,
    "quotes": b'"' * 100_001,
    "array": b'["prompt"]',
    "string": b'"prompt"',
    "number": b"7",
    "null": b"null",
    "true": b"true",
    "NaN": b'{"prompt":"x","temperature":NaN}',
    "Infinity": b'{"prompt":"x","deadline_s":Infinity}',
    "minus Infinity": b'{"prompt":"x","deadline_s":-Infinity}',
    "1e999": b'{"prompt":"x","deadline_s":1e999}',
    "5000 digits": b'{"prompt":"x","seed":' + b"9" * 5000 + b"}",
    "2**64": b'{"prompt":"x","seed":18446744073709551616}',
    "duplicate key": b'{"prompt":"x","prompt":"y"}',
    "duplicate key below": b'{"messages":[{"role":"user","role":"system","content":"x"}]}',
    "lone surrogate": b'{"prompt":"\\ud800"}',
    "lone surrogate in a key": b'{"prompt":"x","\\udfff":1}',
    "NUL": b'{"prompt":"a\\u0000b"}',
    "NUL in a key": b'{"prompt":"x","\\u0000":1}',
    "raw control character": b'{"prompt":"a\nb"}',
    "UTF-16": '{"prompt":"x"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"prompt":"x"}'.encode("utf-16-le"),
    "byte order mark": b'\xef\xbb\xbf{"prompt":"x"}',
    "Latin-1": '{"prompt":"ü"}'.encode("latin-1"),
    "overlong UTF-8": b'{"prompt":"\xc0\xaf"}',
    "surrogate in UTF-8": b'{"prompt":"\xed\xa0\x80"}',
    "an image": b"\xff\xd8\xff\xe0" + bytes(1000),
}

#: JSON, and wrong in very many ways.
MANY_FAULTS: dict[str, bytes] = {
    "many wrong keys": json.dumps({f"k{n}": 0 for n in range(9000)}).encode(),
    "many wrong messages": json.dumps({"messages": [{"role": 7}] * 4000}).encode(),
    "many wrong parts": json.dumps(
        {"messages": [{"role": "user", "content": [1] * 9000}]}
    ).encode(),
}


@pytest.mark.parametrize("topic", ["request/text", "request/vision", "request/cancel"])
def test_what_is_no_json_is_refused(observer: Observer, topic: str) -> None:
    for what, payload in NOT_JSON.items():
        refusal = refused(observer, payload, topic)
        assert refusal.body["code"] == "invalid", what
        assert refusal.body["request"] == topic.removeprefix("request/"), what
        assert refusal.topic == "edged/box/refused", what
        assert "id" not in refusal.body, what
        assert len(refusal.payload) < 1000, what
        for word in (b"Traceback", b"pydantic", b'.py"', b"Error:"):
            assert word not in refusal.payload, what


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("what", NOT_JSON | MANY_FAULTS)
def test_a_refusal_takes_milliseconds_while_the_engine_works(observer: Observer, what: str) -> None:
    payload = (NOT_JSON | MANY_FAULTS)[what]
    tries: list[float] = []
    while not tries or (tries[-1] >= 0.05 and len(tries) < 16):  # a loaded machine is no slow edged
        tries.append(took_s(observer, refused(observer, payload)))

    assert min(tries) < 0.05


# Fields -------------------------------------------------------------------------------------------

SCHEMA: Body = {"json_schema": {"schema": {}}}
WRONG: list[tuple[Body, str]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ["x"]}, "prompt"),
    ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "name"),
    ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"prompt": "x", "v": 2}, "v"),
    ({"prompt": "x", "v": "1"}, "v"),
    ({"prompt": "x", "v": True}, "v"),
    ({"prompt": "x", "system": 1}, "system"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "9"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 1_000_000_000}, "max_tokens"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, "top_p"),
    ({"prompt": "x", "top_k": 0}, "top_k"),
    ({"prompt": "x", "top_k": 2.5}, "top_k"),
    ({"prompt": "x", "seed": -1}, "seed"),
    ({"prompt": "x", "seed": 1.5}, "seed"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "stop": []}, "stop"),
    ({"prompt": "x", "stop": list("abcde")}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop"),
    ({"prompt": "x", "response_format": "json"}, "response_format"),
    ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format"),
    ({"prompt": "x", "response_format": {"type": "json_schema"}}, "json_schema"),
    ({"prompt": "x", "response_format": {"type": "text", **SCHEMA}}, "json_schema"),
    ({"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {}}}, "schema"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream": 1}, "stream"),
    ({"prompt": "x", "priority": 10}, "priority"),
    ({"prompt": "x", "priority": -1}, "priority"),
    ({"prompt": "x", "priority": True}, "priority"),
    ({"prompt": "x", "deadline_s": 0}, "deadline_s"),
    ({"prompt": "x", "deadline_s": -5}, "deadline_s"),
    ({"prompt": "x", "deadline_s": "soon"}, "deadline_s"),
    ({"prompt": "x", "model": 1}, "model"),
    ({"prompt": "x", "model": "../../etc"}, "model"),
    ({"prompt": "x", "reply_to": 1}, "reply_to"),
    ({"prompt": "x", "reply_to": ["edged/reply/a"]}, "reply_to"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), WRONG, ids=lambda value: json.dumps(value)[:60])
def test_a_wrong_field_is_named(observer: Observer, body: Body, field: str) -> None:
    refusal = refused(observer, {"id": "wrong", **body})

    assert refusal.body["code"] == "invalid"
    assert refusal.body["retryable"] is False
    assert field in refusal.body["message"]
    assert refusal.body["id"] == "wrong"
    assert refusal.topic == "edged/box/response/wrong"


@pytest.mark.parametrize(
    "name", ["max_token", "Prompt", "questions", "frames", "detail", "tools", "ü\n"]
)
def test_an_unknown_field_is_refused_by_name(observer: Observer, name: str) -> None:
    refusal = refused(observer, {"id": "unknown", "prompt": "x", name: 1}).body

    assert refusal["code"] == "invalid"
    assert ascii(name).strip("'") in refusal["message"]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\nb", "ä", "x" * 65, "+", "#", 7, ["x"]])
def test_a_malformed_id_is_refused_and_never_repeated(observer: Observer, name: Any) -> None:
    refusal = refused(observer, {"id": name, "prompt": "x"})

    assert refusal.body["code"] == "invalid"
    assert refusal.body["message"].startswith("id")
    assert "id" not in refusal.body
    assert refusal.topic == "edged/box/refused"


@pytest.mark.parametrize("name", ["a b", "ä", "x" * 65, "a.b", "$SYS", ""])
def test_a_client_of_another_shape_is_refused(observer: Observer, name: str) -> None:
    refusal = refused(observer, {"id": "one", "prompt": "x"}, f"request/text/{name}")

    assert refusal.body["code"] == "invalid"
    assert "client" in refusal.body["message"]
    assert "client" not in refusal.body
    assert refusal.topic == "edged/box/refused"


def test_a_refusal_names_the_client_and_goes_to_its_topic(observer: Observer) -> None:
    refusal = refused(observer, {"id": "one", "prompt": ""}, "request/text/desk")

    assert refusal.body["client"] == "desk"
    assert refusal.topic == "edged/box/response/desk/one"


def test_a_refusal_without_an_id_still_names_the_client(observer: Observer) -> None:
    refusal = refused(observer, {"prompt": ""}, "request/text/desk")

    assert refusal.body["client"] == "desk"
    assert refusal.topic == "edged/box/refused"


def test_a_refusal_goes_where_the_request_asked(observer: Observer) -> None:
    body = {"id": "one", "prompt": "", "reply_to": "edged/reply/here"}

    assert refused(observer, body).topic == "edged/reply/here"
    assert refused(observer, body, "request/text/desk").topic == "edged/reply/here"


def test_a_refused_request_leaves_its_id_free(observer: Observer) -> None:
    name = Name(None, "again")
    refused(observer, {"id": "again", "prompt": ""})

    observer.ask("!say x", id="again")

    assert observer.final(name)["text"] == "x"


# Vision -------------------------------------------------------------------------------------------


def test_images_on_request_text_are_refused_naming_the_other_topic(observer: Observer) -> None:
    url = "data:image/png;base64,iVBORw0KGgo="
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]

    refusal = refused(observer, {"id": "i", "messages": [{"role": "user", "content": content}]})

    assert refusal.body["code"] in {"invalid", "unsupported"}
    assert "request/vision" in refusal.body["message"]


# Reply topics -------------------------------------------------------------------------------------

FORBIDDEN = {
    "wildcard": "#",
    "wildcard below": "edged/reply/#",
    "single wildcard": "edged/reply/+/b",
    "wildcard inside a level": "edged/reply/a+b",
    "empty": "",
    "system": "$SYS/x",
    "shared": "$share/g/edged/reply/a",
    "control character": "edged/reply/a\x01b",
    "delete": "edged/reply/a\x7fb",
    "C1": "edged/reply/a\x85b",
    "new line": "edged/reply/a\nb",
    "U+FFFF": "edged/reply/a\uffffb",
    "U+FFFE": "edged/reply/a\ufffeb",
    "U+FDD0": "edged/reply/a\ufdd0b",
    "U+1FFFF": "edged/reply/a\U0001ffffb",
    "300 levels": "edged/reply" + "/x" * 298,
    "17 levels": "edged/reply" + "/x" * 15,
    "257 bytes": "edged/reply/" + "x" * 245,
    "257 bytes of UTF-8": "edged/reply/" + "ü" * 123,
    "70 kB": "edged/reply/" + "x" * 70_000,
    "the prefix alone": "edged/reply/",
    "the prefix without its end": "edged/reply",
    "another prefix": "home/lights/set",
    "like the prefix": "edged/replyx/a",
    "own request": "edged/box/request/text",
    "own request of a client": "edged/box/request/cancel/desk",
    "own response": "edged/box/response/other-id",
    "own status": "edged/box/status",
    "own info": "edged/box/info",
    "own health": "edged/box/health",
    "own refused": "edged/box/refused",
    "own camera": "edged/box/camera/door/frame",
    "another device's request": "edged/other/request/text",
    "another device's status": "edged/other/status",
    "another device's camera": "edged/other/camera/door/frame",
    "up and down": "edged/reply/../box/status/\x00",
}


@pytest.mark.parametrize("what", [what for what in FORBIDDEN if "\0" not in FORBIDDEN[what]])
def test_a_forbidden_reply_topic_is_refused_on_the_default_one(
    observer: Observer, what: str
) -> None:
    body = {"id": "bad", "prompt": "!say x", "reply_to": FORBIDDEN[what]}

    refusal = refused(observer, body, "request/text/desk")

    assert (refusal.body["code"], refusal.body["retryable"]) == ("forbidden_reply", False)
    assert "edged/reply/" in refusal.body["message"]
    assert refusal.topic == "edged/box/response/desk/bad"
    assert observer.final(observer.ask("!say next"))["text"] == "next"


@pytest.mark.parametrize("topic", ["edged/reply/a\x00b", "edged/reply/\ud800"])
def test_a_reply_topic_that_is_no_text_at_all_is_invalid(observer: Observer, topic: str) -> None:
    refusal = refused(observer, {"id": "bad", "prompt": "!say x", "reply_to": topic})

    assert refusal.body["code"] in {"invalid", "forbidden_reply"}
    assert observer.final(observer.ask("!say next"))["text"] == "next"


def test_a_forbidden_reply_topic_of_a_cancel(observer: Observer) -> None:
    refusal = refused(observer, {"id": "bad", "reply_to": "edged/box/status"}, "request/cancel")

    assert refusal.body["code"] == "forbidden_reply"
    assert refusal.topic == "edged/box/response/bad"


def test_the_link_holds_through_all_of_it(box: Box, observer: Observer) -> None:
    for topic in FORBIDDEN.values():
        observer.send("request/text", {"id": "bad", "prompt": "!say x", "reply_to": topic})
    observer.final(observer.ask("!say last"))

    assert not box.daemon.log("mqtt.disconnected")


# Sizes --------------------------------------------------------------------------------------------


def _request(size: int) -> bytes:
    body = json.dumps({"id": "big", "prompt": ""})
    return body.replace('""', '"' + "x" * (size - len(body)) + '"').encode()


def test_a_request_at_the_limit_is_taken(observer: Observer) -> None:
    payload = _request(PAYLOAD)
    assert len(payload) == PAYLOAD

    observer.send("request/text", payload)

    assert observer.final(Name(None, "big"))["text"] == json.loads(payload)["prompt"]


@pytest.mark.parametrize("size", [PAYLOAD + 1, PACKET - 1000])
def test_between_the_limits_a_request_is_too_large(observer: Observer, size: int) -> None:
    refusal = refused(observer, _request(size))

    assert (refusal.body["code"], refusal.body["retryable"]) == ("too_large", False)
    assert str(size) in refusal.body["message"]
    assert str(PAYLOAD) in refusal.body["message"]
    assert "id" not in refusal.body, "it was not read"
    assert refusal.topic == "edged/box/refused"
