"""A journal for tests: drafts, the files of a journal, and a child process that works on one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from edged.jobs import Draft, Job, Key, Kind, Reply, Stamp
from edged.journal import Accepted, Journal, Opened
from edged.testing import ManualClock

NAME = "journal.db"
ROOT = Path(__file__).parents[2]


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory in memory where there is one: a sync costs nothing there."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


def journal(directory: Path, **changes: Any) -> Journal:
    """A journal with roomy limits and a clock that stands still."""
    settings: dict[str, Any] = {
        "clock": ManualClock(),
        "quota_bytes": 64 * 1024 * 1024,
        "results": 100,
        "results_s": 86400.0,
        "max_final_bytes": 8 * 1024,
    }
    return Journal(directory / NAME, **{**settings, **changes})


@asynccontextmanager
async def opened(directory: Path, **changes: Any) -> AsyncIterator[tuple[Journal, Opened]]:
    """An open journal, closed at the end."""
    it = journal(directory, **changes)
    found = await it.open()
    try:
        yield it, found
    finally:
        await it.close()


def draft(
    name: str = "a",
    prompt: str = "hello",
    *,
    client: str | None = "c",
    reply: Reply | None = None,
    arrived: Stamp | None = None,
    **changes: Any,
) -> Draft:
    """A draft whose digest follows from its prompt."""
    return Draft(
        key=Key(client, name),
        kind=changes.pop("kind", Kind.TEXT),
        request={"prompt": prompt},
        digest=hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest(),
        reply=reply or Reply(f"edged/reply/{name}"),
        priority=changes.pop("priority", 5),
        arrived=arrived or ManualClock().stamp(),
        deadline_s=changes.pop("deadline_s", None),
        **changes,
    )


async def accepted(it: Journal, name: str = "a", prompt: str = "hello", **changes: Any) -> Job:
    """A job that the journal has just taken."""
    answer = await it.accept(draft(name, prompt, **changes))
    assert isinstance(answer, Accepted)
    return answer.job


def copy_files(source: Path, target: Path) -> Path:
    """Copy a journal's files, as a crash at this moment would leave them."""
    target.mkdir(parents=True, exist_ok=True)
    for suffix in ("", "-wal"):
        file = source / f"{NAME}{suffix}"
        if file.exists():
            shutil.copyfile(file, target / file.name)
    if (source / "frames").exists():
        shutil.copytree(source / "frames", target / "frames", dirs_exist_ok=True)
    return target


def frame_files(directory: Path) -> list[Path]:
    """The files with frames, in the order of their jobs."""
    found = (directory / "frames").glob("*")
    return sorted(found, key=lambda file: int(file.name.partition("-")[0]))


def bytes_of(directory: Path) -> bytes:
    """All bytes of all files in a directory."""
    return b"".join(file.read_bytes() for file in sorted(directory.iterdir()) if file.is_file())


def child_environment() -> dict[str, str]:
    """The environment in which a child finds this repository."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_child(
    script: str, *arguments: str, prefix: tuple[str, ...] = (), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run Python source in a process of its own, with this repository importable."""
    return subprocess.run(
        [*prefix, sys.executable, "-W", "error", "-c", script, *arguments],
        env=child_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def say(*values: Any) -> None:
    """Write a line that `lines_of` reads, at once: a child may not live to flush."""
    os.write(1, json.dumps(values).encode() + b"\n")


def lines_of(output: str) -> list[Any]:
    """Read what a child said: a JSON value a line."""
    return [json.loads(line) for line in output.splitlines()]
