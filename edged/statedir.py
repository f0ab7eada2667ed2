"""The state directory: made private, and held by one edged at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from edged.errors import ConfigError, StateDirLocked

_LOCK_NAME = "lock"


class StateDir:
    """A directory that only its owner may read, locked while this object holds it.

    The lock is flock(2)'s: the kernel lets it go when the process ends, however it ends. It is held
    by a descriptor that programs started by edged do not inherit.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: What is not as it should be though it works, or None; known once it is locked.
        self.warning: str | None = None
        self._descriptor: int | None = None

    def lock(self) -> None:
        """Make the directory if it is missing, take group's and others' rights away, and lock it.

        Raises:
            StateDirLocked: Another process holds it.
            ConfigError: It cannot be made or written.
        """
        if self._descriptor is not None:
            return
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._make_private()
            descriptor = os.open(
                self.path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise ConfigError([f"state.dir: {self.path}: {error.strerror or error}"]) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                raise ConfigError(
                    [f"state.dir: {self.path} cannot be locked: {error.strerror or error}"]
                ) from error
            raise StateDirLocked(
                f"the state directory {self.path} is in use by another edged{holder}",
                hint="stop that one, or give this one a state.dir of its own",
            ) from error
        self._descriptor = descriptor
        # For the message of another one only, which a full disk need not be able to give.
        with suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def unlock(self) -> None:
        """Let another process have it."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.lock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unlock()

    def _make_private(self) -> None:
        if stat.S_IMODE(self.path.stat().st_mode) & 0o077 == 0:
            return
        try:
            self.path.chmod(0o700)
        except PermissionError:
            self.warning = f"{self.path} belongs to another user and others may read it"
            return
        if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
            self.warning = (
                f"{self.path} is on a file system without permissions: others may read it"
            )


def _holder(descriptor: int) -> str:
    """Return the process that wrote the lock file, for a message."""
    pid = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
    return f" (process {pid})" if pid.isdecimal() else ""
