"""A bus listener that notes everything, and a bus that runs while a test does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from tenacity import wait_fixed

from edged.mqtt import Patience
from edged.ports import Bus, Incoming, Session

PATIENCE_S = 15.0

#: Tries again almost at once.
FAST = Patience(retry=wait_fixed(0.05))


class Recorder:
    """Notes what the bus says; `acks` acknowledges each message at once."""

    def __init__(self, *, acks: Bus | None = None) -> None:
        self.sessions: list[Session] = []
        self.subscribed: list[tuple[str, ...]] = []
        self.reasons: list[str] = []
        self.messages: list[Incoming] = []
        self.acks = acks
        #: Raised by the next calls.
        self.fail: Exception | None = None
        self._changed = asyncio.Event()

    def _note(self) -> None:
        self._changed.set()
        if self.fail is not None:
            raise self.fail

    def on_connected(self, session: Session) -> None:
        self.sessions.append(session)
        self._note()

    def on_subscribed(self, refused: tuple[str, ...]) -> None:
        self.subscribed.append(refused)
        self._note()

    def on_disconnected(self, reason: str) -> None:
        self.reasons.append(reason)
        self._note()

    def on_message(self, message: Incoming) -> None:
        self.messages.append(message)
        if self.acks is not None:
            self.acks.ack(message.receipt)
        self._note()

    @property
    def bodies(self) -> list[bytes | None]:
        return [message.payload for message in self.messages]

    async def until(self, condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
        """Wait until the condition holds, looking at every event."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(
                f"not in {timeout_s} s; sessions {self.sessions}, reasons {self.reasons},"
                f" {len(self.messages)} messages, the last {self.messages[-3:]}"
            ) from None

    async def until_connected(self, times: int = 1, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the subscriptions were answered for the n-th time."""
        await self.until(lambda: len(self.subscribed) >= times, timeout_s)


async def eventually(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    """Wait for what nothing announces, by looking again and again."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def either(*waits: Coroutine[Any, Any, None]) -> None:
    """Wait until one of these is over."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for task in done:
        task.result()


@asynccontextmanager
async def running(bus: Bus, recorder: Recorder) -> AsyncIterator[asyncio.Task[None]]:
    """Run a bus; at the end it is cancelled, as by a daemon that is told to stop at once."""
    task = asyncio.create_task(bus.run(recorder), name="bus")
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
