from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edged.models.join import CannotJoin, Names, features_type, front_of, join

HIDDEN, IDS, PLACEHOLDER = 4, 12, 11
TABLE = np.arange(IDS * HIDDEN, dtype=np.float32).reshape(IDS, HIDDEN)
WEIGHT = np.eye(HIDDEN, dtype=np.float32)[::-1].copy()
NAMES = Names()

Value = onnx.ValueInfoProto
node = helper.make_node


def value(name: str, kind: int, *shape: int | str | None) -> Value:
    return helper.make_tensor_value_info(name, kind, list(shape))


def model(graph: onnx.GraphProto, opset: int = 17, *, ir: int = 8, **more: Any) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    more.setdefault("opset_imports", imports)
    return helper.make_model(graph, ir_version=ir, **more)


def embedding(
    *,
    ids: int = TensorProto.INT64,
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
    names: Names = NAMES,
    table: str = "weight",
    shape: tuple[int | str, ...] = ("n", HIDDEN),
    extra: tuple[Value, ...] = (),
) -> onnx.ModelProto:
    """As Phi-3-vision's: ids below zero are the places of image features, in their order."""
    real = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    zero = np.array(0, np.int32 if ids == TensorProto.INT32 else np.int64)
    graph = helper.make_graph(
        [
            node("Max", [names.input_ids, "zero"], ["ids"]),
            node("Gather", [table, "ids"], ["text"], name="Gather_0"),
            node("Less", [names.input_ids, "zero"], ["below"]),
            node("NonZero", ["below"], ["places"]),
            node("Transpose", ["places"], ["rows"], perm=[1, 0]),
            node("ScatterND", ["text", "rows", names.image_features], [names.inputs_embeds]),
        ],
        "embedding",
        [
            value(names.input_ids, ids, "b", "s"),
            value(names.image_features, kind, *shape),
            *extra,
        ],
        [value(names.inputs_embeds, kind, "b", "s", HIDDEN)],
        [
            numpy_helper.from_array(TABLE.astype(real), table),
            numpy_helper.from_array(zero, "zero"),
        ],
    )
    return model(graph, opset)


def text(
    *,
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
    names: Names = NAMES,
    mask: int | None = TensorProto.INT64,
    positions: bool = False,
    weight: str = "weight",
    hidden: int | str = HIDDEN,
    nodes: tuple[onnx.NodeProto, ...] = (),
    ir: int = 8,
) -> onnx.ModelProto:
    """Embeddings, turned round. What it takes beside them is used, so that it stays."""
    real = np.float16 if kind == TensorProto.FLOAT16 else np.float32
    used = [*(["ones"] if mask else []), *(["at"] if positions else [])]
    inputs = [value(names.text_embeds, kind, "batch", "length", hidden)]
    before = [*nodes]
    if mask:
        inputs.append(value(names.attention_mask, mask, "batch", "total"))
        before.append(node("Cast", [names.attention_mask], ["ones"], to=kind))
    if positions:
        inputs.append(value(names.position_ids, TensorProto.INT64, "batch", "length"))
        before.append(node("Cast", [names.position_ids], ["at"], to=kind))
    graph = helper.make_graph(
        [
            *before,
            node("MatMul", [names.text_embeds, weight], ["logits"], name="Gather_0"),
        ],
        "text",
        inputs,
        [
            value("logits", kind, "batch", "length", HIDDEN),
            *(value(n, kind, None, None) for n in used),
        ],
        [numpy_helper.from_array(WEIGHT.astype(real), weight)],
    )
    return model(graph, opset, ir=ir)


def joined(
    front: onnx.ModelProto | None = None, back: onnx.ModelProto | None = None, **more: Any
) -> onnx.ModelProto:
    more = {"placeholder": PLACEHOLDER, "hidden": HIDDEN} | more
    return join(front or embedding(), back or text(), more.pop("names", NAMES), **more)


def run(graph: onnx.ModelProto, past: int, ids: list[int], features: Any, **names: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    types = {"tensor(int32)": np.int32, "tensor(float16)": np.float16, "tensor(float)": np.float32}
    feed = {
        "input_ids": np.array([ids], np.int64),
        "image_features": features,
        names.get("attention_mask", "attention_mask"): np.ones((1, past + len(ids)), np.int64),
        names.get("position_ids", "position_ids"): np.arange(past, past + len(ids))[None],
    }
    inputs = {each.name: types.get(each.type, np.int64) for each in session.get_inputs()}
    assert set(inputs) <= set(feed)
    return session.run(None, {k: feed[k].astype(kind) for k, kind in inputs.items()})[0]


def expected(past: int, ids: list[int], features: Any) -> Any:
    """What is to come out, said without a graph."""
    rows = [features[past + n] if i == PLACEHOLDER else TABLE[i] for n, i in enumerate(ids)]
    return np.stack(rows)[None].astype(np.float32) @ WEIGHT


FEATURES = -1 - np.arange(40 * HIDDEN, dtype=np.float32).reshape(40, HIDDEN)
JOINED = joined()
IDS_WITH_SLOTS = [3, PLACEHOLDER, PLACEHOLDER, 0, 7, PLACEHOLDER]


@settings(max_examples=40, deadline=None)
@given(
    past=st.integers(0, 20),
    ids=st.lists(st.integers(0, IDS - 1), min_size=1, max_size=20),
)
def test_a_placeholder_is_the_row_at_its_position(past: int, ids: list[int]) -> None:
    got = run(JOINED, past, ids, FEATURES)
    assert np.array_equal(got, expected(past, ids, FEATURES))


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize(
    ("front", "back"),
    [
        ({"ids": TensorProto.INT32}, {}),
        ({}, {"mask": TensorProto.INT32}),
        ({}, {"mask": None, "positions": True}),
        ({}, {"positions": True}),
        ({"opset": 13}, {"opset": 22}),
        ({"opset": 22}, {"opset": 13}),
        ({"kind": TensorProto.FLOAT16}, {"kind": TensorProto.FLOAT16}),
        ({"shape": ("n", "h")}, {"hidden": "h"}),
    ],
    ids=["int32", "mask", "positions", "both", "opsets", "older", "fp16", "shapeless"],
)
def test_what_the_graphs_may_differ_in(
    front: dict[str, Any], back: dict[str, Any], past: int
) -> None:
    graph = joined(embedding(**front), text(**back))
    got = run(graph, past, IDS_WITH_SLOTS, FEATURES)
    assert np.array_equal(got.astype(np.float32), expected(past, IDS_WITH_SLOTS, FEATURES))


def test_names_come_from_the_configuration() -> None:
    names = Names(
        input_ids="tokens",
        image_features="visual",
        inputs_embeds="hidden",
        text_embeds="embeds",
        attention_mask="mask",
        position_ids="where",
    )
    graph = joined(embedding(names=names), text(names=names, positions=True), names=names)
    got = run(graph, 4, IDS_WITH_SLOTS, FEATURES, attention_mask="mask", position_ids="where")
    assert np.array_equal(got, expected(4, IDS_WITH_SLOTS, FEATURES))


@pytest.mark.parametrize(
    "clash", ["weight", "places", "edged.embedding.weight", "edged.embedding."]
)
def test_names_that_both_graphs_have_stay_apart(clash: str) -> None:
    graph = joined(embedding(), text(weight=clash))
    names = [each.name for each in graph.graph.initializer]
    assert len(set(names)) == len(names)
    assert np.array_equal(
        run(graph, 2, IDS_WITH_SLOTS, FEATURES), expected(2, IDS_WITH_SLOTS, FEATURES)
    )


def test_what_a_subgraph_reads_from_around_it_is_found() -> None:
    """The embedding graph's table is only used inside an If."""
    front = embedding()
    taken = [each for each in front.graph.node if each.op_type == "Gather"]
    branch = helper.make_graph(
        [node("Gather", ["weight", "ids"], ["picked"])],
        "branch",
        [],
        [value("picked", TensorProto.FLOAT, "b", "s", HIDDEN)],
    )
    other = onnx.GraphProto()
    other.CopyFrom(branch)
    other.name = "other"
    other.node[0].output[0] = other.output[0].name = "picked2"
    choice = node("If", ["yes"], ["text"], then_branch=branch, else_branch=other)
    front.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    at = list(front.graph.node).index(taken[0])
    front.graph.node.remove(taken[0])
    front.graph.node.insert(at, choice)
    graph = joined(front)
    wanted = expected(3, IDS_WITH_SLOTS, FEATURES)
    assert np.array_equal(run(graph, 3, IDS_WITH_SLOTS, FEATURES), wanted)
    part = front_of(graph, "inputs_embeds")
    assert np.array_equal(run(part, 3, IDS_WITH_SLOTS, FEATURES) @ WEIGHT, wanted)
    assert not {"weight"} & {each.name for each in part.graph.initializer}


def test_functions_of_both_graphs_go_along() -> None:
    def with_function(graph: onnx.ModelProto, op: str) -> onnx.ModelProto:
        kept = next(each for each in graph.graph.node if each.op_type == op)
        body = node(op, ["a", "b"], ["c"])
        own = [helper.make_opsetid("", graph.opset_import[0].version)]
        graph.functions.append(
            helper.make_function("local", "Twin", ["a", "b"], ["c"], [body], own)
        )
        kept.op_type, kept.domain = "Twin", "local"
        graph.opset_import.append(helper.make_opsetid("local", 1))
        return graph

    graph = joined(with_function(embedding(), "Gather"), with_function(text(), "MatMul"))
    assert np.array_equal(
        run(graph, 1, IDS_WITH_SLOTS, FEATURES), expected(1, IDS_WITH_SLOTS, FEATURES)
    )


def test_the_front_is_the_same_alone() -> None:
    part = front_of(joined(), "inputs_embeds")
    assert [each.name for each in part.graph.output] == ["inputs_embeds"]
    assert len(part.graph.node) < len(joined().graph.node)
    got = run(part, 6, IDS_WITH_SLOTS, FEATURES)
    assert np.array_equal(got @ WEIGHT, expected(6, IDS_WITH_SLOTS, FEATURES))


def test_weights_outside_stay_where_they_are() -> None:
    front = embedding()
    tensor = front.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="embedding.onnx.data")
    tensor.external_data.add(key="offset", value="4096")
    graph = joined(front)
    (outside,) = (each for each in graph.graph.initializer if each.external_data)
    assert {each.key: each.value for each in outside.external_data} == {
        "location": "embedding.onnx.data",
        "offset": "4096",
    }
    assert not outside.raw_data


def test_versions_are_the_newer_ones() -> None:
    graph = joined(embedding(opset=17), text(opset=22, ir=10))
    assert graph.ir_version == 10
    assert {each.domain: each.version for each in graph.opset_import}[""] == 22


def test_the_graphs_that_were_given_stay_as_they_are() -> None:
    front, back = embedding(), text()
    before = front.SerializeToString(), back.SerializeToString()
    join(front, back, NAMES, placeholder=PLACEHOLDER, hidden=HIDDEN)
    assert before == (front.SerializeToString(), back.SerializeToString())


def _softmax(opset: int) -> onnx.ModelProto:
    """Softmax at version 13 works along another axis than before."""
    front = embedding(opset=opset)
    front.graph.node.append(node("Softmax", ["text"], ["unused"]))
    return front


def _reduce_max() -> onnx.ModelProto:
    """ReduceMax takes its axes in another way since version 18."""
    return text(opset=13, nodes=(node("ReduceMax", ["inputs_embeds"], ["unused"], axes=[0]),))


def _unknown() -> onnx.ModelProto:
    front = embedding(opset=17)
    front.graph.node.append(node("Surprise", ["text"], ["unused"]))
    return front


def _microsoft(version: int) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", version)]
    front = model(embedding().graph, opset_imports=imports)
    front.graph.node.append(node("Gelu", ["text"], ["unused"], domain="com.microsoft"))
    return front


def _microsoft_text() -> onnx.ModelProto:
    return text(nodes=(node("Gelu", ["inputs_embeds"], ["unused"], domain="com.microsoft"),))


REFUSED: list[tuple[Callable[[], onnx.ModelProto], Callable[[], onnx.ModelProto], str]] = [
    (embedding, lambda: text(mask=None), "where in the sequence"),
    (
        embedding,
        lambda: text(kind=TensorProto.FLOAT16),
        "gives float, the text graph takes float16",
    ),
    (
        embedding,
        lambda: text(hidden=HIDDEN + 1),
        r"text graph's embeddings are \[batch, length, 5\]",
    ),
    (
        lambda: embedding(shape=(1, "n", HIDDEN)),
        text,
        r"features of \[1, n, 4\], not \[tokens, 4\]",
    ),
    (lambda: embedding(shape=("n", 3)), text, "features of"),
    (lambda: embedding(kind=TensorProto.DOUBLE), text, "takes features as double"),
    (lambda: embedding(ids=TensorProto.FLOAT), text, "takes ids as float"),
    (
        lambda: embedding(extra=(value("audio", TensorProto.FLOAT, 1),)),
        text,
        "embedding graph also takes audio",
    ),
    (lambda: embedding(names=Names(image_features="x")), text, "takes no image_features"),
    (lambda: embedding(names=Names(inputs_embeds="x")), text, "gives no inputs_embeds"),
    (embedding, lambda: text(names=Names(text_embeds="x")), "text graph takes no inputs_embeds"),
    (embedding, lambda: text(weight="input_ids"), "a value of its own called input_ids"),
    (embedding, lambda: text(weight="image_features"), "a value of its own called image_features"),
    (
        lambda: _softmax(12),
        lambda: text(opset=17),
        r"versions 12 and 17 of ONNX's.*Softmax changed",
    ),
    (lambda: embedding(opset=22), _reduce_max, "versions 22 and 13.*ReduceMax changed"),
    (_unknown, lambda: text(opset=18), "Surprise changed"),
    (lambda: _microsoft(2), _microsoft_text, "versions 2 and 1 of com.microsoft's.*Gelu changed"),
    (lambda: embedding(opset=12), lambda: text(opset=12), "the oldest that can be joined is 13"),
]


@pytest.mark.parametrize(("front", "back", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused(
    front: Callable[[], onnx.ModelProto], back: Callable[[], onnx.ModelProto], says: str
) -> None:
    with pytest.raises(CannotJoin, match=says):
        join(front(), back(), NAMES, placeholder=PLACEHOLDER, hidden=HIDDEN)


def test_a_graph_that_reads_what_nothing_gives_is_refused() -> None:
    front = embedding()
    front.graph.node.append(node("Neg", ["nowhere"], ["unused"]))
    with pytest.raises(CannotJoin, match=r"Neg reads edged\.embedding\.nowhere"):
        joined(front)


def test_the_type_of_the_features_is_told() -> None:
    assert features_type(embedding(), "image_features") == "float32"
    assert features_type(embedding(kind=TensorProto.FLOAT16), "image_features") == "float16"
