"""A client's talk with a device that a test plays, over a broker in memory."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from edged.client import Client, connection
from edged.conversation import Audience, Conversation, Job, filters
from edged.errors import EdgedError
from edged.jobs import Kind
from edged.options import Client as ClientOptions
from edged.settings import Settings
from edged.testing import MemoryBroker, MemoryBus

SETTINGS = Settings(device="box", client=ClientOptions(username="desk"))
ROOT = "edged/box"


def result(text: str = "text", **fields: Any) -> dict[str, Any]:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"type": "result", "attempt": 1, "text": text, "sha256": digest} | fields


def job(final: dict[str, Any] | None = None, told: str = "", **fields: Any) -> Job:
    made = Job("j", Kind.TEXT, b"{}")
    made.transcript.begin(1)
    made.transcript.add(1, 0, told)
    made.final, made.finals = final, [b"1"] if final else []
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_only_a_whole_result_is_right() -> None:
    assert job(result()).fault() is None
    two = {"answers": [{"text": "a"}, {"text": "b"}]}
    digest = hashlib.sha256(b"a\nb").hexdigest()
    assert job({"type": "result", "attempt": 1, "sha256": digest} | two).fault() is None
    error = {"type": "error", "code": "dead", "message": "m"}
    for words, wrong in {
        "refused, queue_full": job(refused={"code": "queue_full", "message": "m"}),
        "no final": job(),
        "2 different finals": job(result(), finals=[b"1", b"2"]),
        "the error dead": job(error),
        "SHA-256": job(result(sha256="0")),
    }.items():
        assert words in (wrong.fault() or "")


def test_the_stream_is_the_text_of_the_result() -> None:
    assert job(result(), told="text").stream_fault() is None
    assert job({"type": "result", "attempt": 1, "answers": [{"text": "a"}, {"text": "b"}]},
               told="ab").stream_fault() is None  # fmt: skip
    for wrong in (job(result(), told="tex"), job(result(attempt=2), told="text")):
        assert "not the text" in (wrong.stream_fault() or "")


def test_only_cancelled_is_cancelled() -> None:
    cancelled = {"type": "error", "code": "cancelled", "message": "m"}
    assert job(cancelled).cancel_fault() is None
    assert "with a result" in (job(result()).cancel_fault() or "")
    assert "is dead" in (job(cancelled | {"code": "dead"}).cancel_fault() or "")
    assert "no final" in (job().cancel_fault() or "")


# Over a broker ----------------------------------------------------------------------------------


class Told(Audience):
    def __init__(self) -> None:
        self.happened: list[str] = []
        self.shown = ""

    def event(self, event: dict[str, Any]) -> None:
        self.happened.append(event["type"])

    def text(self, text: str) -> None:
        self.shown += text


class Device:
    """Plays the device."""

    def __init__(self) -> None:
        self.broker = MemoryBroker()

    def status(self, state: str) -> None:
        body = {"state": state, "reason": "why", "instance": "i", "interval_s": 10}
        self._publish("status", body | {"ts": time.time()})

    def info(self) -> None:
        self._publish("info", {"instance": "i", "capabilities": {"text": True}})

    def _publish(self, topic: str, body: dict[str, Any]) -> None:
        self.broker.publish(f"{ROOT}/{topic}", json.dumps(body), qos=1, retain=True)

    def event(self, name: str, kind: str, **fields: Any) -> None:
        body = {"v": 1, "id": name, "type": kind} | fields
        self.broker.publish(f"{ROOT}/response/desk/{name}", json.dumps(body), qos=1)

    async def requests(self, count: int) -> list[dict[str, Any]]:
        came = await self.broker.wait_for(f"{ROOT}/request/text/desk", count)
        return [json.loads(each.payload) for each in came]

    @asynccontextmanager
    async def talk(self, audience: Audience | None = None) -> AsyncIterator[Conversation]:
        bus = MemoryBus(self.broker, connection(SETTINGS, "test", filters(SETTINGS)))
        async with Client(SETTINGS, "test", bus=bus) as client:
            yield Conversation(SETTINGS, client, audience)


async def test_a_job_is_followed_to_its_end() -> None:
    device, told = Device(), Told()
    async with device.talk(told) as talk:
        device.status("ready")
        device.info()
        await talk.ready(5)
        asked = talk.ask("a", Kind.TEXT, {"prompt": "What?"})
        assert (await device.requests(1))[0] == {"v": 1, "id": "a", "prompt": "What?"}
        device.event("b", "result", **result("of another job"))
        device.event("a", "started", attempt=1)
        device.event("a", "chunk", attempt=1, seq=0, delta="te")
        device.event("a", "result", **result())
        device.event("a", "chunk", attempt=1, seq=1, delta="xt")
        await talk.finish(asked, 5)
        await talk.late(asked)
    assert asked.fault() is None
    assert asked.stream_fault() is None
    assert told.happened == ["started", "chunk", "result", "chunk"]
    assert told.shown == "text"


async def test_a_job_is_asked_again_after_a_lost_connection() -> None:
    device = Device()
    async with device.talk() as talk:
        asked = talk.ask("a", Kind.TEXT, {"prompt": "What?"})
        waiting = asyncio.create_task(talk.finish(asked, 10))
        await device.requests(1)
        device.broker.drop_connection()
        first, again = await device.requests(2)
        assert again == first
        device.event("a", "error", code="dead", message="m")
        await waiting
    assert "dead" in (asked.fault() or "")


async def test_a_job_that_nobody_waits_for_is_cancelled() -> None:
    device = Device()
    async with device.talk() as talk:
        asked = talk.ask("a", Kind.TEXT, {"prompt": "What?"})
        waiting = asyncio.create_task(talk.finish(asked, 10))
        await device.requests(1)
        await asyncio.sleep(0)  # it waits now
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        (cancel,) = await device.broker.wait_for(f"{ROOT}/request/cancel/desk")
    assert json.loads(cancel.payload)["id"] == "a"


async def test_a_broker_that_refuses_is_said() -> None:
    device = Device()
    device.broker.refuse_publishes(f"{ROOT}/request/#")
    async with device.talk() as talk:
        asked = talk.ask("a", Kind.TEXT, {"prompt": "What?"})
        with pytest.raises(EdgedError, match="does not take what we publish: not authorized"):
            await talk.finish(asked, 5)


async def test_a_device_that_is_not_ready_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.conversation.ABSENT_S", 0.1)
    monkeypatch.setattr("edged.conversation.ABSENT_BEATS", 0)
    device = Device()
    async with device.talk() as talk:
        with pytest.raises(EdgedError, match=r"no sign of a device box under edged/box\Z"):
            await talk.ready(5)
        device.status("offline")
        with pytest.raises(EdgedError, match="its last status: offline"):
            await talk.ready(5)
        device.status("degraded")
        with pytest.raises(EdgedError, match=r"not ready after 0\.2 s \(degraded: why\)"):
            await talk.ready(0.2)
