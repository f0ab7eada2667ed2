"""`edged selftest` as a process: with the model that ships, with another, and with neither."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edged import selftest
from edged.selftest.cases import Case, cases
from tests.e2e.test_ask_top import INSTANCE, Device, Program
from tests.kit.daemon import ROOT, SHIPPED, Daemon
from tests.kit.mosquitto import PROGRAM, Mosquitto

# The wheel is built and every job is run, on a machine that may be busy.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

PYTHON = (sys.executable, "-W", "error")
SELFTEST = (*PYTHON, "-m", "edged", "selftest")
LIMIT_S = 300.0


def run(
    folder: Path, *command: str, path: str | None = str(ROOT)
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder of its own, without a home; it must leave nothing there."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("EDGED_")}
    for name in ("HOME", "PYTHONPATH", "XDG_STATE_HOME"):
        env.pop(name, None)
    folder.mkdir(mode=0o555)
    done = subprocess.run(
        command, cwd=folder, env=env | ({"PYTHONPATH": path} if path else {}),
        stdin=subprocess.DEVNULL, capture_output=True, check=False, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []
    return done


def report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what `--json` printed; only that was printed."""
    body = json.loads(done.stdout)
    assert isinstance(body, dict)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    return body


def check_all_right(body: dict[str, Any], *, own: bool = True) -> None:
    every = cases()
    assert [each["name"] for each in body["cases"]] == [each.name for each in every]
    wrong = [each for each in body["cases"] if not each["ok"]]
    assert wrong == []
    assert (body["v"], body["ok"], body["exact"], body["model"]) == (1, True, True, "selftest")
    assert (body["right"], body["wrong"], body["left_out"]) == (len(every), 0, 0)
    for told, case in zip(body["cases"], every, strict=True):
        assert told["kind"] == case.kind
        assert told["answer"] == told["expected"] == case.expected(exactly=True)
        assert told["ttft_ms"] > 0
        assert told["tokens_per_second"] > 0
    assert body["ttft_ms_p50"] > 0
    assert body["tokens_per_second_p50"] > 0
    known, other = ("peak_memory_mb", "memory_mb")[:: 1 if own else -1]
    assert 20 < body[known] < 1000
    assert body[other] is None
    assert body["seconds"] > 0
    assert {"edged", "python", "onnxruntime-genai"} <= set(body["versions"])


@pytest.mark.parametrize("broker", ["mosquitto", "amqtt"])
def test_the_model_that_ships_is_right(tmp_path: Path, broker: str) -> None:
    if broker == "mosquitto" and PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    if broker == "amqtt" and importlib.util.find_spec("amqtt") is None:
        pytest.skip("amqtt is not installed")
    without_mosquitto = (
        "import sys; from edged import cli, sandbox; sandbox.find_mosquitto = lambda: None; "
        "sys.exit(cli.main(['selftest', '--json']))"
    )
    amqtt = (*PYTHON, "-c", without_mosquitto)
    done = run(tmp_path / "cwd", *((*SELFTEST, "--json") if broker == "mosquitto" else amqtt))
    body = report(done)
    assert done.returncode == 0, body
    check_all_right(body)


@pytest.mark.broker
def test_a_configured_device_is_tried_with_its_own_settings(
    tmp_path: Path, broker: Mosquitto
) -> None:
    model = {"path": str(SHIPPED), "name": "selftest", "max_context": 2048}
    settings = {"model": model, "health": {"interval_s": 4}}
    with Daemon(tmp_path, broker.port, engine="real", settings=settings) as daemon:
        daemon.wait_ready()
        config = ("--config", str(tmp_path / "edged.toml"))
        done = run(tmp_path / "one", *SELFTEST, *config, "--json")
        check_all_right(report(done), own=False)
        assert done.returncode == 0
        # From another box, whose settings know nothing of the model.
        where = ("--set", "mqtt.host=127.0.0.1", "--set", f"mqtt.port={broker.port}")
        done = run(tmp_path / "far", *SELFTEST, *where, "--set", "device=box", "--json")
        check_all_right(report(done), own=False)
        assert done.returncode == 0
        done = run(tmp_path / "two", *SELFTEST, *config)
        assert done.returncode == 0
        assert f"the device box, over the broker at 127.0.0.1:{broker.port}" in done.stdout
        assert done.stdout.count("\nright ") == len(cases())
        assert "smoke test" not in done.stdout
        assert " MB by its heartbeats\n" in done.stdout
        assert f"{len(cases())} right, 0 wrong, in " in done.stdout
        assert daemon.stop() == 0
        assert daemon.faults() == []
        done = run(tmp_path / "three", *SELFTEST, *config)
        assert done.returncode == 1
        assert "no sign of a device box under edged/box; its last status: offline" in done.stderr


ABLE = {"text": True, "vision": True, "json_schema": True}


def present(device: Device) -> None:
    """Have a device that is played be there, and say once how it is."""
    device.status("ready")
    info = {"v": 1, "instance": INSTANCE, "capabilities": ABLE, "model": "played"}
    device.peer.publish("edged/box/info", json.dumps(info), retain=True)
    device.beat("ready")


def answer(device: Device, request: dict[str, Any], case: Case, said: Any) -> None:
    """Have a device that is played answer a request: with text, a JSON object, or several."""
    values = said if "questions" in case.request else [said]
    answers = [
        {"text": each} if isinstance(each, str) else {"text": json.dumps(each), "json": each}
        for each in values
    ]
    whole = "\n".join(each["text"] for each in answers).encode()
    device.event(
        request["id"], "result", attempt=1, sha256=hashlib.sha256(whole).hexdigest(),
        timings={"ttft_ms": 5.0, "tokens_per_second": 9.0},
        **({"answers": answers} if "questions" in case.request else answers[0]),
    )  # fmt: skip


@pytest.mark.broker
@pytest.mark.parametrize("wrong", [None, "a reading as JSON", "a move"])
def test_one_wrong_answer_is_enough(broker: Mosquitto, wrong: str | None) -> None:
    said = {"a reading as JSON": {"device": "pump 3"}, "a move": "The red circle moves up."}
    with Device(broker.port) as device:
        present(device)
        with Program("selftest", "--json", port=broker.port) as program:
            device.peer.wait(bool, timeout_s=LIMIT_S)  # it has started
            for number, case in enumerate(cases(), 1):
                request = device.request(number)
                assert request["topic"] == f"edged/box/request/{case.kind}"
                right = case.expected(exactly=True)
                answer(device, request, case, said[case.name] if case.name == wrong else right)
            # Its next heartbeat, which tells the memory, is waited for.
            time.sleep(0.5)
            device.beat("ready", engine={"state": "idle", "rss_mb": 320.0})
            assert program.wait() == (0 if wrong is None else 1), program.text
        body = json.loads(program.out)
    assert [each["name"] for each in body["cases"] if not each["ok"]] == [wrong] * bool(wrong)
    assert (body["exact"], body["model"], body["ok"]) == (True, "played", wrong is None)
    assert (body["ttft_ms_p50"], body["tokens_per_second_p50"]) == (5, 9)
    assert (body["memory_mb"], body["peak_memory_mb"]) == (320, None)
    if wrong is not None:
        (failed,) = [each for each in body["cases"] if not each["ok"]]
        assert failed["answer"] == said[wrong]


@pytest.mark.broker
def test_a_text_model_is_not_held_to_frames(broker: Mosquitto) -> None:
    said = "the loaded model has no vision: set model.path to a Phi-3.5-vision model"
    with Device(broker.port) as device:
        present(device)
        with Program("selftest", port=broker.port) as program:
            for number, case in enumerate(cases(), 1):
                request = device.request(number)
                if case.kind == "vision":
                    device.event(request["id"], "refused", request="vision", code="unsupported",
                                 message=said, retryable=False)  # fmt: skip
                else:
                    answer(device, request, case, case.expected(exactly=True))
            device.beat("ready")
            assert program.wait() == 0, program.text
    texts = sum(each.kind == "text" for each in cases())
    assert f"\n{texts} right, 0 wrong, {len(cases()) - texts} left out, in " in program.out
    assert "\nits model is one for text: " in program.out
    assert program.out.count(said) == 1
    assert program.out.count(": the same\n") == len(cases()) - texts - 1


@pytest.mark.broker
@pytest.mark.parametrize("why", ["unfused", "stale"])
def test_a_vision_model_that_does_not_see_is_wrong(
    tmp_path: Path, broker: Mosquitto, why: str
) -> None:
    model = Path(shutil.copytree(SHIPPED, tmp_path / "model"))
    record = model / "edged-fused.json"
    if why == "unfused":
        record.unlink()
        (model / "edged-fused.onnx").unlink()
    else:
        body = json.loads(record.read_text())
        next(iter(body["sources"].values()))["sha256"] = "0" * 64
        record.write_text(json.dumps(body))
    settings = {"model": {"path": str(model), "max_context": 2048}}
    with Daemon(tmp_path, broker.port, engine="real", settings=settings) as daemon:
        daemon.wait_ready()
        config = ("--config", str(tmp_path / "edged.toml"))
        done = run(tmp_path / "cwd", *SELFTEST, *config)
    assert done.returncode == 1
    texts = sum(each.kind == "text" for each in cases())
    assert f"\n{texts} right, {len(cases()) - texts} wrong, in " in done.stdout
    assert f"run: edged models fuse {model}, then start edged again\n" in done.stdout


@pytest.mark.broker
def test_another_model_is_asked_for_facts_and_what_is_wrong_is_named(
    tmp_path: Path, broker: Mosquitto, vision_folder: Path
) -> None:
    model = {"path": str(vision_folder), "max_context": 2048}
    with Daemon(tmp_path, broker.port, engine="real", settings={"model": model}) as daemon:
        daemon.wait_ready()
        # What the settings here say of the model does not count.
        config = ("--config", str(tmp_path / "edged.toml"), "--set", f"model.path={SHIPPED}")
        done = run(tmp_path / "cwd", *SELFTEST, *config)
    assert done.returncode == 1
    assert "this is a smoke test" in done.stdout
    assert "\nWRONG  a move: " in done.stdout
    assert "\n       expected: The red circle moves to the right.\n" in done.stdout
    counted = re.search(r"\n(\d+) right, (\d+) wrong, in ", done.stdout)
    assert counted is not None
    right, wrong = map(int, counted.groups())
    assert right + wrong == len(cases())
    assert wrong > right  # random weights may hit on a fact
    assert done.stdout.count("\nWRONG  ") == wrong


@pytest.mark.broker
def test_what_a_text_model_cannot_do_is_left_out(tmp_path: Path, broker: Mosquitto) -> None:
    with Daemon(tmp_path, broker.port, engine="real") as daemon:
        daemon.wait_ready()
        config = ("--config", str(tmp_path / "edged.toml"))
        done = run(tmp_path / "cwd", *SELFTEST, *config, "--json")
    body = report(done)
    assert done.returncode == 1
    assert (body["ok"], body["exact"], body["model"]) == (False, False, "small")
    left_out = [each for each in body["cases"] if each["ok"] is None]
    assert {each["kind"] for each in left_out} == {"vision"}
    assert len(left_out) == body["left_out"] == sum(each.kind == "vision" for each in cases())
    assert all("the loaded model has no vision" in each["reason"] for each in left_out)


def test_a_broker_that_is_not_there_is_said(tmp_path: Path, unused_tcp_port: int) -> None:
    where = ("--set", "mqtt.host=127.0.0.1", "--set", f"mqtt.port={unused_tcp_port}")
    done = run(tmp_path / "cwd", *SELFTEST, *where)
    assert done.returncode == 69
    assert f"127.0.0.1:{unused_tcp_port} cannot be reached: connection refused" in done.stderr


@pytest.mark.parametrize("command", ["selftest", "demo"])
def test_a_damaged_model_is_named(tmp_path: Path, command: str) -> None:
    model = Path(shutil.copytree(SHIPPED, tmp_path / "model"))
    damaged = model / "model.onnx.data"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    code = (
        "import sys; from pathlib import Path; from edged import cli, selftest; "
        f"selftest.model_dir = lambda: Path({str(model)!r}); sys.exit(cli.main([{command!r}]))"
    )
    done = run(tmp_path / "cwd", *PYTHON, "-c", code)
    assert done.returncode == 1
    assert f"damaged: {damaged} has the sha256" in done.stderr
    assert "pip install --force-reinstall" in done.stderr


def test_the_model_that_ships_is_the_pinned_one_and_nothing_else() -> None:
    assert selftest.digests(selftest.verify()) == selftest.pinned()


@pytest.mark.slow
def test_a_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """What is installed is the wheel's; only the locked dependencies are seen from outside."""
    wheels = tmp_path / "wheels"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    subprocess.run(
        [*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "-q",
         "-w", str(wheels)],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = wheels.iterdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "env"], check=True, cwd=tmp_path)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    subprocess.run(
        [*pip, "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    # No .pth of theirs is followed, so that no tree that is installed as editable is seen.
    (site / "locked.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    program = tmp_path / "env" / "bin" / "edged"
    found = subprocess.run(
        [python, "-P", "-c", "import edged; print(edged.__file__)"],
        check=True, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert Path(found.stdout.strip()).is_relative_to(site)
    done = run(tmp_path / "cwd", str(program), "selftest", "--json", path=None)
    check_all_right(report(done))
    assert done.returncode == 0
