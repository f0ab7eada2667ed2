from __future__ import annotations

import socket
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.engine import messages
from edged.engine.wire import MAGIC, BadMessage, Packet, Pipe, Unpacker, pack
from edged.ports import Answer, EngineInfo, Sampling, Task, Timings, Usage

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.dictionaries(st.text(), JSON), st.binary(max_size=40)), max_size=4),
    st.integers(1, 17),
)
def test_messages_survive_any_cutting_of_the_stream(
    sent: list[tuple[dict[str, Any], bytes]], size: int
) -> None:
    stream = b"".join(pack(header, body) for header, body in sent)
    unpacker = Unpacker()
    got = []
    for at in range(0, len(stream), size):
        unpacker.feed(stream[at : at + size])
        got += [(packet.parse(), packet.body) for packet in unpacker]
    assert got == sent
    assert unpacker.waiting == 0


@settings(deadline=None)
@given(st.binary(min_size=12, max_size=200))
def test_stray_bytes_are_seen_at_once(stray: bytes) -> None:
    if stray.startswith(MAGIC):
        stray = b"x" + stray
    unpacker = Unpacker()
    unpacker.feed(stray)
    with pytest.raises(BadMessage):
        list(unpacker)


@pytest.mark.parametrize(("header", "body"), [(11, 0), (0, 11), (1 << 31, 0)])
def test_an_impossible_length_is_refused_before_anything_is_kept(header: int, body: int) -> None:
    unpacker = Unpacker(max_header=10, max_body=10)
    unpacker.feed(MAGIC + header.to_bytes(4) + body.to_bytes(4))
    with pytest.raises(BadMessage, match="impossible length"):
        list(unpacker)


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"1", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_a_header_that_is_no_object_is_refused(header: bytes) -> None:
    with pytest.raises(BadMessage):
        Packet(header).parse()


def test_numbers_that_json_does_not_have_are_not_sent() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack({"x": float("inf")})


def test_a_pipe_polls_without_waiting_and_sees_the_end() -> None:
    ours, theirs = socket.socketpair()
    pipe = Pipe(theirs)
    assert pipe.poll() is None
    ours.sendall(pack({"t": "a"}) + pack({"t": "b"}))
    assert pipe.receive().parse() == {"t": "a"}
    assert pipe.poll() == Packet(b'{"t":"b"}')
    ours.close()
    with pytest.raises(EOFError):
        pipe.receive()
    with pytest.raises(EOFError):
        pipe.poll()
    pipe.close()


ANSWER = Answer(text="é", finish_reason="stop", usage=Usage(), json={"a": [1]}, has_json=True)
INFO = EngineInfo(
    model="m",
    provider="cpu",
    threads=2,
    max_context=256,
    vision=False,
    json_schema=True,
    memory={"total": 1.5},
    versions={"x": "1"},
)


@pytest.mark.parametrize(
    "message",
    [
        messages.Loaded(info=INFO),
        messages.LoadFailed(message="m", hint="h"),
        messages.Begin(job=1, stage="prefill", work=64, done=3, total=100),
        messages.Step(job=1, stage="token", work=1, took=0.1, next=1, done=2, total=3, text="x"),
        messages.Done(job=1, answers=(ANSWER,), timings=Timings(ttft_ms=2.0)),
        messages.Failed(job=1, code="too_long", message="m"),
        messages.Stopped(job=1),
        messages.Pong(n=7),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_an_engine_says_is_read_as_it_was_said(message: messages.FromEngine) -> None:
    unpacker = Unpacker()
    unpacker.feed(pack(asdict(message)))
    assert [messages.read(packet) for packet in unpacker] == [message]


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"nonsense",
        b'{"t":"quit"}',
        b'{"t":"pong","n":"1"}',
        b'{"t":"pong","n":true}',
        b'{"t":"pong","n":1,"extra":1}',
        b'{"t":"step","job":1,"stage":"token","work":1,"took":NaN,"next":1,"done":1,"total":1}',
        b'{"t":"begin","job":1,"stage":"dance","work":1}',
        b'{"t":"failed","job":1,"code":"no_such_code","message":""}',
        b'{"t":"done","job":1,"answers":[{"text":"a"}],"timings":{}}',
    ],
)
def test_what_no_engine_of_ours_says_is_refused(header: bytes) -> None:
    with pytest.raises(BadMessage):
        messages.read(Packet(header))


def test_a_task_and_an_order_arrive_as_they_were_given() -> None:
    task = Task(
        job=3,
        client="c",
        messages=({"role": "user", "content": "hi\u2028"},),
        sampling=Sampling(temperature=0.5, seed=-1),
        max_tokens=5,
        stop=("a", "b"),
        schema={"type": "object"},
    )
    order = messages.Order(model="m", path="/x", threads=2, max_context=512, memory_mb=10.0)
    unpacker = Unpacker()
    unpacker.feed(pack(messages.run(task)) + pack(messages.load(order)))
    first, second = (packet.parse() for packet in unpacker)
    assert messages.task_from(first) == task
    assert messages.order_from(second) == order
