"""Faults of every kind in a random order, while jobs, repetitions and cancels come in."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from tests.faults.conftest import MakeBroker
from tests.kit.daemon import Daemon
from tests.kit.observer import Name, Observer

SEED = int(os.environ.get("EDGED_TEST_SEED") or random.SystemRandom().randrange(2**32))
SECONDS = float(os.environ.get("EDGED_TEST_MIX_S") or 12)

_SCRIPTS = (
    "!say {n}",
    "!tokens 5 10",
    "!tokens 20 20",
    "!prefill 5 20 !say {n}",
    "!fail bad_output",
    "just words {n}",
)


class Mix:
    """What may happen next, drawn by chance."""

    def __init__(self, daemon: Daemon, observer: Observer, dice: random.Random) -> None:
        self.daemon = daemon
        self.observer = observer
        self.dice = dice
        self.asked: list[tuple[Name, str, dict[str, object]]] = []

    def is_back(self, subscriptions: int) -> bool:
        return self.observer.subscriptions > subscriptions

    def has_ended(self, but: int) -> bool:
        return len(self.observer.open_jobs()) < but

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


def test_a_random_mix_of_faults_breaks_no_promise(tmp_path: Path, make_broker: MakeBroker) -> None:
    print(f"EDGED_TEST_SEED={SEED}")  # noqa: T201
    dice = random.Random(SEED)
    broker = make_broker(persistence=True)
    options = ("--reconnect", "0.2", "--backoff", "0.1")
    with (
        Observer(broker.port) as observer,
        Daemon(tmp_path, broker.port, options=options) as daemon,
    ):
        daemon.wait_ready()
        mix = Mix(daemon, observer, dice)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            for _ in range(dice.randrange(1, 6)):
                mix.ask()
                dice.choice((mix.repeat, mix.cancel, lambda: None))()
            match dice.randrange(6):
                case 0 | 1:
                    mix.kill_engine()
                case 2 | 3:
                    mix.kill_daemon()
                case 4:
                    before = observer.subscriptions
                    broker.stop()  # killed, it loses what it has answered and not yet saved
                    broker.start()
                    observer.wait(partial(mix.is_back, before), "the observer to be back")
                case _:
                    pass
            few = dice.randrange(1, 8)
            observer.wait(partial(mix.has_ended, few), "some jobs to end")
        # what was asked before this one has been told of before its own `accepted` is
        observer.final(observer.ask("!say the end", wait=False), 30 + 2 * SECONDS)
        observer.check(crashed=True, timeout_s=30 + 2 * SECONDS)
        assert daemon.stop() == 0
        assert daemon.faults() == []
