"""How good the small model is, with few questions of a seed unseen in training."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import jsonschema
import pytest

from edged import selftest
from edged.client import Client
from edged.conversation import Conversation, filters
from edged.sandbox import choose_broker, private
from edged.selftest.training.evaluate import SEED, ask, questions

pytestmark = pytest.mark.engine

JOBS = 450
#: Of each group, well below the numbers of its card, of which these questions are the first.
LEAST = 0.9
GROUPS = {"text", "one frame", "several frames", "JSON under a schema"}


async def test_new_questions_are_answered_right_and_every_json_answer_fits_its_schema() -> None:
    jobs = list(questions(Random(SEED), JOBS))
    async with private("evaluate", selftest.verify(), choose_broker("auto")) as place:
        async with Client(place.settings, "evaluate", *filters(place.settings)) as client:
            await Conversation(place.settings, client, daemon=place.daemon).ready(60)
        finals = await ask(place.settings, jobs)
    right, fits = defaultdict[str, list[bool]](list), 0
    for job in jobs:
        final = finals[job.request["id"]]
        right[job.group].append(job.is_right(final))
        if job.answered.schema is not None:
            assert final["type"] == "result", final
            jsonschema.validate(final["json"], job.answered.schema)
            fits += 1
    assert set(right) == GROUPS
    assert fits >= 60
    for group, answers in right.items():
        assert sum(answers) >= LEAST * len(answers), (group, answers)
