"""What `edged schema asyncapi` prints is AsyncAPI, is complete, and is what the daemon does."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from edged.asyncapi import document
from edged.errors import Refused
from edged.jobs import Key, Kind
from edged.protocol import CancelRequest, TextRequest, VisionRequest, parse_json, validate
from edged.topics import Topics
from tests.contract.test_refusals import WRONG
from tests.kit.box import serve
from tests.kit.document import Body, Document, validator

SPECIFICATION = json.loads((Path(__file__).parent / "asyncapi-3.0.0.json").read_bytes())
MODELS: dict[str, type[BaseModel]] = {
    "text": TextRequest,
    "vision": VisionRequest,
    "cancel": CancelRequest,
}


# The document -------------------------------------------------------------------------------------


def errors(made: Body) -> list[str]:
    """Return what is wrong with an AsyncAPI document."""
    found = jsonschema.Draft7Validator(SPECIFICATION).iter_errors(made)
    return [f"{error.json_path}: {error.message[:300]}" for error in found]


def test_it_is_valid() -> None:
    assert errors(document()) == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("operations/sendStatus/bindings/mqtt/qos", 3),
        ("operations/sendStatus/action", "publish"),
        ("operations/sendStatus/unknown", 1),
        ("servers/broker/bindings/mqtt/lastWill/qos", "1"),
        ("channels/status/address", 7),
        ("components/messages/chunk/correlationId/location", "x"),
        ("components/schemas/Usage/type", "whatever"),
        ("asyncapi", "2.6.0"),
    ],
)
def test_a_wrong_document_is_not(where: str, value: Any) -> None:
    made = document()
    parent, _, name = where.rpartition("/")
    (_at(made, parent) if parent else made)[name] = value
    assert not jsonschema.Draft7Validator(SPECIFICATION).is_valid(made)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def _at(made: Body, reference: str) -> Any:
    found: Any = made
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def test_every_reference_leads_somewhere() -> None:
    made = document()
    references = set(_references(made))
    assert len(references) > 50
    for reference in references:
        assert isinstance(_at(made, reference), dict), reference


def test_replies_and_correlation_are_where_the_document_says() -> None:
    made = document()
    asked = [each for each in made["operations"].values() if "reply" in each]
    assert len(asked) == 6
    for operation in asked:
        assert _at(made, operation["reply"]["channel"]["$ref"])["address"] is None
        reply = operation["reply"]["address"]["location"]
        for reference in operation["messages"]:
            message = _at(made, _at(made, reference["$ref"])["$ref"])
            for where in (reply, message["correlationId"]["location"]):
                name = where.removeprefix("$message.header#/")
                assert name in message["headers"]["properties"]
                assert name in message["bindings"]["mqtt"]


def test_it_names_the_topics_that_the_daemon_uses() -> None:
    topics = Topics("edged", "box")
    made = document()
    named: dict[str, set[str]] = {"send": set(), "receive": set()}
    for operation in made["operations"].values():
        address = _at(made, operation["channel"]["$ref"])["address"]
        address = address.replace("{base_topic}/{device}", topics.root)
        named[operation["action"]].add(address)
    filters = {re.sub(r"\{\w+\}", "+", address) for address in named["receive"]}
    assert filters == {*topics.requests, topics.camera_frames}
    assert named["send"] == {
        topics.status, topics.info, topics.health, topics.refused,
        topics.camera_status("{camera}"), topics.response(Key(None, "{id}")),
        topics.response(Key("{client}", "{id}")),
    }  # fmt: skip


def test_its_parameters_are_those_of_the_addresses() -> None:
    for channel in document()["channels"].values():
        names = set(re.findall(r"\{(\w+)\}", channel["address"] or ""))
        assert set(channel.get("parameters", {})) == names


def test_every_schema_is_one_and_closed() -> None:
    for name, schema in document()["components"]["schemas"].items():
        jsonschema.Draft7Validator.check_schema(schema)
        if "properties" in schema:
            assert schema["additionalProperties"] is False, name


@pytest.mark.broker
def test_the_daemon_publishes_all_of_it_and_nothing_else(tmp_path: Path) -> None:
    image = base64.b64encode(b"\xff\xd8\xff\xe0 a frame").decode()
    with serve(tmp_path) as box, box.observer() as observer:
        observer.send("camera/door/frame", {"image": image, "ts": 1.7e9}, qos=0)
        observer.send("request/text", {"prompt": ""})
        observer.final(observer.ask("!prefill 3 10 !tokens 20 10", client="desk"))
        observer.final(observer.ask("!fail too_long", reply_to="edged/reply/here"))
        several = observer.ask(
            None, kind="vision", questions=["!say a", "!say b"], frames=[{"image": image}]
        )
        assert len(observer.final(several)["answers"]) == 2
        observer.wait_on("camera/door/status")
        observer.check()

        told = Document(box.daemon.root)
        mine = [each for each in observer.seen if told.is_told(each.topic)]
        assert {told.message(each.topic, each.body) for each in mine} == told.told


# Requests -----------------------------------------------------------------------------------------


def taken(kind: str, body: Body) -> str | None:
    """Return why the daemon would refuse a body, by the code that reads it; None: it would not."""
    try:
        validate(MODELS[kind], parse_json(json.dumps(body).encode()))
    except Refused as refusal:
        return refusal.message
    return None


#: Refused for what no schema can say: the settings, and the order of turns.
UNSAID: list[Body] = [
    {"prompt": "x", "max_tokens": 1_000_000_000},
    {"prompt": "x", "model": "../../etc"},
    {"messages": [{"role": "assistant", "content": "x"}]},
]


@pytest.mark.parametrize(
    "body", [body for body, _ in WRONG], ids=lambda body: json.dumps(body)[:60]
)
def test_what_the_daemon_refuses_the_schema_refuses(body: Body) -> None:
    assert validator("textRequest").is_valid(body) == (body in UNSAID)


IMAGE = {"image": "/9j/4A=="}
PART = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9j/4A=="}}
SAID = [{"role": "user", "content": "x"}]
SEEN = [{"role": "user", "content": [PART, {"type": "text", "text": "x"}]}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {}}}
RIGHT: list[tuple[str, Body]] = [
    ("text", {"prompt": "x"}),
    ("text", {"prompt": "x", "messages": None, "id": None, "reply_to": None, "stop": None}),
    ("text", {"messages": SAID, "system": "s"}),
    ("text", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}),
    (
        "text",
        {
            "v": 1, "id": "a.b:c-d_9", "prompt": "x", "system": "", "max_tokens": 1,
            "temperature": 0, "top_p": 1, "top_k": 1, "seed": 2**63 - 1, "repetition_penalty": 10,
            "stop": ["a", "b"], "response_format": SCHEMA, "stream": False, "priority": 0,
            "deadline_s": 0.1, "model": "m", "reply_to": "anything",
        },
    ),
    ("text", {"prompt": "x", "stop": "a", "response_format": {"type": "text"}}),
    ("text", {"prompt": "x", "response_format": {"type": "text", "json_schema": None}}),
    ("vision", {"prompt": "x", "frames": [IMAGE, {**IMAGE, "ts": 1.5}, {**IMAGE, "ts": None}]}),
    ("vision", {"prompt": "x", "frames": [{**IMAGE, "ts": "2026-01-31T12:00:00Z"}]}),
    ("vision", {"questions": ["a", "b"], "frames": [IMAGE], "detail": "high"}),
    ("vision", {"messages": SEEN}),
    ("vision", {"messages": SAID, "frames": [IMAGE]}),
    ("vision", {"prompt": "x", "frames": {"camera": "door", "last": 2, "span_s": 5}}),
    ("vision", {"prompt": "x", "frames": {"camera": "d", "window": {"min": 1, "max": 2}}}),
    ("vision", {"prompt": "x", "frames": {"camera": "d", "last": None, "max_age_s": 5,
                                         "window": {"min": 1, "max": 2}}}),
    ("cancel", {"id": "x"}),
    ("cancel", {"id": "x", "v": 1, "reply_to": None}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body"), RIGHT, ids=lambda value: json.dumps(value)[:60])
def test_what_the_daemon_takes_the_schema_takes(kind: str, body: Body) -> None:
    assert taken(kind, body) is None
    validator(f"{kind}Request").validate(body)


def test_together_they_have_every_field() -> None:
    named = {name for _, body in RIGHT for name in body}
    assert named == {name for model in MODELS.values() for name in model.model_fields}


#: Any JSON; no whole numbers as 1.0, which are integers to JSON Schema and floats to us.
ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 12)
    | st.sampled_from([-0.5, 0.5, 1.5, 2.0**70])
    | st.text("ax-é/ ", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "role", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
CAMERA = st.fixed_dictionaries(
    {"camera": st.sampled_from(["door", "d o"])},
    optional={
        "last": st.integers(0, 2) | st.none(), "span_s": st.sampled_from([0, 1, 1e9]),
        "max_age_s": st.sampled_from([0, 1, 1e9]),
        "window": st.none()
        | st.fixed_dictionaries({"min": st.integers(0, 2), "max": st.integers(1, 3)}),
    },
)  # fmt: skip
CONTENT = st.sampled_from([
    "x", "", [], [{"type": "text", "text": "x"}], [PART], [PART, {"type": "text", "text": "x"}],
    [{"type": "text", "text": "x", "more": 1}], [{"type": "sound"}],
    [{"type": "image_url", "image_url": {"url": "https://here/a.jpg"}}],
    [{"type": "image_url", "image_url": {"url": "data:image/png;base64,", "detail": "auto"}}],
])  # fmt: skip
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "user", "assistant", "system", "robot"]), "content": CONTENT},
    optional={"name": ANY},
)
NUMBER = st.sampled_from([-1, 0, 0.5, 1, 1.5, 9, 10, 11, 10**6, 2**62, 10**18])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "v": st.sampled_from([1, 1, 1, 2]),
    "id": st.sampled_from(["a", "a.b:c", "", "a b", "x" * 64, "x" * 65, None]),
    "reply_to": st.sampled_from(["edged/reply/a", "", None]),
    "prompt": st.sampled_from(["x", "x", "", None]),
    "messages": st.lists(TURN, max_size=3) | st.none(),
    "questions": st.lists(st.sampled_from(["a", "b", ""]), max_size=17) | st.none(),
    "frames": st.lists(
        st.sampled_from([IMAGE, {**IMAGE, "ts": 1}, {**IMAGE, "ts": "2026-01-31T12:00:00Z"},
                         {**IMAGE, "ts": "then"}, {**IMAGE, "ts": True}, {}, {"image": 1}]),
        max_size=2,
    ) | CAMERA | st.none(),
    "detail": st.sampled_from(["low", "auto", "high", "more", None]),
    "system": st.sampled_from(["s", "", None]),
    "stop": st.sampled_from(["a", "", "x" * 257, [], ["a"], ["a", ""], list("abcde"), None]),
    "response_format": st.sampled_from([
        SCHEMA, {"type": "text"}, {**SCHEMA, "type": "text"}, {"type": "json_schema"}, None,
        {"type": "json_schema", "json_schema": {"schema": True}}, {"type": "json_schema",
        "json_schema": {}}, {"type": "json_schema", "json_schema": None},
    ]),
    "stream": st.booleans(),
    "model": st.sampled_from(["m", None]),
    **dict.fromkeys(
        ("max_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "priority",
         "deadline_s"),
        NUMBER | st.none(),
    ),
    "more": ANY,
}  # fmt: skip


@st.composite
def bodies(draw: st.DrawFn, kind: str) -> Body:
    """Return a body that is nearly a request: its fields are right or at their edges, mostly."""
    model = MODELS[kind]
    need = {"text": ["prompt"], "vision": ["prompt", "frames"], "cancel": ["id"]}[kind]
    rest = [name for name in (*model.model_fields, "more") if name not in need]
    names = {*need, *draw(st.lists(st.sampled_from(rest), max_size=3, unique=True))}
    names -= set(draw(st.lists(st.sampled_from(need), max_size=1)))
    rare = draw(st.integers(0, 9))
    return {
        name: draw(ANY if number == rare else FIELDS[name])
        for number, name in enumerate(sorted(names))
    }


#: What only the code can tell. The schema may take it.
BEYOND = re.compile(
    r'the last of "messages"|there may be one system text|"span_s" goes with|"min" is above'
    r"|frames are either|there are no frames|a frame in a turn|ts: must be Unix seconds"
)


@pytest.mark.parametrize("kind", [*Kind, "cancel"])
@settings(deadline=None)
@given(st.data())
def test_daemon_and_schema_agree_on_any_body(kind: str, data: st.DataObject) -> None:
    body = data.draw(bodies(kind))
    refusal = taken(kind, body)
    fits = validator(f"{kind}Request").is_valid(body)

    if refusal is None:
        assert fits
    elif fits:
        assert all(BEYOND.search(reason) for reason in refusal.split("; ")), refusal
