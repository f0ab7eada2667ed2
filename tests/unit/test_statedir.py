"""The state directory: private, and one edged's at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from edged.errors import ConfigError, StateDirLocked
from edged.statedir import StateDir


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "var" / "edged"
    with StateDir(path) as it:
        assert mode(path) == 0o700
        assert mode(path / "lock") == 0o600
        assert it.warning is None


def test_one_that_others_may_read_is_made_private(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with StateDir(tmp_path) as it:
        assert mode(tmp_path) == 0o700
        assert it.warning is None


@pytest.mark.parametrize("refuses", [True, False])
def test_one_that_cannot_be_made_private_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, refuses: bool
) -> None:
    def chmod(_path: Path, _mode: int) -> None:
        if refuses:
            raise PermissionError(errno.EPERM, "not the owner")

    tmp_path.chmod(0o750)
    monkeypatch.setattr(Path, "chmod", chmod)
    with StateDir(tmp_path) as it:
        assert "others may read it" in (it.warning or "")
        assert str(tmp_path) in (it.warning or "")


def test_a_second_one_is_told_who_has_it(tmp_path: Path) -> None:
    first, second = StateDir(tmp_path), StateDir(tmp_path)
    first.lock()
    first.lock()
    with pytest.raises(StateDirLocked) as caught:
        second.lock()
    assert str(tmp_path) in caught.value.message
    assert str(os.getpid()) in caught.value.message
    assert "state.dir" in (caught.value.hint or "")
    first.unlock()
    first.unlock()
    second.lock()
    second.unlock()


def test_a_holder_that_left_no_number(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateDirLocked, match=r"another edged$"):
            StateDir(tmp_path).lock()


def test_programs_started_by_us_do_not_hold_it(tmp_path: Path) -> None:
    with StateDir(tmp_path) as it:
        assert it._descriptor is not None
        assert not os.get_inheritable(it._descriptor)


def test_a_place_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"state\.dir.*exists"):
        StateDir(tmp_path / "file").lock()

    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="No locks available"):
        StateDir(tmp_path).lock()
