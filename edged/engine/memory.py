"""The memory plan: what the engine will need is summed before it is asked for.

A KV cache is allocated at once for the whole context and is the largest part of the bill beside the
weights; an engine that takes what it wants is killed by the kernel in the middle of a job.
"""

from __future__ import annotations

from dataclasses import dataclass

from edged.errors import EdgedError
from edged.models.folder import ModelFolder
from edged.models.geometry import Geometry

#: Of what is available, by default.
SHARE = 0.7
#: Tokens. The default context is a multiple of STEP, at most DEFAULT_CONTEXT: the models' rotary
#: tables change at 4097, and the whole cache is computed again when it grows past that.
STEP = 256
DEFAULT_CONTEXT = 4096

#: A loaded graph is larger than its file: the weights are packed again for the processor (3.3 GB of
#: 2.7 GB were seen).
_PACKED = 1.25
#: MB: interpreter, libraries, thread stacks, and the activations of a chunk of prefill.
_BASE_MB = 250.0
#: MB that the encoder works in for one view (a crop, or a frame's global view) of _VIEW pixels a
#: side, until it has been measured here: 45 to 60 were seen with the shape of CLIP's ViT-L/14-336
#: (1024 wide, 16 heads, 577 positions; float32), for 2 to 17 views at once.
_VIEW_MB = 64.0
_VIEW = 336


class TooLittleMemory(EdgedError):
    """The model does not fit into the memory it may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a model takes. Bytes, tokens."""

    weights_bytes: int
    encoder_bytes: int
    #: Of the KV cache, a token.
    kv_bytes: int
    #: Of the buffer of image features, a token of context; 0 for a model without vision.
    feature_bytes: int
    context_length: int
    sessions: int = 1
    #: That the encoder works in while it encodes a frame of one crop.
    encoding_bytes: int = 0
    #: Of encoded frames that are kept.
    cache_bytes: int = 0


def need_of(folder: ModelFolder, *, frame_cache_mb: float = 0.0) -> Need:
    """Return what the model of a folder takes.

    Args:
        folder: the model's. A vision model that is not fused loads its encoder and never uses it.
        frame_cache_mb: what encoded frames may take, if it has vision.
    """
    fused = folder.fused
    return Need(
        weights_bytes=folder.weights_bytes,
        encoder_bytes=folder.encoder_bytes,
        kv_bytes=folder.kv_bytes,
        feature_bytes=0 if fused is None else _NUMBER[fused.features] * folder.hidden_size,
        context_length=folder.context_length,
        encoding_bytes=0 if fused is None else int(encoding_mb(fused.geometry, 1) * 1e6),
        cache_bytes=0 if fused is None else int(frame_cache_mb * 1e6),
    )


#: Bytes.
_NUMBER = {"float32": 4, "float16": 2}


def view_mb(geometry: Geometry) -> float:
    """Return the MB that the encoder works in for one view, where it was not measured."""
    return _VIEW_MB * (geometry.crop / _VIEW) ** 2


def encoding_mb(geometry: Geometry, crops: int, view: float | None = None) -> float:
    """Return the MB that encoding a frame takes at its peak: its pixels and what the encoder needs.

    Args:
        geometry: of the model.
        crops: of the frame, its global view not counted.
        view: MB a view, as measured.
    """
    each = view_mb(geometry) if view is None else view
    pixels = 3 * geometry.crop**2 * 4 / 1e6
    return (crops + 1) * (each + pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is planned, in MB (10^6 bytes); `context` in tokens."""

    context: int
    weights: float
    encoder: float
    features: float
    sessions: float
    frame_cache: float
    base: float
    limit: float

    @property
    def total(self) -> float:
        """The sum."""
        parts = (self.weights, self.encoder, self.features, self.sessions, self.frame_cache)
        return sum(parts) + self.base

    def as_dict(self) -> dict[str, float]:
        """Return the plan as `info` shows it."""
        parts = {
            "weights": self.weights,
            "encoder": self.encoder,
            "feature_buffer": self.features,
            "sessions": self.sessions,
            "frame_cache": self.frame_cache,
            "base": self.base,
            "total": self.total,
            "limit": self.limit,
        }
        return {name: round(mb, 1) for name, mb in parts.items()}


def plan(
    need: Need, *, available_mb: float, limit_mb: float | None = None, context: int | None = None
) -> Plan:
    """Return a plan that fits.

    Args:
        need: what the model takes.
        available_mb: what there is, the control group's limit counted.
        limit_mb: `limits.memory_mb`, if set.
        context: `model.max_context`, if set.

    Raises:
        TooLittleMemory: none fits; the message has both numbers.
        EdgedError: the wanted context is more than the model has.
    """
    limit = available_mb * SHARE if limit_mb is None else limit_mb
    if context is not None and context > need.context_length:
        raise EdgedError(
            f"model.max_context is {context}, the model's own context ends at "
            f"{need.context_length} tokens",
            hint="lower model.max_context or leave it out",
        )
    if context is not None:
        tried = _plan(need, context, limit)
        if tried.total > limit:
            raise _too_little(tried, "lower model.max_context, raise limits.memory_mb")
        return tried
    most = min(DEFAULT_CONTEXT, need.context_length)
    least = min(STEP, most)
    tokens = most if most < STEP else most - most % STEP
    while (tried := _plan(need, tokens, limit)).total > limit:
        if tokens <= least:
            raise _too_little(tried, "take a smaller model, raise limits.memory_mb")
        tokens -= STEP
    return tried


def _plan(need: Need, context: int, limit: float) -> Plan:
    return Plan(
        context=context,
        weights=need.weights_bytes * _PACKED / 1e6,
        encoder=(need.encoder_bytes * _PACKED + need.encoding_bytes) / 1e6,
        features=need.feature_bytes * context / 1e6,
        sessions=need.kv_bytes * context * need.sessions / 1e6,
        frame_cache=need.cache_bytes / 1e6,
        base=_BASE_MB,
        limit=limit,
    )


def _too_little(tried: Plan, remedy: str) -> TooLittleMemory:
    return TooLittleMemory(
        f"the model needs {tried.total:.0f} MB with a context of {tried.context} tokens, "
        f"{tried.limit:.0f} MB may be used",
        hint=f"{remedy}, or give the box more memory",
    )
