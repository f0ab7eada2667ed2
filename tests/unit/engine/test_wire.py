from __future__ import annotations

import json
import os
import socket
import threading
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.engine import messages
from edged.engine.wire import (
    MAGIC,
    MAX_BODY,
    MAX_HEADER,
    BadMessage,
    Packet,
    Pipe,
    TooLarge,
    Unpacker,
    head,
    pack,
)
from edged.ports import (
    Answer,
    DroppedFrame,
    EngineInfo,
    FramePlan,
    Look,
    PlannedFrame,
    Sampling,
    Task,
    Timings,
    Usage,
)

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


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.dictionaries(st.text(), JSON), st.binary(max_size=90)), max_size=4),
    st.integers(1, 40),
)
def test_a_body_may_be_read_to_where_it_belongs(
    sent: list[tuple[dict[str, Any], bytes]], size: int
) -> None:
    stream = b"".join(pack(header, body) for header, body in sent)
    unpacker = Unpacker()
    got = []
    at = 0
    while at < len(stream):
        data = stream[at : at + size]
        room = unpacker.room()
        if room is None:
            unpacker.feed(data)
        else:
            data = data[: len(room)]
            room[: len(data)] = data
            unpacker.filled(len(data))
        at += len(data)
        got += [(packet.parse(), packet.body) for packet in unpacker]
    assert got == sent
    assert (unpacker.waiting, unpacker.room()) == (0, None)


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


def test_what_the_other_end_would_not_take_is_not_sent() -> None:
    assert head({}, MAX_BODY)
    with pytest.raises(TooLarge, match=r"268\.4 MB, at most 268\.4 MB"):
        head({}, MAX_BODY + 1)
    with pytest.raises(TooLarge, match="of text"):
        head({"x": "a" * MAX_HEADER})


def test_a_large_body_goes_through_a_pipe() -> None:
    ours, theirs = socket.socketpair()
    pipe = Pipe(theirs)
    body = os.urandom(5_000_000)
    sender = threading.Thread(target=ours.sendall, args=(pack({"t": "a"}, body) + pack({}),))
    sender.start()
    packet = pipe.receive()
    assert (packet.parse(), packet.body) == ({"t": "a"}, body)
    assert pipe.receive().parse() == {}
    sender.join()
    ours.close()
    pipe.close()


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
    no_vision="a text model",
)
PLAN = FramePlan(
    used=(PlannedFrame(1, crops=1, tokens=313), PlannedFrame(2, crops=4, tokens=757)),
    dropped=(DroppedFrame(0, "no room"),),
)


@pytest.mark.parametrize(
    "message",
    [
        messages.Loaded(info=INFO, sessions=1, cache_mb=1.5, cache_hits=2),
        messages.LoadFailed(message="m", hint="h"),
        messages.Begin(job=1, stage="prefill", work=64, done=3, total=100),
        messages.Step(job=1, stage="token", work=1, took=0.1, next=1, done=2, total=3, text="x"),
        messages.Planned(job=1, plan=PLAN),
        messages.Done(job=1, answers=(ANSWER,), timings=Timings(ttft_ms=2.0), frames=PLAN),
        messages.Failed(job=1, code="too_long", message="m"),
        messages.Stopped(job=1, sessions=1, cache_mb=20, cache_hits=1 << 40),
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
        b'{"t":"begin","job":1,"stage":"encode","work":-1}',
        b'{"t":"begin","job":1,"stage":"encode","work":1e300}',
        b'{"t":"begin","job":1,"stage":"encode","work":1000000000000}',
        b'{"t":"done","job":1,"answers":[{"text":"a"}],"timings":{}}',
        b'{"t":"done","job":1,"answers":[],"timings":{},"frames":{}}',
        b'{"t":"stopped","job":1,"cache_mb":-1}',
        b'{"t":"stopped","job":1,"cache_mb":"1"}',
        b'{"t":"stopped","job":1,"cache_hits":1.5}',
        b'{"t":"stopped","job":1,"cache_hits":-1}',
        b'{"t":"stopped","job":1,"sessions":true}',
    ],
)
def test_what_no_engine_of_ours_says_is_refused(header: bytes) -> None:
    with pytest.raises(BadMessage):
        messages.read(Packet(header))


USED = {"index": 0, "crops": 1, "tokens": 313}
DROPPED = {"index": 1, "reason": "no room"}


@pytest.mark.parametrize(
    "plan",
    [
        None,
        [],
        {},
        {"used": [USED], "dropped": None},
        {"used": {}, "dropped": []},
        {"used": [USED], "dropped": [], "more": 1},
        *(
            {"used": [USED | change], "dropped": [DROPPED]}
            for change in (
                {"index": "0"},
                {"index": True},
                {"index": 0.0},
                {"index": -1},
                {"index": 1},
                {"index": 2},
                {"crops": 0},
                {"crops": None},
                {"crops": 1 << 24},
                {"tokens": 0},
                {"tokens": -313},
                {"tokens": 1 << 60},
                {"more": 1},
            )
        ),
        *(
            {"used": [USED], "dropped": [DROPPED | change]}
            for change in (
                {"index": 0},
                {"index": 7},
                {"reason": ""},
                {"reason": None},
                {"reason": "x" * (messages.MAX_REASON + 1)},
            )
        ),
        {
            "used": [USED | {"index": index} for index in range(messages.MAX_FRAMES + 1)],
            "dropped": [],
        },
    ],
    ids=lambda plan: json.dumps(plan)[:80],
)
def test_what_can_be_no_plan_is_refused(plan: Any) -> None:
    planned = {"t": "planned", "job": 1, "plan": plan}
    done: Any = {"t": "done", "job": 1, "answers": [], "timings": {}, "frames": plan or []}
    for header in (planned, done):
        with pytest.raises(BadMessage):
            messages.read(Packet(json.dumps(header).encode()))


def through(task: Task) -> Task:
    """What the engine process gets of a task."""
    unpacker = Unpacker()
    unpacker.feed(pack(messages.run(task), b"".join(messages.body(task))))
    (packet,) = unpacker
    return messages.task_from(packet.parse(), packet.body)


FRAMES = (b"\xff\xd8first", b"", b"\x89PNG third")


@pytest.mark.parametrize(
    "look",
    [
        Look(frames=()),
        Look(frames=FRAMES),
        Look(frames=FRAMES, detail="high", window_min=2, left_s=1.5, plan=PLAN),
    ],
)
def test_the_frames_of_a_task_arrive_as_they_were_given(look: Look) -> None:
    task = Task(
        job=3,
        client=None,
        messages=(
            {"role": "system", "content": "short"},
            {"role": "user", "content": ["a", 0, 1, "b", 2]},
        ),
        questions=("one?", "two?"),
        look=look,
    )
    header = json.dumps(messages.run(task))
    assert "PNG" not in header
    arrived = through(task)
    assert arrived == task
    assert arrived.look is not None
    assert all(type(frame) is bytes for frame in arrived.look.frames)


def test_frames_that_are_not_as_long_as_was_said_are_seen() -> None:
    task = Task(job=3, client=None, messages=(), look=Look(frames=FRAMES))
    body = b"".join(FRAMES)
    for wrong in (body[:-1], body + b"x", b""):
        with pytest.raises(BadMessage, match="in a body of"):
            messages.task_from(messages.run(task), wrong)


def test_a_task_without_frames_has_no_body() -> None:
    task = Task(job=3, client=None, messages=({"role": "user", "content": "hi"},))
    assert messages.body(task) == ()
    assert through(task) == task
    assert through(replace(task, questions=("a",))).questions == ("a",)


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
    order = messages.Order(
        model="m", path="/x", threads=2, memory_mb=10.0, first_token_s=5.0, frame_cache_mb=0.0
    )
    unpacker = Unpacker()
    unpacker.feed(pack(messages.run(task)) + pack(messages.load(order)))
    first, second = (packet.parse() for packet in unpacker)
    assert messages.task_from(first) == task
    assert messages.order_from(second) == order
