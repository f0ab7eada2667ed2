"""An independent client that sees everything of a device, and the oracle over what it saw.

Plain paho on its own thread, none of edged's code. Its session is kept: what the broker takes at
QoS 1 while it is away comes later. All methods block; in a test whose own event loop must go on
meanwhile call them through `asyncio.to_thread` (`async with` does it for start and end).

    with Observer(broker.port) as observer:
        name = observer.ask("!say well")  # any other client may ask too
        assert observer.final(name)["text"] == "well"
        observer.check()  # waits until all is answered, then judges

The oracle (`violations`): every accepted job has a final; all finals of a job are byte-equal; no
event names a job that nobody asked for; every request that was not accepted has a refusal with a
code; the chunks of the final's attempt, if none is missing, are exactly its text; sha256 is right;
order holds within a QoS; whatever edged publishes, on any topic, is as `edged schema asyncapi`
says, and what that says is no request was refused.

What edged published is held to the document at the end of the block even where nothing is judged.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import socket
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from tests.kit.document import Document, validator
from tests.kit.oracle import Body, Name, Request, Seen, judge, sense_wrong, short

__all__ = ["Body", "Name", "Observer", "Request", "Seen"]

JOB_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

#: Seconds a wait lasts before it fails the test.
PATIENCE_S = 30.0

T = TypeVar("T")


class _Index:
    """What was seen, by what is asked of it: so a look costs what came since the one before."""

    def __init__(self, is_request: Callable[[str], bool]) -> None:
        self._is_request = is_request
        self.read = 0
        self.events: list[Seen] = []
        self.of_job: defaultdict[Name | None, list[Seen]] = defaultdict(list)
        self.on_topic: defaultdict[str, list[Seen]] = defaultdict(list)
        #: Jobs that were accepted or ran, and those that have a final.
        self.begun: set[Name | None] = set()
        self.ended: set[Name | None] = set()

    def catch_up(self, seen: Sequence[Seen]) -> None:
        """Take in what is new at the end of `seen`."""
        for each in seen[self.read :]:
            self.on_topic[each.topic].append(each)
            kind, name = each.type, each.name
            if not kind or self._is_request(each.topic):
                continue
            self.events.append(each)
            self.of_job[name].append(each)
            if kind in {"accepted", "started"}:
                self.begun.add(name)
            elif kind in {"result", "error"}:
                self.ended.add(name)
        self.read = len(seen)


class Observer:
    """Subscribes, at QoS 1, to everything under `root` and to the default reply topics.

    Args:
        port: the broker's.
        root: the device's root.
        protocol: "5" or "3.1.1".
        client_id: absent: a fresh one.
        host, username, password, ca, cert, key: for the broker.
        filters: more to subscribe to, or (with `only`) all there is to subscribe to.
        only: leave the default filters out.
        qos: to subscribe with.
        receive_maximum: MQTT 5: how many messages the broker may have under way to us.
        hold: acknowledge nothing until `release`.
        documented: what comes must be as edged's own document says; false where others publish in
            its name.
    """

    def __init__(
        self,
        port: int,
        root: str = "edged/box",
        *,
        protocol: Literal["5", "3.1.1"] = "5",
        client_id: str | None = None,
        host: str = "127.0.0.1",
        username: str | None = None,
        password: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        filters: Iterable[str] = (),
        only: bool = False,
        qos: int = 1,
        receive_maximum: int | None = None,
        hold: bool = False,
        documented: bool = True,
    ) -> None:
        self.root = root
        self.base = root.rpartition("/")[0]
        self.seen: list[Seen] = []
        self._index = _Index(self._is_request)
        #: Requests of others that were sent where we could not see them (QoS 0 while away).
        self.expected: set[Name] = set()
        #: How often the broker has confirmed the subscriptions.
        self.subscriptions = 0
        #: What we published ourselves where edged publishes.
        self._forged: set[tuple[str, bytes]] = set()
        self._document = Document(root) if documented else None
        self._held: dict[int, list[str]] = {}
        self._five = protocol == "5"
        self._host, self._port = host, port
        self._receive_maximum = receive_maximum
        self._hold = hold
        self._unacked: list[tuple[int, int]] = []
        self._answers: dict[int, int] = {}
        self._grants: list[int] = []
        self._qos = qos
        self._filters = [*filters] if only else [f"{root}/#", f"{self.base}/reply/#", *filters]
        self._news = threading.Condition()
        self._count = 0  # of news
        self._numbers = itertools.count()
        self._rest = threading.Event()  # never set
        self._subscribed = threading.Event()
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or f"observer-{uuid.uuid4().hex[:12]}",
            clean_session=None if self._five else False,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            manual_ack=hold,
        )
        client.max_inflight_messages_set(100)
        client.reconnect_delay_set(1, 1)
        if ca is not None:
            client.tls_set(ca, cert, key)
        if username is not None:
            client.username_pw_set(username, password)
        client.on_socket_open = _send_at_once
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish

    # Connection

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.disconnect()
        if kind is not None:
            print(f"--- the observer saw ---\n{self.story()}")  # noqa: T201
        else:
            wrong = self.not_as_documented()
            assert not wrong, "\n".join(wrong)

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.connect)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def connect(self) -> None:
        """Connect (again) and wait for the subscriptions."""
        self._subscribed.clear()
        properties = None
        if self._five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = 3600
            if self._receive_maximum is not None:
                properties.ReceiveMaximum = self._receive_maximum
        options: dict[str, Any] = {"clean_start": False} if self._five else {}
        self._client.connect(self._host, self._port, 60, properties=properties, **options)
        self._client.loop_start()
        assert self._subscribed.wait(PATIENCE_S), "the observer could not subscribe"

    def disconnect(self) -> None:
        """Leave; the broker keeps what comes at QoS 1."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        if not self._filters:
            self._subscribed.set()
        elif self._five:  # retained ones once; whether live ones are retained can be seen
            options = SubscribeOptions(self._qos, retainAsPublished=True, retainHandling=1)
            client.subscribe([(each, options) for each in self._filters])
        else:
            client.subscribe([(each, self._qos) for each in self._filters])

    def _on_subscribe(self, *_: Any) -> None:
        self._subscribed.set()
        with self._news:
            self.subscriptions += 1
            self._count += 1
            self._news.notify_all()

    def _on_publish(self, _client: paho.Client, _data: Any, mid: int, reason: Any, _p: Any) -> None:
        with self._news:
            self._answers[mid] = reason.value
            self._count += 1
            self._news.notify_all()

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        properties = message.properties
        with self._news:
            if self._hold and message.qos:
                self._unacked.append((message.mid, message.qos))
            self.seen.append(
                Seen(
                    number=next(self._numbers),
                    at=time.monotonic(),
                    topic=message.topic,
                    payload=bytes(message.payload),
                    qos=message.qos,
                    retain=message.retain,
                    dup=message.dup,
                    correlation=getattr(properties, "CorrelationData", None),
                    expiry_s=getattr(properties, "MessageExpiryInterval", None),
                )
            )
            self._count += 1
            self._news.notify_all()

    def release(self, count: int | None = None) -> int:
        """Acknowledge the oldest `count` (default: all) held messages; return how many it were."""
        with self._news:
            now, self._unacked = self._unacked[:count], self._unacked[len(self._unacked[:count]) :]
        for mid, qos in now:
            self._client.ack(mid, qos)
        return len(now)

    # Asking

    def send(
        self,
        topic: str,
        payload: bytes | str | Body,
        *,
        qos: int = 1,
        retain: bool = False,
        wait: bool = True,
        **properties: Any,
    ) -> int:
        """Publish below the root, or anywhere with a leading `/`; return the broker's reason code.

        Properties are named as in paho: `ResponseTopic`, `CorrelationData`, `UserProperty`. Waits
        for the PUBACK (at QoS 0: until it is written) unless told not to.
        """
        topic = topic[1:] if topic.startswith("/") else f"{self.root}/{topic}"
        if isinstance(payload, dict):
            payload = json.dumps(payload)
        if self._document is not None and self._document.is_told(topic):
            self._forged.add((topic, payload.encode() if isinstance(payload, str) else payload))
        given = None
        if properties:
            given = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for name, value in properties.items():
                setattr(given, name, value)
        info = self._client.publish(topic, payload, qos, retain, given)
        assert info.rc == paho.MQTT_ERR_SUCCESS, f"not sent: {info.rc}"
        if not wait:
            return 0
        return self.wait(lambda: self._answers.get(info.mid), f"the PUBACK for {topic}")

    def ask(
        self,
        prompt: str | None = None,
        *,
        client: str | None = None,
        id: str | None = None,  # noqa: A002 - the field's name
        kind: Literal["text", "vision"] = "text",
        qos: int = 1,
        wait: bool = True,
        properties: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Name:
        """Publish a request, under a fresh id unless one is given; return its name."""
        name = Name(client, id or f"j-{uuid.uuid4().hex[:12]}")
        body = {"id": name.id, **({} if prompt is None else {"prompt": prompt}), **fields}
        topic = f"request/{kind}" + (f"/{client}" if client else "")
        self.expected.add(name)
        self.send(topic, body, qos=qos, wait=wait, **(properties or {}))
        return name

    def look(self, prompt: str | None, frames: Sequence[bytes] | Body, **options: Any) -> Name:
        """Publish a vision request with these frames, or a camera's; the rest is as in `ask`."""
        if not isinstance(frames, dict):
            images = [base64.b64encode(frame).decode("ascii") for frame in frames]
            return self.ask(
                prompt, kind="vision", frames=[{"image": image} for image in images], **options
            )
        return self.ask(prompt, kind="vision", frames=frames, **options)

    def cancel(self, name: Name, **fields: Any) -> None:
        """Publish a cancel for this job, as its client."""
        topic = "request/cancel" + (f"/{name.client}" if name.client else "")
        self.send(topic, {"id": name.id, **fields})

    # Waiting

    def wait(
        self, look: Callable[[], T | None], what: str = "it", timeout_s: float = PATIENCE_S
    ) -> T:
        """Wait until `look`, called at every news, returns neither None nor False."""
        until = time.monotonic() + timeout_s
        while True:
            known, began = self._count, time.monotonic()
            if (found := look()) is not None and found is not False:
                return found
            now = time.monotonic()
            if now >= until:
                tail = "\n".join(self._lines(self.seen[-40:]))
                raise AssertionError(f"waited {timeout_s} s for {what}; seen:\n{tail}")
            with self._news:
                if self._count == known:
                    self._news.wait(until - now)
            if now - began > 0.01:  # a look at thousands of messages: not at each of them
                self._rest.wait(min(now - began, 0.5))

    def events(
        self, name: Name | None = None, kind: str | None = None, *, topic: str | None = None
    ) -> list[Seen]:
        """Return the events seen: of a job, of a type, on a topic, as far as given."""
        with self._news:
            self._index.catch_up(self.seen)
            told = list(self._index.events if name is None else self._index.of_job[name])
        return [
            each
            for each in told
            if (kind is None or each.type == kind) and (topic is None or each.topic == topic)
        ]

    def event(
        self,
        name: Name | None,
        kind: str,
        *,
        topic: str | None = None,
        count: int = 1,
        timeout_s: float = PATIENCE_S,
    ) -> Seen:
        """Wait for the `count`-th event of this type (of this job, on this topic) and return it."""
        return self.wait(
            lambda: (
                found[count - 1]
                if len(found := self.events(name, kind, topic=topic)) >= count
                else None
            ),
            f"event {count} of type {kind} of {name} on {topic or 'any topic'}",
            timeout_s,
        )

    def finals(self, name: Name) -> list[Seen]:
        """Return the finals of a job, all of them."""
        return [each for each in self.events(name) if each.type in {"result", "error"}]

    def final(self, name: Name, timeout_s: float = PATIENCE_S) -> Body:
        """Wait for a job's first final and return it."""
        return self.wait(
            lambda: found[0].body if (found := self.finals(name)) else None,
            f"the final of {name}",
            timeout_s,
        )

    def refusal(self, name: Name | None = None, count: int = 1) -> Seen:
        """Wait for the `count`-th refusal (of a request with this name) and return it."""
        return self.event(name, "refused", count=count)

    def on(self, topic: str) -> list[Seen]:
        """Return what was seen on a topic below the root."""
        with self._news:
            self._index.catch_up(self.seen)
            return list(self._index.on_topic[f"{self.root}/{topic}"])

    def wait_on(
        self,
        topic: str,
        fits: Callable[[Body], bool] = lambda _: True,
        *,
        after: int = -1,
        timeout_s: float = PATIENCE_S,
    ) -> Seen:
        """Wait for a message below the root that fits and has a number above `after`."""
        return self.wait(
            lambda: next((e for e in self.on(topic) if e.number > after and fits(e.body)), None),
            f"a message on {topic}",
            timeout_s,
        )

    def wait_status(self, state: str, *, after: int = -1, timeout_s: float = PATIENCE_S) -> Seen:
        """Wait for a status of this state."""
        return self.wait_on(
            "status", lambda body: body.get("state") == state, after=after, timeout_s=timeout_s
        )

    def forget(self, name: Name) -> None:
        """Judge nothing of this job: its id was used for another when its final was gone."""
        gone = {each.number for each in self.events(name)}
        gone |= {each.seen.number for each in self.requests() if each.name == name}
        with self._news:
            self.seen = [each for each in self.seen if each.number not in gone]
            self._index = _Index(self._is_request)

    @property
    def last(self) -> int:
        """The number of the newest message; -1 before the first."""
        with self._news:
            return self.seen[-1].number if self.seen else -1

    # The oracle

    def _is_request(self, topic: str) -> bool:
        return topic.startswith(f"{self.root}/request/")

    def requests(self) -> list[Request]:
        """Return the requests that anybody published."""
        found = []
        with self._news:
            seen = list(self.seen)
        for each in seen:
            if self._is_request(each.topic):
                kind, slash, client = each.topic[len(self.root) + 9 :].partition("/")
                found.append(Request(each, kind, client if slash else None))
        return found

    def open_jobs(self) -> set[Name]:
        """Return the jobs that were accepted, or ran, and have no final yet."""
        with self._news:
            self._index.catch_up(self.seen)
            return {name for name in self._index.begun - self._index.ended if name is not None}

    def unanswered(self) -> list[Request]:
        """Return the requests that have neither become a job nor been refused.

        A request whose id edged could not read is answered by a refusal without one; such requests
        and refusals are only counted.
        """
        taken: set[Name] = set()
        made = nameless = 0
        refused: Counter[tuple[Name, str]] = Counter()
        for each in self.events():
            name = each.name
            if each.type == "refused":
                if name is None:
                    nameless += 1
                else:
                    refused[name, str(each.body.get("request"))] += 1
            elif name is not None and name not in taken:
                taken.add(name)
                made += name.id.startswith("e-")
        asked: defaultdict[tuple[Name, str], dict[str, Request]] = defaultdict(dict)
        left: list[Request] = []
        for request in self.requests():
            name = request.name
            if name is None:
                left.append(request)
            elif request.kind == "cancel":
                if name not in taken and not refused[name, "cancel"]:
                    left.append(request)
            else:
                asked[name, request.kind].setdefault(request.seen.question, request)
        for (name, kind), bodies in asked.items():
            missing = len(bodies) - refused[name, kind] - (name in taken)
            left += list(bodies.values())[: max(0, missing)]
        spare = nameless + made
        return left[spare:]

    def settle(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until every request seen is answered and every job has its final."""
        self.wait(
            lambda: not self.open_jobs() and not self.unanswered(),
            "every request to be answered and every job to end",
            timeout_s,
        )

    def violations(self, *, crashed: bool = False) -> list[str]:
        """Return what is against the contract in all that was seen; see the module.

        Args:
            crashed: edged was killed or lost its connection meanwhile: events that live in memory
                (`accepted`, `started`, a refusal) may be missing before a final, or repeated.
        """
        found = [
            f"{name} was accepted and has no final" for name in sorted(self.open_jobs(), key=str)
        ]
        found += [
            f"a request on {each.seen.topic} has no answer: {each.seen.payload[:200]!r}"
            for each in self.unanswered()
        ]
        asked = {request.name for request in self.requests()} | self.expected
        without_id = sum(request.name is None for request in self.requests())
        made: set[Name] = set()
        jobs: defaultdict[Name, list[Seen]] = defaultdict(list)
        found += self.not_as_documented()
        found += self._not_refused()
        for each in self.events():
            if self._is_edgeds(each) and not self._undocumented(each):
                found += [f"{short(each)}: {wrong}" for wrong in self._wrong(each)]
            name = each.name
            if name is None:
                continue
            if name not in asked:
                if not re.fullmatch(r"e-[0-9a-f-]{36}", name.id):
                    found.append(f"{short(each)}: nobody asked for this")
                made.add(name)
            if each.type != "refused":
                jobs[name].append(each)
        if len(made) > without_id:
            found.append(f"{len(made)} ids were made for {without_id} requests without one")
        for name, events in jobs.items():
            found += [f"{name}: {wrong}" for wrong in judge(events, crashed=crashed)]
        return found

    def check(self, *, crashed: bool = False, timeout_s: float = PATIENCE_S) -> None:
        """Wait until all is answered and ended, then fail on any violation."""
        self.settle(timeout_s)
        wrong = self.violations(crashed=crashed)
        assert not wrong, "\n".join(wrong)

    def _wrong(self, each: Seen) -> Iterator[str]:
        """Yield what is wrong with one event that is as documented, looked at alone."""
        yield from sense_wrong(each.body)
        on = each.topic.removeprefix(f"{self.root}/response/")
        if on != each.topic and on != str(each.name):
            yield "it is not on its own response topic"

    def not_as_documented(self) -> list[str]:
        """Return what is wrong with what edged published, against its own document."""
        with self._news:
            seen = list(self.seen)
        return [f"{short(each)}: {wrong}" for each in seen for wrong in self._undocumented(each)]

    def _undocumented(self, each: Seen) -> list[str]:
        if each.number not in self._held:
            self._held[each.number] = list(self._hold_to_document(each))
        return self._held[each.number]

    def _is_edgeds(self, each: Seen) -> bool:
        """Return whether our edged published this, and not a client, a test or another device."""
        if self._document is None or not self._document.is_told(each.topic):
            return False
        if (each.topic, each.payload) in self._forged:
            return False
        ours = (f"{self.root}/", f"{self.base}/reply/")
        return each.topic.startswith(ours) or each.type != ""

    def _hold_to_document(self, each: Seen) -> Iterator[str]:
        if self._document is None or not self._is_edgeds(each):
            return
        yield from self._document.told_wrong(
            each.topic,
            each.body,
            qos=each.qos if self._qos else None,
            # 3.1.1 shows the flag to newcomers only
            retain=each.retain if self._five or each.retain else None,
        )

    def _not_refused(self) -> Iterator[str]:
        """Yield what the document says is no request, and edged has not refused.

        Those without a usable id are only counted.
        """
        wrong: defaultdict[tuple[Name | None, str], dict[str, Request]] = defaultdict(dict)
        for request in self.requests():
            if not validator(f"{request.kind}Request").is_valid(request.seen.body):
                name = request.name
                usable = name is not None and JOB_ID.fullmatch(name.id)
                wrong[name if usable else None, request.kind][request.seen.question] = request
        refused = Counter((e.name, str(e.body.get("request"))) for e in self.events(kind="refused"))
        for (name, kind), requests in wrong.items():
            if refused[name, kind] < len(requests):
                shown = [each.seen.payload[:200] for each in requests.values()]
                yield f"{len(requests)} of {name} are no {kind} requests: {shown}"

    # Telling

    def story(self) -> str:
        """Return what was seen, a line each."""
        with self._news:
            return "\n".join(self._lines(self.seen))

    def _lines(self, seen: Iterable[Seen]) -> Iterator[str]:
        start = self.seen[0].at if self.seen else 0.0
        for each in seen:
            flags = f"{'r' if each.retain else ''}{'d' if each.dup else ''}"
            payload = each.payload[:160].decode(errors="replace")
            when = f"{each.number:4} {each.at - start:7.3f}"
            yield f"{when} q{each.qos}{flags} {each.topic} {payload}"


def _send_at_once(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Turn Nagle's algorithm off: paho's own delays would be taken for edged's."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
