from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edged import brokercheck, check
from edged.errors import ConfigError
from edged.findings import (
    Finding,
    Status,
    exit_status,
    failed,
    ok,
    render_json,
    render_text,
    warning,
)
from edged.options import Cameras, Client, Limits, Model, Mqtt, Settings, State
from edged.settings import load
from tests.kit.fakebroker import (
    MAXIMUM_PACKET_SIZE_4K,
    MAXIMUM_QOS_0,
    RETAIN_UNAVAILABLE,
    FakeBroker,
)
from tests.kit.mosquitto import PASSWD, PROGRAM, Authority, Mosquitto

MODEL = Path(__file__).resolve().parents[1] / "models" / "phi3"

needs_mosquitto = pytest.mark.skipif(PROGRAM is None, reason="mosquitto is not installed")


def by_name(found: list[Finding]) -> dict[str, Finding]:
    assert all(f.remedy for f in found if f.status is not Status.OK), found
    assert all(f.remedy is None for f in found if f.status is Status.OK), found
    return {f.name: f for f in found}


# Findings


def test_exit_codes() -> None:
    fine, poor = ok("a", "b", "c"), warning("configuration", "b", "c", "d")
    wrong, bad = failed("broker", "b", "c", "d"), failed("configuration", "b", "c", "d")
    assert exit_status([]) == 0
    assert exit_status([fine, poor]) == 0
    assert exit_status([fine, wrong]) == 1
    assert exit_status([wrong, bad]) == 78


def test_findings_as_json() -> None:
    value = json.loads(render_json([failed("broker", "address", "refused", "start it")]))
    assert value == {
        "ok": False,
        "exit_status": 1,
        "findings": [
            {
                "area": "broker",
                "name": "address",
                "status": "failed",
                "message": "refused",
                "remedy": "start it",
            }
        ],
    }


@pytest.mark.parametrize("colour", [False, True])
def test_findings_for_people(colour: bool) -> None:
    found = [
        ok("python", "version", "3.11"),
        failed("broker", "address", "x " * 100, "start\x1b[2J it"),
        warning("broker", "clock", "y", "z"),
    ]
    text = render_text(found, width=60, colour=colour)
    assert ("\x1b[31m" in text) is colour
    assert "\x1b[2J" not in text
    plain = text.replace("\x1b[31m", "").replace("\x1b[32m", "").replace("\x1b[33m", "")
    lines = plain.replace("\x1b[0m", "").splitlines()
    assert lines[0] == "python"
    assert lines[1] == "  ok      version: 3.11"
    assert lines[3] == "broker"
    assert lines[4].startswith("  failed  address: x x")
    assert "          -> start [2J it" in lines
    assert max(map(len, lines)) <= 60
    assert lines[-1] == "1 ok, 1 warning, 1 failed"


# Configuration


def test_mistakes_become_findings() -> None:
    with pytest.raises(ConfigError) as raised:
        load(
            None,
            {"mqtt.port": "x", "hots": "1"},
            {"EDGED_MQTT__PASSWORD": "x"},
            default_config=Path("/absent"),
        )
    found = [f for f in check.run_checks(raised.value) if f.area == "configuration"]
    assert [f.name for f in found] == ["mqtt.password", "mqtt.port", "hots"]
    by_name(found)
    assert found[1].message == "'x' is not a whole number from 1 to 65535 [command line]"
    assert found[1].remedy == "write --set mqtt.port=1883"
    assert exit_status(found) == 78


def test_what_needs_no_settings_is_checked_all_the_same() -> None:
    areas = {f.area for f in check.run_checks(ConfigError(["mqtt.port: wrong; write 1"]))}
    assert areas >= {"python", "libraries", "configuration"}
    assert "broker" not in areas


def test_a_mistake_without_its_parts() -> None:
    (found,) = [f for f in check.run_checks(ConfigError(["odd"])) if f.area == "configuration"]
    assert found.message == "odd"
    assert found.remedy


def test_warnings_of_valid_settings() -> None:
    (found,) = check.check_configuration(Settings(mqtt=Mqtt(host="broker")))
    assert found.status is Status.WARNING
    assert found.name == "mqtt.host"
    assert "plain text and without a password" in found.message
    assert found.remedy is not None
    assert found.remedy.startswith("set mqtt.tls = true")
    (found,) = check.check_configuration(Settings())
    assert found.status is Status.OK


# Libraries


def test_this_environment_can_load_the_engine() -> None:
    assert {f.status for f in check.check_libraries("cpu")} == {Status.OK}


@pytest.fixture(name="fake")
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a module of this name and text before the real one."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def fake(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    for name in check.MODULES:
        fake(name, "")
    return fake


def libraries(
    provider: str = "cpu", unfit: str | None = None, **versions: str | None
) -> dict[str, Finding]:
    given = {d[0]: "1.0" for d in check.MODULES.values()} | {
        name.replace("_", "-"): version for name, version in versions.items()
    }
    return by_name(list(check.check_libraries(provider, sys.executable, given.get, lambda: unfit)))


def test_both_builds_installed(fake: Any) -> None:
    found = libraries(onnxruntime_genai_cuda="1.0")["onnxruntime_genai"]
    assert found.status is Status.FAILED
    assert "onnxruntime-genai 1.0, onnxruntime-genai-cuda 1.0 are both installed" in found.message
    assert found.remedy is not None
    assert "pip uninstall -y onnxruntime-genai onnxruntime-genai-cuda" in found.remedy


def test_a_library_that_is_missing(fake: Any) -> None:
    found = libraries(llguidance=None)["llguidance"]
    assert found.status is Status.FAILED
    assert found.remedy is not None
    assert "edged[cpu]" in found.remedy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "this CPU lacks an instruction"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ends the process (SIGSEGV)"),
        ("import os; os._exit(3)", "cannot be imported: no message"),
        ("raise ImportError('libcudart.so.13: no such file')", "libcudart.so.13"),
        ("import time; time.sleep(600)", "took more than"),
    ],
)
def test_a_library_that_cannot_be_loaded(
    text: str, words: str, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("onnxruntime_genai", text)
    if "sleep" in text:
        monkeypatch.setattr(check, "IMPORT_S", 0.5)
        monkeypatch.setattr(check, "MODULES", {"onnxruntime_genai": ("onnxruntime-genai",)})
    found = libraries()["onnxruntime_genai"]
    assert found.status is Status.FAILED
    assert words in found.message


def test_a_library_that_talks_and_crashes_on_its_way_out(fake: Any) -> None:
    fake("numpy", "import atexit, os; print('hello'); atexit.register(os.abort)")
    assert libraries()["numpy"].status is Status.OK


def test_telemetry_is_off_before_the_import(fake: Any) -> None:
    fake("onnxruntime", "import os; assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'")
    assert libraries()["onnxruntime"].status is Status.OK


def test_cuda_wanted_and_not_there(fake: Any) -> None:
    fake("onnxruntime", "get_available_providers = lambda: ['CPUExecutionProvider']")
    found = libraries("cuda")["cuda"]
    assert found.status is Status.FAILED
    assert "only CPUExecutionProvider" in found.message
    assert "cuda" not in libraries("auto")


def test_cuda_wanted_and_there(fake: Any) -> None:
    fake("onnxruntime", "get_available_providers = lambda: ['CUDAExecutionProvider']")
    assert libraries("cuda")["cuda"].status is Status.OK
    assert libraries("auto")["cuda"].status is Status.OK
    assert "cuda" not in libraries("cpu")


def test_cuda_without_kernels_for_this_processor(fake: Any) -> None:
    fake("onnxruntime", "get_available_providers = lambda: ['CUDAExecutionProvider']")
    wanted = libraries("cuda", unfit="has no kernels")["cuda"]
    assert (wanted.status, wanted.message) == (Status.FAILED, "has no kernels")
    allowed = libraries("auto", unfit="has no kernels")["cuda"]
    assert allowed.status is Status.WARNING
    assert "the processor computes" in allowed.message
    assert allowed.remedy == wanted.remedy


@pytest.mark.parametrize(
    ("text", "name", "status"),
    [
        ("processor : 0\nFeatures : fp asimd crc32 asimddp\n", "asimddp", Status.OK),
        ("processor : 0\nFeatures : fp asimd crc32\n", "asimddp", Status.WARNING),
        ("flags\t\t: fpu avx avx2\n", "avx2", Status.OK),
        ("flags\t\t: fpu avx\n", "avx2", Status.WARNING),
        ("something else", None, None),
        ("", None, None),
    ],
)
def test_processors(text: str, name: str | None, status: Status | None, tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    found = by_name(list(check.check_processor(tmp_path)))
    assert {n: f.status for n, f in found.items()} == ({name: status} if name else {})


def test_a_processor_that_says_nothing(tmp_path: Path) -> None:
    assert list(check.check_processor(tmp_path)) == []


# State


def state(path: Path, **limits: Any) -> dict[str, Finding]:
    settings = Settings(state=State(dir=path), limits=Limits(**limits))
    return by_name(list(check.check_state(settings)))


def test_a_state_folder_that_will_be_made(tmp_path: Path) -> None:
    found = state(tmp_path / "a" / "b")
    assert found["state.dir"].status is Status.OK
    assert "will be made" in found["state.dir"].message
    assert not (tmp_path / "a").exists()


def test_a_state_folder_that_is_there(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    found = state(tmp_path)
    assert "can be written" in found["state.dir"].message
    assert "mode" not in found
    assert list(tmp_path.iterdir()) == []
    tmp_path.chmod(0o755)
    assert state(tmp_path)["mode"].status is Status.WARNING


def test_a_state_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert state(tmp_path / "x")["state.dir"].status is Status.FAILED


def test_a_state_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    found = state(tmp_path)["state.dir"]
    assert found.status is Status.FAILED
    assert found.remedy is not None
    assert "chown" in found.remedy


def test_a_state_folder_in_use_is_seen_without_taking_its_lock(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    assert not check.in_use(tmp_path)
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert check.in_use(tmp_path)
        assert state(tmp_path)["lock"].status is Status.WARNING
        fcntl.flock(held, fcntl.LOCK_UN)
        assert not check.in_use(tmp_path)
    assert not check.in_use(tmp_path / "absent")


@pytest.mark.parametrize(
    ("journal", "frames", "status"),
    [(2.0, 0.1, Status.FAILED), (0.5, 0.7, Status.WARNING), (0.5, 0.1, Status.OK)],
)
def test_room_for_the_journal_and_frames(
    journal: float, frames: float, status: Status, tmp_path: Path
) -> None:
    there = os.statvfs(tmp_path)
    free = there.f_bavail * there.f_frsize / 1e6
    settings = Settings(state=State(dir=tmp_path))
    limits = settings.limits.model_copy(update={"journal_mb": free * journal})
    folder = settings.state.model_copy(update={"frames_mb": free * frames})
    changed = settings.model_copy(update={"limits": limits, "state": folder})
    assert by_name(list(check.check_state(changed)))["disk"].status is status


@pytest.mark.parametrize(
    ("mounts", "warned"),
    [
        ("/dev/sda / ext4 rw 0 0\n", False),
        ("/dev/sda / ext4 rw 0 0\ntmpfs {path} tmpfs rw 0 0\n", True),
        ("/dev/sda / ext4 rw 0 0\nbox:/x {path} nfs4 rw 0 0\n", True),
        ("tmpfs {path} tmpfs rw 0 0\n/dev/sda {path} ext4 rw 0 0\n", False),
        ("tmpfs {path}x tmpfs rw 0 0\njunk\n", False),
    ],
)
def test_file_systems(mounts: str, warned: bool, tmp_path: Path) -> None:
    path, root = tmp_path / "a b", tmp_path / "root"
    path.mkdir()
    (root / "proc/self").mkdir(parents=True)
    escaped = str(path).replace(" ", "\\040")
    (root / "proc/self/mounts").write_text(mounts.format(path=escaped))
    found = by_name(list(check.check_state(Settings(state=State(dir=path)), root)))
    assert ("file system" in found) is warned


# Model


def test_no_model() -> None:
    (found,) = check.check_model(Settings())
    assert found.status is Status.FAILED
    assert found.remedy == "set model.path"


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    (found,) = check.check_model(Settings(model=Model(path=tmp_path / "absent")))
    by_name([found])
    assert found.status is Status.FAILED


def test_a_model_that_must_not_be_loaded(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    config = tmp_path / "model" / "genai_config.json"
    value = json.loads(config.read_text())
    options = value["model"]["decoder"].setdefault("session_options", {})
    options["custom_ops_library"] = "/tmp/x.so"
    config.write_text(json.dumps(value))
    (found,) = check.check_model(Settings(model=Model(path=tmp_path / "model")))
    by_name([found])
    assert found.status is Status.FAILED
    assert "custom_ops_library" in found.message


def test_the_memory_plan_is_summed_up() -> None:
    found = by_name(list(check.check_model(Settings(model=Model(path=MODEL, max_context=512)))))
    plan = found["memory"]
    assert plan.status is Status.OK
    assert "sessions of 512 tokens" in plan.message
    assert " MB of " in plan.message


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    model = Model(path=MODEL)
    settings = Settings(model=model, limits=Limits(memory_mb=20), state=State(dir=tmp_path))
    found = by_name(list(check.check_model(settings)))["memory"]
    assert found.status is Status.FAILED
    assert "20 MB" in found.message


def test_memory_that_a_running_edged_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.engine.box.memory_mb", lambda **_: 20.0)
    settings = Settings(model=Model(path=MODEL), state=State(dir=tmp_path))
    assert by_name(list(check.check_model(settings)))["memory"].status is Status.FAILED
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = by_name(list(check.check_model(settings)))["memory"]
    assert found.status is Status.WARNING
    assert "a running edged holds memory now" in found.message


# The box


def test_a_clock_that_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "run/systemd/timesync/synchronized"
    file.parent.mkdir(parents=True)
    file.touch()
    assert by_name(list(check.check_box(Settings(), tmp_path)))["clock"].status is Status.OK


def test_a_clock_that_nobody_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.clock.kernel_synced", lambda: False)
    found = by_name(list(check.check_box(Settings(mqtt=Mqtt(tls=True)), tmp_path)))["clock"]
    assert found.status is Status.WARNING
    assert "certificate" in found.message


@pytest.mark.parametrize(("degrees", "status"), [("45000", Status.OK), ("95000", Status.WARNING)])
def test_heat(degrees: str, status: Status, tmp_path: Path) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "temp").write_text(degrees)
    found = by_name(list(check.check_box(Settings(state=State(dir=tmp_path)), tmp_path)))
    assert found["power and heat"].status is status


# All together


def test_a_check_that_fails_by_itself_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int, tmp_path: Path
) -> None:
    def broken(*_: Any) -> Iterator[Finding]:
        yield ok("state", "x", "y")
        raise RuntimeError("a bug")

    monkeypatch.setattr(check, "check_state", broken)
    monkeypatch.setattr(check, "check_configuration", broken)
    settings = Settings(mqtt=Mqtt(host="127.0.0.1", port=unused_tcp_port))
    found = list(check.run_checks(settings))
    wrong = [f for f in found if f.name == "check"]
    assert [f.area for f in wrong] == ["check", "state"]
    assert all("RuntimeError: a bug" in f.message for f in wrong)
    assert found[-1].area == "broker"
    assert exit_status(found) == 1  # our own fault is not the configuration's


@needs_mosquitto
@pytest.mark.broker
def test_a_box_where_all_is_well(broker: Mosquitto, tmp_path: Path) -> None:
    settings = Settings(
        mqtt=Mqtt(host=broker.host, port=broker.port),
        model=Model(path=MODEL, max_context=512),
        state=State(dir=tmp_path / "state"),
    )
    found = list(check.run_checks(settings))
    assert exit_status(found) == 0, render_text(found)


# Broker


def broker_findings(settings: Settings, **kwargs: Any) -> dict[str, Finding]:
    return by_name(list(brokercheck.check_broker(settings, **kwargs)))


def test_nobody_listens(unused_tcp_port: int) -> None:
    found = broker_findings(Settings(mqtt=Mqtt(host="127.0.0.1", port=unused_tcp_port)))
    assert found["address"].status is Status.FAILED
    assert "connection refused" in found["address"].message


def test_a_host_that_does_not_exist() -> None:
    found = broker_findings(Settings(mqtt=Mqtt(host="no-such-host.invalid")))
    assert found["address"].status is Status.FAILED
    assert found["address"].remedy is not None
    assert "mqtt.host" in found["address"].remedy


def test_something_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokercheck, "STEP_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = broker_findings(Settings(mqtt=Mqtt(host="127.0.0.1", port=port)))
    assert found["address"].status is Status.OK
    assert found["mqtt"].status is Status.FAILED


def test_a_name_service_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokercheck, "STEP_S", 0.1)
    monkeypatch.setattr(brokercheck, "_reach", lambda _: time.sleep(30))
    found = broker_findings(Settings())
    assert "no answer within" in found["address"].message


@needs_mosquitto
@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_an_open_broker(broker: Mosquitto, protocol: Any) -> None:
    found = broker_findings(
        Settings(mqtt=Mqtt(host=broker.host, port=broker.port, protocol=protocol))
    )
    assert {f.status for f in found.values()} == {Status.OK}
    assert set(found) == {"address", "mqtt", "cameras", "rights"}
    assert f"takes MQTT {protocol} without a user name" in found["mqtt"].message


@pytest.fixture(name="secret")
def _secret(tmp_path: Path) -> Callable[[str, str], Path]:
    def secret(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        path.chmod(stat.S_IRUSR)
        return path

    return secret


@pytest.fixture(name="guarded")
def _guarded(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Start a broker that asks for passwords: edged, cameras and desk have one, all `right`."""
    if PROGRAM is None or PASSWD is None:
        pytest.skip("mosquitto is not installed")
    started: list[Mosquitto] = []

    def start(config: str = "", **kwargs: Any) -> Mosquitto:
        directory = tmp_path / f"mosquitto{len(started)}"
        directory.mkdir()
        names = ("edged", "cameras", "desk")
        passwords = dict.fromkeys(names, "right")
        broker = Mosquitto(directory, config=config, passwords=passwords, **kwargs)
        started.append(broker)
        broker.start()
        return broker

    yield start
    for broker in started:
        broker.kill()


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_users_and_passwords(guarded: Any, secret: Any, protocol: Any) -> None:
    broker = guarded()
    right, wrong = secret("right", "right"), secret("wrong", "hunter2")
    base = {"host": broker.host, "port": broker.port, "protocol": protocol}
    found = broker_findings(
        Settings(
            mqtt=Mqtt(**base, username="edged", password_file=right),
            cameras=Cameras(username="cameras", password_file=wrong),
            client=Client(username="desk", password_file=right),
        )
    )
    assert found["mqtt"].status is Status.OK
    assert found["client id"].status is Status.OK
    assert found["cameras"].status is Status.FAILED
    assert "refuses cameras" in found["cameras"].message
    assert found["client"].status is Status.OK
    for mqtt in (Mqtt(**base), Mqtt(**base, username="edged", password_file=wrong)):
        refused = broker_findings(Settings(mqtt=mqtt))
        assert set(refused) == {"address", "mqtt"}
        assert refused["mqtt"].status is Status.FAILED
        assert refused["mqtt"].remedy is not None
        assert "mqtt.password_file" in refused["mqtt"].remedy
    assert "hunter2" not in str(found)


@pytest.mark.broker
def test_a_password_file_that_went_away(guarded: Any, tmp_path: Path) -> None:
    broker = guarded()
    mqtt = Mqtt(
        host=broker.host, port=broker.port, username="edged", password_file=tmp_path / "absent"
    )
    assert broker_findings(Settings(mqtt=mqtt))["mqtt"].status is Status.FAILED


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_no_session_of_ours_stays_at_the_broker(
    guarded: Any, secret: Any, protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tails = iter(["one", "two", "three"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tails))
    broker = guarded()
    mqtt = Mqtt(
        host=broker.host,
        port=broker.port,
        protocol=protocol,
        username="edged",
        password_file=secret("right", "right"),
    )
    broker_findings(Settings(mqtt=mqtt, device="d"))
    assert not list(tails)
    for tail in ("one", "two", "three"):
        with connection(broker, "edged", protocol, f"edged-d-check-{tail}") as peer:
            assert not peer.session_present


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_broker_that_makes_the_user_name_the_client_id(
    guarded: Any, secret: Any, protocol: Any
) -> None:
    broker = guarded("use_username_as_clientid true")
    right = secret("right", "right")
    mqtt = Mqtt(
        host=broker.host,
        port=broker.port,
        protocol=protocol,
        username="edged",
        password_file=right,
    )
    found = broker_findings(Settings(mqtt=mqtt))
    assert found["client id"].status is Status.FAILED
    assert found["client id"].remedy is not None
    assert "cameras.username" in found["client id"].remedy
    assert "cameras" not in found, "it would have wiped the daemon's session"
    own = Cameras(username="cameras", password_file=right)
    found = broker_findings(Settings(mqtt=mqtt, cameras=own))
    assert found["client id"].status is Status.OK
    assert found["cameras"].status is Status.OK
    found = broker_findings(Settings(mqtt=mqtt, cameras=Cameras(max=0)))
    assert set(found) == {"address", "mqtt", "rights"}


@pytest.mark.broker
def test_cameras_that_the_broker_lets_nobody_read(
    broker: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mosquitto 2.0.11 grants whatever is asked for; others do not.
    subscribe = brokercheck._Probe.subscribe

    def refuse(self: Any, topic: str) -> str | None:
        return "not authorized" if "camera" in topic else subscribe(self, topic)

    monkeypatch.setattr(brokercheck._Probe, "subscribe", refuse)
    found = broker_findings(Settings(mqtt=Mqtt(host=broker.host, port=broker.port), device="d"))
    assert found["cameras"].status is Status.FAILED
    assert "edged/d/camera/+/frame" in found["cameras"].message
    assert found["cameras"].remedy is not None
    assert "cameras.max = 0" in found["cameras"].remedy


@pytest.mark.broker
@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_request_that_waits_for_the_daemon_is_there_after_the_check(
    guarded: Any, secret: Any, protocol: Any
) -> None:
    # The session we connect to is the daemon's own here: wiping it would lose what waits in it.
    broker = guarded("use_username_as_clientid true")
    topic = "edged/d/request/text"
    with connection(broker, "edged", protocol) as daemon:
        daemon.subscribe(topic, 1)
        turn(daemon, lambda: daemon.subscribed)
    with connection(broker, "desk", protocol) as desk:
        sent = desk.publish(topic, b"a job", 1)
        turn(desk, sent.is_published)
    mqtt = Mqtt(
        host=broker.host,
        port=broker.port,
        protocol=protocol,
        username="edged",
        password_file=secret("right", "right"),
    )
    found = broker_findings(Settings(mqtt=mqtt, device="d"))
    assert found["client id"].status is Status.FAILED
    with connection(broker, "edged", protocol) as daemon:
        turn(daemon, lambda: daemon.received)
        assert daemon.received == [b"a job"]


class Peer(paho.Client):
    """A user of the broker with the password `right`, driven by `turn`."""

    def __init__(self, user: str, protocol: str, client_id: str) -> None:
        five = protocol == "5"
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if five else False,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
        )
        self.connected = self.subscribed = self.session_present = False
        self.received: list[bytes] = []
        self.username_pw_set(user, "right")
        self.on_connect = self._note_connected
        self.on_subscribe = lambda *_: setattr(self, "subscribed", True)
        self.on_message = lambda _c, _u, message: self.received.append(bytes(message.payload))

    def _note_connected(self, _client: Any, _userdata: Any, flags: Any, *_: Any) -> None:
        self.connected, self.session_present = True, flags.session_present


def turn(peer: Peer, until: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not until():
        assert time.monotonic() < end
        peer.loop(0.05)


@contextmanager
def connection(
    broker: Mosquitto, user: str, protocol: str, client_id: str | None = None
) -> Iterator[Peer]:
    peer = Peer(user, protocol, client_id or f"{user}-id")
    if protocol == "5":
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 3600
        peer.connect(broker.host, broker.port, clean_start=False, properties=properties)
    else:
        peer.connect(broker.host, broker.port)
    turn(peer, lambda: peer.connected)
    yield peer
    peer.disconnect()
    while peer.loop(0.05) is MQTTErrorCode.MQTT_ERR_SUCCESS:
        pass


@pytest.mark.broker
def test_certificates(tmp_path: Path) -> None:
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    good = Authority(tmp_path).issue("localhost")
    with Mosquitto(tmp_path, tls=good) as broker:
        base: dict[str, Any] = {"host": "localhost", "port": broker.port, "tls": True}
        trusting = Mqtt(**base, ca=Path(good.ca))
        now = time.time()
        found = broker_findings(Settings(mqtt=trusting), now=lambda: now - 40 * 86400)
        assert found["certificate"].status is Status.OK
        assert found["mqtt"].status is Status.OK
        found = broker_findings(Settings(mqtt=trusting))
        assert found["certificate"].status is Status.WARNING
        assert found["mqtt.ca"].status is Status.WARNING
        found = broker_findings(Settings(mqtt=trusting), now=lambda: now + 400 * 86400)
        assert found["mqtt.ca"].status is Status.FAILED
        found = broker_findings(Settings(mqtt=Mqtt(**base)))
        assert "not trusted" in found["address"].message
        assert found["address"].remedy is not None
        assert "mqtt.ca" in found["address"].remedy


@pytest.mark.broker
@pytest.mark.parametrize(
    ("name", "end", "words", "remedy"),
    [
        ("elsewhere", None, "another host name", "mqtt.host"),
        ("localhost", "20210101000000Z", "expired", "renew"),
    ],
)
def test_a_broker_with_a_wrong_certificate(
    tmp_path: Path, name: str, end: str | None, words: str, remedy: str
) -> None:
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    issued = Authority(tmp_path).issue(name, end=end)
    with Mosquitto(tmp_path, tls=issued) as broker:
        mqtt = Mqtt(host="localhost", port=broker.port, tls=True, ca=Path(issued.ca))
        found = broker_findings(Settings(mqtt=mqtt))["address"]
    assert found.status is Status.FAILED
    assert words in found.message
    assert found.remedy is not None
    assert remedy in found.remedy


@pytest.mark.broker
def test_a_broker_that_wants_a_certificate(tmp_path: Path) -> None:
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    authority = Authority(tmp_path)
    server, own = authority.issue("localhost"), authority.issue("box")
    config = "require_certificate true\nuse_identity_as_username true"
    with Mosquitto(tmp_path, tls=server, config=config) as broker:
        base: dict[str, Any] = {
            "host": "localhost",
            "port": broker.port,
            "tls": True,
            "ca": Path(server.ca),
        }
        found = broker_findings(Settings(mqtt=Mqtt(**base)))
        assert any(f.status is Status.FAILED for f in found.values())
        mqtt = Mqtt(**base, cert=Path(own.cert), key=Path(own.key))
        found = broker_findings(Settings(mqtt=mqtt))
        assert found["mqtt"].status is Status.OK
        assert found["mqtt.cert"].status is Status.WARNING  # it is valid for a day


@needs_mosquitto
@pytest.mark.broker
def test_tls_to_a_port_without(broker: Mosquitto) -> None:
    found = broker_findings(Settings(mqtt=Mqtt(host="localhost", port=broker.port, tls=True)))
    assert found["address"].status is Status.FAILED


async def from_fake(**kwargs: Any) -> dict[str, Finding]:
    protocol = kwargs.pop("protocol", "5")
    async with FakeBroker(**kwargs) as fake:
        settings = Settings(mqtt=Mqtt(host="127.0.0.1", port=fake.port, protocol=protocol))
        return await asyncio.to_thread(broker_findings, settings)


@pytest.mark.parametrize(
    ("properties", "name", "status"),
    [
        (MAXIMUM_QOS_0, "QoS", Status.FAILED),
        (RETAIN_UNAVAILABLE, "retain", Status.WARNING),
        (MAXIMUM_PACKET_SIZE_4K, "packet size", Status.WARNING),
    ],
)
async def test_what_a_broker_does_not_do(properties: bytes, name: str, status: Status) -> None:
    found = await from_fake(connack=(0, properties))
    assert found["mqtt"].status is Status.OK
    assert found[name].status is status


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (0x87, Status.FAILED, "not authorized"),
        (0x85, Status.WARNING, "only client ids it knows"),
        (0x88, Status.FAILED, "server unavailable"),
    ],
)
async def test_refusals(code: int, status: Status, words: str) -> None:
    found = await from_fake(connack=(code, b""))
    assert found["mqtt"].status is status
    assert words in found["mqtt"].message


async def test_a_broker_that_grants_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brokercheck, "STEP_S", 0.5)
    found = await from_fake(suback=False)
    assert found["subscribe"].status is Status.FAILED
