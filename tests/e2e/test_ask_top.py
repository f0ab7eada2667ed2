"""`edged ask` and `edged top` as processes, over a real broker, with a device that a test plays."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from tests.kit.client import Peer
from tests.kit.daemon import ROOT, SHIPPED, Daemon
from tests.kit.mosquitto import PASSWD, Mosquitto

pytestmark = pytest.mark.broker

PATIENCE_S = 20.0
INSTANCE = "0" * 32
READING = "Pump 3: 71 C, limit 65. Is that well?"
READING_ANSWER = "Pump 3 reads 71 C, limit 65 C: too high, so no."
READING_SCHEMA = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "limit": {"type": "integer"},
        "ok": {"type": "boolean"},
    },
    "required": ["value", "ok"],
    "additionalProperties": False,
}


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("EDGED_")}
    return env | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}


class Program:
    """`python -m edged …`, its output read as it comes."""

    def __init__(self, *arguments: str, port: int, **settings: str) -> None:
        command = [sys.executable, "-W", "error", "-m", "edged", *arguments]
        values = {"device": "box", "mqtt.host": "127.0.0.1", "mqtt.port": str(port)}
        values["health.interval_s"] = "0.4"
        values |= {name.replace("__", "."): value for name, value in settings.items()}
        for name, value in values.items():
            command += ["--set", f"{name}={value}"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._streams = {self.process.stdout.fileno(): "out", self.process.stderr.fileno(): "err"}
        self.text = {"out": "", "err": ""}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    @property
    def out(self) -> str:
        return self.text["out"]

    @property
    def err(self) -> str:
        return self.text["err"]

    def _read(self, until: float) -> None:
        left = max(0.0, until - time.monotonic())
        ready, _, _ = select.select(list(self._streams), [], [], left)
        for number in ready:
            data = os.read(number, 65536)
            if data:
                self.text[self._streams[number]] += data.decode()
            else:
                del self._streams[number]

    def wait_for(self, stream: str, text: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while text not in self.text[stream]:
            assert self._streams, f"it ended without {text!r}: {self.text}"
            assert time.monotonic() < until, f"no {text!r} in {self.text}"
            self._read(until)

    def wait(self) -> int:
        until = time.monotonic() + PATIENCE_S
        while self._streams:
            assert time.monotonic() < until, f"it does not end: {self.text}"
            self._read(until)
        return self.process.wait(PATIENCE_S)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


class Device:
    """Plays a device: sees the requests, says what the test wants."""

    def __init__(self, port: int, *, instance: str = INSTANCE, **peer: Any) -> None:
        self.peer = Peer(port, "edged/box/request/#", **peer)
        self.instance = instance
        self.seq = 0

    def __enter__(self) -> Self:
        self.peer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.__exit__(None, None, None)

    def status(self, state: str, reason: str = "because", **fields: Any) -> None:
        body = {
            "v": 1, "state": state, "instance": self.instance, "reason": reason, "ts": time.time(),
            "clock_synced": True, "interval_s": 20,
        }  # fmt: skip
        self.peer.publish("edged/box/status", json.dumps(body | fields), retain=True)

    def beat(self, state: str, **fields: Any) -> None:
        self.seq += 1
        body = {
            "v": 1, "seq": self.seq, "instance": self.instance, "state": state, "reason": "because",
            "ts": time.time(), "uptime_s": 12.5, "model": "small", "provider": "cpu", "threads": 4,
            "queue": {"depth": 2, "oldest_s": 7.5},
            "job": {"id": "j1", "client": "desk", "stage": "prefill", "progress_age_s": 0.2},
            "outbox": {"depth": 0, "oldest_s": 0.0},
            "totals": {"accepted": 9, "completed": 5, "failed": 1},
            "engine": {"state": "busy", "restarts": 1, "last_reason": "oom", "rss_mb": 310.0,
                       "sessions": 1},
            "speed": {"ttft_ms_p50": 12.0, "prefill_tokens_per_second": 99.0,
                      "tokens_per_second_p50": 11.25},
            "host": {"cpu": 87.0, "rss_mb": 50.0, "mem_available_mb": 900.0, "temp_c": None,
                     "throttled": False, "disk_free_mb": 1000.0},
            "mqtt": {"connected": True, "reconnects": 0, "last_reason": None},
        }  # fmt: skip
        self.peer.publish("edged/box/health", json.dumps(body | fields), qos=0, retain=True)

    def request(self, count: int = 1) -> dict[str, Any]:
        """Wait for this many messages on the request topics; return the last one's body."""
        message = self.peer.wait_for(count)[count - 1]
        body = json.loads(message.payload)
        assert isinstance(body, dict)
        return body | {"topic": message.topic}

    def event(self, job: str, kind: str, *, client: str | None = None, **fields: Any) -> None:
        topic = f"edged/box/response/{client}/{job}" if client else f"edged/box/response/{job}"
        body = {"v": 1, "id": job, "type": kind} | fields
        qos = 0 if kind in {"chunk", "progress"} else 1
        self.peer.publish(topic, json.dumps(body), qos=qos)

    def chunk(self, job: str, attempt: int, seq: int, delta: str, **more: Any) -> None:
        self.event(job, "chunk", attempt=attempt, seq=seq, delta=delta, **more)

    def result(self, job: str, text: str, attempt: int = 1, **more: Any) -> None:
        self.event(
            job, "result", text=text, finish_reason="stop", attempt=attempt, model="small",
            usage={"completion_tokens": 3}, timings={"ttft_ms": 5.0, "tokens_per_second": 9.0},
            sha256=hashlib.sha256(text.encode()).hexdigest(), **more,
        )  # fmt: skip


@pytest.fixture
def device(broker: Mosquitto) -> Iterator[Device]:
    with Device(broker.port) as played:
        yield played


@pytest.fixture
def ready(device: Device) -> Device:
    device.status("ready")
    return device


# ask --------------------------------------------------------------------------------------------


def test_prints_the_answer_as_it_comes(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What is it?", port=broker.port) as ask:
        request = ready.request()
        job = request["id"]
        ready.event(job, "accepted", position=0, durable=True)
        ready.event(job, "started", attempt=1, queue_ms=1.0)
        ready.chunk(job, 1, 0, "It is ")
        ask.wait_for("out", "It is ")  # before anything else has come
        ready.chunk(job, 1, 1, "blue.")
        ready.result(job, "It is blue.")
        assert ask.wait() == 0
    assert (ask.out, ask.err) == ("It is blue.\n", "")
    assert request["topic"] == "edged/box/request/text"
    assert request["prompt"] == "What is it?"
    assert set(request) == {"v", "id", "prompt", "topic"}


def test_asks_as_the_client_with_all_options(
    broker: Mosquitto, ready: Device, tmp_path: Path
) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    options: tuple[str, ...] = ("--system", "Be brief.", "--max-tokens", "7", "--deadline", "90")
    options += ("--schema", str(schema))
    with Program("ask", "Which?", *options, port=broker.port, client__username="desk") as ask:
        request = ready.request()
        ready.result(request["id"], "{}", client="desk")
        assert ask.wait() == 0
    assert request["topic"] == "edged/box/request/text/desk"
    assert request["system"] == "Be brief."
    assert (request["max_tokens"], request["deadline_s"]) == (7, 90)
    assert request["response_format"] == {
        "type": "json_schema", "json_schema": {"schema": {"type": "object"}},
    }  # fmt: skip


def test_fills_lost_chunks_from_the_result(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        job = ready.request()["id"]
        ready.chunk(job, 1, 0, "one ")
        ready.chunk(job, 1, 2, "three ")
        ready.chunk(job, 1, 2, "three ")
        ready.result(job, "one two three four")
        assert ask.wait() == 0
    assert ask.out == "one two three four\n"
    assert "a part of the stream was lost" in ask.err


def test_begins_again_with_a_new_attempt(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        job = ready.request()["id"]
        ready.chunk(job, 1, 0, "half of an")
        ready.event(job, "started", attempt=2, queue_ms=1.0)
        ready.chunk(job, 1, 1, " answer")  # late, of the attempt that is over
        ready.chunk(job, 2, 0, "the whole")
        ready.result(job, "the whole answer", attempt=2)
        assert ask.wait() == 0
    assert ask.out == "half of an\nthe whole answer\n"
    assert "attempt 2 begins" in ask.err


def test_shows_the_whole_result_if_it_is_another_text(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        job = ready.request()["id"]
        ready.chunk(job, 1, 0, "this")
        ready.result(job, "that")
        assert ask.wait() == 0
    assert ask.out == "this\nthat\n"
    assert "differs from what was streamed" in ask.err


@pytest.mark.parametrize("kind", ["refused", "error"])
def test_says_why_there_is_no_answer(broker: Mosquitto, ready: Device, kind: str) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        job = ready.request()["id"]
        ready.event(
            job, kind, code="queue_full", message="too many", retryable=True, retry_after_s=30
        )
        assert ask.wait() == 1
    assert ask.out == ""
    assert "queue_full: too many (again in 30 s)" in ask.err


def test_json_gives_every_event(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", "--json", port=broker.port) as ask:
        job = ready.request()["id"]
        ready.event(job, "accepted", position=1, durable=True)
        ready.chunk(job, 1, 0, "grün")
        ready.peer.publish(f"edged/box/response/{job}", b"no json")
        ready.result(job, "grün")
        assert ask.wait() == 0
    events = [json.loads(line) for line in ask.out.splitlines()]
    assert [event["type"] for event in events] == ["accepted", "chunk", "result"]
    assert events[1]["delta"] == "grün"
    assert ask.err == ""


def test_waits_for_a_device_that_is_offline(broker: Mosquitto, device: Device) -> None:
    device.status("offline", "lost")
    with Program("ask", "What?", port=broker.port) as ask:
        ask.wait_for("err", "box is offline (lost)")
        assert "edged run" in ask.err
        job = device.request()["id"]
        device.status("starting")
        device.result(job, "here I am")
        assert ask.wait() == 0
    assert ask.out == "here I am\n"


def test_asks_again_if_the_request_may_be_lost(broker: Mosquitto, device: Device) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        ask.wait_for("err", "no sign of a device box under edged/box")
        first = device.request()
        time.sleep(5)  # ask.AGAIN_S
        device.status("ready")
        again = device.request(2)
        assert again == first
        device.result(first["id"], "yes")
        assert ask.wait() == 0


def test_gives_up_after_the_timeout_and_cancels(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", "--timeout", "1", port=broker.port) as ask:
        job = ready.request()["id"]
        ready.event(job, "accepted", position=3, durable=True)
        assert ask.wait() == 1
    assert "no result within 1 s" in ask.err
    cancel = ready.request(2)
    assert (cancel["topic"], cancel["id"]) == ("edged/box/request/cancel", job)


def test_ctrl_c_cancels_the_job(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", port=broker.port, client__username="desk") as ask:
        job = ready.request()["id"]
        ready.event(job, "accepted", client="desk", position=0, durable=True)
        ready.chunk(job, 1, 0, "half", client="desk")
        ask.wait_for("out", "half")
        ask.interrupt()
        cancel = ready.request(2)
        began = time.monotonic()
        ready.event(job, "error", client="desk", code="cancelled", message="m", retryable=False)
        assert ask.wait() == 130
        assert time.monotonic() - began < 4  # the final ended it, not its patience
    assert (cancel["topic"], cancel["id"]) == ("edged/box/request/cancel/desk", job)
    assert ask.out == "half\n"
    assert "Traceback" not in ask.err


def test_a_second_ctrl_c_does_not_wait(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        ready.request()
        ask.interrupt()
        ready.request(2)
        ask.interrupt()
        began = time.monotonic()
        assert ask.wait() == 130
        assert time.monotonic() - began < 4


def test_cancels_when_nobody_reads(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        job = ready.request()["id"]
        assert ask.process.stdout is not None
        del ask._streams[ask.process.stdout.fileno()]
        ask.process.stdout.close()
        ready.chunk(job, 1, 0, "to nobody")
        cancel = ready.request(2)
        assert ask.wait() == 141
    assert (cancel["topic"], cancel["id"]) == ("edged/box/request/cancel", job)
    assert ask.err == ""


def test_goes_on_after_a_lost_connection(broker: Mosquitto, ready: Device) -> None:
    with Program("ask", "What?", port=broker.port) as ask:
        first = ready.request()
        ready.chunk(first["id"], 1, 0, "one ")
        ask.wait_for("out", "one ")
        broker.restart()
        ask.wait_for("err", "the connection is lost")
        while len(ready.peer.seen) < 2:  # the broker forgot the device's session: it may be missed
            with suppress(RuntimeError):  # paho's, while it is not connected
                ready.status("ready")
            time.sleep(0.5)
        assert ready.request(2) == first  # the same job, not another
        ready.result(first["id"], "one two")
        assert ask.wait() == 0
    assert ask.out == "one two\n"


def test_says_that_the_broker_is_not_reachable(unused_tcp_port: int) -> None:
    for command in (("ask", "What?"), ("top", "--once"), ("top",)):
        with Program(*command, port=unused_tcp_port) as program:
            assert program.wait() == 69
        assert program.out == ""
        assert f"127.0.0.1:{unused_tcp_port} cannot be reached: connection refused" in program.err
        assert "Traceback" not in program.err


def test_refuses_locally_what_the_device_could_not_answer(broker: Mosquitto, ready: Device) -> None:
    info = json.dumps({"v": 1, "limits": {"payload_mb": 0.001}})
    ready.peer.publish("edged/box/info", info, retain=True)
    with Program("ask", "x" * 2000, port=broker.port) as ask:
        assert ask.wait() == 1
    assert "too_large: the request has 2" in ask.err


@pytest.mark.skipif(PASSWD is None, reason="mosquitto_passwd is not installed")
def test_says_that_the_broker_does_not_take_the_request(tmp_path: Path) -> None:
    acl = "user desk\ntopic read edged/#\n"
    password = tmp_path / "password"
    password.write_text("secret\n")
    with (
        Mosquitto(tmp_path, passwords={"desk": "secret"}, acl=acl) as broker,
        Program(
            "ask", "What?",
            port=broker.port, client__username="desk", client__password_file=str(password),
        ) as ask,
    ):  # fmt: skip
        assert ask.wait() == 1
    assert "the broker does not take the request on edged/box/request/text/desk" in ask.err
    with (
        Mosquitto(tmp_path, passwords={"desk": "secret"}) as broker,
        Program("ask", "What?", port=broker.port, client__username="desk") as ask,
    ):
        assert ask.wait() == 69
    assert "not authorized" in ask.err


def run_on_a_terminal(arguments: list[str], port: int, device: Device) -> tuple[int, str]:
    """Run with one terminal for all, answer the request; return the status and the output."""
    program, terminal = pty.openpty()
    command = [sys.executable, "-m", "edged", *arguments, "--set", "device=box"]
    command += ["--set", "mqtt.host=127.0.0.1", "--set", f"mqtt.port={port}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    job = device.request()["id"]
    device.event(job, "accepted", position=2, eta_s=4.2, durable=True)
    device.event(job, "started", attempt=1, queue_ms=1.0)
    device.event(job, "progress", attempt=1, stage="prefill", done=512, total=1024)
    device.chunk(job, 1, 0, "red \x1b[31malert\x07")
    device.result(job, "red \x1b[31malert\x07")
    text = b""
    while True:
        try:
            data = os.read(program, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        text += data
    os.close(program)
    return process.wait(PATIENCE_S), text.decode()


def test_a_terminal_sees_the_way_and_no_control_characters(
    broker: Mosquitto, ready: Device
) -> None:
    status, text = run_on_a_terminal(["ask", "What?"], broker.port, ready)
    assert status == 0
    assert "accepted, 2 ahead, done in about 4 s" in text
    assert "prefill 512 of 1024" in text
    assert "red ␛[31malert␇" in text
    assert "\x1b[31m" not in text
    assert "[small, 3 tokens, the first after 5 ms, 9.0 a second]" in text


# top --------------------------------------------------------------------------------------------


def test_once_shows_a_kept_beat(broker: Mosquitto, ready: Device) -> None:
    ready.beat("ready")
    with Program("top", "--once", port=broker.port) as top:
        assert top.wait() == 0
    for words in ("box  ready", "2 waiting", "desk/j1  prefill", "11.2 tokens/s", "cpu 87 %"):
        assert words in top.out
    assert top.err == ""


def test_once_json_is_the_heartbeat(broker: Mosquitto, device: Device) -> None:
    device.status("degraded")
    device.beat("degraded")
    with Program("top", "--once", "--json", port=broker.port) as top:
        assert top.wait() == 1
    beat = json.loads(top.out)
    assert (beat["state"], beat["seq"], beat["totals"]["completed"]) == ("degraded", 1, 5)


def test_once_says_offline_with_the_reason(broker: Mosquitto, device: Device) -> None:
    device.beat("ready")
    device.status("offline", "stopped")
    with Program("top", "--once", port=broker.port) as top:
        assert top.wait() == 1
    assert top.out == ""
    assert "box is offline: stopped" in top.err


def test_once_gives_up_on_an_absent_device(broker: Mosquitto) -> None:
    with Program("top", "--once", port=broker.port) as top:
        assert top.wait() == 1
    assert "no sign of a device box under edged/box" in top.err


def test_once_does_not_believe_an_old_beat(broker: Mosquitto, device: Device) -> None:
    device.status("ready", ts=time.time() - 60, interval_s=0.4)
    device.beat("ready", ts=time.time() - 60)
    with Program("top", "--once", port=broker.port) as top:
        assert top.wait() == 1
    assert "no heartbeat of box" in top.err
    assert "its status 6" in top.err


def test_once_waits_for_the_next_beat_after_a_change(broker: Mosquitto, device: Device) -> None:
    device.beat("starting")
    device.status("ready")
    with Program("top", "--once", port=broker.port) as top:
        time.sleep(1.5)
        device.beat("ready")
        assert top.wait() == 0
    assert "beat     2" in top.out


def test_once_ignores_the_will_of_an_earlier_instance(broker: Mosquitto, device: Device) -> None:
    device.status("offline", "lost", instance="f" * 32)
    with Program("top", "--once", port=broker.port) as top:
        until = time.monotonic() + PATIENCE_S
        while top.process.poll() is None and time.monotonic() < until:
            device.beat("ready")
            time.sleep(0.05)
        assert top.wait() == 0


def test_shows_a_line_for_each_beat(broker: Mosquitto, ready: Device) -> None:
    ready.beat("ready")
    with Program("top", port=broker.port) as top:
        top.wait_for("out", "ready · queue 2 · job j1 prefill · 5 completed, 1 failed")
        ready.status("degraded", interval_s=0.4)
        ready.beat("degraded", reason="no model\x1b[2J")
        top.wait_for("out", "degraded (no model␛[2J)")
        top.wait_for("err", "no heartbeat of box")
        ready.status("offline", "lost")
        top.wait_for("err", "box is offline: lost")
        top.interrupt()
        assert top.wait() == 0
    assert "\x1b" not in top.out


def test_draws_in_place_on_a_terminal(broker: Mosquitto, ready: Device) -> None:
    ready.beat("ready")
    program, terminal = pty.openpty()
    command = [sys.executable, "-m", "edged", "top", "--set", "device=box"]
    command += ["--set", "mqtt.host=127.0.0.1", "--set", f"mqtt.port={broker.port}"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    text = ""
    until = time.monotonic() + PATIENCE_S
    while text.count("box  ready") < 3 and time.monotonic() < until:
        text += os.read(program, 65536).decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE_S) == 0
    os.close(program)
    assert "\x1b[11A\r\x1b[J" in text  # eleven rows up, and over them
    assert "Traceback" not in text


# With the real daemon ---------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_asks_the_real_daemon(broker: Mosquitto, tmp_path: Path, version: str) -> None:
    settings = {"mqtt": {"protocol": version}, "model": {"path": str(SHIPPED)}}
    with Daemon(tmp_path, broker.port, engine="real", settings=settings) as daemon:
        daemon.wait_ready()
        with Program("top", "--once", port=broker.port, mqtt__protocol=version) as top:
            assert top.wait() == 0, top.text
        with Program("ask", READING, "--json", port=broker.port, mqtt__protocol=version) as ask:
            assert ask.wait() == 0, ask.text
        events = [json.loads(line) for line in ask.out.splitlines()]
        kinds = [event["type"] for event in events]
        assert kinds[0] == "accepted"
        assert kinds[-1] == "result"
        assert events[-1]["text"] == READING_ANSWER
        with Program("ask", READING, port=broker.port, mqtt__protocol=version) as ask:
            assert ask.wait() == 0
        assert ask.out == f"{READING_ANSWER}\n"
        schema = tmp_path / "schema.json"
        schema.write_text(json.dumps(READING_SCHEMA))
        wanted = ("--schema", str(schema), "--json")
        with Program("ask", READING, *wanted, port=broker.port, mqtt__protocol=version) as ask:
            assert ask.wait() == 0, ask.text
        answer = json.loads(ask.out.splitlines()[-1])["json"]
        assert answer == {"value": 71, "limit": 65, "ok": False}
        assert daemon.stop() == 0
        with Program("top", "--once", port=broker.port, mqtt__protocol=version) as top:
            assert top.wait() == 1
        assert "box is offline: stopped" in top.err
