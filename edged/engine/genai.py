"""The real backend: a Phi model in onnxruntime-genai. Imported in the engine process only."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edged.engine import box, cuda, loading, memory
from edged.engine.backend import Desk
from edged.engine.messages import JobStage, Order
from edged.engine.prompts import PROBE, STYLES, Prompts
from edged.engine.session import Chunks, Features, Session
from edged.engine.text import Constraint, Schema, TextModel, run_text
from edged.engine.tokens import Vocabulary, read_vocabulary
from edged.errors import Code, EdgedError, JobFailed
from edged.models.folder import TOKENIZER, ModelError, ModelFolder, inspect
from edged.models.record import FEATURES
from edged.ports import Completed, EngineInfo, FramePlan, Sampling, Task, Turn

if TYPE_CHECKING:
    from edged.engine.vision.run import Vision

#: Tokens that the warm-up generates.
_WARM_UP = 4
#: Tokens that a frame needs beside its own, for a question and an answer.
_ROOM = 128


class GenaiBackend:
    """See `edged.engine.backend.Backend`."""

    def __init__(self) -> None:
        self._text: TextModel | None = None
        self._session: Session | None = None
        self._vision: Vision | None = None
        self._no_vision: str | None = None
        self._guidance: Any = None
        self._folder: ModelFolder | None = None

    @property
    def sessions(self) -> int:
        """How many KV caches live."""
        return 1 if self._session is not None and self._session.alive else 0

    @property
    def frame_cache(self) -> tuple[float, int]:
        """How many MB the kept frames take, and how often a frame needed no encoding."""
        if self._vision is None:
            return 0.0, 0
        return self._vision.cache.size_mb, self._vision.cache.hits

    def load(self, order: Order) -> EngineInfo:
        """Load the model, compare its template with our prompts, and let it say a few tokens."""
        provider = loading.choose_provider(order.provider, loading.look())
        folder = inspect(order.path)
        plan = memory.plan(
            memory.need_of(folder, frame_cache_mb=order.frame_cache_mb),
            available_mb=box.memory_mb(),
            limit_mb=order.memory_mb,
            context=order.max_context,
        )
        threads = loading.choose_threads(order.threads)
        guided = importlib.util.find_spec("llguidance") is not None
        self._folder = folder
        self._no_vision = _no_vision(folder, plan.context)
        try:
            self._load_text(order, folder, provider, threads, plan.context, guided=guided)
            if self._no_vision is None:
                self._load_vision(order, folder, provider, threads, plan.limit)
            self._warm_up(folder)
        except RuntimeError as error:
            raise _refused(folder, provider, error) from None
        except ArithmeticError as error:
            raise ModelError(f"{folder.path}: {error} in its warm-up") from None
        return EngineInfo(
            model=order.model,
            provider=provider,
            threads=threads,
            max_context=plan.context,
            vision=self._vision is not None,
            json_schema=guided,
            memory=plan.as_dict(),
            versions=loading.versions(),
            no_vision=self._no_vision,
        )

    def run(self, task: Task, desk: Desk) -> Completed:
        """Do a job."""
        if self._text is None or self._session is None:
            raise AssertionError("run before load")
        if task.look is None:
            return run_text(self._text, self._session, task, desk)
        if self._vision is None:
            raise JobFailed(Code.UNSUPPORTED, self._no_vision or "the loaded model has no vision")
        return self._vision.run(task, task.look, desk)

    def _load_text(
        self,
        order: Order,
        folder: ModelFolder,
        provider: loading.Provider,
        threads: int,
        context: int,
        *,
        guided: bool,
    ) -> None:
        og = _import()
        model = og.Model(_config(og, folder, provider, threads))
        tokenizer = og.Tokenizer(model)
        vocabulary = read_vocabulary(folder.path / TOKENIZER)
        prompts = _prompts(tokenizer, vocabulary, folder)
        fused = folder.fused
        # in the model's own number type: the generator reads this memory as it is
        features: Features | None = None
        if fused is not None:
            features = np.zeros((context, folder.hidden_size), fused.features)

        def make() -> Any:
            params = og.GeneratorParams(model)
            params.set_search_options(max_length=context, do_sample=False)
            generator = og.Generator(model, params)
            if features is not None:
                generator.set_model_input(FEATURES, features)
            return generator

        self._session = Session(
            make,
            Chunks(),
            features=features,
            rewinds=folder.type != "phi3v" or fused is not None,
        )
        self._text = TextModel(
            prompts=prompts,
            vocabulary=vocabulary,
            vocab_size=folder.vocab_size,
            eos_ids=frozenset(folder.eos_ids),
            context=context,
            max_tokens=order.max_tokens,
            compile=self._compile if guided else None,
            placeholder=None if fused is None else fused.placeholder,
        )

    def _load_vision(
        self,
        order: Order,
        folder: ModelFolder,
        provider: loading.Provider,
        threads: int,
        limit_mb: float,
    ) -> None:
        # onnxruntime and Pillow are loaded for models that need them only
        from edged.engine.vision.cache import FrameCache  # noqa: PLC0415
        from edged.engine.vision.encoder import Encoder  # noqa: PLC0415
        from edged.engine.vision.run import Vision  # noqa: PLC0415

        if self._text is None or self._session is None or folder.fused is None:
            raise AssertionError("vision before text, or without its graph")
        geometry = folder.fused.geometry
        self._vision = Vision(
            model=self._text,
            session=self._session,
            encoder=Encoder(folder, geometry, threads=threads, provider=provider),
            geometry=geometry,
            cache=FrameCache(order.frame_cache_mb),
            limit_mb=limit_mb,
            first_token_s=order.first_token_s,
        )

    def _compile(self, schema: Schema) -> Constraint:
        from edged.engine.guidance import Guidance  # noqa: PLC0415  (only who asks pays for it)

        if self._guidance is None and self._folder is not None:
            self._guidance = Guidance(
                self._folder.path / TOKENIZER, self._folder.vocab_size, self._folder.eos_ids
            )
        constraint: Constraint = self._guidance.compile(schema)
        return constraint

    def _warm_up(self, folder: ModelFolder) -> None:
        """Run the probe conversation, and a frame: ready means that tokens really came.

        Raises:
            ModelError: what came cannot be right.
            RuntimeError, ArithmeticError: nothing came.
        """
        if self._text is None or self._session is None:
            raise AssertionError("warm-up before load")
        most = min(_WARM_UP, max(1, self._text.max_tokens))
        task = Task(job=0, client=None, messages=PROBE, sampling=Sampling(), max_tokens=most)
        run_text(self._text, self._session, task, _NoDesk())
        logits = self._session.logits().size
        if logits != folder.vocab_size:
            raise ModelError(
                f"{folder.path}: gives {logits} logits, its vocab_size is {folder.vocab_size}"
            )
        if self._vision is not None:
            try:
                self._vision.warm_up(_NoDesk())
            except JobFailed as failed:
                if failed.code is not Code.MEMORY:
                    raise ModelError(f"{folder.path}: {failed.message}, in its warm-up") from None
                self._vision = None  # texts can be answered all the same
                self._no_vision = f"no memory is left to look at frames: {failed.message}"
            except Exception as error:
                # onnxruntime's own exceptions share no class, and are no RuntimeError
                if not type(error).__module__.startswith("onnxruntime"):
                    raise
                raise RuntimeError(f"its vision encoder cannot be run: {error}") from None


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

    def planned(self, plan: FramePlan) -> None:
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
    config.overlay(json.dumps(loading.overlay(threads, folder.fused)))
    # what runs the model is our setting, not the folder's
    config.clear_providers()
    if provider == "cuda":
        config.append_provider("cuda")
        for name, value in loading.cuda_options(folder).items():
            config.set_provider_option("cuda", name, value)
    return config


def _prompts(tokenizer: Any, vocabulary: Vocabulary, folder: ModelFolder) -> Prompts:
    """Return what makes prompts, compared with the folder's own template."""
    fused = folder.fused
    prompts = Prompts(
        lambda text: [int(i) for i in tokenizer.encode(text)],
        vocabulary,
        STYLES[folder.family],
        None if fused is None else fused.placeholder,
    )
    prompts.check(lambda messages: _template(tokenizer, messages), vision=fused is not None)
    return prompts


def _no_vision(folder: ModelFolder, context: int) -> str | None:
    """Return why a model does not see, with what to do about it; None if it does."""
    if folder.fused is not None:
        least = folder.fused.geometry.tokens(1, 1) + _ROOM
        if context >= least:
            return None
        return (
            f"the context of {context} tokens has no room for a frame, {least} has: raise "
            "limits.memory_mb or model.max_context, or give the box more memory"
        )
    if folder.unfused is not None:
        return f"the loaded model's vision cannot be used: {folder.unfused}, then start edged again"
    return "the loaded model has no vision: set model.path to a Phi-3.5-vision model"


def _template(tokenizer: Any, messages: Sequence[Turn]) -> str:
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
    meaning = cuda.meaning(text) if provider == "cuda" else None
    if meaning is not None:
        return loading.SetupError(meaning[0], hint=meaning[1])
    return ModelError(
        f"model.path {folder.path}: onnxruntime-genai cannot load it: {text}",
        hint="fetch the model again; is it an ONNX build for this provider?",
    )
