"""What the fault tests share: a broker that is quick and one that survives its own death."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.mosquitto import PROGRAM, Mosquitto

MakeBroker = Callable[..., Mosquitto]


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[MakeBroker]:
    """Starts brokers; they are gone at the end of the test, whatever happened to them."""
    if PROGRAM is None:
        pytest.skip("mosquitto is not installed")
    made: list[Mosquitto] = []

    def make(*, config: str = "", persistence: bool = False, **options: object) -> Mosquitto:
        directory = tmp_path / f"mosquitto-{len(made)}"
        directory.mkdir()
        # Many, but not 0 (any number): with that mosquitto 2.0 closes the connection whenever it
        # denies a publish. And without TCP_NODELAY it holds small packets back for 40 ms.
        config = f"max_queued_messages 100000\nset_tcp_nodelay true\n{config}"
        broker = Mosquitto(directory, config=config, persistence=persistence, **options)  # type: ignore[arg-type]
        broker.start()
        made.append(broker)
        return broker

    yield make
    for broker in made:
        broker.kill()


@pytest.fixture
def broker(make_broker: MakeBroker) -> Mosquitto:
    """A broker without persistence."""
    return make_broker()
