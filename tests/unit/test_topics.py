"""Topic names: ours, the requests', and which ones we may publish on."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edged.errors import BadPublish
from edged.jobs import Key, Kind
from edged.testing import matches
from edged.topics import (
    MAX_CORRELATION_BYTES,
    MAX_TOPIC_BYTES,
    MAX_TOPIC_LEVELS,
    RequestTopic,
    Topics,
    fault,
    packet_size,
    validate_publish,
)

TOPICS = Topics("edged", "dev1")
PREFIXES = ("edged/reply/", "answers")

BAD = {
    "": "bytes",
    "#": "wildcard",
    "a/+/b": "wildcard",
    "a/b#": "wildcard",
    "$SYS/x": "starts with",
    "$share/g/x": "starts with",
    "a\0b": "control",
    "a\x01b": "control",
    "a\x7fb": "control",
    "a\x85b": "control",
    "a\uffff": "control",
    "a\ufffe": "control",
    "a\U0001ffff": "control",
    "a\ufdd0": "control",
    "\ud800": "UTF-8",
    "x" * (MAX_TOPIC_BYTES + 1): "bytes",
    "ä" * (MAX_TOPIC_BYTES // 2 + 1): "bytes",
    "/".join("x" * (MAX_TOPIC_LEVELS + 1)): "levels",
    "x" * 70_000: "bytes",
}


@pytest.mark.parametrize(("topic", "why"), BAD.items(), ids=ascii)
def test_a_bad_name_is_refused_with_its_fault(topic: str, why: str) -> None:
    found = fault(topic)
    assert found is not None
    assert why in found
    with pytest.raises(BadPublish, match=why):
        validate_publish(topic, 0, None, None)
    assert not TOPICS.may_reply(topic, ("", *PREFIXES))


@pytest.mark.parametrize(
    "topic",
    [
        *("a", "/", "a//b", "edged/dev1/health", "ä/ü 日本", "a$b", "a/$b"),
        "x" * MAX_TOPIC_BYTES,
        "/".join("x" * MAX_TOPIC_LEVELS),
    ],
)
def test_a_good_name_is_taken(topic: str) -> None:
    assert fault(topic) is None
    validate_publish(topic, 0, None, None)


@given(st.text(max_size=300))
@example("a" * 257)
def test_what_is_taken_is_a_legal_topic_name(topic: str) -> None:
    if fault(topic) is not None:
        return
    encoded = topic.encode()  # MQTT 5 section 1.5.4 and 4.7
    assert 1 <= len(encoded) <= 256
    assert not set(topic) & set("+#\0")
    assert topic[0] != "$"
    assert topic.isprintable() or all(
        c.isprintable() or c.isspace() or ord(c) > 0x9F for c in topic
    )


@given(st.text(st.characters(exclude_characters="+#\0/", exclude_categories=["C"]), min_size=1))
def test_ordinary_text_is_a_legal_level(level: str) -> None:
    topic = f"edged/reply/{level}"
    if len(topic.encode()) <= MAX_TOPIC_BYTES:
        assert fault(topic) is None
        assert TOPICS.may_reply(topic, PREFIXES)


# Reply topics


@pytest.mark.parametrize(
    ("topic", "allowed"),
    [
        ("edged/reply/me", True),
        ("edged/reply/me/deep/er", True),
        ("edged/reply/health", True),  # `reply` is no device
        ("edged/reply/", False),
        ("edged/reply", False),
        ("edged/replyx/a", False),
        ("answers", True),
        ("answers/a", True),
        ("answersx", False),
        ("other/a", False),
        ("edged/dev1/response/a", False),
    ],
)
def test_a_reply_topic_must_be_under_a_prefix(topic: str, allowed: bool) -> None:
    assert TOPICS.may_reply(topic, PREFIXES) is allowed


OWN = ["request", "response", "camera", "status", "info", "health", "refused"]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("device", ["dev1", "another"])
def test_no_devices_own_topic_is_a_reply_topic_whatever_is_configured(
    name: str, device: str
) -> None:
    for tail in ("", "/text", "/text/alice"):
        assert not TOPICS.may_reply(f"edged/{device}/{name}{tail}", ("edged/", "edged"))
    assert TOPICS.may_reply(f"edged/{device}/mine", ("edged/",))


@given(st.text(max_size=60), st.lists(st.sampled_from(["edged/reply/", "edged/", "a", "a/"])))
def test_a_permitted_reply_topic_can_be_published_on_and_is_nobodys_own(
    topic: str, prefixes: list[str]
) -> None:
    if not TOPICS.may_reply(topic, tuple(prefixes)):
        return
    validate_publish(topic, 0, None, None)
    assert any(topic.startswith(prefix) for prefix in prefixes)
    assert not any(matches(f"edged/+/{own}/#", topic) for own in OWN) or topic.startswith(
        "edged/reply/"
    )


# Requests


def test_requests_are_subscribed_to_and_parsed() -> None:
    for request in (*Kind, "cancel"):
        for client in (None, "alice"):
            topic = TOPICS.request(request, client)
            assert TOPICS.parse_request(topic) == RequestTopic(str(request), client)
            assert sum(matches(pattern, topic) for pattern in TOPICS.requests) == 1


@pytest.mark.parametrize(
    "topic",
    [
        "edged/dev1/request",
        "edged/dev1/request/",
        "edged/dev1/request/other",
        "edged/dev2/request/text",
        "edged/dev1/status",
        "x/edged/dev1/request/text",
        "",
    ],
)
def test_other_topics_are_no_requests(topic: str) -> None:
    assert TOPICS.parse_request(topic) is None


@given(st.text(max_size=40))
def test_any_client_name_is_returned_for_intake_to_judge(client: str) -> None:
    topic = f"edged/dev1/request/text/{client}"
    assert TOPICS.parse_request(topic) == RequestTopic("text", client)


def test_cameras() -> None:
    topics = Topics("edged", "box")
    assert topics.camera_frames == "edged/box/camera/+/frame"
    assert topics.camera_status("door") == "edged/box/camera/door/status"
    assert matches(topics.camera_statuses, topics.camera_status("door"))
    assert topics.parse_frame("edged/box/camera/door/frame") == "door"
    assert topics.parse_frame("edged/box/camera/a b/frame") == "a b"
    for other in (
        "edged/box/camera/door/status",
        "edged/box/camera/a/b/frame",
        "edged/other/camera/door/frame",
        "edged/box/camera/door/frame/x",
        "edged/box/request/text",
    ):
        assert topics.parse_frame(other) is None


def test_responses() -> None:
    assert TOPICS.response(Key(None, "j1")) == "edged/dev1/response/j1"
    assert TOPICS.response(Key("alice", "j1")) == "edged/dev1/response/alice/j1"


# Sizes


def test_what_the_broker_does_not_take_is_refused_before_it_is_sent() -> None:
    size = packet_size("a", 100, b"cc")
    validate_publish("a", 100, b"cc", size)
    with pytest.raises(BadPublish, match=str(size)):
        validate_publish("a", 100, b"cc", size - 1)


def test_correlation_data_is_bounded() -> None:
    validate_publish("a", 0, b"c" * MAX_CORRELATION_BYTES, None)
    with pytest.raises(BadPublish, match="correlation"):
        validate_publish("a", 0, b"c" * (MAX_CORRELATION_BYTES + 1), None)


@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=50),
    st.integers(0, 300_000),
    st.none() | st.binary(max_size=200),
)
def test_the_packet_size_is_never_too_small(
    topic: str, payload_bytes: int, correlation: bytes | None
) -> None:
    properties = (3 + len(correlation) if correlation is not None else 0) + 5  # and an expiry
    body = 2 + len(topic.encode()) + 2 + 2 + properties + payload_bytes
    assert packet_size(topic, payload_bytes, correlation) >= 1 + 4 + body - 2
