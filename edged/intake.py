"""From a message to a durable job, a refusal, or the answer that is already there.

Acks go out in the order the messages came in (MQTT 5, 4.6): each message has a slot, and a slot is
acknowledged when it and all before it are settled: the job is on disk, or the broker has the
refusal.
"""

from __future__ import annotations

import hashlib
import uuid
from asyncio import Future
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from edged import protocol
from edged.errors import Code, FramesFull, JobGone, JournalFull, JournalUnavailable, Refused
from edged.jobs import Draft, Job, Key, Kind, Reply, Totals, joined
from edged.journal import Accepted, Journal, Known
from edged.outbox import Outbox
from edged.ports import Bus, Clock, Engine, FrameSource, Incoming, Outgoing, Trace, no_trace
from edged.scheduler import Scheduler
from edged.tasks import Background
from edged.topics import JOB_ID, MAX_CORRELATION_BYTES, NAME, Topics

log = structlog.get_logger()

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings that decide what is taken."""

    reply_prefixes: tuple[str, ...]
    payload_bytes: int
    max_frames: int
    max_tokens: int
    model: str | None
    #: Only a session of MQTT 5 tells a retained request from a live one.
    retained_seen: bool


@dataclass(slots=True, eq=False)
class _Slot:
    """The place of a message in the order of acks."""

    message: Incoming
    settled: bool = False


@dataclass(slots=True)
class _Sender:
    """Who asked, as far as it could be read: where a refusal may go and what it may name."""

    request: str | None
    client: str | None = None
    key: Key | None = None
    reply: str | None = None


class Intake:
    """Takes requests; owns their acknowledgement."""

    def __init__(
        self,
        *,
        rules: Rules,
        topics: Topics,
        bus: Bus,
        journal: Journal,
        scheduler: Scheduler,
        outbox: Outbox,
        engine: Engine,
        cameras: FrameSource,
        totals: Totals,
        clock: Clock,
        background: Background,
        cancel: Callable[[Job], Coroutine[Any, Any, None]],
        trace: Trace = no_trace,
    ) -> None:
        self._rules = rules
        self._topics = topics
        self._bus = bus
        self._journal = journal
        self._scheduler = scheduler
        self._outbox = outbox
        self._engine = engine
        self._cameras = cameras
        self._totals = totals
        self._clock = clock
        self._background = background
        self._cancel_job = cancel
        self._trace = trace
        self._slots: deque[_Slot] = deque()
        self._accepting: dict[Key, Future[Any]] = {}
        self.stopping = False

    # Messages and their acks

    def on_message(self, message: Incoming) -> None:
        """Take a message from a request topic."""
        if self.stopping and message.qos:
            return  # not ours any more: the broker keeps it for the next start
        slot = _Slot(message)
        self._slots.append(slot)
        topic = self._topics.parse_request(message.topic)
        sender = _Sender(topic.request if topic else None)
        try:
            self._trace("on_receive")
            if topic is None:
                raise Refused(Code.INVALID, "this is no request topic")
            if self._ignored(message):
                self._settle(slot)
                return
            sender.reply = self._property_reply(message)
            self._check_envelope(message, sender, topic.client)
            body = self._read(message, sender)
            # until it is stored the body is held once, not a second time as it came
            slot.message = replace(message, payload=None)
            if topic.request == "cancel":
                self._cancel(slot, sender, body)
            else:
                self._accept(slot, sender, Kind(topic.request), body)
        except Refused as refusal:
            self._refuse(slot, sender, refusal)
        except Exception:  # noqa: BLE001 - see `_fail`
            self._fail(slot, sender)

    def on_disconnected(self) -> None:
        """Forget the acks owed: the broker sends those messages again."""
        self._slots.clear()

    def _settle(self, slot: _Slot) -> None:
        slot.settled = True
        while self._slots and self._slots[0].settled:
            done = self._slots.popleft()
            if done.message.qos:
                self._bus.ack(done.message.receipt)
                self._trace("after_ack")

    # Reading

    def _ignored(self, message: Incoming) -> bool:
        """Return whether a retained message is only counted; where it can be told, it is refused.

        A session of MQTT 3.1.1 shows the flag on replayed messages alone; their senders are gone.
        """
        if not message.retain or self._rules.retained_seen:
            return False
        self._totals.refused += 1
        log.info("request.retained_dropped", topic=message.topic)
        return True

    def _property_reply(self, message: Incoming) -> str | None:
        topic = message.response_topic
        if topic is not None and self._topics.may_reply(topic, self._rules.reply_prefixes):
            return topic
        return None

    def _check_envelope(self, message: Incoming, sender: _Sender, client: str | None) -> None:
        if client is not None:
            if not NAME.match(client):
                raise Refused(
                    Code.INVALID, "the client in the topic must be 1 to 64 of A-Z a-z 0-9 _ -"
                )
            sender.client = client
        limit = self._rules.payload_bytes
        if message.size > limit:
            raise Refused(
                Code.TOO_LARGE,
                f"the request has {message.size} bytes, limits.payload_mb allows {limit}",
            )
        if message.payload is None:
            raise Refused(
                Code.QUEUE_FULL, "requests come in faster than they can be read", retry_after_s=5.0
            )

    def _read(self, message: Incoming, sender: _Sender) -> dict[str, Any]:
        """Return the body, and note in `sender` what it says of itself.

        What is wrong with the message comes before what is wrong with its body, but is only told
        once the body has been read: its id says where to.
        """
        assert message.payload is not None  # noqa: S101 - checked by _check_envelope
        wrong = self._wrong_message(message)
        try:
            body = protocol.parse_json(message.payload)
            self._identify(sender, message, body)
        except Refused as refusal:
            raise wrong or refusal from None
        if wrong is not None:
            raise wrong
        return body

    def _wrong_message(self, message: Incoming) -> Refused | None:
        if message.retain:
            return Refused(Code.RETAINED, "requests must not be retained: publish without retain")
        if self.stopping:
            return Refused(Code.STOPPING, "edged is stopping: send it again after the restart")
        if message.correlation is not None and len(message.correlation) > MAX_CORRELATION_BYTES:
            return Refused(
                Code.INVALID, f"correlation data may have {MAX_CORRELATION_BYTES} bytes at most"
            )
        return None

    def _identify(self, sender: _Sender, message: Incoming, body: dict[str, Any]) -> None:
        """Read who asks and where the events go, before anything else can be wrong."""
        name = body.get("id")
        if isinstance(name, str) and JOB_ID.match(name):
            sender.key = Key(sender.client, name)
        asked = body.get("reply_to")
        where = asked if isinstance(asked, str) else message.response_topic
        if where is None:
            return
        sender.reply = None
        if not self._topics.may_reply(where, self._rules.reply_prefixes):
            raise Refused(
                Code.FORBIDDEN_REPLY,
                "the reply topic must be a plain topic name under mqtt.reply_prefixes "
                f"({', '.join(self._rules.reply_prefixes)})",
            )
        sender.reply = where

    # Jobs

    def _accept(self, slot: _Slot, sender: _Sender, kind: Kind, body: dict[str, Any]) -> None:
        model = protocol.VisionRequest if kind is Kind.VISION else protocol.TextRequest
        request: protocol.JobRequest = protocol.validate(model, body)
        if request.max_tokens is not None and request.max_tokens > self._rules.max_tokens:
            raise Refused(
                Code.INVALID,
                f"max_tokens: {request.max_tokens} is above limits.max_tokens, "
                f"which is {self._rules.max_tokens}",
            )
        if request.model is not None and request.model != self._rules.model:
            raise Refused(
                Code.INVALID, f"model: the model here is {protocol.shown(self._rules.model or '')}"
            )
        key = sender.key or Key(sender.client, f"e-{uuid.uuid4()}")
        sender.key = key
        limits = [s for s in (request.deadline_s, slot.message.expiry_s) if s is not None]
        draft = Draft(
            key=key,
            kind=kind,
            request={name: value for name, value in body.items() if name != "reply_to"},
            digest=b"",
            reply=Reply(sender.reply or self._topics.response(key), slot.message.correlation),
            priority=request.priority,
            arrived=self._clock.stamp(),
            deadline_s=min(limits, default=None),
        )
        if not isinstance(request, protocol.VisionRequest):
            draft = replace(draft, digest=protocol.digest(kind, draft.request))
            self._admit(slot, sender, draft)
            return
        draft = self._with_images(draft, request)
        if request.camera is None:
            self._admit(slot, sender, draft, request)
        else:  # known or not: a request that comes again must not move its window
            admit = partial(self._admit, slot, sender, draft, request)
            self._look_up(slot, sender, draft, admit)

    def _with_images(self, draft: Draft, request: protocol.VisionRequest) -> Draft:
        """Take the images out of a request; a camera's are chosen once there is room for a job."""
        count, most = len(request.images()), self._rules.max_frames
        if request.camera is not None:
            window = request.camera.window
            count = window.max if window else request.camera.last or 0
        if count > most:
            raise Refused(
                Code.INVALID, f"frames: {count} are more than limits.frames, which is {most}"
            )
        frames = protocol.decoded_images(request)
        body = protocol.stored(draft.request, request.taken())
        hashes = [hashlib.sha256(frame).hexdigest() for frame in frames]
        return replace(
            draft,
            request=body,
            frames=frames,
            digest=protocol.digest(draft.kind, body | {"images": hashes}),
            answers=len(request.questions or ("",)),
        )

    def _look(self, draft: Draft, request: protocol.VisionRequest) -> Draft:
        """Return the draft with its camera's frames, if it is to have any.

        Raises:
            Refused: `unsupported` or `no_frames`.
        """
        info = self._engine.info
        if info is not None and not info.vision:
            raise Refused(
                Code.UNSUPPORTED,
                info.no_vision or "the model here sees nothing: ask on request/text",
            )
        if request.camera is None:
            return draft
        shots = self._cameras.choose(request.camera.choice(), draft.key.client)
        return replace(
            draft,
            request=draft.request | {"moments": [shot.ts for shot in shots]},
            frames=tuple(shot.data for shot in shots),
        )

    def _admit(
        self,
        slot: _Slot,
        sender: _Sender,
        draft: Draft,
        request: protocol.VisionRequest | None = None,
    ) -> None:
        key = draft.key
        try:
            self._scheduler.reserve(key.client)
            try:
                if request is not None:
                    draft = self._look(draft, request)
            except BaseException:
                self._scheduler.give_up(key.client)
                raise
        except Refused as refusal:
            # It may be a job that is already here; then it needs nothing.
            self._look_up(slot, sender, draft, partial(self._refuse, slot, sender, refusal))
            return
        future = self._journal.accept(draft)
        self._accepting[key] = future
        future.add_done_callback(partial(self._journaled, slot, sender, draft))

    def _journaled(
        self, slot: _Slot, sender: _Sender, draft: Draft, future: Future[Accepted | Known]
    ) -> None:
        key = draft.key
        if self._accepting.get(key) is future:
            del self._accepting[key]
        try:
            answer = future.result()
        except JournalUnavailable as error:
            self._scheduler.give_up(key.client)
            self._refuse(slot, sender, _no_disk(error))
            return
        except Exception:  # noqa: BLE001 - see `_fail`
            self._scheduler.give_up(key.client)
            self._fail(slot, sender)
            return
        if isinstance(answer, Known):
            self._scheduler.give_up(key.client)
            self._known(slot, sender, draft, answer)
            return
        self._scheduler.admit(answer.job)
        self._totals.accepted += 1
        self._tell_accepted(answer.job)
        self._settle(slot)

    def _look_up(
        self, slot: _Slot, sender: _Sender, draft: Draft, otherwise: Callable[[], None]
    ) -> None:
        """Answer as a known job, or do otherwise."""
        future = self._journal.find(draft.key)
        self._accepting[draft.key] = future
        future.add_done_callback(partial(self._found, slot, sender, draft, otherwise))

    def _found(
        self,
        slot: _Slot,
        sender: _Sender,
        draft: Draft,
        otherwise: Callable[[], None],
        future: Future[Known | None],
    ) -> None:
        if self._accepting.get(draft.key) is future:
            del self._accepting[draft.key]
        try:
            known = future.result()
        except JournalUnavailable as error:
            self._refuse(slot, sender, _no_disk(error))
            return
        except Exception:  # noqa: BLE001 - see `_fail`
            self._fail(slot, sender)
            return
        if known is not None:
            self._known(slot, sender, draft, known)
            return
        try:
            otherwise()
        except Exception:  # noqa: BLE001 - see `_fail`
            self._fail(slot, sender)

    def _known(self, slot: _Slot, sender: _Sender, draft: Draft, known: Known) -> None:
        if known.digest != draft.digest:
            message = "another request has this id: give each job an id of its own"
            self._refuse(slot, sender, Refused(Code.CONFLICT, message))
            return
        self._totals.duplicates += 1
        self._background.spawn(self._attach(slot, sender, draft, known), "intake.attach")

    async def _attach(self, slot: _Slot, sender: _Sender, draft: Draft, known: Known) -> None:
        """Answer a request that came before: `accepted` again, or its stored final."""
        try:
            rows = await self._journal.add_reply(known.seq, draft.reply)
        except JobGone:  # it has just been forgotten: this is a new job
            if draft.kind is Kind.VISION and not draft.frames:
                message = "the job of this id has just been forgotten: send it again"
                self._refuse(slot, sender, Refused(Code.NO_FRAMES, message))
            else:
                self._admit(slot, sender, draft)
            return
        except JournalUnavailable as error:
            self._refuse(slot, sender, _no_disk(error))
            return
        except Exception:  # noqa: BLE001 - see `_fail`
            self._fail(slot, sender)
            return
        job = self._scheduler.find(draft.key)
        if rows:
            self._outbox.post_rows(rows)
        elif job is not None:
            job = job.evolve(replies=joined(job.replies, draft.reply))
            self._scheduler.update(job)
            self._tell_accepted(job, only=draft.reply)
        self._settle(slot)

    def _tell_accepted(self, job: Job, only: Reply | None = None) -> None:
        position, eta_s = self._scheduler.place(job)
        payload = protocol.event(
            job.key, "accepted", position=position,
            eta_s=None if eta_s is None else round(eta_s, 1), durable=job.durable,
        )  # fmt: skip
        for reply in (only,) if only else job.replies:
            self._outbox.post(
                Outgoing(topic=reply.topic, payload=payload, qos=1, correlation=reply.correlation)
            )

    def announce(self, job: Job) -> None:
        """Say `accepted` for a job that a start found in the journal: it may never have been."""
        self._tell_accepted(job)

    # Cancels

    def _cancel(self, slot: _Slot, sender: _Sender, body: dict[str, Any]) -> None:
        request = protocol.validate(protocol.CancelRequest, body)
        key = Key(sender.client, request.id)
        sender.key = key
        self._cancel_known(slot, sender, key)

    def _cancel_known(self, slot: _Slot, sender: _Sender, key: Key) -> None:
        if (accepting := self._accepting.get(key)) is not None:  # not a job yet, and soon one
            accepting.add_done_callback(lambda _: self._cancel_known(slot, sender, key))
            return
        job = self._scheduler.find(key)
        if job is None:
            message = "no job of this client with this id waits or runs"
            self._refuse(slot, sender, Refused(Code.UNKNOWN_JOB, message))
            return

        async def end() -> None:
            await self._cancel_job(job)
            self._settle(slot)

        self._background.spawn(end(), "intake.cancel")

    # Refusals

    def _fail(self, slot: _Slot, sender: _Sender) -> None:
        """Refuse a request on which our own code has just failed.

        Left unsettled, this one message would hold up every ack after it; and if it ended the
        daemon, it would come again to end the next.
        """
        log.exception("request.failed", topic=slot.message.topic, size=slot.message.size)
        wrong = Refused(Code.INVALID, "edged failed on this request; its log says why")
        self._refuse(slot, sender, wrong)

    def _refuse(self, slot: _Slot, sender: _Sender, refusal: Refused) -> None:
        self._totals.refused += 1
        topic = sender.reply
        if topic is None:
            topic = self._topics.response(sender.key) if sender.key else self._topics.refused
        log.info(
            "request.refused", request=sender.request, code=str(refusal.code),
            client=sender.client, job=sender.key.id if sender.key else None,
            reason=refusal.message, size=slot.message.size,
        )  # fmt: skip
        correlation = slot.message.correlation
        if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
            correlation = None
        payload = protocol.refused_event(sender.request, sender.key, sender.client, refusal)
        self._outbox.post(
            Outgoing(topic=topic, payload=payload, qos=1, correlation=correlation),
            done=partial(self._settle, slot),
            session_bound=slot.message.qos > 0,
        )


def _no_disk(error: JournalUnavailable) -> Refused:
    if isinstance(error, FramesFull) and error.in_memory:
        return Refused(Code.MEMORY, f"no room for the frames: {error.message}", retry_after_s=30.0)
    if isinstance(error, JournalFull):
        message = f"no room to keep the job: {error.message}"
    else:
        message = f"the job cannot be kept now: {error.message}"
    return Refused(Code.DISK_FULL, message, retry_after_s=30.0)
