"""Short work in the background that nobody awaits, kept referenced and never failing unseen."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from edged.errors import EdgedError

log = structlog.get_logger()


class Background:
    """Holds running tasks; `failed` is set to the first error that is a bug and not an event."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failed: asyncio.Future[None] | None = None

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> None:
        """Run this now, on the side."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, EdgedError):
            log.warning("task.failed", task=task.get_name(), reason=error.message)
        else:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Have `watch` raise this error, of a task or of a callback; the first one wins."""
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)
        else:
            log.error("task.failed", reason=repr(error), exc_info=error)

    async def watch(self) -> None:
        """Wait for ever, or until a task fails in a way that nobody foresaw; then raise that."""
        self._failed = asyncio.get_running_loop().create_future()
        try:
            await self._failed
        finally:
            for task in self._tasks:
                task.cancel()

    async def settle(self) -> None:
        """Wait until every task has ended."""
        while self._tasks:
            await asyncio.wait(self._tasks)
