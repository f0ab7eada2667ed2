"""Runs a vision model's graphs on made-up input, to see that a joined graph does what they do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edged.models.geometry import Geometry
from edged.models.join import Names
from edged.models.record import FEATURES, FUSED_IDS

_SEED = 1
#: Rows of the buffer of features; more than any position below.
_ROWS = 96
#: Tokens before these, new tokens, and the places of image features among the new ones.
_CASES: tuple[tuple[int, int, tuple[range, ...]], ...] = (
    (0, 1, ()),
    (0, 24, ()),
    (0, 48, (range(3, 21), range(25, 40))),
    (37, 16, (range(16),)),
    (37, 20, (range(5), range(19, 20))),
    (61, 1, ()),
    (61, 1, (range(1),)),
)
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class TrialFailed(ValueError):
    """A graph does not do what it has to."""


def compare(
    embedding: Path,
    front: onnx.ModelProto,
    names: Names,
    *,
    placeholder: int,
    vocab_size: int,
    hidden: int,
) -> int:
    """Run the folder's embedding graph and a joined graph's front on the same tokens.

    Returns:
        How many times they were compared.

    Raises:
        TrialFailed: they gave different embeddings, or cannot be run here.
    """
    stock = _session(embedding, embedding.parent, embedding.name)
    types = {each.name: _NUMPY.get(each.type) for each in stock.get_inputs()}
    draw = np.random.default_rng(_SEED)
    buffer = draw.normal(size=(_ROWS, hidden)).astype(types[names.image_features])
    made = []
    for past, new, places in _CASES:
        ids = draw.integers(0, vocab_size - 1, (1, new))
        ids[ids >= placeholder] += 1  # any id but the placeholder
        where = [place for each in places for place in each]
        for image, each in enumerate(places, 1):
            ids[0, each] = -image  # as genai counts the images of a prompt
        feed = {names.input_ids: ids, names.image_features: buffer[[past + at for at in where]]}
        wanted = _run(stock, embedding.name, feed)
        ids[0, where] = placeholder
        made.append((past, ids, buffer if where else buffer[:1], wanted))
    del stock  # its table of embeddings may be large
    joined = _session(front.SerializeToString(), embedding.parent, "the fused graph")
    for past, ids, features, wanted in made:
        total = past + ids.shape[1]
        feed = {
            FUSED_IDS: ids,
            FEATURES: features,
            names.attention_mask: np.ones((1, total), np.int64),
            names.position_ids: np.arange(past, total, dtype=np.int64)[None],
        }
        if not np.array_equal(_run(joined, "the fused graph", feed), wanted):
            raise TrialFailed(
                f"the fused graph gives other embeddings than {embedding.name}, for "
                f"{ids.shape[1]} tokens after {past}"
            )
    return len(made)


def look(vision: Path, pixels: str, sizes: str, *, geometry: Geometry, hidden: int) -> None:
    """Run the vision graph on a made-up frame of one crop.

    Raises:
        TrialFailed: it does not give the features that the geometry says, or cannot be run here.
    """
    session = _session(vision, vision.parent, vision.name)
    shape = next(each.shape for each in session.get_inputs() if each.name == pixels)
    crops = shape[1] if isinstance(shape[1], int) else 2  # one, and the global view
    side = geometry.crop
    frame = np.random.default_rng(_SEED).normal(size=(1, crops, 3, side, side))
    frame[:, 2:] = 0
    features = _run(session, vision.name, {pixels: frame, sizes: np.array([[side, side]])})
    wanted = geometry.tokens(1, 1)
    if features.shape[-1] != hidden or features.size != wanted * hidden:
        raise TrialFailed(
            f"{vision.name} gives {list(features.shape)} for a frame of one crop of {side} pixels, "
            f"not {wanted} tokens of {hidden}"
        )
    if not np.isfinite(features).all():
        raise TrialFailed(f"{vision.name} gives features that are no numbers")


def _session(graph: Path | bytes, folder: Path, name: str) -> Any:
    # before the first import: the official wheels send telemetry otherwise
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime  # noqa: PLC0415  (native, and slow to import: only who fuses pays for it)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    has = onnxruntime.get_available_providers()
    wanted = [each for each in ("CUDAExecutionProvider", "CPUExecutionProvider") if each in has]
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        return onnxruntime.InferenceSession(source, options, providers=wanted)
    except Exception as error:  # noqa: BLE001  (onnxruntime's exceptions share no other class)
        raise TrialFailed(f"onnxruntime cannot load {name}: {_short(error)}") from None


def _run(session: Any, name: str, feed: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Run a graph; what it does not take is left out, the rest is given as it takes it."""
    inputs = {each.name: each for each in session.get_inputs()}
    try:
        given = {
            key: np.ascontiguousarray(value, _NUMPY[inputs[key].type])
            for key, value in feed.items()
            if key in inputs
        }
        result: NDArray[Any] = session.run(None, given)[0]
    except Exception as error:  # noqa: BLE001  (as above)
        raise TrialFailed(f"onnxruntime cannot run {name}: {_short(error)}") from None
    return result


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
