"""Helpers of the engine's tests."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from edged.engine.host import EngineHost
from edged.engine.messages import Order
from edged.ports import Completed, Delta, Look, Progress, Task, Turn, Update

PHI3 = Path(__file__).resolve().parents[1] / "models" / "phi3"
_OF_LOOK = ("detail", "window_min", "left_s", "plan")
PHI4 = Path(__file__).resolve().parents[1] / "models" / "phi4-mini"


def order(path: Path = PHI3, **changes: Any) -> Order:
    """An order for a small model."""
    return Order(model="small", path=str(path), **changes)


def task(prompt: str, job: int = 1, client: str | None = "c", **changes: Any) -> Task:
    """A task with one question."""
    return Task(job=job, client=client, messages=({"role": "user", "content": prompt},), **changes)


def frames(count: int, size: int = 64) -> tuple[bytes, ...]:
    """Different frames: PNG, `size` pixels a side, each of one colour."""
    return tuple(_png(size, bytes((n * 37 % 256, n * 91 % 256, n % 256))) for n in range(count))


def _png(size: int, colour: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    head = size.to_bytes(4) * 2 + bytes((8, 2, 0, 0, 0))
    rows = (b"\0" + colour * size) * size
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def seeing(
    prompt: str, pictures: Sequence[bytes] = frames(2), job: int = 1, **changes: Any
) -> Task:
    """A task with one question about frames; `changes` may be the task's or the look's."""
    of_task = {name: changes.pop(name) for name in tuple(changes) if name not in _OF_LOOK}
    content: list[str | int] = [*range(len(pictures)), prompt]
    look = Look(frames=tuple(pictures), **changes)
    turn: Turn = {"role": "user", "content": content}
    return Task(job=job, client="c", messages=(turn,), look=look, **of_task)


@asynccontextmanager
async def running(host: EngineHost) -> AsyncIterator[EngineHost]:
    """Run a host, and see that nothing of it stays."""
    runner = asyncio.create_task(host.run())
    try:
        yield host
    finally:
        pid = host.pid
        await asyncio.wait_for(host.close(), 20)
        await asyncio.wait_for(runner, 5)
        assert not alive(pid)


def alive(pid: int | None) -> bool:
    """Tell whether a process of ours is there."""
    return pid is not None and Path(f"/proc/{pid}").exists()


async def updates(host: EngineHost, task_: Task) -> list[Update]:
    """All that happens to a task that succeeds."""
    return [update async for update in host.execute(task_)]


async def completed(host: EngineHost, task_: Task) -> Completed:
    """The end of a task that succeeds."""
    last = (await updates(host, task_))[-1]
    assert isinstance(last, Completed)
    return last


async def text(host: EngineHost, task_: Task) -> str:
    """The answer of a task that succeeds; its deltas are looked at too."""
    happened = await updates(host, task_)
    last = happened[-1]
    assert isinstance(last, Completed)
    assert "".join(u.text for u in happened if isinstance(u, Delta)) == last.answers[0].text
    return last.answers[0].text


async def reach(stream: AsyncIterator[Update], stage: str, done: int = 0) -> None:
    """Read a task's updates until it is in a stage."""
    async for update in stream:
        if isinstance(update, Progress) and update.stage == stage and update.done >= done:
            return
    raise AssertionError(f"{stage} was never reached")


async def eventually(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Wait for a condition; what it gives is returned."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.005)
    return value
