"""Looks at a model's folder before any native code does.

A model folder is code: one key of `genai_config.json` makes onnxruntime run a shared library of its
maker's choice. So the configuration is read here first, against a list of what may stand in it, and
every file must be a plain file of the folder. Importing this loads no native library.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import edged
from edged.errors import EdgedError
from edged.models import graph
from edged.models.record import FUSED_RECORD, Fused, digest, parse

#: Bytes.
MAX_CONFIG = 1 << 20
MAX_TOKENIZER = 64 << 20
#: Entries of a folder, its subfolders included.
MAX_ENTRIES = 5_000

CONFIG = "genai_config.json"
TOKENIZER = "tokenizer.json"
MANIFEST = "edged-manifest.json"
#: Says how images are prepared, where genai looks for it unless told otherwise.
PROCESSOR = "processor_config.json"
#: The same, in folders that keep Hugging Face's files.
PREPROCESSOR = "preprocessor_config.json"

#: Model types, as genai names them, that we know how to prompt.
TYPES = ("phi3", "phi3v")

Family = Literal["phi3", "phi3.5", "phi3.5-vision", "phi4-mini"]


class ModelError(EdgedError):
    """A model folder that cannot or must not be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """What a folder says of its model; all of it read without running anything."""

    path: Path
    type: str
    family: Family
    context_length: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    #: Bytes of the KV cache a token takes.
    kv_bytes: int
    #: Bytes of the decoder's (and embedding's) graphs and weights, and of the vision encoder's.
    weights_bytes: int
    encoder_bytes: int
    hidden_size: int
    #: Providers that the configuration itself asks for.
    providers: tuple[str, ...]
    #: What a vision model sees with.
    fused: Fused | None = None
    #: Why a vision model has no `fused`, and what to run; None for a text model.
    unfused: str | None = None
    config: Mapping[str, Any] = field(repr=False)


# What may stand in genai_config.json: a type, a tuple of types, a nested table, or a list [item].
_NUMBER = (int, float)
_SESSION: dict[str, Any] = {
    "log_id": str,
    "log_severity_level": int,
    "log_verbosity_level": int,
    "intra_op_num_threads": int,
    "inter_op_num_threads": int,
    "enable_cpu_mem_arena": bool,
    "enable_mem_pattern": bool,
    "graph_optimization_level": str,
    "provider_options": [
        {
            "cpu": {},
            "cuda": {
                "device_id": str,
                "enable_cuda_graph": str,
                "enable_skip_layer_norm_strict_mode": str,
                "gpu_mem_limit": str,
                "arena_extend_strategy": str,
                "cudnn_conv_algo_search": str,
                "cudnn_conv_use_max_workspace": str,
                "do_copy_in_default_stream": str,
                "use_tf32": str,
            },
        }
    ],
}
_DECODER: dict[str, Any] = {
    "session_options": _SESSION,
    "filename": str,
    "hidden_size": int,
    "head_size": int,
    "num_attention_heads": int,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "inputs": {
        "input_ids": str,
        "inputs_embeds": str,
        "attention_mask": str,
        "position_ids": str,
        "past_key_names": str,
        "past_value_names": str,
        "past_sequence_length": str,
        "total_sequence_length": str,
    },
    "outputs": {"logits": str, "present_key_names": str, "present_value_names": str},
    "sliding_window": {
        "window_size": int,
        "pad_value": int,
        "alignment": str,
        "slide_key_value_cache": bool,
        "slide_inputs": bool,
        "layers": [int],
    },
}
_EMBEDDING: dict[str, Any] = {
    "session_options": _SESSION,
    "filename": str,
    "inputs": {"input_ids": str, "image_features": str},
    "outputs": {"inputs_embeds": str},
}
_VISION: dict[str, Any] = {
    "session_options": _SESSION,
    "filename": str,
    "config_filename": str,
    "inputs": {"pixel_values": str, "image_sizes": str},
    "outputs": {"image_features": str},
}
_IDS = (
    *("bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("image_token_id", "bot_token_id", "eot_token_id", "bor_token_id", "eor_token_id"),
)
_ALLOWED: dict[str, Any] = {
    "model": {
        "type": str,
        "context_length": int,
        "vocab_size": int,
        "eos_token_id": (int, list),
        **dict.fromkeys(_IDS, int),
        "decoder": _DECODER,
        "embedding": _EMBEDDING,
        "vision": _VISION,
    },
    "search": {
        **dict.fromkeys(("do_sample", "early_stopping", "past_present_share_buffer"), bool),
        **dict.fromkeys(
            (
                "min_length",
                "max_length",
                "batch_size",
                "num_beams",
                "num_return_sequences",
                "top_k",
                "no_repeat_ngram_size",
                "random_seed",
            ),
            int,
        ),
        **dict.fromkeys(
            ("temperature", "top_p", "repetition_penalty", "length_penalty", "diversity_penalty"),
            _NUMBER,
        ),
    },
}


def inspect(path: str | Path, *, verify: bool = True) -> ModelFolder:
    """Return what a model folder holds.

    Args:
        path: the folder.
        verify: also compare every file that the manifest names, and all that the fused graph was
            made from, with its sha256; reads all of it. Otherwise weights are known by their size.

    Raises:
        ModelError: something is missing, or is not what it has to be.
    """
    root = Path(path)
    if not root.is_dir():
        raise ModelError(f"model.path {root}: no such folder", hint="set model.path")
    root = root.resolve()
    try:
        _only_plain_files(root)
        config = read_object(root, CONFIG, MAX_CONFIG)
        if verify:
            _manifest(root)
        _allowed(config, _ALLOWED, CONFIG)
        return _read(root, config, verify=verify)
    except OSError as error:
        raise ModelError(f"{root}: {error}") from error


def fingerprint(path: str | Path) -> str:
    """Return what tells this model from another: names, sizes, and the small files' contents.

    It never raises: a folder that cannot be read has a fingerprint too, its path's.
    """
    seen = hashlib.sha256()
    root = Path(path)
    try:
        for name in sorted(os.listdir(root)):  # noqa: PTH208  (names only)
            info = (root / name).stat()
            if stat.S_ISREG(info.st_mode):
                seen.update(f"{name}\0{info.st_size}\0".encode())
        for name in (CONFIG, MANIFEST, FUSED_RECORD):
            if (root / name).is_file() and (root / name).stat().st_size <= MAX_CONFIG:
                seen.update((root / name).read_bytes())
    except OSError:
        seen = hashlib.sha256(str(root).encode())
    return seen.hexdigest()[:16]


# Files --------------------------------------------------------------------------------------------


def _only_plain_files(root: Path) -> None:
    """Refuse links: onnxruntime reads through a hard link what it would refuse as a soft one."""
    # package managers hard-link what they install; that is as trusted as the code beside it
    ours = root.is_relative_to(Path(edged.__file__).resolve().parent)
    left = MAX_ENTRIES
    for folder, subfolders, names in os.walk(root):
        for name in (*subfolders, *names):
            left -= 1
            if left < 0:
                raise ModelError(f"{root}: more than {MAX_ENTRIES} files", hint=_COPY)
            entry = Path(folder, name)
            info = entry.lstat()
            if stat.S_ISLNK(info.st_mode):
                raise ModelError(f"{entry}: a symbolic link", hint=_COPY)
            if stat.S_ISDIR(info.st_mode):
                continue
            if not stat.S_ISREG(info.st_mode):
                raise ModelError(f"{entry}: not a plain file", hint=_COPY)
            if info.st_nlink > 1 and not ours:
                raise ModelError(f"{entry}: has {info.st_nlink} hard links", hint=_COPY)


_COPY = (
    "a model folder holds its own plain files and nothing else: copy it with `cp -rL` "
    "(a Hugging Face cache is made of links)"
)


def _file(root: Path, name: object, where: str) -> Path:
    """Return a file of the folder by the name the configuration gives it."""
    if not isinstance(name, str) or not name or name in (".", "..") or "\0" in name:
        raise ModelError(f"{where}: not a file name: {name!r}")
    if "/" in name or "\\" in name:
        raise ModelError(f"{where}: {name!r} leads out of the model's folder")
    path = root / name
    if not path.is_file():
        raise ModelError(f"{root}: {name} is missing ({where} names it)", hint=_COMPLETE)
    return path


_COMPLETE = "the folder is incomplete: fetch or copy it again"


def read_object(root: Path, name: str, most: int) -> dict[str, Any]:
    """Return a JSON object that the folder must have."""
    path = root / name
    if not path.is_file():
        raise ModelError(f"{root}: {name} is missing", hint=_COMPLETE)
    size = path.stat().st_size
    if size > most:
        raise ModelError(f"{path}: {size} bytes, more than the {most} such a file may have")
    try:
        value = json.loads(
            path.read_bytes().decode("utf-8"),
            object_pairs_hook=_no_twins,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}", hint=_COMPLETE) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object", hint=_COMPLETE)
    return value


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _manifest(root: Path) -> None:
    """Compare the files with the manifest, if there is one: {file name: sha256}."""
    if not (root / MANIFEST).exists():
        return
    for name, expected in read_object(root, MANIFEST, MAX_CONFIG).items():
        path = _file(root, name, MANIFEST)
        found = digest(path)
        if found != expected:
            raise ModelError(
                f"{path}: its sha256 is {found}, {MANIFEST} says {expected}", hint=_COMPLETE
            )


# The configuration --------------------------------------------------------------------------------


def _allowed(value: Any, table: Any, where: str) -> None:
    """Refuse what is not on the list, by its name."""
    if isinstance(table, dict):
        if not isinstance(value, dict):
            raise ModelError(f"{where}: must be an object")
        for key, inner in value.items():
            if key not in table:
                raise ModelError(
                    f"{where}: {key!r} is not allowed here",
                    hint="it could make the runtime load code or files of the model maker's "
                    "choice; remove it, or take the model from its publisher",
                )
            _allowed(inner, table[key], f"{where}: {key}")
    elif isinstance(table, list):
        if not isinstance(value, list):
            raise ModelError(f"{where}: must be a list")
        for item in value:
            _allowed(item, table[0], where)
    else:
        kinds = table if isinstance(table, tuple) else (table,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ModelError(f"{where}: must be {names}")


def _read(root: Path, config: dict[str, Any], *, verify: bool) -> ModelFolder:
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("decoder"), dict):
        raise ModelError(f"{root / CONFIG}: has no model.decoder")
    decoder = model["decoder"]
    kind = model.get("type")
    if kind not in TYPES:
        raise ModelError(
            f"{root / CONFIG}: model.type is {kind!r}, edged knows {', '.join(TYPES)}",
            hint="use an ONNX build of Phi-3, Phi-3.5, Phi-3.5-vision or Phi-4-mini",
        )
    numbers = {
        name: _positive(root, table, name)
        for table, names in (
            (model, ("context_length", "vocab_size")),
            (decoder, ("num_hidden_layers", "num_key_value_heads", "head_size", "hidden_size")),
        )
        for name in names
    }
    weights = _graph_files(root, decoder, "model.decoder.filename")
    dtype_bytes = graph.kv_cache_bytes(weights[0]) or 4
    graphs = [weights[0]]
    if "embedding" in model:
        embedding = _graph_files(root, model["embedding"], "model.embedding.filename")
        graphs.append(embedding[0])
        weights += embedding
    encoder: list[Path] = []
    if "vision" in model:
        encoder = _graph_files(root, model["vision"], "model.vision.filename")
        graphs.append(encoder[0])
        if "config_filename" in model["vision"]:
            _file(root, model["vision"]["config_filename"], "model.vision.config_filename")
    tokenizer = read_object(root, TOKENIZER, MAX_TOKENIZER)
    fused: Fused | None = None
    unfused: str | None = None
    if kind == "phi3v" and {"embedding", "vision"} <= model.keys():
        try:
            fused = _fused(
                root,
                _sources(root, model, {*graphs, *weights, *encoder}),
                small=graphs,
                free=free_ids(root, model, numbers["vocab_size"], tokenizer),
                verify=verify,
            )
        except _Unfused as why:
            unfused = f"{why}; run: edged models fuse {shlex.quote(str(root))}"
    kv = 2 * numbers["num_hidden_layers"] * numbers["num_key_value_heads"] * numbers["head_size"]
    return ModelFolder(
        path=root,
        type=kind,
        family=_family(root, kind, numbers["context_length"], tokenizer),
        context_length=numbers["context_length"],
        vocab_size=numbers["vocab_size"],
        eos_ids=_eos(root, model, numbers["vocab_size"]),
        kv_bytes=kv * dtype_bytes,
        weights_bytes=_bytes(weights),
        encoder_bytes=_bytes(encoder),
        hidden_size=numbers["hidden_size"],
        providers=tuple(
            sorted(
                {
                    name
                    for options in decoder.get("session_options", {}).get("provider_options", ())
                    for name in options
                }
            )
        ),
        fused=fused,
        unfused=unfused,
        config=config,
    )


def _positive(root: Path, table: dict[str, Any], name: str) -> int:
    value = table.get(name)
    if not isinstance(value, int) or not 0 < value < 1 << 31:
        raise ModelError(f"{root / CONFIG}: {name} must be a positive number, is {value!r}")
    return value


def _eos(root: Path, model: dict[str, Any], vocab_size: int) -> tuple[int, ...]:
    value = model.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ModelError(f"{root / CONFIG}: eos_token_id must name tokens of the vocabulary")
    return tuple(ids)


def _graph_files(root: Path, table: dict[str, Any], where: str) -> list[Path]:
    """Return a graph and the files that its weights lie in."""
    path = _file(root, table.get("filename"), where)
    try:
        outside = graph.external_files(path)
    except graph.NotAGraph as error:
        raise ModelError(f"{path}: not an ONNX graph: {error}", hint=_COMPLETE) from None
    return [path, *(_file(root, name, path.name) for name in sorted(outside))]


def _bytes(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in set(files))


def _family(root: Path, kind: str, context_length: int, tokenizer: dict[str, Any]) -> Family:
    """Tell whose prompts the model expects. `edged.engine` checks it against the template."""
    if not (root / "tokenizer_config.json").is_file():
        raise ModelError(f"{root}: tokenizer_config.json is missing", hint=_COMPLETE)
    added = tokenizer.get("added_tokens")
    if not isinstance(added, list):
        raise ModelError(f"{root / TOKENIZER}: has no added_tokens")
    names = {token.get("content") for token in added if isinstance(token, dict)}
    wanted = {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}
    if not wanted <= names:
        raise ModelError(
            f"{root / TOKENIZER}: lacks {', '.join(sorted(wanted - names))}",
            hint="this is no tokenizer of a Phi-3, Phi-3.5 or Phi-4-mini instruct model",
        )
    if kind == "phi3v":
        return "phi3.5-vision"
    if "<|/tool|>" in names or "<|tool|>" in names:
        return "phi4-mini"
    return "phi3.5" if context_length > 4096 else "phi3"


# The fused graph ----------------------------------------------------------------------------------


class _Unfused(Exception):
    """Why there is no fused graph that may be used."""


def sources(folder: ModelFolder) -> set[Path]:
    """Return the files that a fused graph is made from, or that say how it is to be used."""
    model = folder.config["model"]
    parts = [model[part]["filename"] for part in ("decoder", "embedding", "vision")]
    files = {folder.path / name for name in parts}
    for name in parts:
        files |= {folder.path / outside for outside in graph.external_files(folder.path / name)}
    return _sources(folder.path, model, files)


def free_ids(
    root: Path, model: Mapping[str, Any], vocab_size: int, tokenizer: Mapping[str, Any]
) -> set[int]:
    """Return the ids below `vocab_size` that neither a text nor the configuration has a use for.

    Raises:
        ModelError: the tokenizer's file does not say which ids it has.
    """
    inner = tokenizer.get("model")
    vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
    added = tokenizer.get("added_tokens")
    if not isinstance(vocabulary, dict) or not isinstance(added, list):
        raise ModelError(f"{root / TOKENIZER}: has no model.vocab, or no added_tokens")
    taken = [*vocabulary.values()]
    taken += [token.get("id") if isinstance(token, dict) else None for token in added]
    if not all(type(number) is int for number in taken):
        raise ModelError(f"{root / TOKENIZER}: an id that is no number")
    configured = [model.get(name) for name in (*_IDS, "eos_token_id")]
    for value in configured:
        taken += value if isinstance(value, list) else [value]
    return set(range(vocab_size)) - {number for number in taken if type(number) is int}


def _sources(root: Path, model: Mapping[str, Any], files: set[Path]) -> set[Path]:
    how = root / model["vision"].get("config_filename", PROCESSOR)
    return files | {path for path in (how, root / PREPROCESSOR) if path.is_file()}


def _fused(
    root: Path, wanted: set[Path], *, small: list[Path], free: set[int], verify: bool
) -> Fused:
    """Return what the record says, if it is true. Nobody else's word is taken for it."""
    if not (root / FUSED_RECORD).exists():
        raise _Unfused("not fused")
    try:
        record = read_object(root, FUSED_RECORD, MAX_CONFIG)
    except ModelError as error:
        raise _Unfused(error.message) from None
    try:
        told = parse(record)
    except ValueError as error:
        raise _Unfused(f"{FUSED_RECORD}: {error}") from None
    fused, before = told.fused, told.sources
    if fused.placeholder not in free:
        raise _Unfused(f"stale: {fused.placeholder} is no id that the model has free")
    if before.keys() != {path.name for path in wanted}:
        names = ", ".join(sorted(before.keys() ^ {path.name for path in wanted}))
        raise _Unfused(f"stale: the model is made of other files since: {names}")
    large = {path for path in wanted if path.suffix != ".json"} - set(small)
    for path in sorted(wanted):
        then = before[path.name]
        changed = path.stat().st_size != then.size
        if not changed and (verify or path not in large):
            changed = digest(path) != then.sha256
        if changed:
            raise _Unfused(f"stale: {path.name} has changed since")
    path = root / fused.graph
    if not path.is_file():
        raise _Unfused(f"{path.name} is missing")
    if digest(path) != told.graph_sha256:
        raise _Unfused(f"{path.name} is not the graph that {FUSED_RECORD} tells of")
    try:
        outside = graph.external_files(path)
    except graph.NotAGraph as error:
        raise _Unfused(f"{path.name}: not an ONNX graph: {error}") from None
    if not outside <= before.keys():
        raise _Unfused(f"{path.name}: its weights are not the model's")
    return fused
