"""`edged top`: how a device is, as its heartbeat says."""

from __future__ import annotations

import asyncio
import json
import math
import signal
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from edged.client import Client, Down, Interrupted, Presence, Up, read_object, stale_s
from edged.ports import Incoming
from edged.settings import Settings
from edged.terminal import Screen, one_line, printable, width
from edged.topics import Topics

#: A device is absent after this many beats without one.
ABSENT_BEATS = 3
#: The status that says offline comes together with the retained heartbeat, or this much later, s.
TOGETHER_S = 0.5
READY = "ready"


def main(settings: Settings, *, once: bool = False, as_json: bool = False) -> int:
    """Show heartbeats, or one; return the exit status.

    Raises:
        BrokerUnreachable: with the reason.
        ConfigError: the client's password cannot be read.
    """
    top = _Top(settings, as_json=as_json)
    return asyncio.run(top.once() if once else top.live())


class _Top:
    """A view of one device."""

    def __init__(self, settings: Settings, *, as_json: bool) -> None:
        self._settings = settings
        self._as_json = as_json
        self._topics = Topics(settings.mqtt.base_topic, settings.device)
        self._presence = Presence()
        self._screen = Screen()
        self._beat: dict[str, Any] | None = None
        #: Whether it came as it was said, and was not kept by the broker.
        self._first_hand = False
        self._came = 0.0
        self._lost: str | None = None
        self._began = 0.0
        self._drawn = 0
        self._absence_told = False

    def _connect(self) -> Client:
        return Client(self._settings, "top", (self._topics.status, 1), (self._topics.health, 0))

    @property
    def _patience_s(self) -> float:
        interval = self._presence.interval_s or self._settings.health.interval_s
        return ABSENT_BEATS * interval

    def _take(self, message: Incoming) -> bool:
        """Take a message in; return whether it is a beat."""
        if message.topic == self._topics.status:
            self._presence.take(message)
            return False
        beat = read_object(message.payload)
        if message.topic != self._topics.health or beat is None or "state" not in beat:
            return False
        self._beat, self._came = beat, time.monotonic()
        self._first_hand = not message.retain
        self._absence_told = False
        return True

    # One beat

    async def once(self) -> int:
        """Print one heartbeat; return 0 if it says ready, else 1."""
        async with self._connect() as client:
            self._began = time.monotonic()
            settled = self._began + TOGETHER_S
            while True:
                now = time.monotonic()
                end = self._began + self._patience_s
                if now >= settled and self._is_offline():
                    self._screen.say(self._absence())
                    return 1
                if self._believed(settled=now >= settled):
                    return self._tell_once()
                if now >= end:
                    self._screen.say(self._absence())
                    return 1
                note = await client.next((settled if now < settled else end) - now)
                if isinstance(note, Incoming):
                    self._take(note)
                elif isinstance(note, Down):
                    self._screen.say(f"the connection is lost ({note.reason})")
                    return 1

    def _is_offline(self) -> bool:
        return self._presence.state == "offline" and not self._contradicted()

    def _contradicted(self) -> bool:
        """Return whether a beat that just came shows an `offline` to be of an earlier instance."""
        return (
            self._first_hand
            and self._beat is not None
            and self._beat.get("instance") != self._presence.instance
        )

    def _believed(self, *, settled: bool) -> bool:
        """Return whether the beat that came tells how the device is now.

        A kept one may be old, or the device has changed since: then the next is waited for.
        """
        beat, presence = self._beat, self._presence
        if beat is None:
            return False
        if self._first_hand:
            return True
        interval = presence.interval_s or self._settings.health.interval_s
        if not settled or stale_s(beat.get("ts"), interval) is not None:
            return False
        same = beat.get("instance") == presence.instance and beat["state"] == presence.state
        return presence.state is None or (presence.live and same)

    def _tell_once(self) -> int:
        beat = self._beat or {}
        if self._as_json:
            self._screen.line(_json(beat, terminal=self._screen.out_terminal))
        else:
            for row in view(beat, self._settings.device, self._age()):
                self._screen.line(row)
        return 0 if beat.get("state") == READY else 1

    def _absence(self) -> str:
        device, presence = self._settings.device, self._presence
        if presence.state == "offline":
            return f"{device} is offline: {one_line(presence.reason) or 'it gave no reason'}"
        waited = time.monotonic() - max(self._began, self._came)
        if presence.state is None:
            return (
                f"no sign of a device {device} under {self._topics.root} for {waited:.0f} s: is "
                "`edged run` running there, and is `device` right (--set device=NAME)?"
            )
        ago = f" {abs(presence.stale_s):.0f} s ago" if presence.stale_s is not None else ""
        return f"no heartbeat of {device} for {waited:.0f} s; its status{ago}: {presence.state}"

    def _age(self) -> float:
        """Return how long ago the beat was said, in seconds."""
        since = time.monotonic() - self._came
        ts = (self._beat or {}).get("ts")
        if self._first_hand or not isinstance(ts, int | float):
            return since
        return max(since, time.time() - ts)

    # All beats

    async def live(self) -> int:
        """Show heartbeats until interrupted."""
        async with self._connect() as client:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, client.interrupt, int(number))
            self._began = time.monotonic()
            with suppress(BrokenPipeError):
                await self._show(client)
        return 0

    async def _show(self, client: Client) -> None:
        drawing = self._screen.out_terminal and not self._as_json
        while True:
            if drawing:
                self._draw()
            note = await client.next(1.0)
            new = False
            if isinstance(note, Interrupted):
                return
            if isinstance(note, Down):
                self._lost = note.reason
                if not drawing:
                    self._screen.say(f"the connection is lost ({note.reason}), trying again")
            elif isinstance(note, Up):
                self._lost = None
            elif isinstance(note, Incoming):
                before = self._presence.state
                new = self._take(note)
                if not drawing and before != "offline" and self._presence.state == "offline":
                    self._screen.say(self._absence())
            if new and not drawing:
                self._print()
            elif not drawing and not self._absence_told and self._absent:
                self._absence_told = True
                self._screen.say(self._absence())

    @property
    def _absent(self) -> bool:
        since = max(self._began, self._came)
        return self._lost is None and time.monotonic() - since > self._patience_s

    def _print(self) -> None:
        beat = self._beat or {}
        if self._as_json:
            self._screen.line(_json(beat, terminal=self._screen.out_terminal))
        elif self._age() <= self._patience_s:
            self._screen.line(f"{datetime.now(UTC).astimezone():%H:%M:%S} {line(beat)}")

    def _draw(self) -> None:
        """Write the view over the one before."""
        beat, out, columns = self._beat, self._screen.out, width()
        rows = [] if beat is None else view(beat, self._settings.device, self._age())
        if self._lost is not None:
            rows.append(f"the connection to the broker is lost ({one_line(self._lost)})")
        elif self._is_offline() or self._absent:
            rows.append(self._absence())
        elif beat is None:
            rows.append(f"waiting for {self._settings.device}")
        # A row that wraps would be two to go up again.
        rows = [row[: columns - 1] for row in rows]
        up = f"\x1b[{self._drawn}A" if self._drawn else ""
        head, *others = rows
        body = "\n".join([self._screen.bold(head), *others])
        out.write(f"{up}\r\x1b[J{body}\n")
        out.flush()
        self._drawn = len(rows)


# Words for a heartbeat --------------------------------------------------------------------------


def _json(beat: dict[str, Any], *, terminal: bool) -> str:
    text = json.dumps(beat, ensure_ascii=False)
    return printable(text) if terminal else text


def _get(beat: dict[str, Any], *path: str) -> Any:
    value: Any = beat
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return one_line(value) if isinstance(value, str) else value


def _number(value: Any, form: str = "{:.0f}", unit: str = "") -> str:
    """Return a number with its unit; a dash where the box has no such probe."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    return form.format(value) + (f" {unit}" if unit else "")


def _span(seconds: Any) -> str:
    """Return a duration in words."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "-"
    whole = int(seconds)
    for size, unit, smaller, name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def _job(beat: dict[str, Any]) -> str:
    if not isinstance(beat.get("job"), dict):
        return "none"
    client = _get(beat, "job", "client")
    who = f"{client}/" if client else ""
    moved = _span(_get(beat, "job", "progress_age_s"))
    return f"{who}{_get(beat, 'job', 'id')}  {_get(beat, 'job', 'stage')}, moved {moved} ago"


def view(beat: dict[str, Any], device: str, age_s: float) -> list[str]:
    """Return a heartbeat as rows for people."""
    totals = beat.get("totals")
    counts = totals.items() if isinstance(totals, dict) else ()
    model = f"{_get(beat, 'model')}  {_get(beat, 'provider') or 'not loaded'}"
    threads = _get(beat, "threads")
    throttled = {True: "throttled", False: "not throttled"}.get(_get(beat, "host", "throttled"))
    host = [
        f"cpu {_number(_get(beat, 'host', 'cpu'))} %",
        f"edged {_number(_get(beat, 'host', 'rss_mb'), unit='MB')}",
        f"memory free {_number(_get(beat, 'host', 'mem_available_mb'), unit='MB')}",
        f"disk free {_number(_get(beat, 'host', 'disk_free_mb'), unit='MB')}",
        _number(_get(beat, "host", "temp_c"), unit="°C"),
        throttled or "-",
    ]
    engine = [
        str(_get(beat, "engine", "state")),
        f"{_number(_get(beat, 'engine', 'restarts'))} restarts",
        _number(_get(beat, "engine", "rss_mb"), unit="MB"),
        f"{_number(_get(beat, 'engine', 'sessions'))} sessions",
    ]
    if reason := _get(beat, "engine", "last_reason"):
        engine.append(f"last ended: {reason}")
    connected = "connected" if _get(beat, "mqtt", "connected") else "not connected"
    mqtt = [connected, f"{_number(_get(beat, 'mqtt', 'reconnects'))} reconnects"]
    if reason := _get(beat, "mqtt", "last_reason"):
        mqtt.append(f"last lost: {reason}")
    waiting, oldest = _get(beat, "queue", "depth"), _span(_get(beat, "queue", "oldest_s"))
    outbox, unsent = _get(beat, "outbox", "depth"), _span(_get(beat, "outbox", "oldest_s"))
    speed = [
        f"first token {_number(_get(beat, 'speed', 'ttft_ms_p50'), unit='ms')}",
        f"prompt {_number(_get(beat, 'speed', 'prefill_tokens_per_second'), '{:.1f}')} tokens/s",
        f"answer {_number(_get(beat, 'speed', 'tokens_per_second_p50'), '{:.1f}')} tokens/s",
    ]
    seq, up = _number(beat.get("seq")), _span(beat.get("uptime_s"))
    rows = [
        f"{device}  {_get(beat, 'state')}  {_get(beat, 'reason') or ''}",
        f"beat     {seq}, {_span(age_s)} ago; up {up}",
        f"model    {model}" + (f", {threads} threads" if threads else ""),
        f"job      {_job(beat)}",
        f"queue    {_number(waiting)} waiting" + (f", the oldest {oldest}" if waiting else ""),
        f"outbox   {_number(outbox)} unsent" + (f", the oldest {unsent}" if outbox else ""),
        "totals   " + ", ".join(f"{_number(count)} {one_line(name)}" for name, count in counts),
        "engine   " + ", ".join(engine),
        "speed    " + ", ".join(speed),
        "host     " + ", ".join(host),
        "mqtt     " + ", ".join(mqtt),
    ]
    cameras = beat.get("cameras")
    for name, camera in cameras.items() if isinstance(cameras, dict) else ():
        if isinstance(camera, dict):
            fps, newest = _number(camera.get("fps"), "{:.1f}"), _span(camera.get("newest_age_s"))
            rows.append(f"camera   {one_line(name)}: {fps} frames/s, the newest {newest} old")
    return rows


def line(beat: dict[str, Any]) -> str:
    """Return a heartbeat on one line."""
    state, reason = _get(beat, "state"), _get(beat, "reason")
    parts = [f"{state}" if state == READY else f"{state} ({reason})"]
    parts.append(f"queue {_number(_get(beat, 'queue', 'depth'))}")
    if isinstance(beat.get("job"), dict):
        parts.append(f"job {_get(beat, 'job', 'id')} {_get(beat, 'job', 'stage')}")
    done, failed = _get(beat, "totals", "completed"), _get(beat, "totals", "failed")
    parts.append(f"{_number(done)} completed, {_number(failed)} failed")
    parts.append(f"engine {_get(beat, 'engine', 'state')}")
    speed = _get(beat, "speed", "tokens_per_second_p50")
    if speed is not None:
        parts.append(f"{_number(speed, '{:.1f}')} tokens/s")
    parts.append(f"cpu {_number(_get(beat, 'host', 'cpu'))} %")
    parts.append(f"free {_number(_get(beat, 'host', 'mem_available_mb'))} MB")
    return " · ".join(parts)
