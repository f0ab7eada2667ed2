"""What `ask` and `top` make of what they read, without any broker."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged import top
from edged.client import Presence, Transcript, connection, read_event
from edged.ports import Incoming, Receipt
from edged.settings import Mqtt, Settings
from edged.terminal import Screen, one_line, printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# Events -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        None,
        b"",
        b"\xff",
        b"[]",
        b"[" * 100_000,
        b'{"id":"other","type":"accepted","position":0}',
        b'{"id":"j","type":"news"}',
        b'{"id":"j","type":["chunk"]}',
        b'{"id":"j","type":"chunk","attempt":"1","seq":0,"delta":"x"}',
        b'{"id":"j","type":"result","attempt":1}',
        b'{"id":"j","type":"result","attempt":1,"answers":[{"text":1}]}',
        b'{"id":"j","type":"result","attempt":1,"answers":"text"}',
        b'{"id":"j","type":"error","code":"dead"}',
    ],
)
def test_what_is_no_event_of_the_job_is_left_out(payload: bytes | None) -> None:
    assert read_event(payload, "j") is None


@given(st.data())
def test_a_transcript_shows_the_text_once_whatever_the_order(data: st.DataObject) -> None:
    deltas = data.draw(st.lists(st.text(min_size=1), max_size=8))
    sent = [(1, seq, delta) for seq, delta in enumerate(deltas)]
    stale = data.draw(st.lists(st.sampled_from([(0, 0, "stale")]), max_size=2))
    twice = data.draw(st.lists(st.sampled_from(sent), max_size=4)) if sent else []
    came = data.draw(st.permutations([*sent, *twice, *stale]))
    transcript = Transcript()
    assert not transcript.begin(1)
    shown = "".join(transcript.add(*chunk) for chunk in came)
    assert shown == transcript.shown == "".join(deltas)
    assert not transcript.gap
    assert transcript.rest(shown) == ""


def test_a_transcript_knows_attempts_and_gaps() -> None:
    transcript = Transcript()
    transcript.begin(1)
    assert transcript.add(1, 0, "a") == "a"
    assert transcript.add(1, 2, "c") == ""
    assert transcript.gap
    assert transcript.rest("abc") == "bc"
    assert transcript.rest("xyz") is None
    assert transcript.begin(2)
    assert not transcript.begin(2)
    assert not transcript.begin(1)
    assert (transcript.shown, transcript.chunks, transcript.gap) == ("", 0, False)
    assert transcript.add(1, 0, "a") == ""


# Presence ---------------------------------------------------------------------------------------


def status(state: str, *, retain: bool = False, age_s: float = 0.0, **fields: Any) -> Incoming:
    ts = time.time() - age_s
    body = {"state": state, "instance": "one", "reason": "r", "ts": ts, "interval_s": 10}
    payload = json.dumps(body | fields).encode()
    return Incoming(
        topic="t", payload=payload, size=len(payload), qos=1, retain=retain, receipt=Receipt(1, 1)
    )


def test_presence_follows_the_status() -> None:
    presence = Presence()
    assert [presence.live] == [False]
    assert presence.take(status("starting", retain=True))
    assert presence.live
    assert not presence.take(status("starting"))
    assert presence.take(status("ready"))
    assert presence.take(status("offline"))
    assert (presence.live, presence.state, presence.reason) == (False, "offline", "r")


def test_presence_ignores_the_late_will_of_an_earlier_instance() -> None:
    presence = Presence()
    presence.take(status("ready", instance="two"))
    assert not presence.take(status("offline", instance="one"))
    assert presence.live
    assert presence.take(status("offline", instance="two"))


@pytest.mark.parametrize("age_s", [31.0, -31.0])
def test_presence_does_not_believe_what_is_kept_too_long(age_s: float) -> None:
    presence = Presence()
    presence.take(status("ready", retain=True, age_s=age_s))
    assert not presence.live
    assert presence.take(status("ready", age_s=age_s))  # said now: only the clock is wrong
    assert presence.live


def test_presence_stands_nonsense() -> None:
    presence = Presence()
    for payload in (b"", b"1", b"{}", b'{"state":1}'):
        message = Incoming(topic="t", payload=payload, size=1, qos=0, receipt=Receipt(1, 1))
        assert not presence.take(message)
    presence.take(status("ready", retain=True, ts="now", interval_s=None, instance=3, reason=None))
    assert presence.live


def test_a_client_is_never_the_daemon() -> None:
    settings = Settings(mqtt=Mqtt(client_id="edged-box", username="daemon"))
    one, other = connection(settings, "ask", ()), connection(settings, "ask", ())
    assert one.client_id != other.client_id
    assert one.client_id.startswith("edged-ask-")
    assert len(one.client_id) <= 23
    assert one.username is None
    assert (one.clean_start, one.session_expiry_s) == (True, 0)


# Terminal ---------------------------------------------------------------------------------------


def test_nothing_acts_on_the_terminal() -> None:
    assert printable("a\x1b[2J\r\x07\x7f\x9b\u202eb\n\tc") == "a␛[2J␍␇␡��b\n\tc"
    assert one_line("a\n b\x00c") == "a b␀c"
    assert one_line("x" * 300, 10) == "x" * 9 + "…"


def test_a_file_gets_the_text_as_it_is() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err)
    screen.status("never seen")
    screen.text("a\x1b")
    screen.say("note")
    screen.text("b")
    screen.end_line()
    screen.end_line()
    assert (out.getvalue(), err.getvalue()) == ("a\x1bb\n", "note\n")


def test_a_terminal_keeps_notes_and_answer_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    both = Terminal()
    screen = Screen(both, both)
    screen.status("wait")
    screen.text("a")
    screen.status("not in the middle of a line")
    screen.say("note")
    screen.text("b\n")
    assert both.getvalue() == "\r\x1b[2Kwait\r\x1b[2Ka\nnote\nb\n"


def test_colours_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Screen(Terminal(), io.StringIO()).bold("x") == "\x1b[1mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen(Terminal(), io.StringIO()).bold("x") == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert Screen(Terminal(), io.StringIO()).bold("x") == "x"


# Heartbeats -------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
_PARTS = ("queue", "job", "outbox", "totals", "engine", "speed", "host", "mqtt", "cameras", "seq")


@given(st.dictionaries(st.sampled_from([*_PARTS, "state", "reason", "model", "uptime_s"]), _JSON))
def test_any_heartbeat_can_be_shown(beat: dict[str, Any]) -> None:
    rows = [*top.view(beat, "box", 1.0), top.line(beat)]
    assert not any("\n" in row or "\x1b" in row for row in rows)


def test_a_heartbeat_shows_cameras_and_durations() -> None:
    beat = {"state": "ready", "uptime_s": 90061, "cameras": {"door": {"fps": 2.5}}}
    rows = top.view(beat, "box", 61.0)
    assert "beat     -, 1 min 1 s ago; up 1 d 1 h" in rows
    assert "camera   door: 2.5 frames/s, the newest - old" in rows
