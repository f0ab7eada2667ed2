"""Reads the little that must be known of an ONNX graph before onnxruntime opens it.

ONNX is a protobuf file. This walks over its fields, skipping the weights, and needs neither the
onnx package nor memory for the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

#: Nested graphs and messages; a real one has three or four.
_DEPTH = 32
#: Bytes an element of a KV cache takes, by ONNX's numbers of its element types.
_ELEMENT_BYTES = {1: 4, 2: 1, 3: 1, 10: 2, 16: 2, 17: 1, 18: 1, 19: 1, 20: 1}

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5


class NotAGraph(ValueError):
    """The file is no ONNX graph."""


def external_files(path: Path) -> set[str]:
    """Return the names of the files that a graph's weights lie in, as the graph writes them."""
    with _Mapped(path) as view:
        found: set[str] = set()
        for number, value in _fields(view):
            if number == 7 and isinstance(value, memoryview):  # ModelProto.graph
                found |= _graph_locations(value, _DEPTH)
            elif number == 25 and isinstance(value, memoryview):  # ModelProto.functions
                for inner, node in _fields(value):
                    if inner == 7 and isinstance(node, memoryview):  # FunctionProto.node
                        found |= _node_locations(node, _DEPTH)
        return found


def kv_cache_bytes(path: Path) -> int | None:
    """Return how many bytes an element of the KV cache takes, None if the graph does not tell."""
    with _Mapped(path) as view:
        for number, graph in _fields(view):
            if number != 7 or not isinstance(graph, memoryview):
                continue
            for inner, value in _fields(graph):
                if inner != 11 or not isinstance(value, memoryview):  # GraphProto.input
                    continue
                name, element = _input(value)
                if name.startswith("past"):
                    return _ELEMENT_BYTES.get(element)
    return None


def _graph_locations(graph: memoryview, depth: int) -> set[str]:
    if depth == 0:
        raise NotAGraph("nested too deep")
    found: set[str] = set()
    for number, value in _fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == 5:  # GraphProto.initializer
            found |= _tensor_location(value)
        elif number == 15:  # GraphProto.sparse_initializer
            found |= _sparse_locations(value)
        elif number == 1:  # GraphProto.node
            found |= _node_locations(value, depth)
    return found


def _node_locations(node: memoryview, depth: int) -> set[str]:
    found: set[str] = set()
    for number, attribute in _fields(node):
        if number == 5 and isinstance(attribute, memoryview):  # NodeProto.attribute
            found |= _attribute_locations(attribute, depth - 1)
    return found


def _attribute_locations(attribute: memoryview, depth: int) -> set[str]:
    found: set[str] = set()
    for number, value in _fields(attribute):
        if not isinstance(value, memoryview):
            continue
        if number in (5, 10):  # AttributeProto.t, .tensors
            found |= _tensor_location(value)
        elif number in (22, 23):  # AttributeProto.sparse_tensor, .sparse_tensors
            found |= _sparse_locations(value)
        elif number in (6, 11):  # AttributeProto.g, .graphs
            found |= _graph_locations(value, depth)
    return found


def _sparse_locations(sparse: memoryview) -> set[str]:
    found: set[str] = set()
    for number, tensor in _fields(sparse):
        if number in (1, 2) and isinstance(tensor, memoryview):  # values and indices
            found |= _tensor_location(tensor)
    return found


def _tensor_location(tensor: memoryview) -> set[str]:
    found: set[str] = set()
    for number, value in _fields(tensor):
        if number == 13 and isinstance(value, memoryview):  # TensorProto.external_data
            pair = {inner: _text(text) for inner, text in _fields(value)}
            if pair.get(1) == "location":
                found.add(pair.get(2, ""))
    return found


def _input(value: memoryview) -> tuple[str, int]:
    name, element = "", 0
    for number, inner in _fields(value):
        if number == 1:
            name = _text(inner)
        elif number == 2 and isinstance(inner, memoryview):  # ValueInfoProto.type
            for kind, tensor in _fields(inner):
                if kind == 1 and isinstance(tensor, memoryview):  # TypeProto.tensor_type
                    element = next((e for n, e in _fields(tensor) if n == 1 and type(e) is int), 0)
    return name, element


def _text(value: int | memoryview) -> str:
    if isinstance(value, int):
        raise NotAGraph("a number where a name should be")
    try:
        return bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise NotAGraph("a name that is no UTF-8") from None


def _fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield a protobuf message's fields: their number, and a number or the bytes."""
    at, end = 0, len(view)
    while at < end:
        key, at = _varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(view, at)
            yield number, value
            continue
        if kind == _LEN:
            length, at = _varint(view, at)
        elif kind == _I64:
            length = 8
        elif kind == _I32:
            length = 4
        else:
            raise NotAGraph(f"a field of an unknown kind, {kind}")
        if length > end - at:
            raise NotAGraph("cut off")
        if kind == _LEN:
            yield number, view[at : at + length]
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise NotAGraph("cut off")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


class _Mapped:
    """A file as a memoryview, for a `with`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        if path.stat().st_size == 0:
            self._file.close()
            raise NotAGraph("empty")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)

    def __enter__(self) -> memoryview:
        return self._view

    def __exit__(self, *_: object) -> None:
        # slices of the view may still be about in a traceback; the map goes with the last of them
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            pass
        self._file.close()
