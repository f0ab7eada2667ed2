"""The frames of the jobs that are open: a file a job, or memory. Used by the journal's thread only.

A file is written and synced, then its folder, then the row that names it is committed; it is
removed after the commit of the job's final. So a row never names a file that is not on disk, and a
crash leaves files without a row at most; those are swept when the journal is opened. Their names
have a random part, which stands in the row and in the file: a number that a rollback gave back and
another job got cannot lead to the wrong frames.

Removing is not erasing: a flash card keeps the blocks until it needs them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import structlog

from edged.errors import FramesFull, FramesLost, JournalFull, JournalUnavailable, Loss
from edged.journal_schema import NO_SPACE, Damaged, sync_directory
from edged.ports import Trace

Keep = Literal["durable", "none"]

#: What stands in the row.
TOKEN: Final = re.compile(r"[0-9a-f]{16}\Z")
#: Seconds that removing what a crash left may take; what is left then goes at the next opening.
SWEEP_S = 5.0

# A file: magic, token, number of frames; size and CRC of each; CRC of all that; the frames.
_HEAD = struct.Struct(">8s16sI")
_ENTRY = struct.Struct(">QI")
_SUM = struct.Struct(">I")
_MAGIC = b"edgfrm\x00\x01"
_NAME = re.compile(r"[0-9]{1,19}-[0-9a-f]{16}\.frames\Z")
#: Trouble of this process, which says nothing about the file.
_OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Held:
    """Where the frames of an open job are, as its row says."""

    seq: int
    #: None: in memory.
    token: str | None
    bytes: int


class Frames:
    """Frames by the numbers of their jobs; what a transaction does to them is undone with it.

    Args:
        folder: Of the files; made when the first one is.
        keep: Where frames go that are put from now on; what was put before is read from where it
            is.
        quota_bytes: The most that the frames of all open jobs may have.
        trace: Told of the steps.
    """

    def __init__(self, folder: Path, *, keep: Keep, quota_bytes: int, trace: Trace) -> None:
        self._folder = folder
        self._keep = keep
        self.quota_bytes = quota_bytes
        self._trace = trace
        self._held: dict[int, Held] = {}
        self._memory: dict[int, tuple[bytes, ...]] = {}
        #: Put, and dropped, since the last commit.
        self._fresh: list[int] = []
        self._dropped: list[int] = []
        self._unsynced = False
        #: Of jobs that have ended; their files are still there.
        self._leaving: list[Held] = []
        #: Bytes that the disk would not take, and what it said.
        self._refused: tuple[int, str] | None = None
        #: Of frames that are in files or in memory.
        self.used_bytes = 0

    @property
    def jobs(self) -> int:
        """Return how many jobs have frames here."""
        return len(self._held)

    def trouble(self) -> str | None:
        """Return why the disk took no frames when it last had to, unless it has room again."""
        if self._refused is None:
            return None
        size, why = self._refused
        if (free := self._free()) is not None and free >= size:
            self._refused = None
            return None
        return why

    # A transaction's ------------------------------------------------------------------------------

    def admit(self, size: int, spare: int) -> None:
        """Do nothing if there is room for `size` bytes, and on the disk for `spare` more.

        Finals are stored on the same disk, and frames only go when finals are stored: frames must
        not take the last bytes.

        Raises:
            FramesFull: The quota is used up.
            JournalFull: The disk is.
        """
        quota = self.quota_bytes
        if self.used_bytes + size > quota:
            where = "on disk" if self._keep == "durable" else "in memory"
            raise FramesFull(
                f"the frames of waiting jobs have {self.used_bytes} of {quota} bytes {where}, and"
                f" these have {size}",
                hint="wait for jobs to end, or raise state.frames_mb"
                if size <= quota
                else "send fewer or smaller frames, or raise state.frames_mb",
                in_memory=self._keep == "none",
            )
        if self._keep == "durable" and (free := self._free()) is not None and free < size + spare:
            why = (
                f"the disk of {self._folder} has {free} bytes free: these frames have {size}, and"
                f" {spare} are left to the answers of waiting jobs"
            )
            self._refused = (size + spare, why)
            raise JournalFull(why, hint=f"free space on the file system of {self._folder}")

    def put(self, seq: int, frames: tuple[bytes, ...]) -> str | None:
        """Keep the frames of a new job; return the token for its row, None if it is in memory.

        Raises:
            JournalFull: The disk is full; nothing is left behind, as with the next.
            JournalUnavailable: Any other trouble of the disk.
        """
        size = sum(map(len, frames))
        held = Held(seq, secrets.token_hex(8) if self._keep == "durable" else None, size)
        if held.token is None:
            self._memory[seq] = frames
        else:
            self._write(self._path(held), held.token, frames)
        self._fresh.append(seq)
        self._held[seq] = held
        self.used_bytes += size
        if held.token is not None:
            self._trace("after_frames_write")
        return held.token

    def drop(self, seq: int) -> None:
        """Let the frames of a job go with this transaction."""
        if seq in self._held:
            self._dropped.append(seq)

    def sync(self) -> None:
        """Make the names of the new files last; the commit follows.

        Raises:
            JournalFull: As `put`.
            JournalUnavailable: As `put`.
        """
        if not self._unsynced:
            return
        try:
            sync_directory(self._folder)
        except OSError as error:
            raise self._problem(error, 0) from error
        self._trace("after_frames_sync")

    def committed(self) -> None:
        """Take what the transaction did as done."""
        self._fresh.clear()
        self._unsynced = False
        for seq in self._dropped:
            held = self._held.pop(seq)
            if held.token is not None:
                self._leaving.append(held)
            else:
                del self._memory[seq]
                self.used_bytes -= held.bytes
        self._dropped.clear()

    def rolled_back(self) -> None:
        """Undo what the transaction did."""
        for seq in self._fresh:
            held = self._held.pop(seq)
            if held.token is not None:
                with contextlib.suppress(OSError):  # it is swept one day
                    self._path(held).unlink()
            self._memory.pop(seq, None)
            self.used_bytes -= held.bytes
        self._fresh.clear()
        self._dropped.clear()
        self._unsynced = False

    # Outside of transactions ----------------------------------------------------------------------

    def tidy(self) -> None:
        """Remove the files of jobs that have ended; those that cannot be, the next time."""
        leaving, self._leaving = self._leaving, []
        for held in leaving:
            try:
                self._path(held).unlink(missing_ok=True)
            except OSError:
                self._leaving.append(held)
            else:
                self.used_bytes -= held.bytes
                self._trace("after_frames_unlink")

    def adopt(self, jobs: Iterable[Held]) -> None:
        """Begin anew with the frames that the rows of the open jobs name; sweep all other files."""
        rows = {held.seq: held for held in jobs}
        self._memory = {
            seq: frames
            for seq, frames in self._memory.items()
            if seq in rows and rows[seq].token is None
        }
        self._held = {
            seq: held for seq, held in rows.items() if held.token is not None or seq in self._memory
        }
        self._fresh.clear()
        self._dropped.clear()
        self._leaving.clear()
        self._unsynced = False
        self.used_bytes = sum(held.bytes for held in self._held.values())
        self._sweep({self._path(held).name for held in self._held.values() if held.token})

    def forget(self) -> None:
        """Let go of the memory."""
        self._memory.clear()
        self._held.clear()
        self._leaving.clear()
        self._refused = None
        self.used_bytes = 0

    def get(self, held: Held, count: int) -> tuple[bytes, ...]:
        """Return the frames of an open job, of which there are `count`.

        Raises:
            FramesLost: They are not what was put.
            JournalUnavailable: They cannot be read now.
        """
        if held.token is None:
            frames = self._memory.get(held.seq)
            if frames is None:
                raise FramesLost(
                    Loss.MEMORY,
                    "the frames of this job were in memory only and a restart has lost them: send"
                    " it again, and set state.frames to durable if that must not happen",
                )
            return frames
        try:
            # At most what was put: damage may have made it another file.
            content = _read(self._path(held), _index_bytes(count) + held.bytes)
            return _unpack(content, held.token, count)
        except FileNotFoundError as error:
            raise FramesLost(
                Loss.MISSING, "the frames of this job are gone from the disk: send it again"
            ) from error
        except OSError as error:
            if error.errno in _OURS:
                raise JournalUnavailable(f"frames cannot be read: {error}") from error
            raise FramesLost(Loss.DAMAGED, _damaged(error.strerror or str(error))) from error
        except Damaged as damage:
            raise FramesLost(Loss.DAMAGED, _damaged(str(damage))) from damage

    # Parts ----------------------------------------------------------------------------------------

    def _path(self, held: Held) -> Path:
        return self._folder / f"{held.seq}-{held.token}.frames"

    def _write(self, path: Path, token: str, frames: tuple[bytes, ...]) -> None:
        try:
            descriptor = self._create(path)
            try:
                for part in (_index(token, frames), *frames):
                    _write_all(descriptor, part)
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):  # it is swept one day
                    path.unlink()
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._problem(error, sum(map(len, frames))) from error
        self._unsynced = True
        self._refused = None

    def _create(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            self._folder.mkdir(mode=0o700)
            sync_directory(self._folder.parent)
            return os.open(path, flags, 0o600)

    def _problem(self, error: OSError, size: int) -> JournalUnavailable:
        full = error.errno in NO_SPACE
        why = f"frames cannot be kept in {self._folder}: {error.strerror or error}"
        # What is wrong besides a lack of room is not over because there is room.
        self._refused = (size if full else 1 << 62, why)
        hint = (
            f"free space on the file system of {self._folder}, or lower state.frames_mb"
            if full
            else f"make {self._folder} a directory that edged's user may write"
        )
        return (JournalFull if full else JournalUnavailable)(why, hint=hint)

    def _free(self) -> int | None:
        """Return the bytes that are free on the disk; None if it does not say."""
        for folder in (self._folder, self._folder.parent):
            with contextlib.suppress(OSError):
                status = os.statvfs(folder)
                return status.f_bavail * status.f_frsize if status.f_blocks else None
        return None

    def _sweep(self, wanted: set[str]) -> None:
        until = time.monotonic() + SWEEP_S
        files = size = 0
        for entry in self._files():
            if entry.name in wanted:
                continue
            with contextlib.suppress(OSError):
                bytes_ = entry.stat(follow_symlinks=False).st_size
                Path(entry).unlink()
                files, size = files + 1, size + bytes_
            if time.monotonic() > until:
                break
        if files:
            log.info("frames.swept", files=files, bytes=size)

    def _files(self) -> Iterator[os.DirEntry[str]]:
        """Yield the files that are named as ours are."""
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if _NAME.match(entry.name) and entry.is_file(follow_symlinks=False):
                    yield entry


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def _read(path: Path, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(size + 1)


def _index_bytes(count: int) -> int:
    return _HEAD.size + count * _ENTRY.size + _SUM.size


def _index(token: str, frames: tuple[bytes, ...]) -> bytes:
    head = _HEAD.pack(_MAGIC, token.encode(), len(frames))
    head += b"".join(_ENTRY.pack(len(frame), zlib.crc32(frame)) for frame in frames)
    return head + _SUM.pack(zlib.crc32(head))


def _unpack(content: bytes, token: str, count: int) -> tuple[bytes, ...]:
    """Return the frames in a file's content; raise Damaged unless it is as it was written."""
    start = _index_bytes(count)
    if len(content) < start:
        raise Damaged("the file is too short")
    head = content[: start - _SUM.size]
    if _SUM.pack(zlib.crc32(head)) != content[start - _SUM.size : start]:
        raise Damaged("the index is not what was written")
    if head[: _HEAD.size] != _HEAD.pack(_MAGIC, token.encode(), count):
        raise Damaged("the file is another job's")
    frames = []
    for number, (size, crc) in enumerate(_ENTRY.iter_unpack(head[_HEAD.size :])):
        frame = content[start : start + size]
        if len(frame) != size or zlib.crc32(frame) != crc:
            raise Damaged(f"frame {number} is not what was written")
        frames.append(frame)
        start += size
    if start != len(content):
        raise Damaged("the file is too long")
    return tuple(frames)


def _damaged(why: str) -> str:
    return f"the frames of this job cannot be read from the disk ({why}): send it again"
