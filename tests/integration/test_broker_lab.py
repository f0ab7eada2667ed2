"""F40, the security lab: mosquitto with the files in deploy/brokers, exactly as they ship.

Only paths and the port are put in place of the shipped ones. The files are included by a main file
that is Debian's, the certificates come from the shipped script, and users beyond those in the ACL
file are made as deploy/brokers/README.md says: by copying a block.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from edged.settings import Settings, packet_bytes
from tests.kit.daemon import ROOT, Daemon
from tests.kit.frames import digests, marked
from tests.kit.mosquitto import PASSWD, PROGRAM, Mosquitto
from tests.kit.observer import Observer

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(PROGRAM is None or PASSWD is None, reason="mosquitto is not installed"),
]

SHIPPED = ROOT / "deploy" / "brokers"
PASSWORD = "right"
DENIED = 0x87
#: Seconds a wait lasts before it fails the test.
PATIENCE_S = 90.0

Variant = Literal["tls", "mtls"]

#: What Debian's package has as /etc/mosquitto/mosquitto.conf.
DEBIAN = """\
pid_file /run/mosquitto/mosquitto.pid
persistence true
persistence_location /var/lib/mosquitto/
log_dest file /var/log/mosquitto/mosquitto.log
include_dir /etc/mosquitto/conf.d
"""

#: What is started here.
TRIED = ("edged.conf", "listener-tls.conf", "listener-mtls.conf", "acl")

#: How deploy/brokers/README.md makes a user out of another's block.
COPY_A_BLOCK = (
    r"""printf '%s\n\n' "$(sed -n '/^user {old}\(-cameras\)*$/,/^$/p' acl"""
    """ | sed 's/{old}/{new}/g')" >> acl"""
)

#: Users that are made from a block of the ACL file.
COPIES = {"gate": "door", "porch": "yard", "hall": "desk"}


def placed(text: str, **places: str) -> str:
    """Return a shipped text with other paths and another port; each must be there."""
    for old, new in places.items():
        assert old in text
        text = text.replace(old, new)
    return text


class Shipped(Mosquitto):
    """A broker with the shipped files."""

    def __init__(self, directory: Path, variant: Variant, certificates: Path) -> None:
        super().__init__(directory)
        self.host = "localhost"
        self.variant = variant
        self.certificates = certificates
        drop_ins = directory / "conf.d"
        drop_ins.mkdir()
        etc = {"/etc/mosquitto/passwords": f"{directory}/passwords"}
        etc["/etc/mosquitto/acl"] = f"{directory}/acl"
        text = placed((SHIPPED / "mosquitto/edged.conf").read_text(), **etc)
        (drop_ins / "edged.conf").write_text(text)
        name = f"listener-{variant}.conf"
        text = (SHIPPED / "mosquitto" / name).read_text()
        port = {"tls": "listener 8883", "mtls": "listener 8884"}[variant]
        etc = {port: f"listener {self.port} 127.0.0.1", "/etc/mosquitto/certs": f"{certificates}"}
        (drop_ins / name).write_text(placed(text, **etc))
        self.acl = directory / "acl"
        self.acl.write_text((SHIPPED / "mosquitto/acl").read_text())
        for new, old in COPIES.items():
            command = COPY_A_BLOCK.format(old=old, new=new)
            subprocess.run(["bash", "-ec", command], cwd=directory, check=True)
        passwords = directory / "passwords"
        passwords.touch()
        assert PASSWD is not None
        for user in self.users:
            subprocess.run([PASSWD, "-b", str(passwords), user, PASSWORD], check=True)

    @property
    def users(self) -> list[str]:
        """Who has a block in the ACL file."""
        return re.findall(r"^user (.+)$", self.acl.read_text(), re.MULTILINE)

    def _config(self) -> str:
        places = {"/run/mosquitto/mosquitto.pid": f"{self.directory}/pid"}
        places["/var/lib/mosquitto/"] = f"{self.directory}/"
        places["/var/log/mosquitto/mosquitto.log"] = f"{self.directory}/mosquitto.log"
        places["/etc/mosquitto/conf.d"] = f"{self.directory}/conf.d"
        return f"user root\n{placed(DEBIAN, **places)}"


class Composed(Shipped):
    """The same with the configuration of compose.yaml's broker."""

    def _config(self) -> str:
        text = (SHIPPED.parent / "compose-mosquitto.conf").read_text()
        places = {"/mosquitto/data": str(self.directory)}
        places["/etc/mosquitto/conf.d"] = f"{self.directory}/conf.d"
        return f"user root\n{placed(text, **places)}"


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the shipped script makes for the broker and for every user of the lab."""
    directory = tmp_path_factory.mktemp("certificates")
    users = re.findall(r"^user (.+)$", (SHIPPED / "mosquitto/acl").read_text(), re.MULTILINE)
    make_certs(directory, "server", "localhost", "127.0.0.1")
    make_certs(directory, "client", *users, *COPIES, "gate-cameras")
    return directory


def make_certs(*arguments: object) -> None:
    subprocess.run([SHIPPED / "make-certs.sh", *map(str, arguments)], check=True)


@pytest.fixture(params=["tls", "mtls"])
def broker(request: pytest.FixtureRequest, tmp_path: Path, certificates: Path) -> Iterator[Shipped]:
    with Shipped(tmp_path, request.param, certificates) as started:
        yield started


def account(broker: Shipped, user: str) -> dict[str, Any]:
    """Return what an observer needs to connect as a user."""
    found = {"host": broker.host, "ca": f"{broker.certificates}/ca.pem"}
    if broker.variant == "tls":
        return found | {"username": user, "password": PASSWORD}
    clients = f"{broker.certificates}/clients"
    return found | {"cert": f"{clients}/{user}.pem", "key": f"{clients}/{user}.key"}


def observe(broker: Shipped, user: str, *filters: str, **options: Any) -> Observer:
    return Observer(
        broker.port, "edged/door", filters=filters, only=True, documented=False,
        **account(broker, user), **options,
    )  # fmt: skip


def tool(broker: Shipped, program: str, user: str, *arguments: str) -> list[str]:
    """Return the command line of mosquitto's own client, as a user."""
    options = {"host": "-h", "ca": "--cafile", "username": "-u", "password": "-P"}
    command = [program, "-V", "5", "-p", str(broker.port)]
    for name, value in account(broker, user).items():
        command += [options.get(name, f"--{name}"), value]
    return [*command, *arguments]


def until(look: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def logged(broker: Shipped, text: str, count: int) -> bool:
    return broker.log.count(text) == count


# Rights -----------------------------------------------------------------------------------------

EVERYONE = ("operator", "desk", "hall", "monitor")
#: Of topics: who may write, who may read them.
RIGHTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # Requests: in one's own name only, and by clients only.
    "edged/door/request/text": ((), ()),
    "edged/door/request/text/desk": (("desk",), ("door", "operator")),
    "edged/door/request/vision/desk": (("desk",), ("door", "operator")),
    "edged/door/request/cancel/desk": (("desk",), ("door", "operator")),
    "edged/gate/request/text/desk": (("desk",), ("gate", "operator")),
    "edged/door/request/text/hall": (("hall",), ("door", "operator")),
    "edged/door/request/text/operator": (("operator",), ("door", "operator")),
    "edged/door/request/text/door": ((), ()),
    "edged/gate/request/text/door": ((), ()),
    "edged/door/request/vision/yard": ((), ()),
    "edged/door/request/text/monitor": ((), ()),
    # Answers: by the box asked, to whom they are for.
    "edged/door/response/q1": (("door",), ("operator",)),
    "edged/door/response/desk/q1": (("door",), ("operator", "desk")),
    "edged/gate/response/desk/q1": (("gate",), ("operator", "desk")),
    "edged/door/response/hall/q1": (("door",), ("operator", "hall")),
    "edged/door/refused": (("door",), ("operator",)),
    "edged/reply/desk/q1": (("door", "gate"), ("operator", "desk")),
    "edged/reply/other": (("door", "gate"), ("operator",)),
    # What a box says of itself.
    "edged/door/status": (("door",), ("door", *EVERYONE)),
    "edged/gate/status": (("gate",), ("gate", *EVERYONE)),
    "edged/door/info": (("door",), EVERYONE),
    "edged/door/health": (("door",), ("operator", "monitor")),
    "edged/door/camera/yard/status": (("door",), ("operator", "monitor")),
    # Frames.
    "edged/door/camera/yard/frame": (("yard",), ("door", "door-cameras", "operator")),
    "edged/door/camera/porch/frame": (("porch",), ("door", "door-cameras", "operator")),
    "edged/door/camera/other/frame": ((), ()),
    "edged/gate/camera/yard/frame": ((), ()),
    # Elsewhere.
    "edged/desk/status": ((), ()),
    "edged": ((), ()),
    "elsewhere": ((), ()),
}


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_each_user_may_do_what_stands_in_the_acl_and_nothing_else(
    broker: Shipped, protocol: Any
) -> None:
    with ExitStack() as stack:
        users = {
            name: stack.enter_context(observe(broker, name, "#", "$SYS/#", protocol=protocol))
            for name in broker.users
        }
        assert {"door", "door-cameras", "yard", "desk", "operator", "monitor"} < set(users)
        for topic, (writers, _) in RIGHTS.items():
            codes = {name: user.send(f"/{topic}", name) for name, user in users.items()}
            if protocol == "5":  # 3.1.1 has no way to say it
                assert {name for name, code in codes.items() if code != DENIED} == set(writers)
        for name, user in users.items():
            expected = {
                (topic, writer)
                for topic, (writers, readers) in RIGHTS.items()
                for writer in writers
                if name in readers
            }
            # The broker does one thing after the other: what comes, comes before this is answered.
            before = user.subscriptions
            user._client.subscribe("nothing")
            user.wait(lambda: user.subscriptions > before, "an answer")  # noqa: B023
            assert {(each.topic, each.payload.decode()) for each in user.seen} == expected, name


def test_nobody_gets_in_without_a_name(broker: Shipped) -> None:
    command = ["mosquitto_pub", "-h", broker.host, "-p", str(broker.port), "-t", "t", "-m", "m"]
    for more in ([], ["-u", "door", "-P", "wrong"]):
        authority = ["--cafile", f"{broker.certificates}/ca.pem"]
        assert subprocess.run([*command, *authority, *more], check=False).returncode != 0
    ours = tool(broker, "mosquitto_pub", "door", "-t", "edged/door/status", "-m", "m")
    assert subprocess.run(ours, check=False).returncode == 0


def test_a_will_on_anothers_topic_does_not_arrive(broker: Shipped) -> None:
    with observe(broker, "operator", "edged/#") as operator:
        for number, topic in enumerate(("edged/door/status", "edged/gate/status"), 1):
            will = ["--will-topic", topic, "--will-payload", "gone"]
            command = tool(broker, "mosquitto_sub", "gate", "-i", "gate", "-t", "none", *will)
            with subprocess.Popen(command) as client:
                until(partial(logged, broker, "as gate ", number), "the client")
                client.kill()
            until(partial(logged, broker, "Client gate ", number), "its end")
        operator.wait(lambda: bool(operator.seen), "the will on its own topic")
        assert [each.topic for each in operator.seen] == ["edged/gate/status"]


def test_the_readme_says_how_a_user_is_copied() -> None:
    assert (
        f"\n{COPY_A_BLOCK.format(old='door', new='gate')}\n" in (SHIPPED / "README.md").read_text()
    )


def test_what_is_not_tried_says_so() -> None:
    tried = {"README.md", "make-certs.sh", *(f"mosquitto/{name}" for name in TRIED)}
    files = {str(each.relative_to(SHIPPED)) for each in SHIPPED.rglob("*") if each.is_file()}
    assert tried < files
    for name in files - tried:
        assert "NOT RUN" in "".join((SHIPPED / name).read_text().splitlines()[:4]), name


# Sessions ---------------------------------------------------------------------------------------


def waiting_box(broker: Shipped) -> Observer:
    """Return a box whose requests wait at the broker while it is away."""
    return observe(broker, "door", "edged/door/request/text/+", client_id="edged-door")


def test_who_can_take_the_place_of_another(broker: Shipped) -> None:
    """With certificates nobody; with passwords anybody, as listener-tls.conf says."""
    with waiting_box(broker):
        pass
    with observe(broker, "desk") as desk:
        assert desk.send("request/text/desk", b"waits") == 0
    thief = tool(broker, "mosquitto_sub", "gate", "-i", "edged-door", "-t", "none", "-E")
    subprocess.run(thief, check=True)
    if broker.variant == "mtls":
        thief = tool(broker, "mosquitto_sub", "gate", "-i", "door", "-t", "none", "-E")
        subprocess.run(thief, check=True)
    with waiting_box(broker) as box, observe(broker, "desk") as desk:
        assert desk.send("request/text/desk", b"last") == 0
        box.wait(lambda: box.seen[-1:] and box.seen[-1].payload == b"last", "the last request")
    stolen = [each.payload for each in box.seen] == [b"last"]
    assert stolen == (broker.variant == "tls")


def test_a_killed_broker_keeps_a_waiting_request(broker: Shipped) -> None:
    keeps_a_waiting_request(broker)


def test_so_does_the_broker_of_the_containers(tmp_path: Path, certificates: Path) -> None:
    with Composed(tmp_path, "tls", certificates) as broker:
        keeps_a_waiting_request(broker)
        with observe(broker, "desk", "#") as desk:
            assert desk.send("request/text/hall", b"") == DENIED


def keeps_a_waiting_request(broker: Shipped) -> None:
    with waiting_box(broker):
        pass
    with observe(broker, "desk") as desk:
        assert desk.send("request/text/desk", b"waits") == 0
        database = broker.directory / "mosquitto.db"
        until(lambda: database.exists() and b"waits" in database.read_bytes(), "it to be saved")
        broker.restart()
    with waiting_box(broker) as box:
        box.wait(lambda: bool(box.seen), "the request")
    assert [each.payload for each in box.seen] == [b"waits"]


@pytest.mark.parametrize("broker", ["tls"], indirect=True)
def test_the_lines_for_all_clients(broker: Shipped) -> None:
    """Uncommented, they let every user ask in its own name; a reload is enough."""
    with observe(broker, "hall", "#") as hall, observe(broker, "door") as box:
        assert hall.send("/edged/gate/request/text/hall", b"") == 0
        _, lines = broker.acl.read_text().split("\n#pattern", 1)
        broker.acl.write_text(f"pattern{lines}".replace("#pattern", "pattern"))
        os.kill(broker.pid, signal.SIGHUP)
        until(lambda: box.send("status", b"", wait=True) == DENIED, "the blocks to be gone")
        assert hall.send("/edged/gate/request/text/hall", b"") == 0
        assert hall.send("/edged/gate/request/text/desk", b"") == DENIED
        assert hall.send("/edged/gate/request/text", b"") == DENIED


# The whole thing --------------------------------------------------------------------------------


def identity(broker: Shipped, user: str, directory: Path) -> dict[str, str]:
    """Return the settings to connect as a user."""
    if broker.variant == "mtls":
        clients = f"{broker.certificates}/clients"
        return {"cert": f"{clients}/{user}.pem", "key": f"{clients}/{user}.key"}
    path = directory / f"{user}.password"
    path.touch(0o600)
    path.write_text(PASSWORD)
    return {"username": user, "password_file": str(path)}


@pytest.fixture
def box(broker: Shipped, tmp_path: Path) -> Iterator[Daemon]:
    """The daemon `door`, ready, and its settings file, which is the operator's as well."""
    directory = tmp_path / "box"
    directory.mkdir()
    mqtt = {"host": broker.host, "tls": True, "ca": f"{broker.certificates}/ca.pem"}
    settings = {
        "device": "door",
        "mqtt": {**mqtt, "client_id": "edged-door", **identity(broker, "door", directory)},
        "cameras": {"buffer_s": 3600, **identity(broker, "door-cameras", directory)},
        "client": {"username": "operator", **identity(broker, "operator", directory)},
    }
    with Daemon(directory, broker.port, settings=settings) as daemon:
        daemon.wait_ready(PATIENCE_S)
        yield daemon
        assert not daemon.running or daemon.stop() == 0
        assert daemon.faults() == []


def edged(box: Daemon, *arguments: str, status: int | None = 0) -> str:
    """Run the command line with the box's settings file and return what it prints."""
    command = [sys.executable, "-W", "error", "-m", "edged", *arguments]
    done = subprocess.run(
        [*command, "--config", str(box.directory / "edged.toml")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert status in {None, done.returncode}, done.stderr
    return done.stdout


def test_a_box_runs_whole(broker: Shipped, box: Daemon) -> None:
    assert edged(box, "ask", "!say well") == "well\n"
    frames = [marked(number) for number in range(3)]
    with (
        observe(broker, "yard") as yard,
        observe(broker, "monitor", "edged/+/camera/+/status") as monitor,
        Observer(broker.port, "edged/door", **account(broker, "desk")) as desk,
    ):
        for frame in frames:
            yard.send("camera/yard/frame", frame, qos=0)
        monitor.wait_on("camera/yard/status", lambda body: body["buffered"] == len(frames))
        assert edged(box, "ask", "--camera", "yard", "--last", "3", "!frames").strip() == digests(
            frames
        )
        # Another client's jobs are out of reach.
        runs = desk.ask("!tokens 1000 1000", client="desk")
        desk.event(runs, "started")
        with observe(broker, "hall", "#") as hall:
            assert hall.send("request/cancel/desk", {"id": runs.id}) == DENIED
            hall.send("request/cancel/hall", {"id": runs.id})
            refused = hall.wait_on(f"response/hall/{runs.id}")
            assert refused.body["code"] == "unknown_job"
            assert not desk.finals(runs)
            desk.cancel(runs)
            assert desk.final(runs)["code"] == "cancelled"
            mine = re.compile(r"edged/(door/(status|info)|(door/response|reply)/hall/.+)")
            assert [each.topic for each in hall.seen if not mine.fullmatch(each.topic)] == []
        assert edged(box, "top", "--once")
        assert box.log("health.state")[-1]["state"] == "ready"


def test_what_the_broker_takes_reaches_the_box(broker: Shipped, box: Daemon) -> None:
    """Between the limits of edged's requests and of its packets edged answers, above the broker."""
    text = (SHIPPED / "mosquitto/edged.conf").read_text()
    limit = int(text.partition("\nmax_packet_size ")[2].partition("\n")[0])
    topic = "edged/door/request/text/desk"
    with observe(broker, "desk", "edged/door/response/#", "edged/reply/#") as desk:
        reply = "edged/reply/desk/q"
        room = 5 + (2 + len(topic)) + 2 + (1 + 3 + len(reply))  # header, topic, packet id, property
        assert desk.send(f"/{topic}", bytes(limit - room), ResponseTopic=reply) == 0
        assert desk.refusal().body["code"] == "too_large"
        desk._client.publish(topic, bytes(packet_bytes(Settings())), 1)
        until(lambda: "oversize" in broker.log, "the broker's word")
    assert len(box.log("mqtt.connected", client_id="edged-door")) == 1


def test_check_finds_nothing_wrong_with_the_broker(broker: Shipped, box: Daemon) -> None:
    for runs in (True, False):
        found = json.loads(edged(box, "check", "--json", status=None))
        about = [each for each in found["findings"] if each["area"] == "broker"]
        assert {each["status"] for each in about} == {"ok"}, about
        assert {"mqtt", "client id", "cameras", "client"} <= {each["name"] for each in about}
        if runs:
            box.wait_state("ready")
            assert edged(box, "ask", "!say still here") == "still here\n"
            assert box.stop() == 0
