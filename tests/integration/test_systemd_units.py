"""The unit files: what systemd itself says of them, and what they must agree on with the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from edged.app import STOP_S
from edged.jobs import MAX_DEATHS
from edged.options import Settings
from tests.kit.unit import DROP_INS, SERVICE, SYSTEMD, last, read, seconds

#: Where a box keeps the units that ours refers to.
VENDOR = Path("/usr/lib/systemd/system")
NAMES = sorted(path.stem for path in DROP_INS.glob("*.conf"))

#: What systemd learned after 249 and one might want here, with the version that has it first.
TOO_NEW = {
    "ExitType": 250,
    "LoadCredentialEncrypted": 250,
    "SetCredentialEncrypted": 250,
    "RestrictFileSystems": 250,
    "RestrictNetworkInterfaces": 250,
    "ConditionCredential": 252,
    "MemoryZSwapMax": 253,
    "OpenFile": 253,
    "ReloadSignal": 253,
    "FileDescriptorStorePreserve": 254,
    "ImportCredential": 254,
    "MemoryPressureThresholdSec": 254,
    "MemoryPressureWatch": 254,
    "RestartMaxDelaySec": 254,
    "RestartMode": 254,
    "RestartSteps": 254,
    "SurviveFinalKillSignal": 255,
    "PrivatePIDs": 257,
}
#: And values of older directives: directive, value, version.
TOO_NEW_VALUES = {
    ("Type", "notify-reload", 253),
    ("PrivateTmp", "disconnected", 257),
    ("ProtectControlGroups", "strict", 257),
    ("PrivateUsers", "identity", 257),
}


def systemd(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of systemd's; every one of them is given a root of its own to look at."""
    assert any(each.startswith("--root=") for each in command), "this machine is not ours to change"
    program = shutil.which(command[0])
    assert program is not None, f"{command[0]} is not installed: apt install systemd"
    return subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, timeout=60, check=False
    )


Box = Callable[..., str]


@pytest.fixture(name="box")
def _box(tmp_path: Path) -> Box:
    """A file system on which edged is installed; returns the option that names it."""

    def make(*drop_ins: str) -> str:
        root = tmp_path / "root"
        units = root / "etc/systemd/system"
        (units / "edged.service.d").mkdir(parents=True)
        shutil.copy(SERVICE, units)
        for name in drop_ins:
            shutil.copy(DROP_INS / f"{name}.conf", units / "edged.service.d")
        shutil.copytree(VENDOR, root / "usr/lib/systemd/system", symlinks=True)
        (root / "lib").symlink_to("usr/lib")
        program = root / "opt/edged/bin/edged"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        return f"--root={root}"

    return make


@pytest.mark.parametrize("drop_ins", [[], *([name] for name in NAMES), NAMES], ids="+".join)
def test_systemd_finds_nothing_wrong(box: Box, drop_ins: list[str]) -> None:
    done = systemd("systemd-analyze", box(*drop_ins), "verify", "--man=no", "edged.service")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("drop_ins", "threshold"),
    [((), 20), (("v4l2",), 20), (("pi-sensors", "v4l2"), 20), (("cuda",), 25), (("jetson",), 25)],
)
def test_systemd_finds_it_safe_enough(box: Box, drop_ins: tuple[str, ...], threshold: int) -> None:
    done = systemd(
        "systemd-analyze", box(*drop_ins), "security", "--offline=true", f"--threshold={threshold}",
        "--no-pager", "edged.service",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level for edged.service" in done.stdout


def test_systemd_249_knows_every_directive() -> None:
    lines = read(SERVICE, *DROP_INS.glob("*.conf"))
    assert len(lines) > 60
    newer = {name: TOO_NEW[name] for _, name, _ in lines if name in TOO_NEW}
    newer |= {
        name: since for name, value, since in TOO_NEW_VALUES if ("Service", name, value) in lines
    }
    assert newer == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_user_and_folders_are_made_and_made_again(box: Box, tmp_path: Path) -> None:
    root = box()
    made = systemd("systemd-sysusers", root, str(SYSTEMD / "edged.sysusers"))
    assert made.returncode == 0, made.stderr
    etc, lib = tmp_path / "root/etc", tmp_path / "root/var/lib/edged"
    user = re.search(r"^edged:x:(\d+):(\d+):.*:/var/lib/edged:/usr/sbin/nologin$",
                     (etc / "passwd").read_text(), re.MULTILINE)  # fmt: skip
    assert user is not None
    for _ in range(2):  # each boot does it
        made = systemd("systemd-tmpfiles", root, "--create", str(SYSTEMD / "edged.tmpfiles"))
        assert (made.returncode, made.stderr) == (0, "")
    found = {
        path: (path.stat().st_uid, path.stat().st_mode & 0o777)
        for path in (etc / "edged", etc / "edged/credentials", lib, lib / "models")
    }
    assert list(found.values()) == [(0, 0o755), (0, 0o700), (int(user[1]), 0o700), (0, 0o755)]


# What unit and code must agree on ---------------------------------------------------------------


def test_a_missing_credential_has_something_to_fall_back_to() -> None:
    lines = read(SERVICE)
    loaded = [value.split(":") for _, name, value in lines if name == "LoadCredential"]
    given = [value for _, name, value in lines if name == "SetCredential"]
    assert loaded
    assert all(path == f"/etc/edged/credentials/{name}" for name, path in loaded)
    assert given == [rf"{name}:\x00" for name, _ in loaded]


def test_every_file_that_the_daemon_reads_can_be_a_credential() -> None:
    wanted = {
        f"{section}-{name.removesuffix('_file')}"
        for section in ("mqtt", "cameras")
        for name, field in type(getattr(Settings(), section)).model_fields.items()
        if name in {"password_file", "ca", "cert", "key"}
    }
    lines = read(SERVICE)
    assert {v.split(":")[0] for _, name, v in lines if name == "LoadCredential"} == wanted


def test_a_stop_fits_its_time() -> None:
    assert seconds(last(read(SERVICE), "TimeoutStopSec")) >= Settings().state.stop_s + STOP_S


def test_what_ends_at_once_ends_as_failed_and_a_deadly_job_does_not() -> None:
    lines = read(SERVICE)
    burst = int(last(lines, "StartLimitBurst"))
    interval, pause = (
        seconds(last(lines, each)) for each in ("StartLimitIntervalSec", "RestartSec")
    )
    assert burst * (pause + 5) < interval
    assert burst > 3 * MAX_DEATHS


def test_what_is_right_on_one_box_only_stands_in_a_drop_in() -> None:
    devices = {"DeviceAllow", "PrivateDevices", "SupplementaryGroups"}
    assert [value for _, name, value in read(SERVICE) if name in devices] == ["yes"]
    for path in DROP_INS.glob("*.conf"):
        # DeviceAllow without it does nothing: a private /dev has no device in it.
        assert ("Service", "PrivateDevices", "no") in read(path), path.name
