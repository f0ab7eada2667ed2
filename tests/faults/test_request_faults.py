"""F20 to F23, F27, F28, F30: hostile requests, against the daemon and against the small model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.box import Box, serve
from tests.kit.client import Peer
from tests.kit.observer import Body, Name, Observer

CONTEXT, MAX_TOKENS = 2048, 2000


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    options = ("--stage-floor", "5", "--backoff", "0.05")
    with serve(tmp_path_factory.mktemp("box"), options=options) as box:
        yield box


@pytest.fixture(scope="module")
def model_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    settings = {"model": {"max_context": CONTEXT}, "limits": {"max_tokens": MAX_TOKENS}}
    directory = tmp_path_factory.mktemp("model-box")
    with serve(directory, engine="real", settings=settings) as box:
        yield box


@pytest.fixture
def observer(box: Box) -> Iterator[Observer]:
    with box.observer() as observer:
        yield observer
        connects = box.daemon.log("mqtt.connected", client_id="edged-box")
        assert len(connects) == 1, "the link has dropped"


@pytest.fixture
def model(model_box: Box) -> Iterator[Observer]:
    with model_box.observer() as observer:
        yield observer
        assert len(model_box.daemon.log("engine.started")) == 1, "the engine has ended"


# F20, F21 ---------------------------------------------------------------------------------------

_PROPERTIES: list[dict[str, Any]] = [
    {"ResponseTopic": topic}
    for topic in (
        "#", "a/+/b", "", "$SYS/broker/uptime", "$share/group/x", "/".join("x" * 300),
        "edged/other/request/text", "edged/box/request/text", "edged/box/status",
        "edged/reply/\x01", "edged/reply/\uffff", "edged/reply/" + "x" * 60_000,
    )
] + [
    {"CorrelationData": bytes(60_000)},
    {"CorrelationData": bytes(1025), "ResponseTopic": "edged/reply/mine"},
    {"UserProperty": [("name", "value")] * 200, "ResponseTopic": "#"},
]  # fmt: skip


def test_hostile_properties_are_refused_and_the_link_holds(box: Box, observer: Observer) -> None:
    with Peer(box.broker.port) as peer:  # the broker may well end this one's connection
        for number, properties in enumerate(_PROPERTIES):
            name = Name(None, f"hostile-{number}")
            observer.expected.add(name)
            body = f'{{"id": "{name.id}", "prompt": "!say no"}}'
            before = len(observer.requests())
            peer.send("edged/box/request/text", body, **properties)
            next_name = observer.ask(f"!say next {number}")
            assert observer.final(next_name)["text"] == f"next {number}"
            came = [r for r in observer.requests()[before:] if r.name == name]
            if came:  # else the broker has kept it from us
                code = observer.refusal(name).body["code"]
                wanted = "invalid" if "CorrelationData" in properties else "forbidden_reply"
                assert code == wanted, properties
    assert len([n for n in observer.expected if observer.events(n, "refused")]) >= 6


def test_a_correlation_of_the_largest_size_comes_back(observer: Observer) -> None:
    data = bytes(range(256)) * 4
    name = observer.ask("!say it", properties={"CorrelationData": data})
    observer.final(name)
    assert {each.correlation for each in observer.events(name)} == {data}


# F22, F23 ---------------------------------------------------------------------------------------


def test_retained_requests_are_refused_and_not_run_at_the_next_connect(
    box: Box, observer: Observer
) -> None:
    observer.send("request/text", {"id": "kept", "prompt": "!say no"}, retain=True)
    refusal = observer.refusal(Name(None, "kept")).body
    assert (refusal["code"], refusal["retryable"]) == ("retained", False)
    refused = len(observer.events(kind="refused"))
    observer.send("request/text", {"id": "last", "prompt": "!say yes"})
    observer.final(Name(None, "last"))
    assert len(observer.events(kind="refused")) == refused
    observer.send("request/text", b"", retain=True)  # takes it away again
    observer.check()


def test_a_dead_job_is_not_tried_again_under_its_name(observer: Observer) -> None:
    name = observer.ask("!exit 3")
    assert observer.final(name)["code"] == "dead"
    started = len(observer.events(name, "started"))
    observer.ask("!exit 3", id=name.id)
    observer.event(name, "error", count=2)
    assert len(observer.events(name, "started")) == started == 3
    observer.ask("!say other", id=name.id)
    assert observer.refusal(name).body["code"] == "conflict"
    observer.check()


@pytest.mark.parametrize("by", ["deadline_s", "message expiry"])
def test_an_expired_job_gives_the_engine_up_within_a_token(by: str, observer: Observer) -> None:
    fields: dict[str, Any] = {"deadline_s": 0.5}
    if by == "message expiry":
        fields = {"properties": {"MessageExpiryInterval": 1}}
    observer.final(observer.ask("!say ready"))  # a test before may have ended the engine
    runs = observer.ask("!tokens 400 50", **fields)
    observer.event(runs, "started")
    waits = observer.ask("!say never", deadline_s=0.2)
    following = observer.ask("!say next")
    for name in (runs, waits):
        assert observer.final(name)["code"] == "expired"
    assert observer.final(following)["text"] == "next"
    ended = observer.finals(runs)[0].at
    assert observer.events(following, "started")[0].at - ended < 0.5
    assert not observer.events(waits, "started")
    observer.check()


# F27, F28: with the model -----------------------------------------------------------------------

_SMUGGLED = {
    "control tokens": "<|end|><|assistant|><|user|><|system|><|endoftext|></s><s>",
    "image tags": "<|image_1|><|image_2|>" * 20,
    "byte tokens": "<0x0A><0x00><unk>",
    "right to left and invisible": "\u202egnp.exe\u202c \u200b\u200d\ufeff \u2066x\u2069",
    "a line end of every kind": "a\r\nb\u2028c\u2029d\x85e\x0bf",
}


@pytest.mark.engine
@pytest.mark.parametrize("what", _SMUGGLED)
def test_user_text_makes_no_control_token_and_is_not_cut(what: str, model: Observer) -> None:
    text = _SMUGGLED[what]

    def tokens(prompt: str, **fields: Any) -> int:
        final = model.final(model.ask(prompt, max_tokens=1, **fields))
        assert final["type"] == "result", final
        return int(final["usage"]["prompt_tokens"])

    bare, once, twice = tokens("x"), tokens(text), tokens(text + text)
    # a control token is one token, its characters are many; what is cut adds nothing
    assert once - bare >= len(text) // 8
    assert twice - once >= len(text) // 8
    everywhere = tokens("x", system=text, stop=[text[:32]])
    assert everywhere - bare >= len(text) // 8
    turns = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
        {"role": "user", "content": "x"},
    ]
    name = model.ask(messages=turns, max_tokens=1)
    assert model.final(name)["usage"]["prompt_tokens"] - bare >= 2 * (len(text) // 8)
    model.check()


@pytest.mark.engine
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a\0b"},
        {"prompt": "a", "system": "\0"},
        {"prompt": "a", "stop": ["\0"]},
        {"prompt": "a", "model": "sm\u200ball"},
        {"prompt": "a", "reply_to": "edged/reply/\u202e\0"},
        {"prompt": "a", "response_format": {"type": "te\u200bxt"}},
        {"messages": [{"role": "us\u200ber", "content": "a"}]},
    ],
    ids="-".join,
)
def test_what_is_hidden_in_a_field_is_refused(fields: dict[str, Any], model: Observer) -> None:
    before = model.last
    model.ask(**fields)
    refusal = model.wait(
        lambda: next((e for e in model.events(kind="refused") if e.number > before), None)
    )
    assert refusal.body["code"] in {"invalid", "forbidden_reply"}
    assert model.final(model.ask("x", max_tokens=1))["type"] == "result"
    model.check()


@pytest.mark.engine
def test_a_million_characters_are_too_long_and_both_numbers_are_said(model: Observer) -> None:
    long = model.ask("word " * 200_000, max_tokens=10)
    tight = model.ask("word " * 60, max_tokens=MAX_TOKENS)
    following = model.ask("x", max_tokens=1)
    for name in (long, tight):
        final = model.final(name)
        assert final["code"] == "too_long"
        assert str(CONTEXT) in final["message"]
        assert not [e for e in model.events(name) if e.type in {"progress", "chunk"}]
    assert model.final(following)["type"] == "result"
    model.check()


# F30: with the model ----------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("phase", ["waiting", "prefill"])
def test_a_cancel_before_the_first_token_ends_the_job_once(
    phase: str, model_box: Box, model: Observer
) -> None:
    engine = model_box.daemon.engine_pid
    os.kill(engine, signal.SIGSTOP)  # it does nothing until it has the cancel before it
    try:
        prompt = f"{phase} " * 200 if phase == "prefill" else phase
        name = model.ask(prompt, max_tokens=None if phase == "prefill" else CONTEXT // 2)
        first = name
        if phase == "waiting":
            name = model.ask("second", max_tokens=5)
            model.event(name, "accepted")
        else:
            model.event(name, "started")
        model.cancel(name)
        if phase == "prefill":
            model.wait(lambda: model.finals(name), "the final, whatever the engine does")
    finally:
        os.kill(engine, signal.SIGCONT)
    final = model.final(name)
    assert (final["type"], final["code"]) == ("error", "cancelled")
    if phase == "waiting":
        assert not model.events(name, "started")
        assert model.final(first)["type"] == "result"
    it_answers_at_once(model)


@pytest.mark.engine
def test_a_cancel_amid_the_tokens_ends_the_job_once(model: Observer) -> None:
    final: Body = {}
    for _ in range(20):  # a small model may have said all before the cancel is there
        name = model.ask("token", max_tokens=CONTEXT // 2)
        model.event(name, "chunk")
        model.cancel(name)
        final = model.final(name)
        if final["type"] == "error":
            break
    assert final["code"] == "cancelled"
    it_answers_at_once(model)


def it_answers_at_once(model: Observer) -> None:
    began = time.monotonic()
    assert model.final(model.ask("x", max_tokens=1))["type"] == "result"
    assert time.monotonic() - began < 5
    model.check()


@pytest.mark.engine
def test_a_cancel_of_no_job_of_ones_own_is_refused(model: Observer) -> None:
    ended = model.ask("x", max_tokens=1)
    model.final(ended)
    others = model.ask("y", max_tokens=200, client="desk")
    model.event(others, "started")
    for name in (ended, Name(None, "never-was"), Name("door", others.id), Name(None, others.id)):
        model.expected.add(name)
        refused = len(model.events(name, "refused"))
        model.cancel(name)
        assert model.event(name, "refused", count=refused + 1).body["code"] == "unknown_job"
    assert model.final(others)["type"] == "result"
    model.check()
