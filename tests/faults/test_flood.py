"""F16: more comes in than can be done: memory is bounded, refusals are told, health goes on."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from tests.kit.client import Peer
from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Observer

#: MB (10^6 bytes) that the daemon may grow by at the default limits, whatever comes: the requests
#: of waiting jobs (limits.journal_mb, 64), four packets of the largest size that wait for the loop
#: (40), one more as bytes, text and objects on its way to the journal, what the allocator keeps.
GROWTH_MB = 200.0
#: Seconds between heartbeats here, and how late one may be: a tenth of what the default is. To read
#: a request of 8 MB holds the loop for a good part of a second.
BEAT, LATE = 1.0, 1.0
SMALL, LARGE = 5000, 15
#: Below the default of limits.payload_mb.
LARGE_BYTES = 7_900_000


def rss_mb(pid: int, field: str) -> float:
    """Return a field of /proc/<pid>/status: VmRSS, or VmHWM, the most it has ever been."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError(field)


@pytest.mark.parametrize("what", ["small", "QoS 0", "large"])
def test_a_flood_is_bounded_refused_and_does_not_disturb_the_heartbeat(
    what: str, tmp_path: Path, broker: Mosquitto
) -> None:
    filters = ["edged/box/response/#", "edged/box/refused", "edged/box/health"]
    with (
        Observer(broker.port, only=True, filters=filters) as observer,
        Daemon(
            tmp_path,
            broker.port,
            settings={"health": {"interval_s": BEAT}, "limits": {"queue": 64}},
        ) as daemon,
        Peer(broker.port) as peer,
    ):
        daemon.wait_ready()
        runs = observer.ask("!tokens 100 30")
        observer.event(runs, "started")
        before = rss_mb(daemon.pid, "VmRSS")
        begun = observer.last
        match what:
            case "small":
                bodies = [json.dumps({"id": f"n{n}", "prompt": "!say x"}) for n in range(SMALL)]
                sent = [peer.send("edged/box/request/text", body) for body in bodies]
            case "QoS 0":
                body = json.dumps({"prompt": "!say x", "system": "x" * 1_000_000})
                sent = [peer.send("edged/box/request/text", body, qos=0) for _ in range(60)]
            case _:
                large = {"prompt": "!say x", "system": "x" * LARGE_BYTES}
                bodies = [json.dumps({"id": f"n{n}", **large}) for n in range(LARGE)]
                sent = [peer.send("edged/box/request/text", body) for body in bodies]
        for info in sent:
            info.wait_for_publish(60)
        last = observer.ask("!say last", client="other")
        observer.wait(lambda: observer.events(last), "an answer behind the flood", timeout_s=60)
        observer.final(runs)
        if what != "QoS 0":  # of those the broker may let some go
            count = SMALL if what == "small" else LARGE

            def all_answered() -> bool:
                events = observer.events()
                refused = sum(each.type == "refused" for each in events)  # some could not be read
                return refused + len({e.name for e in events if e.type == "accepted"}) >= count + 2

            observer.wait(all_answered, "an answer to each request", timeout_s=60)
        observer.wait(lambda: len([e for e in observer.on("health") if e.number > begun]) >= 3)
        codes = Counter(each.body["code"] for each in observer.events(kind="refused"))
        assert set(codes) <= {"queue_full", "disk_full"}
        assert codes, "nothing was refused"
        assert all(
            each.body["retryable"] and each.body["retry_after_s"] > 0
            for each in observer.events(kind="refused")
        )
        grown = rss_mb(daemon.pid, "VmHWM") - before
        print(f"{what}: grew by {grown:.0f} MB, refused {dict(codes)}")  # noqa: T201
        assert grown < GROWTH_MB
        beats = [each.body for each in observer.on("health") if each.number > begun]
        assert [b["seq"] - a["seq"] for a, b in itertools.pairwise(beats)] == [1] * (len(beats) - 1)
        periods = [b["ts"] - a["ts"] for a, b in itertools.pairwise(beats)]
        assert periods
        assert max(periods) <= BEAT + LATE, periods
        assert len(daemon.log("mqtt.connected", client_id="edged-box")) == 1
        assert daemon.faults() == []
