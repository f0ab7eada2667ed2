"""How good the small model is: new questions, asked over MQTT, and the share of right answers.

    python -m edged.selftest.training.evaluate [DIR] [--jobs N] [--seed N] [--wrong N]

An answer is right if it is the right one as a whole, to the last character; a JSON answer if each
of its values is. Scenes and wordings are drawn from a seed that the training does not use. What is
measured is the model as it was quantised and as the daemon runs it, over a broker.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from edged import protocol, selftest
from edged.client import Client, read_object
from edged.conversation import Conversation, filters
from edged.ports import Incoming
from edged.sandbox import choose_broker, private
from edged.selftest.training import reports
from edged.selftest.training.objects import Answered
from edged.selftest.training.questions import Asker
from edged.selftest.training.scenes import scene
from edged.settings import Settings
from edged.topics import Topics

SEED = 987_654
#: The daemon loads the model within this, seconds.
READY_S = 180.0
#: Jobs that are on their way at the same time.
_AHEAD = 8
_COUNTS = (2, 3, 4, 4, 4, 5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Question:
    """One job, and what is right."""

    group: str
    request: dict[str, Any]
    answered: Answered

    @property
    def topic(self) -> str:
        """The kind of its request."""
        return "vision" if "frames" in self.request else "text"

    def is_right(self, final: dict[str, Any]) -> bool:
        """Tell whether this final has the right answer."""
        if final.get("type") != "result":
            return False
        if self.answered.schema is not None:
            return bool(final.get("json") == json.loads(self.answered.answer))
        return bool(final["text"] == self.answered.answer)


def questions(random: Random, jobs: int) -> Iterator[Question]:
    """Yield so many questions: a third about reports, one frame, and several frames each."""
    for n in range(jobs):
        files: list[bytes] = []
        if n % 3 == 0:
            refusal = random.random() < 0.1
            asked = reports.refused(random, frames=False) if refusal else reports.ask(random)
            group = "text"
        else:
            seen = scene(random, 1 if n % 3 == 1 else random.choice(_COUNTS))
            files = [seen.file(frame, random) for frame in range(seen.frames)]
            asked = Asker(seen, random).ask()
            group = "one frame" if seen.frames == 1 else "several frames"
        request: dict[str, Any] = {"id": f"q{n}", "prompt": asked.question}
        if asked.schema is not None:
            group = "JSON under a schema"
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {"schema": asked.schema},
            }
        if files:
            request["frames"] = [{"image": base64.b64encode(each).decode()} for each in files]
        yield Question(group, request, asked)


async def ask(settings: Settings, jobs: Sequence[Question]) -> dict[str, dict[str, Any]]:
    """Ask all of it of the daemon; return the finals by their job's id."""
    topics = Topics(settings.mqtt.base_topic, settings.device)
    finals: dict[str, dict[str, Any]] = {}
    waiting = list(reversed(jobs))
    running: dict[str, Question] = {}
    async with Client(settings, "evaluate", (f"{topics.root}/response/+", 1)) as client:
        while waiting or running:
            while waiting and len(running) < _AHEAD:
                job = waiting.pop()
                running[job.request["id"]] = job
                body = protocol.encode({"v": protocol.VERSION, "stream": False, **job.request})
                client.send(topics.request(job.topic), body)
            note = await client.next(60.0)
            if note is None:
                raise TimeoutError(f"no answer to {', '.join(running)}")
            event = read_object(note.payload) if isinstance(note, Incoming) else None
            if event is None or event.get("id") not in running:
                continue
            if event["type"] in {"result", "error", "refused"}:
                finals[event["id"]] = event
                del running[event["id"]]
    return finals


@dataclass(eq=False, slots=True)
class Score:
    """How many answers of a group were right."""

    right: int = 0
    asked: int = 0

    def __str__(self) -> str:
        return f"{100 * self.right / max(self.asked, 1):.1f} % of {self.asked}"


async def measure(model: Path, jobs: Sequence[Question], wrong: int) -> dict[str, Score]:
    """Ask a daemon with this model; return the scores by group, and print some wrong answers."""
    async with private("evaluate", model, choose_broker("auto")) as place:
        async with Client(place.settings, "evaluate", *filters(place.settings)) as client:
            await Conversation(place.settings, client, daemon=place.daemon).ready(READY_S)
        finals = await ask(place.settings, jobs)
    scores: dict[str, Score] = defaultdict(Score)
    for job in jobs:
        final = finals[job.request["id"]]
        right = job.is_right(final)
        names = [job.group]
        if job.answered.schema is not None:
            names.append("JSON under a schema, valid")
        for name in names:
            scores[name].asked += 1
            scores[name].right += final["type"] == "result" if name.endswith("valid") else right
        if not right and wrong > 0:
            wrong -= 1
            said = final.get("text", final.get("message"))
            print(f"{job.answered.kind}: {job.answered.question!r}\n  is   {said!r}")
            print(f"  not  {job.answered.answer!r}")
    return scores


def main() -> None:
    """Read the command line, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m edged.selftest.training.evaluate")
    parser.add_argument("model", type=Path, nargs="?", default=selftest.model_dir())
    parser.add_argument("--jobs", type=int, default=3000, help="questions in all")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--wrong", type=int, default=0, help="print so many wrong answers")
    options = parser.parse_args()
    jobs = list(questions(Random(options.seed), options.jobs))
    scores = asyncio.run(measure(options.model.resolve(), jobs, options.wrong))
    print("| questions | right |\n|---|---|")
    for group, score in sorted(scores.items()):
        print(f"| {group} | {score} |")


if __name__ == "__main__":
    main()
