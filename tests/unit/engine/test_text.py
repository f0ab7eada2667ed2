"""Generation with the real small models, in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edged.engine.guidance import Guidance
from edged.engine.messages import JobStage
from edged.engine.session import Chunks, Session
from edged.engine.text import TextModel, conversations, run_text
from edged.errors import Code, JobFailed, JobStopped
from edged.models.folder import inspect
from edged.ports import Answer, Sampling, Task

pytestmark = pytest.mark.engine

CONTEXT = 512
QUESTIONS = [
    "What is at the gate?",
    "Describe what happens between the first frame and the last frame.",
    '{"sensor": "pressure", "value": 12} - is it in range?',
    "Ist die Tür offen? 🔥",
]


class Desk:
    """Takes note, and says stop after a number of steps of a stage."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stages: list[str] = []
        self.texts: list[str] = []
        self.steps: list[tuple[str, int, int]] = []
        self.checks_after_stop = 0
        self._stop = stop

    def begin(self, stage: JobStage, *, work: int = 1, done: int = 0, total: int = 1) -> None:
        self.stages.append(stage)

    def step(self, *, work: int, done: int, total: int, text: str = "", **_: Any) -> None:
        self.steps.append((self.stages[-1], done, total))
        self.texts.append(text)

    def planned(self, plan: Any) -> None:
        raise AssertionError("a text job has no frames")

    def check(self) -> None:
        if self._stop is None:
            return
        stage, count = self._stop
        if len([1 for step in self.steps if step[0] == stage]) >= count:
            raise JobStopped("stop")


class Small:
    """A small model with a session, as the backend makes them."""

    def __init__(self, kit: Any, chunks: Chunks | None = None) -> None:
        self.og = pytest.importorskip("onnxruntime_genai")
        self.kit = kit
        folder = inspect(kit.folder)
        guidance = Guidance(kit.folder / "tokenizer.json", folder.vocab_size, folder.eos_ids)
        self.model = TextModel(
            prompts=kit.prompts,
            vocabulary=kit.vocabulary,
            vocab_size=folder.vocab_size,
            eos_ids=frozenset(folder.eos_ids),
            context=CONTEXT,
            max_tokens=64,
            compile=guidance.compile,
        )
        self.session = Session(self.generator, chunks or Chunks())

    def generator(self, **options: Any) -> Any:
        params = self.og.GeneratorParams(self.kit.model)
        params.set_search_options(max_length=CONTEXT, do_sample=False, **options)
        return self.og.Generator(self.kit.model, params)

    def ask(self, prompt: str, desk: Desk | None = None, **fields: Any) -> Answer:
        task = Task(
            job=1,
            client=fields.pop("client", "c"),
            messages=({"role": "user", "content": prompt},),
            **fields,
        )
        return run_text(self.model, self.session, task, desk or Desk()).answers[0]

    def cold_logits(self, prompt: str) -> Any:
        """The logits after a prompt."""
        self.cold(prompt, max_tokens=1)
        return self.session.logits()

    def cold(self, prompt: str, **fields: Any) -> Answer:
        self.session.drop()
        return self.ask(prompt, **fields)

    def runtimes_own(self, prompt: str, count: int, **options: Any) -> str:
        """Let genai itself choose the tokens."""
        generator = self.generator(**options)
        messages = [{"role": "user", "content": prompt}]
        generator.append_tokens(np.array(self.kit.prompts.build(messages), np.int32))
        ids: list[int] = []
        while len(ids) < count:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in self.model.eos_ids:
                break
            ids.append(token)
        return str(self.kit.vocabulary.decode(ids))


@pytest.fixture
def small(kit: Any) -> Small:
    return Small(kit)


@pytest.mark.parametrize("prompt", QUESTIONS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_our_greedy_answer_is_the_runtimes_own(small: Small, prompt: str, penalty: float) -> None:
    ours = small.ask(prompt, sampling=Sampling(repetition_penalty=penalty), max_tokens=40)
    assert ours.text == small.runtimes_own(prompt, 40, repetition_penalty=penalty)
    assert ours.text


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.2),
        Sampling(temperature=0.9, seed=5),
        Sampling(temperature=1.2, top_k=20, top_p=0.9, seed=-4, repetition_penalty=1.1),
    ],
)
def test_a_reused_session_gives_the_cold_answer(small: Small, sampling: Sampling) -> None:
    cold = {q: small.cold(q, sampling=sampling, max_tokens=30).text for q in QUESTIONS}
    small.session.drop()
    for question in [*QUESTIONS, *reversed(QUESTIONS)]:
        assert small.ask(question, sampling=sampling, max_tokens=30).text == cold[question]
    answer = small.ask(QUESTIONS[0], sampling=sampling, max_tokens=30)
    assert answer.text == cold[QUESTIONS[0]]
    assert answer.usage.cached_tokens == answer.usage.prompt_tokens - 1


@pytest.mark.parametrize("size", [16, 64, 512])
def test_the_size_of_the_chunks_does_not_change_an_answer(kit: Any, size: int) -> None:
    prompt = "The red car stands at the gate, and the dog waits. " * 8
    whole = Small(kit, Chunks(first=512, least=512)).ask(prompt, max_tokens=20).text
    cut = Small(kit, Chunks(first=size, least=size, most=size)).ask(prompt, max_tokens=20).text
    assert cut == whole


def test_seeds_tell_answers_apart(small: Small) -> None:
    texts = {
        small.ask(QUESTIONS[0], sampling=Sampling(temperature=1.5, seed=seed)).text
        for seed in range(4)
    }
    assert len(texts) == 4


def test_deltas_steps_and_counts_fit_the_answer(small: Small) -> None:
    desk = Desk()
    answer = small.ask(QUESTIONS[1], desk, max_tokens=12)
    assert "".join(desk.texts) == answer.text
    assert desk.stages == ["prepare", "prefill", "token"]
    tokens = [step for step in desk.steps if step[0] == "token"]
    assert [done for _, done, _ in tokens] == list(range(1, answer.usage.completion_tokens + 1))
    assert {total for _, _, total in tokens} == {12}
    assert answer.usage.cached_tokens == 0


def test_max_tokens_ends_an_answer_by_length(small: Small) -> None:
    long = small.ask(QUESTIONS[0], max_tokens=20)
    short = small.ask(QUESTIONS[0], max_tokens=5)
    assert short.finish_reason == "length"
    assert short.usage.completion_tokens == 5
    assert long.text.startswith(short.text)


def test_without_max_tokens_an_answer_has_what_is_left(kit: Any) -> None:
    small = Small(kit)
    sampling = Sampling(temperature=3.0, seed=2)
    schema = {"type": "string", "minLength": 2000}
    with pytest.raises(JobFailed):  # it is cut off, and so no JSON: but how long was it?
        small.ask("x", desk := Desk(), sampling=sampling, schema=schema)
    assert desk.steps[-1] == ("token", 64, 64)  # limits.max_tokens
    prompt, left = "", CONTEXT
    while left >= 64:
        prompt += "word "
        left = CONTEXT - len(kit.prompts.build([{"role": "user", "content": prompt}]))
    with pytest.raises(JobFailed) as caught:
        small.ask(prompt, desk := Desk(), sampling=sampling, schema=schema)
    assert caught.value.code is Code.BAD_OUTPUT
    assert desk.steps[-1] == ("token", left, left)


@pytest.mark.parametrize("length", [1, 3, 12])
def test_a_stop_string_ends_an_answer_before_it(small: Small, length: int) -> None:
    whole = small.ask(QUESTIONS[0], max_tokens=30).text
    for at in range(1, len(whole) - length, 7):
        stop = whole[at : at + length]
        desk = Desk()
        answer = small.ask(QUESTIONS[0], desk, max_tokens=30, stop=("never this", stop))
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop_string"
        assert "".join(desk.texts) == answer.text


def test_what_is_held_back_for_a_stop_string_comes_at_the_end(small: Small) -> None:
    whole = small.ask(QUESTIONS[0], max_tokens=10)
    answer = small.ask(QUESTIONS[0], max_tokens=10, stop=(whole.text[-3:] + "\x01",))
    assert (answer.text, answer.finish_reason) == (whole.text, whole.finish_reason)


def test_the_models_own_end_ends_an_answer(small: Small) -> None:
    answers = [small.ask(f"{q} {n}") for q in QUESTIONS for n in range(10)]
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert ended
    controls = small.kit.vocabulary.controls
    assert not any("<|end|>" in answer.text for answer in answers)
    assert all(answer.usage.completion_tokens <= 64 for answer in answers)
    assert controls["<|end|>"] in small.model.eos_ids


SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"enum": ["yes", "no"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["answer", "count", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, seed=3)])
@pytest.mark.parametrize("prompt", QUESTIONS)
def test_an_answer_satisfies_its_schema(small: Small, prompt: str, sampling: Sampling) -> None:
    desk = Desk()
    answer = small.ask(prompt, desk, sampling=sampling, schema=SCHEMA)
    assert answer.has_json
    assert set(answer.json) == {"answer", "count", "ok"}
    assert answer.json["answer"] in ("yes", "no")
    assert 0 <= answer.json["count"] <= 99
    assert answer.finish_reason == "stop"
    assert "".join(desk.texts) == answer.text
    assert " " not in answer.text
    assert small.ask(prompt, sampling=sampling, schema=SCHEMA).text == answer.text


def test_an_answer_cut_off_by_max_tokens_is_bad_output(small: Small) -> None:
    with pytest.raises(JobFailed) as caught:
        small.ask(QUESTIONS[0], schema=SCHEMA, max_tokens=3)
    assert caught.value.code is Code.BAD_OUTPUT
    assert "larger max_tokens" in caught.value.message


def test_a_schema_that_cannot_be_compiled_fails_before_the_prefill(small: Small) -> None:
    desk = Desk()
    with pytest.raises(JobFailed) as caught:
        small.ask(QUESTIONS[0], desk, schema={"type": "nope"})
    assert caught.value.code is Code.INVALID
    assert desk.stages == ["prepare"]


def test_without_guidance_a_schema_is_unsupported(small: Small) -> None:
    small.model = replace(small.model, compile=None)
    with pytest.raises(JobFailed) as caught:
        small.ask(QUESTIONS[0], schema=True)
    assert caught.value.code is Code.UNSUPPORTED


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "numbers"),
    [
        ("hello there", CONTEXT, (f"max_tokens {CONTEXT}", f"context has {CONTEXT}")),
        ("word " * CONTEXT, None, (f"context {CONTEXT}",)),
        ("word " * 100_000, None, ("at least", f"context {CONTEXT}")),
    ],
    ids=["answer", "prompt", "far"],
)
def test_what_does_not_fit_is_told_with_both_numbers_before_the_prefill(
    small: Small, prompt: str, max_tokens: int | None, numbers: tuple[str, ...]
) -> None:
    desk = Desk()
    with pytest.raises(JobFailed) as caught:
        small.ask(prompt, desk, max_tokens=max_tokens)
    assert caught.value.code is Code.TOO_LONG
    for number in numbers:
        assert number in caught.value.message
    assert desk.stages == ["prepare"]


def test_prompt_and_answer_may_fill_the_context_to_the_last_token(small: Small) -> None:
    used = len(small.kit.prompts.build([{"role": "user", "content": "hi"}]))
    small.model = replace(small.model, eos_ids=frozenset(), max_tokens=CONTEXT)
    assert small.ask("hi", max_tokens=1).usage.completion_tokens == 1
    answer = small.ask("hi", max_tokens=CONTEXT - used)
    assert answer.usage.completion_tokens == CONTEXT - used
    assert answer.finish_reason == "length"


def test_a_stop_ends_a_prefill_within_a_chunk_and_an_answer_within_a_token(kit: Any) -> None:
    small = Small(kit, Chunks(first=16, least=16, most=16))
    prompt = "The red car stands at the gate. " * 10
    desk = Desk(stop=("prefill", 2))
    with pytest.raises(JobStopped):
        small.ask(prompt, desk)
    assert [step[1] for step in desk.steps if step[0] == "prefill"] == [16, 32]
    desk = Desk(stop=("token", 3))
    with pytest.raises(JobStopped):
        small.ask(prompt, desk, sampling=Sampling(temperature=2.0, seed=1))
    assert len([1 for step in desk.steps if step[0] == "token"]) == 3
    assert small.ask(prompt, max_tokens=9).text == small.cold(prompt, max_tokens=9).text


def test_what_follows_shares_the_conversation_so_far(small: Small) -> None:
    first = small.ask("Name a colour.", max_tokens=8)
    second = small.ask("Name a colour. And a shape.", max_tokens=8)
    assert 0 < second.usage.cached_tokens < first.usage.prompt_tokens
    other = small.ask("Name a colour. And a shape.", max_tokens=8, client="other")
    assert other.usage.cached_tokens == 0
    assert other.text == second.text


def test_questions_are_answered_in_order_and_their_prefix_computed_once(small: Small) -> None:
    questions = ("What is at the gate?", "Is it red?", "What is at the gate?")
    task = Task(
        job=1,
        client="c",
        messages=({"role": "user", "content": "The red car stands at the gate, the dog waits."},),
        questions=questions,
        max_tokens=8,
    )
    desk = Desk()
    answers = run_text(small.model, small.session, task, desk).answers
    prompts = [small.model.prompts.build(messages) for messages in conversations(task)]
    assert answers[0].usage.prompt_tokens == len(prompts[0])
    for answer, prompt in zip(answers[1:], prompts[1:], strict=True):
        assert 0 < answer.usage.prompt_tokens < len(prompt) / 2
        assert answer.usage.cached_tokens == 0
    assert answers[2].text == answers[0].text
    assert "".join(desk.texts) == "".join(answer.text for answer in answers)
    for question, answer in zip(questions, answers, strict=True):
        content = f"The red car stands at the gate, the dog waits.\n{question}"
        assert small.cold(content, max_tokens=8).text == answer.text


def test_what_stands_for_a_frame_is_never_said(small: Small) -> None:
    said = small.ask(QUESTIONS[0], max_tokens=20).text
    chosen = int(small.cold_logits(QUESTIONS[0]).argmax())
    small.model = replace(small.model, placeholder=chosen)
    other = small.cold(QUESTIONS[0], max_tokens=20).text
    assert other != said
    assert chosen not in small.kit.encode(other)
