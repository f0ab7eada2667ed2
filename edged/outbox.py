"""Everything that leaves at QoS 1, in order, within the broker's window, until the broker has it.

Two kinds travel in one line, so that the events of a job keep their order: messages in memory
(accepted, started, refusals) and rows of the journal's outbox (finals), which are loaded when their
turn comes and deleted when the broker has acknowledged them. Retained state jumps the line.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from edged import protocol
from edged.errors import BadPublish, Code, ConnectionLost, JournalUnavailable
from edged.jobs import Outcome
from edged.journal import Journal
from edged.ports import Bus, Outgoing, PubAck, Session, Trace, no_trace
from edged.tasks import Background

#: Most QoS 1 messages unacknowledged at once, whatever the broker allows.
WINDOW = 16
#: Most messages held in memory while there is no connection; the oldest unneeded one goes first.
MAX_HELD = 2000
#: A row that the broker refused is offered again after this long, seconds.
DENIED_RETRY_S = 30.0
#: A connection that ends this soon after a publish casts suspicion on it, seconds.
SUSPICIOUS_S = 2.0
#: So many suspicions and a row is set aside for PARK_S seconds, for the others' sake.
MAX_STRIKES = 3
PARK_S = 60.0

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Entry:
    """A place in the line: a message, or the journal row that holds one."""

    since: float
    message: Outgoing | None = None
    row: int | None = None
    #: Called once the broker answered, whatever it said.
    done: Callable[[], None] | None = None
    #: Belongs to a request that the broker will send again: worthless in another connection.
    session_bound: bool = False
    strikes: int = 0


class Outbox:
    """The line to the broker; `run` pumps it."""

    def __init__(
        self,
        bus: Bus,
        journal: Journal,
        background: Background,
        *,
        replaced: Callable[[], None] = lambda: None,
        trace: Trace = no_trace,
    ) -> None:
        self._bus = bus
        self._journal = journal
        self._background = background
        self._replaced = replaced
        self._trace = trace
        self._line: deque[_Entry] = deque()
        self._sent: dict[_Entry, None] = {}  # unanswered, oldest first
        self._denied: dict[_Entry, str] = {}
        self._one_by_one = 0
        self._last_sent = 0.0
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusal: tuple[float, str] | None = None

    # What others put in

    def post(
        self,
        message: Outgoing,
        *,
        done: Callable[[], None] | None = None,
        session_bound: bool = False,
    ) -> None:
        """Send a QoS 1 message that need not survive this process."""
        entry = _Entry(time.monotonic(), message, done=done, session_bound=session_bound)
        self._line.append(entry)
        if len(self._line) > MAX_HELD and self._bus.session is None:
            self._forget_one()
        self._stir()

    def post_state(self, message: Outgoing) -> None:
        """Send retained state ahead of everything else; an older one still in line goes."""
        for entry in [e for e in self._line if e.message and e.message.topic == message.topic]:
            self._line.remove(entry)
        self._line.appendleft(_Entry(time.monotonic(), message, session_bound=True))
        self._stir()

    def post_rows(self, rows: Iterable[int]) -> None:
        """Send finals that the journal holds."""
        self._line.extend(_Entry(time.monotonic(), row=row) for row in rows)
        self._stir()

    def _forget_one(self) -> None:
        for entry in self._line:
            if entry.message is not None and entry.done is None:
                self._line.remove(entry)
                log.warning("outbox.dropped", topic=entry.message.topic)
                return

    # What the connection tells

    def on_connected(self, _session: Session) -> None:
        """Start again with a new connection; what the broker refused is offered once more."""
        self._give_back()
        for entry in [each for each in self._denied if each.strikes < MAX_STRIKES]:
            self._release(entry)
        self._stir()

    def on_disconnected(self) -> None:
        """Take back what the broker did not answer, in its old order."""
        if self._sent and time.monotonic() - self._last_sent < SUSPICIOUS_S:
            if len(self._sent) == 1:
                self._strike(next(iter(self._sent)))
            self._one_by_one = len(self._sent)
        self._give_back()

    def _give_back(self) -> None:
        again = [*self._sent, *self._line]
        self._sent.clear()
        self._line = deque(entry for entry in again if not entry.session_bound)
        self._stir()

    def _strike(self, entry: _Entry) -> None:
        entry.strikes += 1
        if entry.strikes < MAX_STRIKES:
            return
        del self._sent[entry]
        log.error("outbox.parked", row=entry.row, strikes=entry.strikes, retry_s=PARK_S)
        if entry.row is not None:
            self._hold(entry, "the connection ends whenever a stored final is sent", PARK_S)

    # The pump

    def _stir(self) -> None:
        self._idle.clear()
        self._wake.set()

    def _room(self) -> bool:
        session = self._bus.session
        if session is None or session.maximum_qos < 1:
            return False
        window = 1 if self._one_by_one else min(WINDOW, session.receive_maximum)
        return len(self._sent) < window

    async def run(self) -> None:
        """Send what is in line whenever there is a connection and room in its window."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._line and self._room():
                entry = self._line[0]  # stays first in line while its row is read
                try:
                    message = entry.message or await self._load(entry)
                except JournalUnavailable as error:
                    self._line.remove(entry)
                    self._hold(entry, error.message, DENIED_RETRY_S)
                    continue
                if self._line[0] is not entry or not self._room():
                    continue  # the connection changed meanwhile, and the line with it
                self._line.popleft()
                if message is not None:
                    self._send(entry, message)
            if not self._line and not self._sent:
                self._idle.set()

    async def _load(self, entry: _Entry) -> Outgoing | None:
        assert entry.row is not None  # noqa: S101 - an entry has a message or a row
        row = await self._journal.outgoing(entry.row)
        if row is None:
            return None
        return Outgoing(topic=row.topic, payload=row.payload, qos=1, correlation=row.correlation)

    def _send(self, entry: _Entry, message: Outgoing) -> None:
        self._sent[entry] = None
        self._last_sent = time.monotonic()
        future = self._bus.publish(message)
        self._trace("after_publish")
        future.add_done_callback(lambda done: self._answered(entry, message, done))

    def _answered(self, entry: _Entry, message: Outgoing, answer: asyncio.Future[PubAck]) -> None:
        if entry not in self._sent:
            return  # taken back when the connection went
        error = None if answer.cancelled() else answer.exception()
        if answer.cancelled() or isinstance(error, ConnectionLost):
            return  # `on_disconnected` or the next `on_connected` takes it back
        del self._sent[entry]
        self._one_by_one = max(0, self._one_by_one - 1)
        if isinstance(error, BadPublish):
            self._unsendable(entry, message, error)
        elif error is not None:
            raise error
        elif answer.result().failed:
            self._refused(entry, message, answer.result().reason)
        else:
            self._trace("on_puback")
            if entry.row is not None:
                self._background.spawn(self._journal.delivered(entry.row), "outbox.delivered")
            if entry.done is not None:
                entry.done()
        self._stir()

    def _refused(self, entry: _Entry, message: Outgoing, reason: str) -> None:
        log.error("outbox.refused", topic=message.topic, reason=reason)
        why = f"the broker refuses to take messages on {message.topic}: {reason}"
        if entry.row is not None:
            self._hold(entry, why, DENIED_RETRY_S)
        else:
            self._refusal = (time.monotonic(), why)
        if entry.done is not None:
            entry.done()

    def _unsendable(self, entry: _Entry, message: Outgoing, error: BadPublish) -> None:
        log.error("outbox.unsendable", topic=message.topic, reason=error.message)
        if entry.row is not None:
            self._background.spawn(self._replace(entry.row, error), "outbox.replace")
        if entry.done is not None:
            entry.done()

    async def _replace(self, number: int, error: BadPublish) -> None:
        """Put a stored `too_large` in the place of a final that was never sent."""
        try:
            row = await self._journal.outgoing(number)
            if row is None:
                return
            if not row.replaced:
                message = f"the result does not fit: {error.message}; ask for fewer tokens"
                final = protocol.error_event(row.key, Code.TOO_LARGE, message)
                self.post_rows(await self._journal.replace_final(row.seq, final, Outcome.FAILED))
                self._replaced()
                return
            why = error.message
        except JournalUnavailable as unavailable:
            why = unavailable.message
        self._hold(_Entry(time.monotonic(), row=number), why, PARK_S)

    def _hold(self, entry: _Entry, why: str, seconds: float) -> None:
        self._denied[entry] = why
        asyncio.get_running_loop().call_later(seconds, self._release, entry)

    def _release(self, entry: _Entry) -> None:
        if self._denied.pop(entry, None) is not None:
            entry.strikes = 0
            self._line.append(entry)
            self._stir()

    # What health asks

    @property
    def depth(self) -> int:
        """How many messages the broker does not have yet, finals and others."""
        return len(self._line) + len(self._sent) + len(self._denied)

    @property
    def oldest_s(self) -> float:
        """How long the oldest of them has waited, in seconds."""
        entries = (*self._sent, *self._denied, *self._line)
        now = time.monotonic()
        return max((now - entry.since for entry in entries), default=0.0)

    @property
    def trouble(self) -> str | None:
        """Why messages do not get away although there is a connection, or None."""
        session = self._bus.session
        if session is not None and session.maximum_qos < 1:
            return "the broker allows QoS 0 only, edged needs QoS 1: change the broker's settings"
        if self._denied:
            return next(iter(self._denied.values()))
        if self._refusal is not None and time.monotonic() - self._refusal[0] < 2 * DENIED_RETRY_S:
            return self._refusal[1]
        return None

    async def drained(self) -> None:
        """Wait until nothing is in line or unanswered."""
        await self._idle.wait()
