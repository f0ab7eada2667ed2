"""`edged models fuse`: one graph for a vision model, written beside the stock ones.

The stock way gives images to a model with its first prompt only, and takes the whole prompt at
once. The fused graph is a text model's, so that frames can be added to a live session, a prefill
can go in chunks, and a question can be taken back (see `edged.models.join`).

Only a graph is written, no weights; whoever may write the model's folder does it once. The service
only ever reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import onnx

from edged.models import join, trial
from edged.models.folder import (
    MAX_CONFIG,
    MAX_TOKENIZER,
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER,
    ModelError,
    ModelFolder,
    free_ids,
    inspect,
    read_object,
    sources,
)
from edged.models.geometry import Geometry
from edged.models.record import FUSED_GRAPH, FUSED_RECORD, Fused, Record, Source

#: The step of `processor_config.json` that Phi-3-vision's images are prepared by.
OPERATOR = "Phi3ImageTransform"

#: What that step does when nothing in the folder says otherwise: onnxruntime-extensions,
#: shared/api/image_transforms_phi_3.hpp, has these as constants. It reads no attribute; the
#: published `num_crops` changes nothing.
OPERATOR_DOES: Mapping[str, Any] = {
    "crop": 336,
    "tokens": 144,
    "max_crops": 16,
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}

#: Bytes. A graph's weights lie outside it; one that is larger holds them, and protobuf's limit is
#: near.
_MAX_GRAPH = 1 << 30


class FuseError(ModelError):
    """A model folder that cannot be fused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it."""

    folder: ModelFolder
    fused: Fused
    #: Whether anything was written; a graph that is there and valid is left alone.
    changed: bool
    #: How often the fused graph was compared with the folder's own.
    compared: int = 0

    @property
    def graph(self) -> Path:
        """The fused graph."""
        return self.folder.path / self.fused.graph


def fuse(path: str | Path) -> Outcome:
    """Write the fused graph of a vision model's folder, and the record that makes it valid.

    The graph is complete and checked before it gets its name, and without its record it does not
    count: whatever ends this early leaves the folder as unfused as it was. Two at a time wait for
    each other.

    Raises:
        ModelError: the folder is no model's, or cannot be fused; nothing has changed then.
    """
    if not Path(path).is_dir():
        raise FuseError(f"{path}: no such folder", hint="name the model's folder")
    try:
        root = _vision(inspect(path, verify=False)).path
        with _alone(root):
            return _fuse(_vision(inspect(root)))
    except PermissionError:
        raise _not_writable(Path(path)) from None
    except OSError as error:
        raise FuseError(f"{path}: {error}", hint=_ROOM) from None


def _fuse(folder: ModelFolder) -> Outcome:
    root = folder.path
    if folder.fused is not None:
        return Outcome(folder=folder, fused=folder.fused, changed=False)
    if not os.access(root, os.W_OK | os.X_OK):
        raise _not_writable(root)
    _sweep(root)
    seen = {each.name: Source.of(each) for each in sources(folder)}
    try:
        joined, fused, compared = _make(folder)
    except (join.CannotJoin, trial.TrialFailed) as error:
        raise FuseError(f"{root}: {error}", hint=_OTHER) from None
    data = joined.SerializeToString(deterministic=True)
    record = Record(fused=fused, graph_sha256=hashlib.sha256(data).hexdigest(), sources=seen)
    like = root / folder.config["model"]["embedding"]["filename"]
    _write(root / FUSED_GRAPH, data, like)
    _write(root / FUSED_RECORD, record.text().encode(), like)
    folder = inspect(root, verify=False)
    if folder.fused is None:
        raise FuseError(f"{root}: {folder.unfused}", hint="does another program write there?")
    return Outcome(folder=folder, fused=folder.fused, changed=True, compared=compared)


_OTHER = "take an ONNX build of Phi-3-vision or Phi-3.5-vision for onnxruntime-genai, unchanged"
_ROOM = "the folder must be writable, on a disk with room for a graph"


def _vision(folder: ModelFolder) -> ModelFolder:
    """Return the folder, if it is a vision model's."""
    model = folder.config["model"]
    missing = [part for part in ("embedding", "vision") if part not in model]
    if folder.type != "phi3v":
        raise FuseError(
            f"{folder.path}: a text model ({folder.type}): there is nothing to fuse",
            hint="fuse the folder of a vision model; a text model runs as it is",
        )
    if missing:
        raise FuseError(
            f"{folder.path}: its configuration names no {' and no '.join(missing)} graph",
            hint=_OTHER,
        )
    return folder


def _not_writable(root: Path) -> FuseError:
    owner: object = root.stat().st_uid
    with suppress(KeyError):
        owner = root.owner()
    return FuseError(
        f"{root}: cannot be written by this user",
        hint=f"run it as {owner}, who owns the folder, or on a writable copy of it",
    )


# Making -------------------------------------------------------------------------------------------


def _make(folder: ModelFolder) -> tuple[onnx.ModelProto, Fused, int]:
    """Join the graphs and run what was joined; return it, what it is, and how often it ran.

    Raises:
        CannotJoin: the graphs are not as they are known.
        TrialFailed: they do not do what they have to.
        FuseError: anything else is in the way.
    """
    root, model = folder.path, folder.config["model"]
    names = _names(model)
    embedding = _load(root / model["embedding"]["filename"])
    text = _load(root / model["decoder"]["filename"])
    vision = _load(root / model["vision"]["filename"])
    geometry, pixels, sizes = _geometry(root, model, vision)
    fused = Fused(
        graph=FUSED_GRAPH,
        placeholder=_placeholder(folder),
        features=cast(
            "Literal['float32', 'float16']", join.features_type(embedding, names.image_features)
        ),
        geometry=geometry,
    )
    joined = join.join(
        embedding, text, names, placeholder=fused.placeholder, hidden=folder.hidden_size
    )
    compared = trial.compare(
        root / model["embedding"]["filename"],
        join.front_of(joined, names.text_embeds),
        names,
        placeholder=fused.placeholder,
        vocab_size=folder.vocab_size,
        hidden=folder.hidden_size,
    )
    trial.look(
        root / model["vision"]["filename"],
        pixels,
        sizes,
        geometry=geometry,
        hidden=folder.hidden_size,
    )
    return joined, fused, compared


def _names(model: Mapping[str, Any]) -> join.Names:
    """Return what the configuration calls the inputs and outputs; else they have genai's names."""
    embedding, decoder = model["embedding"], model["decoder"].get("inputs", {})
    named = {
        "input_ids": embedding.get("inputs", {}).get("input_ids"),
        "image_features": embedding.get("inputs", {}).get("image_features"),
        "inputs_embeds": embedding.get("outputs", {}).get("inputs_embeds"),
        "text_embeds": decoder.get("inputs_embeds"),
        "attention_mask": decoder.get("attention_mask"),
        "position_ids": decoder.get("position_ids"),
    }
    return join.Names(**{key: value for key, value in named.items() if value})


def _load(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights."""
    size = path.stat().st_size
    if size > _MAX_GRAPH:
        raise FuseError(
            f"{path}: {size} bytes; its weights must lie outside the graph",
            hint="save it with external data (onnx.save, save_as_external_data)",
        )
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # noqa: BLE001  (protobuf's own class is not ours to name)
        raise FuseError(f"{path}: not an ONNX graph: {error}", hint=_OTHER) from None


def _placeholder(folder: ModelFolder) -> int:
    tokenizer = read_object(folder.path, TOKENIZER, MAX_TOKENIZER)
    free = free_ids(folder.path, folder.config["model"], folder.vocab_size, tokenizer)
    if not free:
        raise FuseError(
            f"{folder.path}: its tokenizer has a text for each of the {folder.vocab_size} ids: "
            "none is free to stand for an image",
            hint="such a model cannot be fused; the published ones have a few ids to spare",
        )
    return max(free)


# Geometry -----------------------------------------------------------------------------------------


def _geometry(
    root: Path, model: Mapping[str, Any], vision: onnx.ModelProto
) -> tuple[Geometry, str, str]:
    """Find out how frames are cut; return it and the names of the vision graph's two inputs.

    What the graph's own shapes fix comes first, then what `processor_config.json` says of its
    step, then Hugging Face's file, and what the step does of itself last.
    """
    pixels, sizes = (
        model["vision"].get("inputs", {}).get(name, name)
        for name in ("pixel_values", "image_sizes")
    )
    fixed = _fixed(vision, pixels, sizes)
    said: dict[str, Any] = {}
    for table in (_preprocessor(root), _operator(root, model)):  # the later word counts
        said |= {name: value for name, value in _said(table).items() if value is not None}
    crop = said.get("crop")
    if fixed["crop"] and crop and fixed["crop"] != crop:
        raise FuseError(
            f"{root}: the vision graph takes crops of {fixed['crop']} pixels, but the folder's "
            f"files say {crop}",
            hint=_OTHER,
        )
    tokens = said.get("tokens", OPERATOR_DOES["tokens"])
    if type(tokens) is not int or tokens < 1 or math.isqrt(tokens) ** 2 != tokens:
        raise FuseError(f"{root}: a crop of {tokens!r} tokens, which is no square", hint=_OTHER)
    try:
        geometry = Geometry.read(
            {
                "crop": fixed["crop"] or crop or OPERATOR_DOES["crop"],
                "tokens_a_side": math.isqrt(tokens),
                "max_crops": fixed["max_crops"] or OPERATOR_DOES["max_crops"],
                "mean": said.get("mean", OPERATOR_DOES["mean"]),
                "std": said.get("std", OPERATOR_DOES["std"]),
            }
        )
    except ValueError as error:
        raise FuseError(
            f"{root}: images are prepared in a strange way: {error}", hint=_OTHER
        ) from None
    return geometry, pixels, sizes


def _fixed(vision: onnx.ModelProto, pixels: str, sizes: str) -> dict[str, int | None]:
    """Return what the vision graph's shapes leave no choice in."""
    given = {each.name for each in vision.graph.initializer}
    inputs = {each.name: each.type.tensor_type for each in vision.graph.input}
    if inputs.keys() - given != {pixels, sizes}:
        raise join.CannotJoin(
            f"the vision graph takes {', '.join(sorted(inputs.keys() - given))}, not {pixels} and "
            f"{sizes}"
        )
    dims = [d.dim_value if d.HasField("dim_value") else None for d in inputs[pixels].shape.dim]
    if len(dims) != 5 or dims[2] not in (None, 3) or dims[3] != dims[4]:
        raise join.CannotJoin(
            f"the vision graph's {pixels} is {dims}, not [frames, crops, 3, side, side]"
        )
    return {"crop": dims[3], "max_crops": dims[1] - 1 if dims[1] else None}


def _operator(root: Path, model: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes of the one step that is known here."""
    name = model["vision"].get("config_filename", PROCESSOR)
    processor = read_object(root, name, MAX_CONFIG).get("processor")
    steps = processor.get("transforms") if isinstance(processor, dict) else None
    found = []
    for step in steps if isinstance(steps, list) else ():
        operation = step.get("operation") if isinstance(step, dict) else None
        if isinstance(operation, dict):
            found.append(operation)
    kinds = [str(operation.get("type")) for operation in found]
    if kinds.count(OPERATOR) != 1 or not set(kinds) <= {"DecodeImage", "ConvertRGB", OPERATOR}:
        raise FuseError(
            f"{root / name}: images are prepared by {', '.join(kinds) or 'nothing'}; edged knows "
            f"{OPERATOR}",
            hint=_OTHER,
        )
    attributes = found[kinds.index(OPERATOR)].get("attrs", {})
    if not isinstance(attributes, dict):
        raise FuseError(f"{root / name}: attrs must be an object", hint=_OTHER)
    return attributes


def _preprocessor(root: Path) -> Mapping[str, Any]:
    if not (root / PREPROCESSOR).is_file():
        return {}
    return read_object(root, PREPROCESSOR, MAX_CONFIG)


def _said(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table of attributes says, by our names; None where it is silent."""
    crop = table.get("crop_size", table.get("image_size"))
    if isinstance(crop, dict):  # {"height": n, "width": n}
        crop = list(crop.values())
    if isinstance(crop, list):
        crop = crop[0] if crop and all(each == crop[0] for each in crop) else repr(crop)
    return {
        "crop": crop,
        "tokens": table.get("num_img_tokens"),
        "mean": table.get("image_mean"),
        "std": table.get("image_std"),
    }


# Writing ------------------------------------------------------------------------------------------


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep others from fusing this folder meanwhile."""
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some file systems have no locks; then nobody waits
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(root: Path) -> None:
    """Remove what an earlier run that was ended has left."""
    for name in (FUSED_GRAPH, FUSED_RECORD):
        for path in root.glob(f".{name}.*.tmp"):
            path.unlink()


def _write(path: Path, data: bytes, like: Path) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            # who may read the model may read this
            info = like.stat()
            os.fchmod(file.fileno(), stat.S_IMODE(info.st_mode) & 0o666)
            with suppress(PermissionError):
                os.fchown(file.fileno(), info.st_uid, info.st_gid)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
