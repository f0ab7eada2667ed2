"""How many small messages a second the bus moves against mosquitto: `python -m tests.bench.bus`.

The publisher is a process of its own, so that what is measured is the bus and the broker.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Literal

from edged.mqtt import Connection, MqttBus
from edged.ports import Outgoing, PubAck
from tests.kit.mosquitto import Mosquitto
from tests.kit.recorder import Recorder, running

MESSAGES = 20_000
BYTES = 200
WINDOW = 16

_PUBLISHER = """
import sys
from paho.mqtt import client as paho
client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
client.max_inflight_messages = 200
client.connect("127.0.0.1", int(sys.argv[1]))
client.loop_start()
sent = [client.publish("in/a", bytes(int(sys.argv[3])), 1) for _ in range(int(sys.argv[2]))]
sent[-1].wait_for_publish()
"""


async def _inwards(bus: MqttBus, recorder: Recorder, port: int) -> float:
    """Take what waits at the broker and what comes, acknowledging each message."""
    publisher = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PUBLISHER, *map(str, (port, MESSAGES, BYTES))
    )
    await recorder.until(lambda: recorder.messages, 60)
    begin = time.perf_counter()
    await recorder.until(lambda: len(recorder.messages) >= MESSAGES, 120)
    took = time.perf_counter() - begin
    await publisher.wait()
    return MESSAGES / took


async def _outwards(bus: MqttBus) -> float:
    """Publish at QoS 1 with at most WINDOW unanswered, as the outbox does."""
    begin = time.perf_counter()
    unanswered: deque[asyncio.Future[PubAck]] = deque()
    for _ in range(MESSAGES):
        if len(unanswered) == WINDOW:
            await unanswered.popleft()
        unanswered.append(bus.publish(Outgoing(topic="out/a", payload=bytes(BYTES))))
    await asyncio.gather(*unanswered)
    return MESSAGES / (time.perf_counter() - begin)


async def _tokens(bus: MqttBus) -> float:
    """Offer at QoS 0 as fast as it is taken."""
    begin = time.perf_counter()
    for _ in range(MESSAGES):
        while not bus.offer(Outgoing(topic="out/a", payload=bytes(60))):  # noqa: ASYNC110 - full speed
            await asyncio.sleep(0)
    await bus.publish(Outgoing(topic="out/a", payload=b""))  # behind them all
    return MESSAGES / (time.perf_counter() - begin)


async def main() -> None:
    """Print a line for each version of the protocol."""
    versions: tuple[Literal["5", "3.1.1"], ...] = ("5", "3.1.1")
    for version in versions:
        with (
            tempfile.TemporaryDirectory() as directory,
            Mosquitto(Path(directory), config="max_queued_messages 0") as mosquitto,
        ):
            connection = Connection(
                host="127.0.0.1",
                port=mosquitto.port,
                client_id="bench",
                protocol=version,
                subscriptions=(("in/#", 1),),
            )
            bus = MqttBus(connection)
            recorder = Recorder(acks=bus)
            async with running(bus, recorder):
                await recorder.until_connected()
                inwards = await _inwards(bus, recorder, mosquitto.port)
                outwards, tokens = await _outwards(bus), await _tokens(bus)
            print(
                f"MQTT {version}: in {inwards:.0f}/s (QoS 1, acknowledged), "
                f"out {outwards:.0f}/s (QoS 1, window {WINDOW}), {tokens:.0f}/s (QoS 0)"
            )


if __name__ == "__main__":
    asyncio.run(main())
