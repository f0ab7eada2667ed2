"""Bounds, and many at once: full queues, full disks, large results, slow and numerous clients."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.kit.box import Box, Protocol, serve
from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Name, Observer

pytestmark = pytest.mark.broker

QUEUE = 8
RESULTS = 5
MAX_PACKET = 4500


@pytest.fixture(scope="module", params=["5", "3.1.1"])
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    protocol: Protocol = request.param
    settings = {"limits": {"queue": QUEUE, "results": RESULTS, "journal_mb": 1, "payload_mb": 2}}
    with serve(tmp_path_factory.mktemp("limits"), protocol=protocol, settings=settings) as box:
        yield box


@pytest.fixture
def blocker(observer: Observer) -> Name:
    """A job that runs until it is cancelled."""
    name = observer.ask("!tokens 1000 50", client="blocker")
    observer.event(name, "started")
    return name


# The queue ----------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_says_when_to_try_again(observer: Observer, blocker: Name) -> None:
    names = [observer.ask("!say x", client=f"c{n}") for n in range(QUEUE)]
    for name in names:
        observer.event(name, "accepted")

    over = observer.ask("!say x", client="late", id="again")

    refusal = observer.refusal(over).body
    assert (refusal["code"], refusal["retryable"]) == ("queue_full", True)
    assert refusal["retry_after_s"] > 0
    assert str(QUEUE) in refusal["message"]
    observer.cancel(blocker)
    for name in names:
        observer.final(name)
    observer.ask("!say x", client="late", id="again")
    assert observer.final(over)["text"] == "x"


def test_one_client_cannot_take_every_place(observer: Observer, blocker: Name) -> None:
    greedy = [observer.ask("!say x", client="greedy") for _ in range(QUEUE + 4)]
    refused = {each.name for each in [observer.refusal(name) for name in greedy[QUEUE:]]}
    assert refused == set(greedy[QUEUE:])

    other = observer.ask("!say x", client="modest")

    observer.event(other, "accepted")
    observer.cancel(blocker)
    assert observer.final(other)["text"] == "x"


def test_a_known_job_needs_no_place_in_a_full_queue(observer: Observer, blocker: Name) -> None:
    names = [observer.ask("!say x", client=f"c{n}") for n in range(QUEUE)]
    for name in names:
        observer.event(name, "accepted")

    observer.ask("!say x", client="c3", id=names[3].id)

    assert observer.event(names[3], "accepted", count=2).body["position"] >= 1
    observer.cancel(blocker)


def test_refusals_come_at_once_however_many_there_are(observer: Observer, blocker: Name) -> None:
    names = [observer.ask("!say x", client=f"c{n % 20}", wait=False) for n in range(300)]
    observer.wait(lambda: len(observer.events(None, "refused")) == 300 - QUEUE, "the refusals")

    assert observer.last  # the link lives
    observer.cancel(blocker)
    observer.settle()
    ends = {name: observer.events(name)[-1].type for name in names}
    assert sorted(set(ends.values())) == ["refused", "result"]


# What is kept -------------------------------------------------------------------------------------


def test_an_id_is_free_again_when_its_final_is_no_longer_kept(observer: Observer) -> None:
    first = observer.ask("!say first", id="old")
    observer.final(first)
    newest = first
    for _ in range(RESULTS + 2):  # the last ones may not be delivered yet
        newest = observer.ask("!say x")
        observer.final(newest)

    observer.ask("!say x", id=newest.id)
    observer.ask("!say second", id="old")

    # not a conflict, and not the stored final: a new job, which this observer is to take for one
    again = observer.wait(lambda: next((e for e in observer.finals(first)[1:]), None))
    assert again.body["text"] == "second"
    assert len(observer.finals(newest)) == 2, "the newest are kept"
    assert len(observer.events(newest, "started")) == 1
    observer.forget(first)


def test_without_room_in_the_journal_a_request_is_refused(observer: Observer) -> None:
    refusal = observer.refusal(observer.ask("x " * 500_000)).body

    assert (refusal["code"], refusal["retryable"]) == ("disk_full", True)
    assert refusal["retry_after_s"] > 0
    assert observer.final(observer.ask("!say small"))["text"] == "small"


# Many and slow clients ----------------------------------------------------------------------------


def test_many_clients_at_once(tmp_path: Path) -> None:
    with serve(tmp_path) as box, box.observer() as watcher, ExitStack() as stack:
        clients = [f"client-{n}" for n in range(64)]
        peers = {
            client: stack.enter_context(
                box.observer(filters=[f"edged/box/response/{client}/#"], only=True)
            )
            for client in clients
        }
        names = {
            client: [peer.ask(f"!say {client} {n}", client=client, wait=False) for n in range(3)]
            for client, peer in peers.items()
        }

        for client, peer in peers.items():
            for number, name in enumerate(names[client]):
                assert peer.final(name)["text"] == f"{client} {number}"
            assert {each.body["client"] for each in peer.events()} == {client}
        watcher.check()
        assert len(watcher.events(None, "result")) == 192


def test_a_subscriber_that_acknowledges_late_disturbs_nobody(box: Box, observer: Observer) -> None:
    options = {"receive_maximum": 1} if box.protocol == "5" else {}
    with box.observer(filters=["edged/box/response/#"], only=True, hold=True, **options) as slow:
        names = [observer.ask("!tokens 3 1") for _ in range(5)]
        for name in names:
            observer.final(name)
        assert len([each for each in slow.seen if each.qos]) <= (1 if box.protocol == "5" else 20)

        for count in range(1, 16):
            slow.wait(partial(_has, slow, count), "another event")
            slow.release(1)

        kinds = [each.type for name in names for each in slow.events(name) if each.qos]
        assert kinds == ["accepted", "started", "result"] * 5


def _has(slow: Observer, count: int) -> bool:
    return len([each for each in slow.seen if each.qos]) >= count


# Results that do not fit --------------------------------------------------------------------------


def test_a_result_above_the_brokers_packet_limit_is_replaced(tmp_path: Path) -> None:
    with (
        serve(tmp_path, config=f"max_packet_size {MAX_PACKET}") as box,
        box.observer() as observer,
    ):
        name = observer.ask("!tokens 1000 0")

        final = observer.final(name)

        assert (final["type"], final["code"], final["retryable"]) == ("error", "too_large", False)
        sizes = [int(number) for number in re.findall(r"\d+", final["message"])]
        assert MAX_PACKET in sizes
        assert max(sizes) > MAX_PACKET
        assert observer.final(observer.ask("!say small"))["text"] == "small"
        observer.ask("!tokens 1000 0", id=name.id)
        observer.wait(lambda: len(observer.finals(name)) == 2, "the stored error")
        totals = observer.wait_on("health", after=observer.last).body["totals"]
        assert (totals["completed"], totals["failed"]) == (1, 1), "results, and finals `error`"
        observer.check()


# Retained requests on 3.1.1 -----------------------------------------------------------------------


def test_a_replayed_retained_request_is_dropped_and_counted_on_311(tmp_path: Path) -> None:
    settings = {"mqtt": {"protocol": "3.1.1"}}
    with (
        Mosquitto(tmp_path) as broker,
        Daemon(tmp_path, broker.port, settings=settings) as daemon,
        Observer(broker.port, protocol="3.1.1") as observer,
    ):
        observer.wait_status("ready")
        name = Name(None, "kept")
        # live, nobody can tell it from another request
        observer.send("request/text", {"id": "kept", "prompt": "!say x"}, retain=True)
        observer.final(name)
        events = len(observer.events(name))

        daemon.restart()

        daemon.wait_log("request.retained_dropped")
        observer.final(observer.ask("!say y"))
        beat = observer.wait_on("health", lambda body: body["totals"]["completed"] == 1)
        assert beat.body["totals"]["refused"] == 1
        assert len(observer.events(name)) == events
