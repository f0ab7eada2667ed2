"""Faults of every kind in a random order, while jobs, repetitions and cancels come in.

A minute by default; ten, as a soak:

    EDGED_TEST_MIX_S=600 python -m pytest tests/faults/test_mix.py -s

EDGED_TEST_SEED repeats a run's order. In the second half the daemon itself is left alive, so that
what it does not let go of can be seen: looked at whenever it is at rest.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import MakeBroker
from tests.faults.test_flood import rss_mb
from tests.kit.daemon import Daemon
from tests.kit.mosquitto import Mosquitto
from tests.kit.observer import Body, Name, Observer

SEED = int(os.environ.get("EDGED_TEST_SEED") or random.SystemRandom().randrange(2**32))
SECONDS = float(os.environ.get("EDGED_TEST_MIX_S") or 60)
#: MB (10^6 bytes) by which the daemon's memory may rise over all looks at it, by their slope, once
#: it is warm: what the allocator keeps for a while.
RISE_MB = 5.0

_SCRIPTS = (
    "!say {n}",
    "!tokens 5 10",
    "!tokens 20 20",
    "!prefill 5 20 !say {n}",
    "!fail bad_output",
    "just words {n}",
)


@dataclass(frozen=True)
class Rest:
    """What the daemon holds while it has nothing to do."""

    at: float
    rss_mb: float
    descriptors: int
    threads: int


class Mix:
    """What may happen next, drawn by chance."""

    def __init__(
        self, broker: Mosquitto, daemon: Daemon, observer: Observer, dice: random.Random
    ) -> None:
        self.broker = broker
        self.daemon = daemon
        self.observer = observer
        self.dice = dice
        self.asked: list[tuple[Name, str, dict[str, object]]] = []

    def is_back(self, subscriptions: int) -> bool:
        return self.observer.subscriptions > subscriptions

    def has_ended(self, but: int) -> bool:
        # the newest is answered too: or a slow broker is asked more and more, for it says nothing
        newest = self.asked[-1][0]
        return bool(self.observer.events(newest)) and len(self.observer.open_jobs()) < but

    def ask(self) -> None:
        number = len(self.asked)
        script = self.dice.choice(_SCRIPTS).format(n=number)
        fields: dict[str, object] = {"priority": self.dice.randrange(10)}
        if self.dice.random() < 0.1:
            fields["deadline_s"] = 0.2
        client = self.dice.choice((None, "desk", "door"))
        name = Name(client, f"job-{number}")
        self.asked.append((name, script, fields))
        self.observer.ask(script, client=client, id=name.id, wait=False, **fields)  # type: ignore[arg-type]

    def repeat(self) -> None:
        if self.asked:
            name, script, fields = self.dice.choice(self.asked[-20:])
            self.observer.ask(script, client=name.client, id=name.id, wait=False, **fields)  # type: ignore[arg-type]

    def cancel(self) -> None:
        if self.asked:
            name, _, _ = self.dice.choice(self.asked[-10:])
            topic = "request/cancel" + (f"/{name.client}" if name.client else "")
            self.observer.send(topic, {"id": name.id}, wait=False)

    def kill_engine(self) -> None:
        for pid in self.daemon.engine_pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_daemon(self) -> None:
        self.daemon.kill()
        self.daemon.start()

    def restart_broker(self) -> None:
        before = self.observer.subscriptions
        self.broker.stop()  # killed, it loses what it has answered and not yet saved
        self.broker.start()
        self.observer.wait(partial(self.is_back, before), "the observer to be back")

    def go_on(self, seconds: float, *, mortal: bool) -> None:
        """Let things happen for so long; `mortal`: the daemon may be killed too."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for _ in range(self.dice.randrange(1, 6)):
                self.ask()
                self.dice.choice((self.repeat, self.cancel, lambda: None))()
            match self.dice.randrange(6):
                case 0 | 1:
                    self.kill_engine()
                case 2 | 3 if mortal:
                    self.kill_daemon()
                case 4:
                    self.restart_broker()
                case _:
                    pass
            few = self.dice.randrange(1, 8)
            self.observer.wait(partial(self.has_ended, few), "some jobs to end")

    def rest(self) -> Rest:
        """Wait until the daemon has nothing to do, its outbox empty, and look at it."""
        self.observer.wait(lambda: not self.observer.open_jobs(), "all jobs to end")
        self.observer.wait_on("health", _is_idle, after=self.observer.last)
        process = Path(f"/proc/{self.daemon.pid}")
        return Rest(
            at=time.monotonic(),
            rss_mb=rss_mb(self.daemon.pid, "VmRSS"),
            descriptors=len(list((process / "fd").iterdir())),
            threads=len(list((process / "task").iterdir())),
        )


def _is_idle(beat: Body) -> bool:
    waiting = beat["queue"]["depth"] + beat["outbox"]["depth"]
    return not waiting and "job" not in beat and beat["engine"]["state"] == "idle"


def leaks(rests: list[Rest]) -> list[str]:
    """Return what grew from look to look."""
    # Of counts the least: a probe may just hold one more.
    early, late = rests[: len(rests) // 2], rests[len(rests) // 2 :]
    slope, _ = statistics.linear_regression([r.at for r in rests], [r.rss_mb for r in rests])
    rise = slope * (rests[-1].at - rests[0].at)
    found = [f"memory rose by {rise:.1f} MB"] if rise > RISE_MB else []
    for what in ("descriptors", "threads"):
        before, after = (min(getattr(rest, what) for rest in part) for part in (early, late))
        if after > before:
            found.append(f"{before} {what} became {after}")
    return found


@pytest.mark.timeout(120 + 5 * SECONDS)
def test_a_random_mix_of_faults_breaks_no_promise(tmp_path: Path, make_broker: MakeBroker) -> None:
    print(f"EDGED_TEST_SEED={SEED}")  # noqa: T201
    broker = make_broker(persistence=True)
    # a broker that is back within a blink, again and again, looks like a client id that is stolen
    options = ("--reconnect", "0.2", "--backoff", "0.1", "--stolen-wait", "0.2")
    with (
        Observer(broker.port) as observer,
        Daemon(tmp_path, broker.port, options=options) as daemon,
    ):
        daemon.wait_ready()
        mix = Mix(broker, daemon, observer, random.Random(SEED))
        mix.go_on(SECONDS / 2, mortal=True)
        mix.go_on(SECONDS / 8, mortal=False)  # until it is warm
        rests = [mix.rest()]
        looks = max(3, round(SECONDS / 20))
        for _ in range(looks):
            mix.go_on(SECONDS * 3 / 8 / looks, mortal=False)
            rests.append(mix.rest())
        # what was asked before this one has been told of before its own `accepted` is
        observer.final(observer.ask("!say the end", wait=False), 30 + 2 * SECONDS)
        observer.check(crashed=True, timeout_s=30 + 2 * SECONDS)
        rests.append(mix.rest())
        print(f"{len(mix.asked)} jobs", *rests, sep="\n")  # noqa: T201
        assert leaks(rests) == []
        assert daemon.stop() == 0
        assert daemon.faults() == []


def test_a_leak_is_found() -> None:
    """What the mix goes by at its end."""
    steady = [Rest(at=n, rss_mb=50 + n % 3, descriptors=30 + n % 2, threads=9) for n in range(30)]
    assert leaks(steady) == []
    leaky = [Rest(at=n, rss_mb=50 + n / 5, descriptors=30 + n, threads=9 + n) for n in range(30)]
    assert [found.split()[1] for found in leaks(leaky)] == ["rose", "descriptors", "threads"]
