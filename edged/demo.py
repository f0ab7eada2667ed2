"""`edged demo`: the whole thing on this machine, from an empty folder to checked answers.

It starts a broker, an edged of its own as a process, and asks it as a client would. Whatever it
started and wrote is gone when it ends, also after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edged import protocol, settings, top
from edged.client import Client, Denied, Presence, Transcript, read_event, read_object
from edged.errors import EdgedError
from edged.ports import Incoming
from edged.sandbox import (
    STOP_S,
    Child,
    StartBroker,
    choose_broker,
    free_port,
    listening,
    need_engine,
    running,
)
from edged.selftest import model_dir
from edged.terminal import Screen, one_line, printable, width
from edged.topics import Topics

#: What each part may take, seconds.
READY_S = 60.0
JOB_S = 60.0
#: Chunks are QoS 0: a last one may come after the final, within this.
LATE_S = 1.0
#: Characters of an answer that are shown.
SHOWN = 240

DEVICE = "demo"
PLAIN, LONG, FORM = "demo-plain", "demo-long", "demo-json"
#: The second job is cancelled when so many of its chunks have come.
CANCEL_AFTER = 2
_ROOMS = ["kitchen", "hall", "garden"]
_FORM_SCHEMA = {
    "type": "object",
    "properties": {
        "room": {"enum": _ROOMS},
        "people": {"type": "integer", "minimum": 0, "maximum": 99},
        "door_open": {"type": "boolean"},
    },
    "required": ["room", "people", "door_open"],
    "additionalProperties": False,
}
#: Makes the answer long for certain: left alone, a model with random weights may stop anywhere.
_LONG_SCHEMA = {"type": "array", "items": {"enum": _ROOMS}, "minItems": 1000}


def main(broker: str = "auto") -> int:
    """Run the demo; return 0 if every answer was right, else 1.

    Args:
        broker: `mosquitto`, `amqtt`, or `auto` for the first of them that is installed.

    Raises:
        EdgedError: something is not installed or did not start.
    """
    return asyncio.run(_main(broker))


async def _main(broker: str) -> int:
    need_engine()
    start_broker = choose_broker(broker)
    screen = Screen()
    _say_what_it_is(screen)
    with _ended_by_signals() as ended:
        try:
            with tempfile.TemporaryDirectory(
                prefix="edged-demo-", ignore_cleanup_errors=True
            ) as folder:
                return await _demo(screen, Path(folder), start_broker)
        except asyncio.CancelledError:
            if not ended:
                raise
            return 128 + ended[0]


@contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Cancel this task at the first signal to end, so that everything is cleaned up on the way."""
    loop, task, seen = asyncio.get_running_loop(), asyncio.current_task(), list[int]()

    def end(number: int) -> None:
        seen.append(number)
        if task is not None and len(seen) == 1:
            task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, end, int(number))
    try:
        yield seen
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _say_what_it_is(screen: Screen) -> None:
    screen.line(screen.bold("edged demo: a broker, the agent and a client, on this machine"))
    screen.line(
        "The model that ships with edged has random weights, so it speaks nonsense. What is shown\n"
        "and checked is everything around the sense: the way of a question and of its answer."
    )
    screen.line()


# The demo ---------------------------------------------------------------------------------------


async def _demo(screen: Screen, folder: Path, start_broker: StartBroker) -> int:
    port = free_port()
    config = folder / "edged.toml"
    broker = start_broker(folder, port)
    async with running(broker):
        await listening(broker, port)
        config.write_text(_config(folder, port, broker.protocol))
        command = [sys.executable, "-m", "edged", "run", "--config", str(config)]
        async with running(Child("edged", command, folder / "edged.log")) as daemon:
            _row(screen, "broker", f"{broker.name}, MQTT {broker.protocol}, on 127.0.0.1:{port}")
            _row(screen, "edged", f"process {daemon.process.pid}, its state in {folder}")
            _row(screen, "model", f"{model_dir().parent.name}: INT4, 2 layers, random weights")
            return await _converse(screen, daemon, settings.load(config, environ={}))


def _row(screen: Screen, name: str, text: str) -> None:
    screen.line(f"{screen.dim(f'{name:<12}')} {printable(text)}")


def _config(folder: Path, port: int, version: str) -> str:
    def text(value: object) -> str:
        return settings.toml_value(str(value))

    return (
        f"device = {text(DEVICE)}\n"
        f'[mqtt]\nhost = "127.0.0.1"\nport = {port}\nprotocol = {text(version)}\n'
        f'[model]\nname = "selftest"\npath = {text(model_dir())}\nmax_context = 4096\n'
        f"[state]\ndir = {text(folder / 'state')}\nstop_s = 5\n"
        "[health]\ninterval_s = 0.5\n"
        "[limits]\nmax_tokens = 4000\n"
        '[log]\nformat = "json"\n'
    )


async def _converse(screen: Screen, daemon: Child, chosen: settings.Settings) -> int:
    topics = Topics(chosen.mqtt.base_topic, chosen.device)
    filters = (topics.status, topics.health, f"{topics.root}/response/+", topics.refused)
    async with Client(chosen, "demo", *((name, 1) for name in filters)) as client:
        demo = _Conversation(screen, daemon, client, topics)
        await demo.wait_ready()
        wrong = [await demo.plain(), await demo.long(), await demo.form()]
        wrong.append(await demo.goodbye())
    faults = [fault for fault in wrong if fault]
    screen.line()
    if faults:
        screen.line(screen.style("not all was as it must be:", "1;31"))
        for fault in faults:
            screen.line(f"  {printable(fault)}")
        screen.line(f"the end of edged's log:\n{daemon.last_words()}")
        return 1
    screen.line(screen.style("All three jobs ended as they must.", "1;32"))
    screen.line(
        "The answers were nonsense because this model has random weights; with a real one set\n"
        "model.path and run `edged run`. `edged ask` and `edged top` then do what was shown here."
    )
    return 0


@dataclass(eq=False)
class _Seen:
    """What came back for one job."""

    id: str
    transcript: Transcript = field(default_factory=Transcript)
    finals: list[bytes] = field(default_factory=list)
    final: dict[str, Any] | None = None
    refused: dict[str, Any] | None = None
    streamed: int = 0  # characters shown

    @property
    def ended(self) -> bool:
        return self.final is not None or self.refused is not None


class _Conversation:
    """Asks, shows what happens, and says what is wrong with it."""

    def __init__(self, screen: Screen, daemon: Child, client: Client, topics: Topics) -> None:
        self._screen = screen
        self._daemon = daemon
        self._client = client
        self._topics = topics
        self._presence = Presence()
        self._began = time.monotonic()
        self._job = _Seen("")
        #: Heartbeats that came in the middle of an answer.
        self._held: list[str] = []

    # What comes

    async def _until(self, enough: Callable[[], bool], seconds: float) -> bool:
        """Take what comes until there is enough of it; return whether that was in time."""
        end = time.monotonic() + seconds
        while not enough():
            left = end - time.monotonic()
            if left <= 0:
                return False
            note = await self._client.next(min(left, 0.25))
            if isinstance(note, Incoming):
                self._take(note)
            elif isinstance(note, Denied):
                raise EdgedError(f"the broker does not take what we publish: {note.reason}")
            elif note is None and self._daemon.process.returncode not in {None, 0}:
                raise self._daemon.failed(f"ended with {self._daemon.process.returncode}")
        return True

    def _take(self, message: Incoming) -> None:
        if message.topic == self._topics.status:
            if self._presence.take(message):
                since = time.monotonic() - self._began
                said = f"{self._presence.state}: {self._presence.reason}"
                self._aside("status", f"{said}  ({since:.1f} s)")
        elif message.topic == self._topics.health:
            beat = read_object(message.payload)
            if beat is not None:
                self._aside("beat", top.line(beat))
        else:
            event = read_event(message.payload, self._job.id)
            if event is not None:
                self._event(self._job, event, message.payload or b"")

    def _event(self, job: _Seen, event: dict[str, Any], payload: bytes) -> None:
        kind = event["type"]
        if kind == "accepted":
            where = f"{event['position'] or 'nothing'} ahead of it"
            kept = "on disk" if event.get("durable") else "in memory"
            self._say("accepted", f"{where}, {kept}")
        elif kind == "started":
            job.transcript.begin(event["attempt"])
            self._say("started", f"attempt {event['attempt']}, {event.get('queue_ms')} ms later")
        elif kind == "chunk":
            job.transcript.begin(event["attempt"])
            self._stream(job, job.transcript.add(event["attempt"], event["seq"], event["delta"]))
        elif kind in {"result", "error"}:
            if payload not in job.finals:
                job.finals.append(payload)
            job.final = job.final or event
        elif kind == "refused":
            job.refused = event

    # What is shown

    def _say(self, name: str, text: str) -> None:
        self._screen.line(f"  {self._screen.dim(f'{name:<10}')} {one_line(text, 300)}")

    def _aside(self, name: str, text: str) -> None:
        """Show something that is not of the job: now, or when its answer is through."""
        room = width() - 14 if self._screen.out_terminal else 300
        row = f"{self._screen.dim(f'{name:<12}')} {one_line(text, room)}"
        if self._job.id and not self._job.ended:
            self._held.append(row)
        else:
            self._screen.line(row)

    def _stream(self, job: _Seen, text: str) -> None:
        room = SHOWN - job.streamed
        if not text or room <= 0:
            return
        if not job.streamed:
            self._screen.text("    ")
        job.streamed += len(text)
        shown = text[:room] + (" …" if len(text) > room else "")
        self._screen.text(shown.replace("\n", "\n    "))

    def _verdict(self, fault: str | None, good: str) -> None:
        self._screen.end_line()
        word, colour = ("right", "32") if fault is None else ("WRONG", "31")
        text = printable(good if fault is None else fault)
        self._screen.line(f"  {self._screen.style(f'{word:<10}', colour)} {text}")
        for row in self._held:
            self._screen.line(row)
        self._held.clear()

    # The parts

    async def wait_ready(self) -> None:
        """Wait until the daemon says that it is ready, and a heartbeat has been seen."""
        if not await self._until(lambda: self._presence.state == top.READY, READY_S):
            said = f"{self._presence.state}: {self._presence.reason}"
            raise self._daemon.failed(f"is not ready after {READY_S:g} s ({said})")

    async def _run(self, title: str, job: str, request: dict[str, Any]) -> _Seen:
        self._job = seen = _Seen(job)
        self._screen.line()
        self._screen.line(self._screen.bold(title))
        wanted = request.get("response_format")
        for name, value in request.items():
            if name != "response_format":
                self._say(name, str(value))
        if wanted is not None:
            self._say("schema", json.dumps(wanted["json_schema"]["schema"]))
        body = {"v": protocol.VERSION, "id": job, **request}
        self._client.send(self._topics.request("text"), protocol.encode(body))
        return seen

    def _cancel(self, job: str) -> None:
        self._screen.end_line()
        self._say("cancel", "a request of its own, on request/cancel")
        body = protocol.encode({"v": protocol.VERSION, "id": job})
        self._client.send(self._topics.request("cancel"), body)

    async def _finish(self, seen: _Seen) -> None:
        await self._until(lambda: seen.ended, JOB_S)
        final = seen.final
        if final is not None and final["type"] == "result":
            whole = len(final["text"])
            await self._until(lambda: len(seen.transcript.shown) >= whole, LATE_S)
        self._screen.end_line()
        if final is None:
            return
        if final["type"] == "error":
            self._say("error", f"{final['code']}: {final['message']}")
            return
        usage, timings = final.get("usage") or {}, final.get("timings") or {}
        self._say(
            "result",
            f"{usage.get('completion_tokens')} tokens in {seen.transcript.chunks} chunks, "
            f"{timings.get('tokens_per_second')} tokens/s, the first after "
            f"{timings.get('ttft_ms')} ms; it ended by {final.get('finish_reason')}",
        )

    async def plain(self) -> str | None:
        """Ask a plain question; return what was wrong."""
        seen = await self._run(
            "1. A question", PLAIN, {"prompt": "What does the door sensor say?", "max_tokens": 48}
        )
        await self._finish(seen)
        fault = wrong_result(seen.final, seen.finals, seen.refused, seen.transcript)
        self._verdict(fault, "one final; the chunks are its text, its SHA-256 is right")
        return fault and f"the question: {fault}"

    async def long(self) -> str | None:
        """Ask for something long and cancel it while it streams; return what was wrong."""
        seen = await self._run(
            "2. A long list, cancelled while it comes", LONG,
            {"prompt": "List where the cat was.", "response_format": _format(_LONG_SCHEMA)},
        )  # fmt: skip
        if await self._until(lambda: seen.ended or seen.transcript.chunks >= CANCEL_AFTER, JOB_S):
            self._cancel(seen.id)
        await self._finish(seen)
        fault = wrong_cancel(seen.final, seen.finals, seen.refused)
        self._verdict(fault, "one final: the error `cancelled`")
        return fault and f"the cancelled list: {fault}"

    async def form(self) -> str | None:
        """Ask for JSON under a schema; return what was wrong."""
        seen = await self._run(
            "3. An answer that must fit a JSON schema", FORM,
            {"prompt": "Who is where?", "response_format": _format(_FORM_SCHEMA)},
        )  # fmt: skip
        await self._finish(seen)
        fault = wrong_result(seen.final, seen.finals, seen.refused, seen.transcript)
        fault = fault or wrong_form(seen.final or {})
        self._verdict(fault, "valid JSON with the schema's three fields and their types")
        return fault and f"the JSON answer: {fault}"

    async def goodbye(self) -> str | None:
        """Stop the daemon; return what was wrong."""
        self._job = _Seen("")
        self._screen.line()
        self._screen.line(self._screen.bold("4. Stopping"))
        self._daemon.process.terminate()
        said = await self._until(lambda: self._presence.state == "offline", STOP_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await self._daemon.process.wait()
        status = self._daemon.process.returncode
        fault = None
        if status != 0:
            fault = f"edged ended with {status}" if status is not None else "edged did not end"
        elif not said or self._presence.reason != "stopped":
            fault = f"edged's last status is {self._presence.state} ({self._presence.reason})"
        self._verdict(fault, "edged said goodbye and ended with 0")
        return fault


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


# What is right ----------------------------------------------------------------------------------


def _not_one_final(
    final: dict[str, Any] | None, finals: list[bytes], refused: dict[str, Any] | None
) -> str | None:
    if refused is not None:
        return f"it was refused, {refused['code']}: {refused['message']}"
    if final is None:
        return f"no final within {JOB_S:g} s"
    return f"{len(finals)} different finals" if len(finals) != 1 else None


def wrong_result(
    final: dict[str, Any] | None,
    finals: list[bytes],
    refused: dict[str, Any] | None,
    transcript: Transcript,
) -> str | None:
    """Return what is wrong with a result, or None."""
    fault = _not_one_final(final, finals, refused)
    if fault is not None or final is None:
        return fault
    if final["type"] != "result":
        return f"no result but the error {final['code']}: {final['message']}"
    if final["attempt"] != transcript.attempt or final["text"] != transcript.shown:
        return "the chunks are not the text of the result"
    if hashlib.sha256(final["text"].encode()).hexdigest() != final.get("sha256"):
        return "the SHA-256 is not that of the text"
    return None


def wrong_cancel(
    final: dict[str, Any] | None, finals: list[bytes], refused: dict[str, Any] | None
) -> str | None:
    """Return what is wrong with the final of a job that was cancelled, or None."""
    fault = _not_one_final(final, finals, refused)
    if fault is not None or final is None:
        return fault
    if final["type"] == "result":
        return "it ended with a result although it was cancelled"
    return None if final["code"] == "cancelled" else f"its error is {final['code']}, not cancelled"


def wrong_form(final: dict[str, Any]) -> str | None:
    """Return how an answer misses `_FORM_SCHEMA`, or None; by hand, to depend on no validator."""
    try:
        value = json.loads(final.get("text", ""))
    except ValueError as error:
        return f"the answer is no JSON: {error}"
    if final.get("json") != value:
        return "the result's json is not its text, parsed"
    if not isinstance(value, dict) or set(value) != {"room", "people", "door_open"}:
        return "the answer has not exactly the fields room, people and door_open"
    people = value["people"]
    if value["room"] not in _ROOMS or not isinstance(value["door_open"], bool):
        return "room or door_open is not what the schema allows"
    if isinstance(people, bool) or not isinstance(people, int) or not 0 <= people <= 99:
        return "people is not a whole number from 0 to 99"
    return None
