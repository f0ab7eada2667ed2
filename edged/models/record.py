"""The record that lies beside a fused graph, `edged-fused.json`.

It says what the graph was made from and what must be known to use it. It is read as strictly as it
is written, because it lies in a folder that others may have filled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from edged import __version__
from edged.models.geometry import Geometry

FUSED_GRAPH = "edged-fused.onnx"
FUSED_RECORD = "edged-fused.json"
#: The fused graph's input of token ids: [batch, tokens], int64.
FUSED_IDS = "input_ids"
#: And its own one: [rows, hidden size], row p for the token at position p.
FEATURES = "image_features"

_VERSION = 1
_KEYS = {"v", "edged", "graph", "graph_sha256", "sources", "placeholder", "features", "geometry"}
_HEX = set("0123456789abcdef")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """The one graph that a vision model's embedding and text graphs were joined to."""

    #: File name, in the model's folder.
    graph: str
    #: The id that stands for a row of image features; no text has it. It must never be sampled.
    placeholder: int
    #: The type of the features, as numpy names it.
    features: Literal["float32", "float16"]
    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Source:
    """A file as it was when a graph was made from it."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Source:
        """Read a file, all of it."""
        return cls(path.stat().st_size, digest(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is written."""

    fused: Fused
    graph_sha256: str
    #: By file name.
    sources: Mapping[str, Source] = field(repr=False)

    def text(self) -> str:
        """Return it as it is written; `parse` is the way back."""
        value = {
            "v": _VERSION,
            "edged": __version__,
            "graph": self.fused.graph,
            "graph_sha256": self.graph_sha256,
            "sources": {name: asdict(source) for name, source in sorted(self.sources.items())},
            "placeholder": self.fused.placeholder,
            "features": self.fused.features,
            "geometry": self.fused.geometry.as_dict(),
        }
        return json.dumps(value, indent=1) + "\n"


def digest(path: Path) -> str:
    """Return a file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(value: Mapping[str, Any]) -> Record:
    """Return what `Record.text` wrote.

    Raises:
        ValueError: it is not that; the message says what is wrong.
    """
    if value.get("v") != _VERSION:
        raise ValueError(f"of another version, {value.get('v')!r}")
    if value.keys() != _KEYS:
        raise ValueError(f"has not just {', '.join(sorted(_KEYS))}")
    if value["graph"] != FUSED_GRAPH:
        raise ValueError(f"graph must be {FUSED_GRAPH}")
    placeholder, features = value["placeholder"], value["features"]
    if type(placeholder) is not int:
        raise ValueError("placeholder must be a number")
    if features not in ("float32", "float16"):
        raise ValueError("features must be float32 or float16")
    return Record(
        fused=Fused(
            graph=FUSED_GRAPH,
            placeholder=placeholder,
            features=cast("Literal['float32', 'float16']", features),
            geometry=Geometry.read(value["geometry"]),
        ),
        graph_sha256=_sha256(value["graph_sha256"]),
        sources=_sources(value["sources"]),
    )


def _sources(table: object) -> dict[str, Source]:
    found = {}
    for name, value in (table if isinstance(table, dict) else {"": None}).items():
        if not isinstance(value, dict) or value.keys() != {"size", "sha256"}:
            raise ValueError("sources must have a size and a sha256 for each file")
        if type(value["size"]) is not int:
            raise ValueError(f"sources: {name!r}: size must be a number")
        found[name] = Source(value["size"], _sha256(value["sha256"]))
    return found


def _sha256(value: object) -> str:
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= _HEX:
        raise ValueError("a sha256 is 64 hexadecimal digits")
    return value
