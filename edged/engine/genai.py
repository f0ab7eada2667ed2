"""The real backend: a Phi model in onnxruntime-genai. Imported in the engine process only."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import Any

from edged.engine import box, loading, memory
from edged.engine.backend import Desk
from edged.engine.messages import JobStage, Order
from edged.engine.prompts import PROBE, STYLES, Message, Prompts
from edged.engine.session import Chunks, Session
from edged.engine.text import Constraint, Schema, TextModel, run_text
from edged.engine.tokens import read_vocabulary
from edged.errors import EdgedError
from edged.models.folder import TOKENIZER, ModelError, ModelFolder, inspect
from edged.ports import Completed, EngineInfo, Sampling, Task

#: Tokens that the warm-up generates.
_WARM_UP = 4


class GenaiBackend:
    """See `edged.engine.backend.Backend`."""

    def __init__(self) -> None:
        self._text: TextModel | None = None
        self._session: Session | None = None
        self._guidance: Any = None
        self._folder: ModelFolder | None = None

    @property
    def sessions(self) -> int:
        """How many KV caches live."""
        return 1 if self._session is not None and self._session.alive else 0

    def load(self, order: Order) -> EngineInfo:
        """Load the model, compare its template with our prompts, and let it say a few tokens."""
        provider = loading.choose_provider(order.provider, loading.look())
        folder = inspect(order.path)
        if folder.family not in STYLES:
            raise ModelError(
                f"{folder.path}: a vision model, which this version cannot load",
                hint="set model.path to a text model",
            )
        plan = memory.plan(
            memory.need_of(folder),
            available_mb=box.memory_mb(),
            limit_mb=order.memory_mb,
            context=order.max_context,
        )
        threads = loading.choose_threads(order.threads)
        og = _import()
        try:
            model = og.Model(_config(og, folder, provider, threads))
            tokenizer = og.Tokenizer(model)
            vocabulary = read_vocabulary(folder.path / TOKENIZER)
            prompts = Prompts(
                lambda text: [int(i) for i in tokenizer.encode(text)],
                vocabulary,
                STYLES[folder.family],
            )
            prompts.check(lambda messages: _template(tokenizer, messages))
        except RuntimeError as error:
            raise _refused(folder, provider, error) from None

        def make() -> Any:
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=plan.context, do_sample=False)
            return og.Generator(model, params)

        guided = importlib.util.find_spec("llguidance") is not None
        self._folder = folder
        self._session = Session(make, Chunks())
        self._text = TextModel(
            prompts=prompts,
            vocabulary=vocabulary,
            vocab_size=folder.vocab_size,
            eos_ids=frozenset(folder.eos_ids),
            context=plan.context,
            max_tokens=order.max_tokens,
            compile=self._compile if guided else None,
        )
        self._warm_up(folder, provider)
        return EngineInfo(
            model=order.model,
            provider=provider,
            threads=threads,
            max_context=plan.context,
            vision=False,
            json_schema=guided,
            memory=plan.as_dict(),
            versions=loading.versions(),
        )

    def run(self, task: Task, desk: Desk) -> Completed:
        """Do a job."""
        if self._text is None or self._session is None:
            raise AssertionError("run before load")
        return run_text(self._text, self._session, task, desk)

    def _compile(self, schema: Schema) -> Constraint:
        from edged.engine.guidance import Guidance  # noqa: PLC0415  (only who asks pays for it)

        if self._guidance is None and self._folder is not None:
            self._guidance = Guidance(
                self._folder.path / TOKENIZER, self._folder.vocab_size, self._folder.eos_ids
            )
        constraint: Constraint = self._guidance.compile(schema)
        return constraint

    def _warm_up(self, folder: ModelFolder, provider: str) -> None:
        """Run the probe conversation: ready means that tokens really came."""
        if self._text is None or self._session is None:
            raise AssertionError("warm-up before load")
        task = Task(
            job=0,
            client=None,
            messages=PROBE,
            sampling=Sampling(),
            max_tokens=min(_WARM_UP, max(1, self._text.max_tokens)),
        )
        try:
            run_text(self._text, self._session, task, _NoDesk())
            logits = self._session.logits().size
        except RuntimeError as error:
            raise _refused(folder, provider, error) from None
        except ArithmeticError as error:
            raise ModelError(f"{folder.path}: {error} in its warm-up") from None
        if logits != folder.vocab_size:
            raise ModelError(
                f"{folder.path}: gives {logits} logits, its vocab_size is {folder.vocab_size}"
            )


class _NoDesk:
    """Nobody watches a warm-up but the load's own deadline."""

    def begin(self, stage: JobStage, *, work: int = 1, done: int = 0, total: int = 1) -> None:
        """Do nothing."""

    def step(
        self,
        *,
        work: int,
        done: int,
        total: int,
        next_work: int = 1,
        text: str = "",
        question: int | None = None,
    ) -> None:
        """Do nothing."""

    def check(self) -> None:
        """Do nothing."""


def _import() -> Any:
    """Import onnxruntime-genai."""
    try:
        import onnxruntime_genai  # noqa: PLC0415  (native: not before it was looked at)
    except (ImportError, OSError) as error:
        raise loading.SetupError(
            f"onnxruntime-genai cannot be imported: {error}",
            hint="install edged[cpu] (or edged[cuda]) again, for this Python and processor",
        ) from None
    return onnxruntime_genai


def _config(og: Any, folder: ModelFolder, provider: str, threads: int) -> Any:
    config = og.Config(str(folder.path))
    config.overlay(json.dumps(loading.overlay(threads)))
    # what runs the model is our setting, not the folder's
    config.clear_providers()
    if provider == "cuda":
        config.append_provider("cuda")
        for name, value in loading.cuda_options(folder).items():
            config.set_provider_option("cuda", name, value)
    return config


def _template(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        )
    except RuntimeError as error:
        raise ModelError(
            f"the model's chat template cannot be applied: {error}",
            hint="take the model and its tokenizer files from their publisher, unchanged",
        ) from None


def _refused(folder: ModelFolder, provider: str, error: RuntimeError) -> EdgedError:
    text = " ".join(str(error).split())[:400]
    if "bad_alloc" in text or "Failed to allocate memory" in text:
        raise MemoryError(text)
    if provider == "cuda" and "no kernel image" in text:
        return loading.SetupError(
            "the installed CUDA libraries have no kernels for this box's graphics processor",
            hint="on a Jetson install wheels built for it (see the README), or set model.provider "
            "to cpu",
        )
    return ModelError(
        f"model.path {folder.path}: onnxruntime-genai cannot load it: {text}",
        hint="fetch the model again; is it an ONNX build for this provider?",
    )
