"""Jobs, their events and their ends, with nothing that MQTT 3.1.1 has not; on both protocols."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.box import Box, Protocol, serve
from tests.kit.observer import Name, Observer

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    protocol: Protocol = request.param
    with serve(
        tmp_path_factory.mktemp("jobs"),
        protocol=protocol,
        settings={"limits": {"max_tokens": 200}},
        options=["--backoff", "0.05"],
    ) as box:
        yield box


def block(observer: Observer, ms: int = 600) -> Name:
    """Keep the engine busy, and return when it is."""
    name = observer.ask(f"!tokens {ms // 20} 20")
    observer.event(name, "started")
    return name


def frees_the_engine(observer: Observer, ended: Name) -> bool:
    """Return whether another job starts soon after this one's early end."""
    started = observer.event(observer.ask("!say next"), "started")
    return started.at - observer.finals(ended)[0].at < 3


# The way of a job ---------------------------------------------------------------------------------


def test_an_anonymous_job_from_the_request_to_its_result(observer: Observer) -> None:
    name = observer.ask("!tokens 30 10")

    final = observer.final(name)

    topic = f"edged/box/response/{name.id}"
    events = observer.events(name)
    assert {each.topic for each in events} == {topic}
    assert [each.type for each in events if each.qos] == ["accepted", "started", "result"]
    accepted, started = (each.body for each in events if each.type in {"accepted", "started"})
    assert accepted == {
        "v": 1, "id": name.id, "type": "accepted", "position": 0, "durable": True,
        **({"eta_s": accepted["eta_s"]} if "eta_s" in accepted else {}),
    }  # fmt: skip
    assert started["attempt"] == 1
    assert final["text"] == " ".join(f"w{n}" for n in range(30))
    assert final["finish_reason"] == "stop"
    assert final["model"] == "small"
    assert final["attempt"] == 1
    assert final["usage"]["completion_tokens"] == 30
    assert final["timings"]["generate_ms"] > 200
    assert "client" not in final
    chunks = [each.body for each in events if each.type == "chunk"]
    assert len(chunks) > 1
    assert [each["seq"] for each in chunks] == list(range(len(chunks)))
    assert "".join(each["delta"] for each in chunks) == final["text"]


def test_a_named_clients_job_is_answered_on_its_own_topics(observer: Observer) -> None:
    name = observer.ask("!say hello", client="desk-1")

    final = observer.final(name)

    assert final["client"] == "desk-1"
    topics = {each.topic for each in observer.events(name)}
    assert topics == {f"edged/box/response/desk-1/{name.id}"}
    assert {each.body["client"] for each in observer.events(name)} == {"desk-1"}


def test_the_same_id_of_two_clients_is_two_jobs(observer: Observer) -> None:
    names = [observer.ask(f"!say {who}", client=who, id="one-id") for who in ("ann", "bob")]
    names.append(observer.ask("!say nobody", id="one-id"))

    assert [observer.final(name)["text"] for name in names] == ["ann", "bob", "nobody"]


def test_a_request_without_an_id_is_given_one(observer: Observer) -> None:
    observer.send("request/text", {"prompt": "!say hello"})

    final = observer.event(None, "result")

    assert re.fullmatch(r"e-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", final.body["id"])
    assert final.topic == f"edged/box/response/{final.body['id']}"


@pytest.mark.parametrize("name", ["a", "A" * 64, "0.9_a:b-C", "e-mine"])
def test_ids_of_every_allowed_shape(observer: Observer, name: str) -> None:
    assert observer.final(observer.ask("!say x", id=name))["id"] == name


@pytest.mark.parametrize("qos", [0, 2])
def test_a_request_of_another_qos_is_a_job_like_any_other(observer: Observer, qos: int) -> None:
    assert observer.final(observer.ask("!say hello", qos=qos))["text"] == "hello"


def test_the_version_may_be_said(observer: Observer) -> None:
    assert observer.final(observer.ask("!say hello", v=1))["v"] == 1


def test_messages_in_openais_shape(observer: Observer) -> None:
    parts = [{"type": "text", "text": "!say th"}, {"type": "text", "text": "ree"}]
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": parts},
    ]

    final = observer.final(observer.ask(messages=messages))

    assert final["text"] == "three"
    assert final["usage"]["prompt_tokens"] == 6  # the engine here counts words, of all turns


def test_a_system_text_is_part_of_the_prompt(observer: Observer) -> None:
    final = observer.final(observer.ask("!say x", system="three more words"))

    assert final["usage"]["prompt_tokens"] == 5


def test_text_of_every_script_comes_back_unharmed(observer: Observer) -> None:
    text = 'naïve 日本語 🙂 \u202eabc\u202c é\u200d x\\y "q" <|end|>'

    final = observer.final(observer.ask(text))

    assert final["text"] == text


def test_reply_to_is_obeyed_instead_of_the_default(observer: Observer) -> None:
    name = observer.ask("!tokens 3 5", client="desk", reply_to="edged/reply/desk/inbox")

    observer.event(name, "result", topic="edged/reply/desk/inbox")

    assert {each.topic for each in observer.events(name)} == {"edged/reply/desk/inbox"}


@pytest.mark.parametrize(
    "topic",
    ["edged/reply/a", "edged/reply/" + "x" * 244, "edged/reply" + "/l" * 14, "edged/reply/ü/ a"],
)
def test_reply_topics_up_to_the_limits(observer: Observer, topic: str) -> None:
    observer.event(observer.ask("!say x", reply_to=topic), "result", topic=topic)


def test_positions_count_the_jobs_ahead_and_the_running_one(observer: Observer) -> None:
    block(observer)
    names = [observer.ask("!say x") for _ in range(3)]

    told = [observer.event(name, "accepted").body["position"] for name in names]

    assert told == [1, 2, 3]
    started = [observer.event(name, "started") for name in names]
    assert [each.number for each in started] == sorted(each.number for each in started)
    assert started[2].body["queue_ms"] > 100


def test_after_a_result_the_end_is_estimated(observer: Observer) -> None:
    observer.final(observer.ask("!tokens 3 5"))

    assert observer.event(observer.ask("!tokens 3 5"), "accepted").body["eta_s"] >= 0


def test_a_higher_priority_goes_first(observer: Observer) -> None:
    block(observer)
    names = {number: observer.ask("!say x", priority=number) for number in (0, 4, 9)}
    names[5] = observer.ask("!say x")
    for name in names.values():
        observer.final(name)

    started = {number: observer.event(name, "started").number for number, name in names.items()}
    assert sorted(started, key=started.__getitem__) == [9, 5, 4, 0]


def test_many_jobs_of_one_client_do_not_hold_up_another(observer: Observer) -> None:
    observer.event(observer.ask("!tokens 20 20", client="many"), "started")
    many = [observer.ask("!tokens 4 20", client="many") for _ in range(8)]
    few = [observer.ask("!tokens 4 20", client="few") for _ in range(2)]
    for name in (*many, *few):
        observer.final(name)

    later = [n for n in many if _started(observer, n) > _started(observer, few[-1])]
    assert len(later) >= 5, "the client with two jobs waited for most of the other's"


def _started(observer: Observer, name: Name) -> int:
    return observer.event(name, "started").number


# Streams ------------------------------------------------------------------------------------------


def test_without_a_stream_only_the_final_tells_the_text(observer: Observer) -> None:
    name = observer.ask("!prefill 30 40 !tokens 10 5", stream=False)

    assert len(observer.final(name)["text"].split()) == 10
    observer.check()
    assert [each.type for each in observer.events(name)] == ["accepted", "started", "result"]


def test_progress_comes_at_most_once_a_second(observer: Observer) -> None:
    name = observer.ask("!prefill 46 50 !say x")
    observer.final(name)

    progress = observer.events(name, "progress")

    assert 2 <= len(progress) <= 3
    assert {each.body["stage"] for each in progress} == {"prefill"}
    assert all(each.body["total"] == 46 * 64 for each in progress)
    done = [each.body["done"] for each in progress]
    assert done == sorted(set(done))
    assert done[-1] <= 46 * 64
    assert all(b.at - a.at > 0.9 for a, b in itertools.pairwise(progress))


def test_chunks_are_few_and_soon(observer: Observer) -> None:
    name = observer.ask("!tokens 100 5")
    observer.final(name)

    chunks = observer.events(name, "chunk")

    assert 2 <= len(chunks) <= 12  # one in 100 ms of the half second, and the first at once
    assert chunks[0].body["delta"] == "w0"


def test_a_long_answer_is_told_in_chunks_of_bounded_size(observer: Observer) -> None:
    text = "x" * 300
    name = observer.ask("!say " + " ".join([text] * 20))
    observer.final(name)

    assert all(len(each.body["delta"]) <= 1100 for each in observer.events(name, "chunk"))


# Limits of the answer -----------------------------------------------------------------------------


def test_max_tokens_ends_an_answer(observer: Observer) -> None:
    final = observer.final(observer.ask("!tokens 9 0", max_tokens=4))

    assert final["finish_reason"] == "length"
    assert final["usage"]["completion_tokens"] == 4


def test_the_limit_of_tokens_holds_without_max_tokens(observer: Observer) -> None:
    final = observer.final(observer.ask("!tokens 300 0"))

    assert (final["finish_reason"], final["usage"]["completion_tokens"]) == ("length", 200)


def test_max_tokens_at_the_limit_is_taken_and_above_it_refused(observer: Observer) -> None:
    assert observer.final(observer.ask("!say x", max_tokens=200))["text"] == "x"

    refusal = observer.refusal(observer.ask("!say x", max_tokens=201)).body
    assert refusal["code"] == "invalid"
    assert "max_tokens" in refusal["message"]
    assert "200" in refusal["message"]


def test_prompt_and_max_tokens_above_the_context_are_too_long(observer: Observer) -> None:
    words = "a " * 4000

    final = observer.final(observer.ask(words, max_tokens=97))

    assert (final["type"], final["code"], final["retryable"]) == ("error", "too_long", False)
    assert "4097" in final["message"]
    assert "4096" in final["message"]
    assert observer.final(observer.ask(words, max_tokens=96))["type"] == "result"
    assert observer.final(observer.ask(words))["type"] == "result", "absent: never the cause"


def test_the_model_may_be_named_and_must_be_the_loaded_one(observer: Observer) -> None:
    assert observer.final(observer.ask("!say x", model="small"))["model"] == "small"

    refusal = observer.refusal(observer.ask("!say x", model="other")).body
    assert refusal["code"] == "invalid"
    assert "small" in refusal["message"]


# Ends that are errors -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "retryable"),
    [
        ("too_long", False),
        ("memory", True),
        ("invalid", False),
        ("unsupported", False),
        ("bad_output", True),
        ("bad_frame", False),
    ],
)
def test_a_job_that_cannot_be_done_ends_with_its_code(
    observer: Observer, code: str, retryable: bool
) -> None:
    final = observer.final(observer.ask(f"!fail {code}"))

    assert (final["type"], final["code"], final["retryable"]) == ("error", code, retryable)


def test_a_job_that_ends_the_engine_each_time_is_given_up(observer: Observer) -> None:
    name = observer.ask("!say one !segv")
    after = observer.ask("!say well")

    final = observer.final(name)

    assert (final["type"], final["code"]) == ("error", "dead")
    attempts = [each.body["attempt"] for each in observer.events(name, "started")]
    assert attempts == [1, 2, 3]
    assert observer.final(after)["text"] == "well"


def test_a_deadline_passes_while_the_job_waits(observer: Observer) -> None:
    blocker = block(observer, 1500)

    final = observer.final(observer.ask("!say x", deadline_s=0.3))

    assert (final["code"], final["retryable"]) == ("expired", False)
    assert not observer.finals(blocker), "it did not wait for its turn to say so"


def test_a_deadline_passes_while_the_job_runs(observer: Observer) -> None:
    name = observer.ask("!tokens 200 50", deadline_s=0.5)

    assert observer.final(name)["code"] == "expired"
    assert observer.events(name, "chunk")
    assert frees_the_engine(observer, name)


def test_a_job_that_meets_its_deadline_is_not_expired(observer: Observer) -> None:
    assert observer.final(observer.ask("!say x", deadline_s=20))["type"] == "result"


# The same id again --------------------------------------------------------------------------------


def test_the_same_request_again_while_it_waits(observer: Observer) -> None:
    block(observer)
    first = observer.ask("!say ahead")
    name = observer.ask("!say x", priority=3)
    observer.event(name, "accepted")

    observer.ask("!say x", id=name.id, priority=3)

    again = observer.event(name, "accepted", count=2)
    assert again.body["position"] == 2
    observer.final(first)
    observer.final(name)
    assert len(observer.events(name, "started")) == 1


def test_the_same_request_again_while_it_runs(observer: Observer) -> None:
    name = block(observer)

    observer.ask("!tokens 30 20", id=name.id)

    assert observer.event(name, "accepted", count=2).body["position"] == 0
    observer.final(name)
    assert len(observer.events(name, "started")) == 1


def test_the_same_request_again_after_its_end(observer: Observer) -> None:
    name = observer.ask("!say x")
    observer.final(name)

    observer.ask("!say x", id=name.id)

    observer.wait(lambda: len(observer.finals(name)) == 2, "the stored final")
    assert len({each.payload for each in observer.finals(name)}) == 1
    assert len(observer.events(name, "accepted")) == 1
    assert len(observer.events(name, "started")) == 1


def test_the_stored_final_of_an_error_comes_again(observer: Observer) -> None:
    name = observer.ask("!fail too_long")
    observer.final(name)

    observer.ask("!fail too_long", id=name.id)

    observer.wait(lambda: len(observer.finals(name)) == 2, "the stored final")


def test_the_body_is_compared_as_parsed(observer: Observer) -> None:
    observer.send("request/text", b'{"id":"spaces","prompt":"!say x","seed":1}')
    name = Name(None, "spaces")
    observer.final(name)

    observer.send("request/text", b'{ "seed": 1,\n "prompt": "\\u0021say x", "id": "spaces" }')

    observer.wait(lambda: len(observer.finals(name)) == 2, "the stored final")
    assert not observer.events(name, "refused")


def test_another_body_with_the_same_id_is_a_conflict(observer: Observer) -> None:
    name = block(observer)

    for _ in range(2):  # while it runs, and when it has ended
        observer.ask("!say other", id=name.id)
        refusal = observer.refusal(name).body
        assert (refusal["code"], refusal["retryable"]) == ("conflict", False)
        observer.final(name)

    observer.refusal(name, count=2)
    assert observer.final(name)["text"].startswith("w0 ")


def test_the_same_request_from_elsewhere_gets_all_later_events_there(observer: Observer) -> None:
    first = observer.ask("!say ahead", priority=9)
    name = block(observer)

    observer.ask("!tokens 30 20", id=name.id, reply_to="edged/reply/elsewhere")

    observer.event(name, "result", topic="edged/reply/elsewhere")
    observer.event(name, "result", topic=f"edged/box/response/{name.id}")
    there = [e.type for e in observer.events(name, topic="edged/reply/elsewhere")]
    assert there[0] == "accepted"
    assert "chunk" in there
    assert len(observer.events(name, "accepted", topic=f"edged/box/response/{name.id}")) == 1
    observer.final(first)


def test_the_stored_final_goes_to_whom_asks_for_it(observer: Observer) -> None:
    name = observer.ask("!say x")
    observer.final(name)

    observer.ask("!say x", id=name.id, reply_to="edged/reply/late")

    observer.event(name, "result", topic="edged/reply/late")
    assert len(observer.finals(name)) == 2


# Cancels ------------------------------------------------------------------------------------------


def test_a_waiting_job_is_cancelled(observer: Observer) -> None:
    block(observer)
    name = observer.ask("!say x")
    observer.event(name, "accepted")

    observer.cancel(name)

    final = observer.final(name)
    assert (final["type"], final["code"], final["retryable"]) == ("error", "cancelled", False)
    assert not observer.events(name, "started")


def test_a_running_job_is_cancelled(observer: Observer) -> None:
    name = observer.ask("!tokens 200 50")
    observer.event(name, "chunk")

    observer.cancel(name)

    assert observer.final(name)["code"] == "cancelled"
    assert frees_the_engine(observer, name)


def test_a_running_job_is_cancelled_in_prefill(observer: Observer) -> None:
    name = observer.ask("!prefill 200 50 !say x")
    observer.event(name, "progress")

    observer.cancel(name)

    assert observer.final(name)["code"] == "cancelled"
    assert frees_the_engine(observer, name)


def test_a_cancel_is_answered_on_the_jobs_own_topics_only(observer: Observer) -> None:
    name = observer.ask("!tokens 200 50", client="desk", reply_to="edged/reply/job")
    observer.event(name, "started")

    observer.cancel(name, v=1, reply_to="edged/reply/cancel")

    observer.final(name)
    observer.check()
    assert {each.topic for each in observer.events(name)} == {"edged/reply/job"}


def test_a_cancel_right_behind_its_request(observer: Observer) -> None:
    names = []
    for number in range(10):
        names.append(observer.ask("!tokens 20 50", client="desk", id=f"short-{number}", wait=False))
        observer.cancel(names[-1])

    assert {observer.final(name)["code"] for name in names} == {"cancelled"}
    assert not observer.events(None, "refused")


def test_a_second_cancel_is_silent_or_finds_no_job(observer: Observer) -> None:
    name = observer.ask("!tokens 200 20")
    observer.event(name, "started")

    for _ in range(2):
        observer.send("request/cancel", {"id": name.id}, wait=False)

    assert observer.final(name)["code"] == "cancelled"
    observer.final(observer.ask("!say x"))
    assert all(each.body["code"] == "unknown_job" for each in observer.events(name, "refused"))
    assert len(observer.finals(name)) == 1


def test_a_cancel_that_finds_no_job_is_refused(observer: Observer) -> None:
    ended = observer.ask("!say x")
    observer.final(ended)
    others = observer.ask("!tokens 40 20", client="ann")
    observer.event(others, "started")

    for name in (ended, Name(None, "never"), Name("bob", others.id), Name(None, others.id)):
        observer.cancel(name)
        refusal = observer.refusal(name)
        assert (refusal.body["code"], refusal.body["request"]) == ("unknown_job", "cancel")
        assert refusal.body["retryable"] is False
        assert refusal.topic == f"edged/box/response/{name}"

    assert observer.final(others)["type"] == "result"


def test_a_refused_cancel_goes_where_it_asks(observer: Observer) -> None:
    observer.cancel(Name("desk", "never"), reply_to="edged/reply/cancel")

    assert observer.refusal(Name("desk", "never")).topic == "edged/reply/cancel"


@pytest.mark.parametrize(
    "body", [{}, {"id": None}, {"id": 7}, {"id": "a b"}, {"id": "x", "why": 1}]
)
def test_a_malformed_cancel_is_invalid(observer: Observer, body: dict[str, Any]) -> None:
    observer.send("request/cancel", body)

    refusal = observer.event(None, "refused").body
    assert (refusal["code"], refusal["request"]) == ("invalid", "cancel")


# The broker's own tools ---------------------------------------------------------------------------


@pytest.mark.parametrize("client", [None, "desk"])
def test_the_brokers_own_tools_are_enough(box: Box, observer: Observer, client: str | None) -> None:
    name = Name(client, f"tool-{client}")
    reader = ["-i", f"reader-{client}", "-c", "-q", "1", "-t", f"edged/box/response/{name}"]
    if box.protocol == "5":
        reader += ["-x", "600"]
    box.tool("mosquitto_sub", *reader, "-E")

    topic = "edged/box/request/text" + (f"/{client}" if client else "")
    request = json.dumps({"id": name.id, "prompt": "!say from a shell"}).encode()
    box.tool("mosquitto_pub", "-q", "1", "-t", topic, "-s", stdin=request)
    observer.final(name)

    # what was kept for it while it was away: the events of QoS 1
    lines = box.tool("mosquitto_sub", *reader, "-C", "3", "-W", "20", "-F", "%q %r %p").splitlines()
    bodies = [json.loads(line.split(" ", 2)[2]) for line in lines]
    assert [line.split(" ", 2)[:2] for line in lines] == [["1", "0"]] * 3
    assert [body["type"] for body in bodies] == ["accepted", "started", "result"]
    assert bodies[2]["text"] == "from a shell"
