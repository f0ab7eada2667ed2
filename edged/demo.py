"""`edged demo`: the whole thing on this machine, from an empty folder to checked answers.

It starts a broker, an edged of its own as a process, and asks it as a client would. Whatever it
started and wrote is gone when it ends, also after Ctrl-C, but for the frames that it saved to be
looked at: it names their folder.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edged import top
from edged.client import Client, Presence
from edged.conversation import Audience, Conversation, Job, filters
from edged.jobs import Kind
from edged.sandbox import (
    STOP_S,
    Child,
    Private,
    StartBroker,
    choose_broker,
    private,
    until_ended,
)
from edged.selftest import showing, verify
from edged.selftest.cases import (
    DIRECTIONS,
    EVENTS,
    READING,
    READING_ANSWER,
    REFUSAL,
    TO_THE_RIGHT,
    WHICH_WAY,
    Answer,
    drawn,
    form,
    moving,
    seen,
    thing,
)
from edged.terminal import Screen, one_line, printable, width

#: What each part may take, seconds.
READY_S = 180.0
JOB_S = 180.0
#: Characters of an answer that are shown.
SHOWN = 240

DEVICE = "demo"
#: The long job is cancelled when so many of its chunks have come.
CANCEL_AFTER = 2
#: Makes an answer long for certain: of itself the model says a sentence and stops.
_LONG = {
    "type": "json_schema",
    "json_schema": {
        "schema": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1000}
    },
}


def main(broker: str = "auto") -> int:
    """Run the demo; return 0 if every answer was right, else 1.

    Args:
        broker: `mosquitto`, `amqtt`, or `auto` for the first of them that is installed.

    Raises:
        EdgedError: something is not installed, is damaged, or did not start.
    """
    return asyncio.run(until_ended(_demo(verify(), choose_broker(broker))))


async def _demo(model: Path, start_broker: StartBroker) -> int:
    screen = Screen()
    screen.line(screen.bold("edged demo: a broker, the agent and a client, on this machine"))
    screen.line(
        "The model that ships with edged is small and knows little: simple shapes, what happens\n"
        "to them, and readings with their limits. What it says of those is checked."
    )
    screen.line()
    async with private(DEVICE, model, start_broker) as place:
        _row(screen, "broker", f"{place.broker.name}, MQTT {place.broker.protocol}, on "
             f"127.0.0.1:{place.settings.mqtt.port}")  # fmt: skip
        folder = place.settings.state.dir.parent
        _row(screen, "edged", f"process {place.daemon.process.pid}, its state in {folder}")
        _row(screen, "model", f"{model}: INT4, sees")
        return await _show(screen, place)


def _row(screen: Screen, name: str, text: str) -> None:
    screen.line(f"{screen.dim(f'{name:<12}')} {printable(text)}")


async def _show(screen: Screen, place: Private) -> int:
    shown = _Shown(screen)
    async with Client(place.settings, "demo", *filters(place.settings)) as client:
        talk = Conversation(place.settings, client, shown, place.daemon)
        await talk.ready(READY_S)
        demo = _Demo(screen, shown, talk)
        circle = drawn([[thing("red", "circle", (0.5, 0.5))]])
        await demo.ask("A frame", seen(circle, "What colour is the circle?"), "The circle is red.")
        frames = drawn(moving("red", "circle", TO_THE_RIGHT))
        await demo.ask("Four frames", seen(frames, WHICH_WAY), "The red circle moves to the right.")
        frames.reverse()
        await demo.ask(
            "The same frames, the last first: the answer turns round",
            seen(frames, WHICH_WAY),
            "The red circle moves to the left.",
        )
        await demo.ask(
            "An answer that must fit a JSON schema",
            seen(frames, "What happens?", response_format=form(event=EVENTS, direction=DIRECTIONS)),
            {"event": "moved", "direction": "left"},
        )
        await demo.ask("A reading", {"prompt": READING}, READING_ANSWER)
        await demo.ask("What it cannot know", {"prompt": "What is the capital of France?"}, REFUSAL)
        await demo.cancel(
            "A long list, cancelled while it comes",
            {"prompt": "List the colours.", "response_format": _LONG},
        )
        await demo.stop(place.daemon)
    screen.line()
    if demo.faults:
        screen.line(screen.style("not all was as it must be:", "1;31"))
        for fault in demo.faults:
            screen.line(f"  {printable(fault)}")
        screen.line(f"the end of edged's log:\n{place.daemon.last_words()}")
        return 1
    screen.line(screen.style("All answers were right.", "1;32"))
    screen.line(
        "For answers about the world set model.path to a real model and run `edged run`.\n"
        "`edged ask` and `edged top` then do what was shown here."
    )
    return 0


class _Shown(Audience):
    """Shows what comes, heartbeats between the answers."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._began = time.monotonic()
        self._streamed = 0  # characters
        #: A job's answer comes: what is not of it waits.
        self.busy = False
        self._held: list[str] = []

    def begin(self) -> None:
        """Take note that an answer comes next."""
        self.busy, self._streamed = True, 0

    def end(self) -> None:
        """Show what has waited for the end of the answer."""
        self.busy = False
        for row in self._held:
            self._screen.line(row)
        self._held.clear()

    def say(self, name: str, text: str) -> None:
        """Show something of the job."""
        self._screen.line(f"  {self._screen.dim(f'{name:<10}')} {one_line(text, 300)}")

    def status(self, presence: Presence) -> None:
        """Show the new state."""
        since = time.monotonic() - self._began
        self._aside("status", f"{presence.state}: {presence.reason}  ({since:.1f} s)")

    def beat(self, beat: dict[str, Any]) -> None:
        """Show a heartbeat."""
        self._aside("beat", top.line(beat))

    def _aside(self, name: str, text: str) -> None:
        room = width() - 14 if self._screen.out_terminal else 300
        row = f"{self._screen.dim(f'{name:<12}')} {one_line(text, room)}"
        if self.busy:
            self._held.append(row)
        else:
            self._screen.line(row)

    def event(self, event: dict[str, Any]) -> None:
        """Show what has become of the job."""
        if event["type"] == "accepted":
            kept = "on disk" if event.get("durable") else "in memory"
            self.say("accepted", f"{event['position'] or 'nothing'} ahead of it, {kept}")
        elif event["type"] == "started":
            self.say("started", f"attempt {event['attempt']}, {event.get('queue_ms')} ms later")

    def text(self, text: str) -> None:
        """Show a piece of the answer."""
        room = SHOWN - self._streamed
        if not text or room <= 0:
            return
        if not self._streamed:
            self._screen.text("    ")
        self._streamed += len(text)
        shown = text[:room] + (" …" if len(text) > room else "")
        self._screen.text(shown.replace("\n", "\n    "))


class _Demo:
    """Does one thing after the other, and says what is wrong with it."""

    def __init__(self, screen: Screen, shown: _Shown, talk: Conversation) -> None:
        self._screen = screen
        self._shown = shown
        self._talk = talk
        self._number = 0
        self._saved: Path | None = None  # where the frames are
        self.faults: list[str] = []

    def _begin(self, title: str) -> None:
        self._number += 1
        self._screen.line()
        self._screen.line(self._screen.bold(f"{self._number}. {title}"))
        self._shown.begin()

    def _verdict(self, fault: str | None, good: str) -> None:
        self._screen.end_line()
        word, colour = ("right", "32") if fault is None else ("WRONG", "31")
        text = printable(good if fault is None else fault)
        self._screen.line(f"  {self._screen.style(f'{word:<10}', colour)} {text}")
        self._shown.end()
        if fault is not None:
            self.faults.append(f"{self._number}: {fault}")

    def _send(self, request: Mapping[str, Any]) -> Job:
        self._shown.say("prompt", str(request["prompt"]))
        wanted = request.get("response_format")
        if wanted is not None:
            self._shown.say("schema", json.dumps(wanted["json_schema"]["schema"]))
        kind = Kind.VISION if "frames" in request else Kind.TEXT
        return self._talk.ask(f"demo-{self._number}", kind, request)

    def _frames(self, frames: Sequence[bytes]) -> None:
        """Show frames, on a terminal that has the colours for it; else save them as they are."""
        if self._screen.colours and os.environ.get("COLORTERM") in {"truecolor", "24bit"}:
            for row in showing.rows(frames):
                self._screen.line(f"    {row}")
            return
        if self._saved is None:
            self._saved = Path(tempfile.mkdtemp(prefix="edged-demo-frames-"))
        names = [f"{self._number}-{n}.jpg" for n in range(1, len(frames) + 1)]
        for name, frame in zip(names, frames, strict=True):
            (self._saved / name).write_bytes(frame)
        self._shown.say("frames", f"{self._saved}: {', '.join(names)}")

    async def ask(
        self, title: str, request: Mapping[str, Any], answer: str | dict[str, Any]
    ) -> None:
        """Ask something that has one right answer; show the frames that it is about."""
        self._begin(title)
        if "frames" in request:
            self._frames([base64.b64decode(each["image"]) for each in request["frames"]])
        job = self._send(request)
        await self._talk.finish(job, JOB_S)
        await self._talk.late(job)
        self._ended(job)
        fault = job.fault() or job.stream_fault()
        if fault is None and not Answer(exact=answer).matches(job.final or {}, exactly=True):
            right = answer if isinstance(answer, str) else json.dumps(answer)
            fault = f"the right answer is {right}"
        self._verdict(fault, "it is so; one final, and the chunks are its text")

    async def cancel(self, title: str, request: Mapping[str, Any]) -> None:
        """Ask for something long and cancel it while it streams."""
        self._begin(title)
        job = self._send(request)
        if await self._talk.until(
            lambda: job.ended or job.transcript.chunks >= CANCEL_AFTER, JOB_S
        ):
            self._screen.end_line()
            self._shown.say("cancel", "a request of its own, on request/cancel")
            self._talk.cancel(job)
        await self._talk.finish(job, JOB_S)
        self._ended(job)
        self._verdict(job.cancel_fault(), "one final: the error `cancelled`")

    def _ended(self, job: Job) -> None:
        self._screen.end_line()
        final = job.final
        if final is None:
            return
        if final["type"] == "error":
            self._shown.say("error", f"{final['code']}: {final['message']}")
            return
        usage, timings = final.get("usage") or {}, final.get("timings") or {}
        self._shown.say(
            "result",
            f"{usage.get('completion_tokens')} tokens in {job.transcript.chunks} chunks, "
            f"{timings.get('tokens_per_second')} tokens/s, the first after "
            f"{timings.get('ttft_ms')} ms; of the {usage.get('prompt_tokens')} before it "
            f"{usage.get('image_tokens')} were frames, {usage.get('cached_tokens')} were kept",
        )

    async def stop(self, daemon: Child) -> None:
        """Stop the daemon."""
        self._begin("Stopping")
        self._shown.end()
        presence = self._talk.presence
        daemon.process.terminate()
        said = await self._talk.until(lambda: presence.state == "offline", STOP_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await daemon.process.wait()
        status = daemon.process.returncode
        fault = None
        if status != 0:
            fault = f"edged ended with {status}" if status is not None else "edged did not end"
        elif not said or presence.reason != "stopped":
            fault = f"edged's last status is {presence.state} ({presence.reason})"
        self._verdict(fault, "edged said goodbye and ended with 0")
