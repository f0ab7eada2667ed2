"""F1: SIGKILL of the daemon at every step of a job's way; the next start loses nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Name, Observer

JOBS = 12
#: What is hit -> the label and at which of its calls, one start after the other on one state
#: directory. The numbers of publishes and their answers fall among finals: before them come states,
#: `accepted`s and `started`s.
POINTS = {
    "while requests come in": (
        ("on_receive", 5),
        ("in_accept_txn", 2),
        ("after_accept_commit", 4),
        ("after_ack", 6),
    ),
    "while jobs run": (
        ("after_attempt_mark", 3),
        ("after_infer", 4),
        ("in_result_txn", 4),
        ("after_result_commit", 4),
    ),
    "while finals go out": (("after_publish", 25), ("on_puback", 36), ("after_sent_mark", 4)),
}


def ask_twelve(observer: Observer, prefix: str) -> Counter[Name]:
    """Ask, and ask some of it twice; return how often each was asked."""
    asked: Counter[Name] = Counter()
    for number in (*range(JOBS), 0, 3, 7):
        client = "desk" if number % 2 else None
        prompt = f"!say {prefix} {number}"
        name = observer.ask(prompt, id=f"{prefix}-{number}", client=client, wait=False)
        asked[name] += 1
    return asked


@pytest.mark.parametrize("where", POINTS)
def test_nothing_is_lost_and_nothing_differs_after_kills(
    where: str, tmp_path: Path, broker: Mosquitto
) -> None:
    first, *others = (("--crash-at", f"{label}:{number}") for label, number in POINTS[where])
    with Observer(broker.port) as observer, Daemon(tmp_path, broker.port, options=first) as daemon:
        daemon.wait_ready()
        daemon.options = ()
        asked = ask_twelve(observer, "first")
        assert daemon.wait_exit() == -9
        for options in others:
            daemon.start(*options)
            asked += ask_twelve(observer, options[1].partition(":")[0])
            assert daemon.wait_exit() == -9
        daemon.start()
        observer.check(crashed=True)
        repeated = 0
        for name, times in asked.items():
            finals = observer.finals(name)
            assert {each.body["text"] for each in finals} == {name.id.replace("-", " ")}
            repeated += max(0, len(finals) - times)  # a repeated request gets the final, too
        # only what the broker had and the journal did not know of yet
        assert repeated <= 3 * len(POINTS[where])
        assert daemon.stop() == 0
        assert daemon.faults() == []
