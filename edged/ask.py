"""`edged ask`: a question over the broker, its answer as it comes."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from edged import protocol
from edged.client import (
    Client,
    Denied,
    Down,
    Interrupted,
    Note,
    Presence,
    Transcript,
    Up,
    read_event,
    read_object,
)
from edged.jobs import Key, Kind
from edged.ports import Detail, Incoming
from edged.settings import MB, Settings
from edged.terminal import Screen, printable
from edged.topics import Topics

#: A device not heard of for this long after connecting is probably not there, seconds.
ABSENT_S = 2.0
#: Unanswered, the request is published again at the device's next sign after this, seconds.
AGAIN_S = 5.0
#: After a cancel the final is waited for this long, seconds.
CANCEL_S = 5.0
#: The exit status of a program whose reader has gone, as a shell has it (128 + SIGPIPE).
EXIT_PIPE = 141


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to ask, and how long to wait for the answer (inf: for ever)."""

    text: str
    #: JPEG or PNG, oldest first.
    frames: tuple[bytes, ...] = ()
    #: Instead of frames: the newest `last` of this camera, spread over the newest `span_s` seconds.
    camera: str | None = None
    last: int = 1
    span_s: float | None = None
    detail: Detail | None = None
    system: str | None = None
    max_tokens: int | None = None
    #: A JSON schema that the answer must satisfy.
    schema: dict[str, Any] | bool | None = None
    deadline_s: float | None = None
    timeout_s: float = 600.0

    @property
    def kind(self) -> Kind:
        """Which request it is."""
        return Kind.VISION if self.frames or self.camera else Kind.TEXT

    def body(self, job: str) -> dict[str, Any]:
        """Return the request."""
        body: dict[str, Any] = {"v": protocol.VERSION, "id": job, "prompt": self.text}
        if self.frames:
            images = [base64.b64encode(frame).decode("ascii") for frame in self.frames]
            body["frames"] = [{"image": image} for image in images]
        elif self.camera is not None:
            body["frames"] = {"camera": self.camera, "last": self.last}
            if self.span_s is not None:
                body["frames"]["span_s"] = self.span_s
        if self.schema is not None:
            wanted = {"type": "json_schema", "json_schema": {"schema": self.schema}}
            body["response_format"] = wanted
        others = {
            "system": self.system, "max_tokens": self.max_tokens, "deadline_s": self.deadline_s,
            "detail": self.detail,
        }  # fmt: skip
        return body | {name: value for name, value in others.items() if value is not None}


def main(settings: Settings, question: Question, *, as_json: bool = False) -> int:
    """Ask, print, return the exit status.

    Raises:
        BrokerUnreachable: with the reason.
        ConfigError: the client's password cannot be read.
    """
    return asyncio.run(_Ask(settings, question, as_json=as_json).run())


class _Ask:
    """One question, from connecting to its end."""

    def __init__(self, settings: Settings, question: Question, *, as_json: bool) -> None:
        self._settings = settings
        self._question = question
        self._as_json = as_json
        self._screen = Screen()
        self._topics = Topics(settings.mqtt.base_topic, settings.device)
        self._key = Key(settings.client.username, f"ask-{uuid.uuid4().hex}")
        self._payload = protocol.encode(question.body(self._key.id))
        self._presence = Presence()
        self._transcript = Transcript()
        self._client: Client
        self._accepted = False
        #: Something has come since the request was last published, so it arrived.
        self._confirmed = False
        self._gap_told = self._absence_told = False
        self._asked = -math.inf
        #: When to give up waiting, and with which exit status then.
        self._until = math.inf
        self._status = 1
        self._cancelled = False

    async def run(self) -> int:
        topics = self._topics
        filters = (topics.response(self._key), topics.status, topics.info)
        client = Client(self._settings, "ask", *((name, 1) for name in filters))
        async with client:
            with _interruptible(client):
                self._client = client
                self._began = time.monotonic()
                self._until = self._began + self._question.timeout_s
                while (status := await self._step()) is None:
                    pass
                return status

    async def _step(self) -> int | None:
        """Wait for what comes next and act on it; return the exit status if it was the last."""
        now = time.monotonic()
        absent = math.inf if self._absence_told else self._began + ABSENT_S
        note = await self._client.next(min(self._until, absent) - now)
        try:
            if note is not None:
                return self._take(note)
            if time.monotonic() >= self._until:
                return self._timed_out()
            if self._presence.state is None and not self._accepted:
                self._say_absent()
            self._absence_told = True
        except BrokenPipeError:
            return self._reader_gone()
        return None

    # What comes

    def _take(self, note: Note) -> int | None:
        match note:
            case Up():
                self._ask()
            case Down(reason):
                if not self._cancelled:
                    self._screen.say(f"the connection is lost ({reason}), trying again")
            case Denied(reason):
                if self._cancelled:
                    return self._status
                return self._fail(
                    f"the broker does not take the request on {self._request_topic}: {reason}"
                )
            case Interrupted(number):
                return self._interrupted(number)
            case Incoming():
                return self._message(note)
        return None

    def _message(self, message: Incoming) -> int | None:
        if message.topic == self._topics.status:
            changed = self._presence.take(message)
            self._heard(changed=changed)
            return None
        if message.topic == self._topics.info:
            return self._check_size(message)
        event = read_event(message.payload, self._key.id)
        if event is None:
            return None
        if self._as_json:
            line = json.dumps(event, ensure_ascii=False)
            self._screen.line(printable(line) if self._screen.out_terminal else line)
        return self._event(event)

    def _event(self, event: dict[str, Any]) -> int | None:
        kind = event["type"]
        if kind == "refused":
            # After a cancel: the job had ended, or never arrived.
            return self._status if self._cancelled else self._ended_badly(event)
        self._accepted = self._confirmed = True
        if kind == "accepted":
            self._show_accepted(event)
        elif kind == "started":
            self._begin(event["attempt"])
        elif kind == "progress" and event["attempt"] >= self._transcript.attempt:
            self._passing(f"{event['stage']} {event['done']:g} of {event['total']:g}")
        elif kind == "chunk":
            self._begin(event["attempt"])
            self._show(self._transcript.add(event["attempt"], event["seq"], event["delta"]))
            self._note_gap()
        elif kind == "error":
            return self._status if self._cancelled else self._ended_badly(event)
        elif kind == "result" and "text" in event:  # answers to several questions are not ours
            return self._result(event)
        return None

    def _begin(self, attempt: int) -> None:
        if self._transcript.begin(attempt):
            self._gap_told = False
            self._end_line()
            self._screen.say(f"attempt {attempt} begins: the answer starts again")
        elif not self._transcript.chunks:
            self._passing("started")

    def _note_gap(self) -> None:
        if self._transcript.gap and not self._gap_told and not self._as_json:
            self._gap_told = True
            self._screen.say("a part of the stream was lost, the rest comes with the result")

    def _result(self, event: dict[str, Any]) -> int:
        if not self._as_json:
            self._begin(event["attempt"])
            rest = self._transcript.rest(event["text"])
            if rest is None:
                self._end_line()
                self._screen.say("the result differs from what was streamed; this is all of it:")
                rest = event["text"]
            self._show(rest)
            self._end_line()
            self._summary(event)
        # Interrupted in the last moment: the answer is shown, and the end is still the signal's.
        return self._status if self._cancelled else 0

    def _ended_badly(self, event: dict[str, Any]) -> int:
        retry = event.get("retry_after_s")
        more = f" (again in {retry:g} s)" if isinstance(retry, int | float) else ""
        return self._fail(f"{event['code']}: {event['message']}{more}")

    def _fail(self, message: str) -> int:
        self._end_line()
        self._screen.say(message)
        return 1

    # What is shown

    def _show(self, text: str) -> None:
        if not self._as_json:
            self._screen.text(text)

    def _end_line(self) -> None:
        with suppress(BrokenPipeError):
            self._screen.end_line()

    def _passing(self, text: str) -> None:
        if not self._as_json:
            self._screen.status(text)

    def _show_accepted(self, event: dict[str, Any]) -> None:
        ahead = event["position"]
        queue = f"{ahead} ahead" if ahead else "next"
        eta = event.get("eta_s")
        about = f", done in about {eta:.0f} s" if isinstance(eta, int | float) else ""
        if not self._transcript.attempt:
            self._passing(f"accepted, {queue}{about}")

    def _summary(self, event: dict[str, Any]) -> None:
        frames = event.get("frames")
        for frame in frames["dropped"] if isinstance(frames, dict) else ():
            self._screen.say(f"frame {frame['index']} was left out: {frame['reason']}")
        if not (self._screen.err_terminal and self._screen.out_terminal):
            return
        usage, timings = event.get("usage"), event.get("timings")
        if not isinstance(usage, dict) or not isinstance(timings, dict):
            return
        tokens = usage.get("completion_tokens")
        ttft, speed = timings.get("ttft_ms"), timings.get("tokens_per_second")
        parts = [str(event.get("model", "")), f"{tokens} tokens"]
        if isinstance(frames, dict):
            parts.append(f"{len(frames['used'])} frames of {usage.get('image_tokens')} tokens")
        if isinstance(ttft, int | float):
            after = f"{ttft:.0f} ms" if ttft < 1000 else f"{ttft / 1e3:.1f} s"
            parts.append(f"the first after {after}")
        if isinstance(speed, int | float):
            parts.append(f"{speed:.1f} a second")
        if event.get("finish_reason") == "length":
            parts.append("cut off by max_tokens")
        self._screen.say(f"[{', '.join(part for part in parts if part)}]")

    # Asking

    @property
    def _request_topic(self) -> str:
        return self._topics.request(self._question.kind, self._key.client)

    def _ask(self) -> None:
        """Publish the request; doing so again is harmless, its id names the job."""
        if self._cancelled:
            self._cancel()
            return
        now = time.monotonic()
        self._asked, self._confirmed = now, False
        # Whoever asks has gone by then: a request that waited at the broker is not run for nobody.
        self._client.send(self._request_topic, self._payload, self._until - now)

    def _heard(self, *, changed: bool) -> None:
        """Act on a sign of the device."""
        presence = self._presence
        if presence.live:
            self._absence_told = True
            # A broker keeps no request for a device whose session it does not have.
            if not self._confirmed and time.monotonic() - self._asked >= AGAIN_S:
                self._ask()
        if not changed or self._cancelled:
            return
        if not presence.live:
            self._absence_told = True
            self._say_absent()
        elif presence.state in {"degraded", "stopping"}:
            self._screen.say(f"{self._settings.device} is {presence.state}: {presence.reason}")
        elif not self._accepted:
            self._passing(f"{self._settings.device} is {presence.state}: {presence.reason}")

    def _say_absent(self) -> None:
        presence, device = self._presence, self._settings.device
        if presence.state is None:
            what = f"no sign of a device {device} under {self._topics.root}"
            todo = "is `edged run` running there, and is `device` right (--set device=NAME)?"
        elif presence.state == "offline":
            what = f"{device} is offline ({presence.reason})"
            todo = "start it there with `edged run`, or as a service with systemctl start edged."
        else:
            age = abs(presence.stale_s or 0.0)
            what = f"the last sign of {device} is {age:.0f} s old (it was {presence.state} then)"
            todo = "is `edged run` still running there?"
        if self._accepted:
            todo = "the job is kept there and goes on when it is back."
        left = self._until - time.monotonic()
        end = "until it answers" if math.isinf(left) else f"{left:.0f} s at most"
        self._screen.say(f"{what}: {todo} Waiting {end}, Ctrl-C cancels.")

    def _check_size(self, message: Incoming) -> int | None:
        """Stop if the request is too large for the device.

        Its answer to that could not name our job, and what is far too large the broker drops.
        """
        limits = (read_object(message.payload) or {}).get("limits")
        allowed = limits.get("payload_mb") if isinstance(limits, dict) else None
        if not isinstance(allowed, int | float) or len(self._payload) <= allowed * MB:
            return None
        size = len(self._payload)
        return self._fail(f"too_large: the request has {size} bytes, {allowed:g} MB are allowed")

    # Ends before the final

    def _timed_out(self) -> int | None:
        if self._cancelled:
            return self._status
        self._end_line()
        seconds = self._question.timeout_s
        self._screen.say(f"no result within {seconds:g} s, the job is cancelled (--timeout)")
        return self._give_up(1)

    def _interrupted(self, number: int) -> int | None:
        status = 128 + number
        if self._cancelled:
            return status
        self._end_line()
        self._screen.say("cancelling")
        self._status = status
        self._cancel()
        # A device that is not there cannot confirm it: the broker keeps it, if it keeps anything.
        wait = CANCEL_S if self._accepted or self._presence.live else 0.5
        self._until = time.monotonic() + wait
        return None

    def _reader_gone(self) -> int | None:
        """End because nobody reads standard output any more."""
        return self._status if self._cancelled else self._give_up(EXIT_PIPE)

    def _give_up(self, status: int) -> int | None:
        """Cancel, and leave once the broker had a moment to take it."""
        self._status = status
        self._cancel()
        self._until = time.monotonic() + 0.5
        return None

    def _cancel(self) -> None:
        self._cancelled = True
        topic = self._topics.request("cancel", self._key.client)
        self._client.send(topic, protocol.encode({"v": protocol.VERSION, "id": self._key.id}))


@contextmanager
def _interruptible(client: Client) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into notes, in their turn with what the broker brings."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, client.interrupt, int(number))
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
