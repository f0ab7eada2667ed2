"""What MQTT 5 properties add: reply topics, correlation data, expiry, and retained requests."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.test_refusals import FORBIDDEN
from tests.kit.box import Box, serve
from tests.kit.observer import Name, Observer

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    settings = {
        "limits": {"payload_mb": 0.05},
        "mqtt": {"reply_prefixes": ["edged/reply/", "home/answers"]},
    }
    with serve(tmp_path_factory.mktemp("properties"), settings=settings) as box:
        yield box


# Reply topics -------------------------------------------------------------------------------------


def test_the_response_topic_is_obeyed(observer: Observer) -> None:
    name = observer.ask("!tokens 3 5", properties={"ResponseTopic": "edged/reply/inbox"})

    observer.event(name, "result", topic="edged/reply/inbox")

    assert {each.topic for each in observer.events(name)} == {"edged/reply/inbox"}


def test_reply_to_wins_over_the_response_topic(observer: Observer) -> None:
    name = observer.ask(
        "!say x", reply_to="edged/reply/body", properties={"ResponseTopic": "edged/reply/property"}
    )

    observer.event(name, "result", topic="edged/reply/body")

    assert {each.topic for each in observer.events(name)} == {"edged/reply/body"}


def test_a_good_reply_to_wins_over_a_forbidden_response_topic(observer: Observer) -> None:
    name = observer.ask(
        "!say x", reply_to="edged/reply/body", properties={"ResponseTopic": "edged/box/status"}
    )

    observer.event(name, "result", topic="edged/reply/body")


@pytest.mark.parametrize("how", ["property", "body"])
def test_reply_topics_under_every_configured_prefix(box: Box, how: str) -> None:
    with box.observer(filters=["home/#"]) as observer:
        for topic in ("home/answers", "home/answers/kitchen"):
            if how == "body":
                name = observer.ask("!say x", reply_to=topic)
            else:
                name = observer.ask("!say x", properties={"ResponseTopic": topic})
            observer.event(name, "result", topic=topic)
        refusal = observer.refusal(observer.ask("!say x", reply_to="home/answersx"))
        assert refusal.body["code"] == "forbidden_reply"
        observer.check()


#: mosquitto disconnects who sends control characters or non-characters, and hides them from edged.
SENDABLE = [
    what
    for what, topic in FORBIDDEN.items()
    if len(topic) < 65536 and not any(unicodedata.category(c) in {"Cc", "Cn"} for c in topic)
]


@pytest.mark.parametrize("what", SENDABLE)
def test_a_forbidden_response_topic_is_refused_on_the_default_one(
    box: Box, observer: Observer, what: str
) -> None:
    connects = len(box.daemon.log("mqtt.connected", client_id="edged-box"))
    name = observer.ask(
        "!say x", client="desk", id="bad", properties={"ResponseTopic": FORBIDDEN[what]}
    )

    refusal = observer.refusal(name)

    assert refusal.body["code"] == "forbidden_reply"
    assert refusal.topic == "edged/box/response/desk/bad"
    assert observer.final(observer.ask("!say next"))["text"] == "next"
    assert len(box.daemon.log("mqtt.connected", client_id="edged-box")) == connects


@pytest.mark.parametrize(
    "payload", [b"{nonsense", b'{"id":"x","prompt":""}', b'{"prompt":"","id":7}']
)
@pytest.mark.parametrize("topic", ["request/text", "request/vision/desk", "request/cancel"])
def test_a_refusal_goes_to_the_response_topic(
    observer: Observer, topic: str, payload: bytes
) -> None:
    observer.send(topic, payload, ResponseTopic="edged/reply/inbox", CorrelationData=b"7")

    refusal = observer.event(None, "refused")

    assert refusal.topic == "edged/reply/inbox"
    assert refusal.correlation == b"7"


def test_a_request_too_large_to_read_is_refused_on_its_response_topic(observer: Observer) -> None:
    request = json.dumps({"id": "big", "prompt": "x" * 60_000})
    observer.send("request/text", request, ResponseTopic="edged/reply/inbox", CorrelationData=b"7")

    refusal = observer.event(None, "refused")

    assert (refusal.body["code"], refusal.topic) == ("too_large", "edged/reply/inbox")
    assert refusal.correlation == b"7"


def test_a_request_above_the_announced_packet_size_never_arrives(box: Box) -> None:
    with box.observer() as observer:  # unjudged: this request has no answer
        announced = observer.wait_on("info").body["limits"]["packet_bytes"]

        observer.send("request/text", {"id": "huge", "prompt": "x" * announced})

        assert observer.final(observer.ask("!say next"))["text"] == "next"
        assert not observer.events(Name(None, "huge"))


def test_a_devices_own_topics_are_forbidden_whatever_the_prefixes(tmp_path: Path) -> None:
    settings = {"mqtt": {"reply_prefixes": ["edged"]}}
    with serve(tmp_path, settings=settings) as box, box.observer() as observer:
        for what in FORBIDDEN:
            if what.startswith(("own ", "another device")):
                refusal = observer.refusal(observer.ask("!say x", reply_to=FORBIDDEN[what]))
                assert refusal.body["code"] == "forbidden_reply", what
        for topic in ("edged/reply/x", "edged/reply/status"):
            observer.event(observer.ask("!say x", reply_to=topic), "result", topic=topic)
        observer.check()


# Correlation data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"7", bytes(range(256)), b"x" * 1024])
def test_correlation_data_comes_back_on_every_event(observer: Observer, data: bytes) -> None:
    name = observer.ask("!prefill 3 10 !tokens 20 10", properties={"CorrelationData": data})

    observer.final(name)

    events = observer.events(name)
    assert {each.type for each in events} >= {"accepted", "started", "progress", "chunk", "result"}
    assert {each.correlation for each in events} == {data}


def test_correlation_data_is_on_refusals_and_errors(observer: Observer) -> None:
    failed = observer.ask("!fail too_long", properties={"CorrelationData": b"a"})
    refused = observer.ask("", properties={"CorrelationData": b"b"})

    observer.final(failed)
    observer.refusal(refused)

    assert {each.correlation for each in observer.events(failed)} == {b"a"}
    assert {each.correlation for each in observer.events(refused)} == {b"b"}


def test_correlation_data_is_no_id(observer: Observer) -> None:
    for _ in range(2):
        observer.send("request/text", {"prompt": "!say x"}, CorrelationData=b"same")

    observer.event(None, "result", count=2)

    assert len({each.name for each in observer.events(None, "result")}) == 2


def test_each_requester_gets_its_own_correlation_data(observer: Observer) -> None:
    name = observer.ask("!tokens 20 20", properties={"CorrelationData": b"one"})
    observer.event(name, "started")

    properties = {"CorrelationData": b"two", "ResponseTopic": "edged/reply/two"}
    observer.ask("!tokens 20 20", id=name.id, properties=properties)

    observer.event(name, "result", topic="edged/reply/two")
    observer.event(name, "result", topic=f"edged/box/response/{name.id}")
    by_topic = {each.topic: each.correlation for each in observer.events(name)}
    assert by_topic == {f"edged/box/response/{name.id}": b"one", "edged/reply/two": b"two"}


@pytest.mark.parametrize("size", [1025, 60_000])
def test_correlation_data_that_is_too_long_is_refused(observer: Observer, size: int) -> None:
    name = observer.ask("!say x", properties={"CorrelationData": b"x" * size})

    refusal = observer.refusal(name)

    assert refusal.body["code"] == "invalid"
    assert "1024" in refusal.body["message"]
    assert refusal.correlation is None
    assert refusal.topic == f"edged/box/response/{name.id}"


def test_properties_that_edged_does_not_know_do_no_harm(observer: Observer) -> None:
    properties = {
        "UserProperty": [("ts", "x"), ("\u202e", "ü" * 1000)],
        "ContentType": "text/plain",
        "PayloadFormatIndicator": 1,
    }

    assert observer.final(observer.ask("!say x", properties=properties))["text"] == "x"


# Expiry -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deadline_s", "expiry"), [(None, 1), (60, 1), (0.8, 60)])
@pytest.mark.parametrize("where", ["waiting", "running"])
def test_the_smaller_of_deadline_and_message_expiry_counts(
    observer: Observer, deadline_s: float | None, expiry: int, where: str
) -> None:
    if where == "waiting":
        observer.event(observer.ask("!tokens 30 60"), "started")

    properties = {"MessageExpiryInterval": expiry}
    name = observer.ask("!tokens 99 50", deadline_s=deadline_s, properties=properties)

    assert observer.final(name)["code"] == "expired"
    ended = observer.finals(name)[0].at - observer.requests()[-1].seen.at
    assert 0.7 < ended < 2.5
    assert bool(observer.events(name, "started")) == (where == "running")


def test_an_expiry_that_is_met_changes_nothing(observer: Observer) -> None:
    name = observer.ask("!say x", properties={"MessageExpiryInterval": 60})

    assert observer.final(name)["type"] == "result"


# Retained requests --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "vision", "cancel"])
def test_a_retained_request_is_refused(observer: Observer, kind: str) -> None:
    observer.send(f"request/{kind}", {"id": "kept", "prompt": "!say x"}, retain=True)

    refusal = observer.refusal(Name(None, "kept"))

    assert (refusal.body["code"], refusal.body["request"]) == ("retained", kind)
    assert refusal.topic == "edged/box/response/kept"
    observer.send(f"request/{kind}", b"", retain=True)  # taken away again
    observer.event(None, "refused", count=2)


def test_a_retained_request_is_not_run_at_the_next_start(box: Box, observer: Observer) -> None:
    observer.send("request/text", {"id": "kept-2", "prompt": "!say x"}, retain=True)
    observer.refusal(Name(None, "kept-2"))

    box.daemon.restart()

    observer.final(observer.ask("!say y"))
    # a kill before the ack makes it come again, and be refused again
    events = observer.events(Name(None, "kept-2"))
    observer.send("request/text", b"", retain=True)
    observer.event(None, "refused", count=len(events) + 1)
    assert {each.type for each in events} == {"refused"}


# A 3.1.1 client of a daemon that speaks 5 ---------------------------------------------------------


def test_a_client_of_311_is_served_like_any_other(box: Box) -> None:
    with box.observer(protocol="3.1.1") as observer:
        name = observer.ask("!tokens 5 10", client="old", reply_to="edged/reply/old")
        assert observer.final(name)["text"] == "w0 w1 w2 w3 w4"
        observer.cancel(Name("old", "never"))
        observer.send("request/text", b"?")
        observer.check()


def test_the_brokers_tools_can_use_the_properties(box: Box, observer: Observer) -> None:
    reader = ["-i", "reader", "-c", "-x", "600", "-q", "1", "-t", "edged/reply/shell"]
    box.tool("mosquitto_sub", *reader, "-E")

    request = json.dumps({"id": "shell", "prompt": "!say from a shell"}).encode()
    properties = ["-D", "publish", "response-topic", "edged/reply/shell"]
    properties += ["-D", "publish", "correlation-data", "s-1"]
    box.tool(
        "mosquitto_pub", "-q", "1", "-t", "edged/box/request/text", *properties, "-s", stdin=request
    )
    observer.final(Name(None, "shell"))

    lines = box.tool("mosquitto_sub", *reader, "-C", "3", "-W", "20", "-F", "%D %p").splitlines()
    assert [line.split(" ", 1)[0] for line in lines] == ["s-1"] * 3
    assert json.loads(lines[2].split(" ", 1)[1])["text"] == "from a shell"
