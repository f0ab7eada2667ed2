"""A real mosquitto as a child process, and certificates for it."""

from __future__ import annotations

import itertools
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAM = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
PASSWD = shutil.which("mosquitto_passwd")

_STARTS_WITHIN_S = 10.0


def free_port() -> int:
    """Return a TCP port of the loopback that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert isinstance(port, int)
        return port


class Mosquitto:
    """A broker on a port of its own that stays the same over restarts.

    Args:
        directory: For its configuration, log and database.
        config: More lines for mosquitto.conf, for its one listener.
        persistence: Keep sessions and messages over `kill`, written at every change.
        acl: The text of an ACL file.
        passwords: User names with their passwords; with any, nobody else gets in.
        tls: Certificates; a client's own is asked for with `require_certificate true` in `config`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: str = "",
        persistence: bool = False,
        acl: str | None = None,
        passwords: dict[str, str] | None = None,
        tls: Certificates | None = None,
    ) -> None:
        self.directory = directory
        self.host = "localhost" if tls else "127.0.0.1"
        self.port = free_port()
        self._extra = config
        self._persistence = persistence
        self._acl = acl
        self._passwords = passwords or {}
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What mosquitto has said, over all its starts."""
        path = self.directory / "mosquitto.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _config(self) -> str:
        lines = [
            f"listener {self.port} 127.0.0.1",
            f"allow_anonymous {'false' if self._passwords else 'true'}",
            "user root",  # else it gives up root, and with it its own directory
            "log_dest stdout",
            "log_type all",
        ]
        if self._persistence:
            lines += [
                "persistence true",
                f"persistence_location {self.directory}/",
                "autosave_on_changes true",
                "autosave_interval 1",
            ]
        if self._acl is not None:
            path = self.directory / "acl"
            path.write_text(self._acl)
            lines.append(f"acl_file {path}")
        if self._passwords:
            assert PASSWD is not None
            path = self.directory / "passwords"
            path.touch()
            for name, password in self._passwords.items():
                subprocess.run([PASSWD, "-b", str(path), name, password], check=True)
            lines.append(f"password_file {path}")
        if self._tls is not None:
            lines += [
                f"cafile {self._tls.ca}",
                f"certfile {self._tls.cert}",
                f"keyfile {self._tls.key}",
            ]
        return "\n".join([*lines, self._extra, ""])

    def start(self) -> None:
        """Start it and wait until it listens."""
        assert PROGRAM is not None, "mosquitto is not installed"
        assert self._process is None
        path = self.directory / "mosquitto.conf"
        path.write_text(self._config())
        with (self.directory / "mosquitto.log").open("ab") as output:
            self._process = subprocess.Popen(
                [PROGRAM, "-c", str(path)], stdout=output, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + _STARTS_WITHIN_S
        while True:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"mosquitto did not start:\n{self.log}")
            time.sleep(0.005)  # there is nothing to wait on but the port itself

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: it says goodbye to its clients and saves."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(number)
            process.wait(10)

    def save(self) -> None:
        """Have it write its database, and wait until it is written.

        Even with `autosave_on_changes` it acknowledges first and saves after, the last change not
        at all until there is another: what it loses when killed in between is its own loss.
        """
        assert self._process is not None
        database = self.directory / "mosquitto.db"
        before = database.stat().st_mtime_ns if database.exists() else None
        self._process.send_signal(signal.SIGUSR1)
        until = time.monotonic() + _STARTS_WITHIN_S
        while not database.exists() or database.stat().st_mtime_ns == before:
            assert time.monotonic() < until, "mosquitto does not save"
            time.sleep(0.005)

    def restart(self) -> None:
        """Kill it and start it again on the same port."""
        self.kill()
        self.start()


# Certificates -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths of PEM files: a CA, and a certificate it signed with its key."""

    ca: str
    cert: str
    key: str


class Authority:
    """A certificate authority in a directory, by the `openssl` program."""

    _CONFIG = """
[ca]
default_ca = here
[here]
dir = {directory}
new_certs_dir = $dir
database = $dir/index.txt
rand_serial = yes
default_md = sha256
policy = any
[any]
commonName = supplied
"""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory / name
        self._directory.mkdir()
        self._numbers = itertools.count()
        (self._directory / "index.txt").touch()
        (self._directory / "index.txt.attr").write_text("unique_subject = no\n")
        (self._directory / "ca.cnf").write_text(self._CONFIG.format(directory=self._directory))
        self.ca = str(self._directory / "ca.pem")
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *(
                "-nodes",
                "-keyout",
                "ca.key",
                "-out",
                "ca.pem",
                "-days",
                "2",
                "-subj",
                f"/CN={name}",
            ),
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments],
            check=False,
            cwd=self._directory,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def issue(
        self, common_name: str, *, start: str | None = None, end: str | None = None
    ) -> Certificates:
        """Return a certificate for this name; times as YYYYMMDDHHMMSSZ, default now and a day."""
        stem = f"{next(self._numbers)}"
        extensions = self._directory / f"{stem}.ext"
        alternative = "DNS:localhost,IP:127.0.0.1" if common_name == "localhost" else ""
        extensions.write_text(
            f"subjectAltName={alternative or f'DNS:{common_name}'}\n"
            "authorityKeyIdentifier=keyid\nkeyUsage=digitalSignature\n"
            "extendedKeyUsage=serverAuth,clientAuth\n"
        )
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", f"{stem}.key", "-out", f"{stem}.csr", "-subj", f"/CN={common_name}"),
        )
        dates = ["-startdate", start or "20200101000000Z"]
        dates += ["-enddate", end] if end else ["-days", "1"]
        self._openssl(
            *("ca", "-batch", "-notext", "-config", "ca.cnf", "-cert", "ca.pem"),
            *("-keyfile", "ca.key", "-in", f"{stem}.csr", "-out", f"{stem}.pem"),
            *("-extfile", extensions.name, *dates),
        )
        return Certificates(
            self.ca, str(self._directory / f"{stem}.pem"), str(self._directory / f"{stem}.key")
        )
