"""deploy/brokers/make-certs.sh: what it makes is right for its use, and nothing is overwritten."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.kit.daemon import ROOT

SCRIPT = ROOT / "deploy" / "brokers" / "make-certs.sh"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def make(directory: Path, *arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        [SCRIPT, directory, *arguments], check=False, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert not list(directory.glob(".work*")), "it leaves something behind"
    return done.stdout + done.stderr


def openssl(*arguments: object) -> str:
    """Run openssl; return what it prints, "" if it says no."""
    done = subprocess.run(
        ["openssl", *map(str, arguments)], check=False, capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else ""


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_certificates_are_for_their_use_only(tmp_path: Path) -> None:
    make(tmp_path, "server", "broker.lan", "192.168.1.5", "::1")
    make(tmp_path, "client", "door", "d_2-x")
    server, client = tmp_path / "server.pem", tmp_path / "clients/door.pem"
    verify = ("verify", "-x509_strict", "-CAfile", tmp_path / "ca.pem", "-purpose")
    assert openssl(*verify, "sslserver", server)
    assert openssl(*verify, "sslclient", client)
    assert not openssl(*verify, "sslclient", server), "the broker could be a user"
    assert not openssl(*verify, "sslserver", client), "a user could be the broker"
    for name in (
        ("-verify_hostname", "broker.lan"),
        ("-verify_ip", "192.168.1.5"),
        ("-verify_ip", "::1"),
    ):
        assert openssl(*verify, "sslserver", *name, server)
    assert not openssl(*verify, "sslserver", "-verify_hostname", "elsewhere.lan", server)
    assert openssl("x509", "-in", client, "-noout", "-subject").strip() == "subject=CN = door"
    for key in tmp_path.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_nothing_is_overwritten_and_what_is_missing_is_made(tmp_path: Path) -> None:
    make(tmp_path, "client", "door")
    make(tmp_path, "server", "broker.lan")
    before = contents(tmp_path)
    make(tmp_path, "server", "broker.lan")
    assert "left as it is" in make(tmp_path, "client", "door", "gate")
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {Path(name).name for name in set(after) - set(before)} == {"gate.pem", "gate.key"}
    assert "for other names" in make(tmp_path, "server", "broker.lan", "10.0.0.1", status=1)
    assert contents(tmp_path) == after

    (tmp_path / "clients/door.pem").unlink()  # renewed: the key stays
    make(tmp_path, "client", "door")
    renewed = contents(tmp_path)
    changed = {Path(name).name for name in after if renewed[name] != after[name]}
    assert changed == {"door.pem"}
    (tmp_path / "ca.key").unlink()
    assert "ca.key" in make(tmp_path, "client", "hall", status=1)
    (tmp_path / "clients/door.key").unlink()
    (tmp_path / "ca.key").touch()
    assert "not its key" in make(tmp_path, "client", "door", status=1)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["client", "a/b"], 1),
        (["client", "door", "+"], 1),
        (["client", ""], 1),
        (["client", "x" * 65], 1),
        (["server", "broker,DNS:evil"], 1),
        (["server"], 2),
        (["clients", "door"], 2),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, arguments: list[str], status: int) -> None:
    assert make(tmp_path, *arguments, status=status)
    assert not list(tmp_path.rglob("*.pem"))


def test_no_openssl_is_said(tmp_path: Path) -> None:
    path = tmp_path / "bin"
    path.mkdir()
    for name in ("sh", "mkdir", "mktemp", "rm", "cat", "mv", "chmod", "sed"):
        (path / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [SCRIPT, tmp_path / "certs", "client", "door"],
        check=False, capture_output=True, text=True, env={"PATH": str(path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert "openssl" in done.stderr
