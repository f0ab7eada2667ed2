from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

import edged
from edged import cli
from edged.check import check_model
from edged.engine import loading
from edged.findings import Status
from edged.models import fuse as fusing
from edged.models import join
from edged.models.folder import ModelError, fingerprint, inspect
from edged.models.fuse import FuseError, fuse
from edged.models.record import FUSED_GRAPH, FUSED_RECORD, digest
from edged.options import Model
from edged.settings import Settings
from tests.kit.vision import STOCK, STOCK_FP16, fused_folder, stock_copy

PHI3 = Path(__file__).resolve().parents[2] / "models" / "phi3"

Edit = Callable[[Any], object]


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    return stock_copy(tmp_path)


@pytest.fixture
def fused(tmp_path: Path, vision_folder: Path) -> Path:
    """A fused folder of the test's own."""
    return Path(shutil.copytree(vision_folder, tmp_path / "fused"))


def change(folder: Path, name: str, edit: Edit) -> None:
    path = folder / name
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def change_graph(folder: Path, name: str, edit: Edit) -> None:
    model = onnx.load(folder / name, load_external_data=False)
    edit(model)
    (folder / name).write_bytes(model.SerializeToString())


def attributes(config: Any) -> Any:
    return config["processor"]["transforms"][2]["operation"]["attrs"]


def contents(folder: Path) -> dict[str, tuple[int, int, str]]:
    """All that a second run must leave as it is."""
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino, digest(path))
        for path in folder.iterdir()
    }


def why_not(folder: Path, *, verify: bool = True) -> str:
    """Why a folder is not fused; it says what to run, always."""
    found = inspect(folder, verify=verify)
    assert found.fused is None
    assert found.unfused is not None
    why, run, path = found.unfused.partition("; run: edged models fuse ")
    assert run
    assert path == str(folder)
    return why


# What is written


@pytest.mark.parametrize("source", [STOCK, STOCK_FP16], ids=["fp32", "fp16"])
def test_a_stock_folder_is_fused(source: Path, tmp_path: Path) -> None:
    folder = stock_copy(tmp_path, source)
    before = contents(folder)
    assert why_not(folder) == "not fused"
    done = fuse(folder)
    assert done.changed
    assert done.compared > 0
    found = inspect(folder)
    assert found.unfused is None
    assert found.fused == done.fused
    ids = json.loads((folder / "tokenizer.json").read_text())
    taken = {*ids["model"]["vocab"].values(), *(each["id"] for each in ids["added_tokens"])}
    assert done.fused.placeholder not in taken
    assert done.fused.placeholder < found.vocab_size
    assert done.fused.features == ("float16" if source is STOCK_FP16 else "float32")
    assert done.fused.geometry.as_dict() == {
        "crop": 336,
        "tokens_a_side": 12,
        "max_crops": 16,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    }
    after = contents(folder)
    assert after.keys() - before.keys() == {FUSED_GRAPH, FUSED_RECORD}
    assert {name: after[name] for name in before} == before
    weights = sum(path.stat().st_size for path in folder.glob("*.onnx.data"))
    assert done.graph.stat().st_size < min(weights, 100_000)


def test_the_record_tells_what_the_graph_was_made_from(fused: Path) -> None:
    record = json.loads((fused / FUSED_RECORD).read_text())
    assert record["v"] == 1
    assert record["edged"] == edged.__version__
    assert record["graph"] == FUSED_GRAPH
    assert record["graph_sha256"] == digest(fused / FUSED_GRAPH)
    graphs = ["embedding.onnx", "model.onnx", "vision.onnx"]
    files = {*graphs, *(f"{name}.data" for name in graphs), "processor_config.json"}
    assert record["sources"] == {
        name: {"size": (fused / name).stat().st_size, "sha256": digest(fused / name)}
        for name in files
    }


def test_no_weight_is_read_into_the_fused_graph(fused: Path) -> None:
    def outside(name: str) -> dict[str, list[str]]:
        graph = onnx.load(fused / name, load_external_data=False).graph
        return {
            each.name.removeprefix("edged.embedding."): sorted(e.value for e in each.external_data)
            for each in graph.initializer
            if each.data_location == TensorProto.EXTERNAL
        }

    assert outside(FUSED_GRAPH) == outside("embedding.onnx") | outside("model.onnx")


def test_a_second_run_changes_nothing(fused: Path) -> None:
    before = contents(fused)
    assert not fuse(fused).changed
    assert contents(fused) == before


def test_two_folders_alike_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = (fused_folder(tmp_path / name) for name in "ab")
    for name in (FUSED_GRAPH, FUSED_RECORD):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o600])
def test_who_may_read_the_model_may_read_the_fused_graph(stock: Path, mode: int) -> None:
    (stock / "embedding.onnx").chmod(mode)
    fuse(stock)
    for name in (FUSED_GRAPH, FUSED_RECORD):
        assert stat.S_IMODE((stock / name).stat().st_mode) == mode


def test_the_overlay_loads_the_fused_graph_and_no_other(fused: Path) -> None:
    found = inspect(fused)
    over = loading.overlay(3, found.fused)["model"]
    assert over["type"] == "phi3"
    assert over["decoder"]["filename"] == FUSED_GRAPH
    assert over["decoder"]["session_options"] == {"intra_op_num_threads": 3}
    assert over["embedding"]["filename"] == over["vision"]["filename"] == ""
    assert loading.overlay(3) == {
        "model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}
    }


def test_what_a_model_is_known_by_changes_when_it_is_fused(stock: Path) -> None:
    before = fingerprint(stock)
    fuse(stock)
    assert fingerprint(stock) != before


# Stale and tampered


@pytest.mark.parametrize(
    ("name", "verify"),
    [
        ("embedding.onnx", False),
        ("model.onnx", False),
        ("vision.onnx", False),
        ("processor_config.json", False),
        ("embedding.onnx.data", True),
        ("model.onnx.data", True),
        ("vision.onnx.data", True),
    ],
)
def test_a_changed_file_makes_it_stale(fused: Path, name: str, verify: bool) -> None:
    """Without a change of size: a large file's contents are only looked at to verify."""
    data = bytearray((fused / name).read_bytes())
    # somewhere that keeps the file readable: white space, a producer's name, a weight
    at = data.index(b"\n ") + 1 if name.endswith(".json") else _harmless(bytes(data))
    data[at] = ord("\n") if name.endswith(".json") else data[at] ^ 1
    (fused / name).write_bytes(data)
    assert why_not(fused, verify=verify) == f"stale: {name} has changed since"
    if verify:
        assert inspect(fused, verify=False).fused is not None
    done = fuse(fused)
    assert done.changed
    assert inspect(fused).fused == done.fused


def _harmless(data: bytes) -> int:
    for name in (b"onnxruntime-genai", b"edged"):
        if name in data[:100]:
            return data.index(name) + 1
    return len(data) - 1


def test_a_large_file_of_another_size_is_seen_at_once(fused: Path) -> None:
    with (fused / "model.onnx.data").open("ab") as file:
        file.write(b"\0")
    assert why_not(fused, verify=False) == "stale: model.onnx.data has changed since"


def test_another_graph_named_by_the_configuration_makes_it_stale(fused: Path) -> None:
    shutil.copy(fused / "vision.onnx", fused / "other.onnx")
    change(fused, "genai_config.json", lambda c: c["model"]["vision"].update(filename="other.onnx"))
    assert why_not(fused) == (
        "stale: the model is made of other files since: other.onnx, vision.onnx"
    )


def test_a_preprocessor_that_comes_later_makes_it_stale(fused: Path) -> None:
    (fused / "preprocessor_config.json").write_text("{}")
    assert "other files since: preprocessor_config.json" in why_not(fused)


def test_a_placeholder_that_a_text_may_have_by_now_is_stale(fused: Path) -> None:
    found = inspect(fused).fused
    assert found is not None
    token = {"id": found.placeholder, "content": "<|new|>"}
    change(fused, "tokenizer.json", lambda t: t["added_tokens"].append(token))
    assert why_not(fused) == f"stale: {found.placeholder} is no id that the model has free"
    again = fuse(fused).fused.placeholder
    assert again != found.placeholder
    change(fused, "genai_config.json", lambda c: c["model"].update(pad_token_id=again))
    assert "is no id that the model has free" in why_not(fused)


def test_the_graph_itself_changed(fused: Path) -> None:
    data = (fused / FUSED_GRAPH).read_bytes()
    (fused / FUSED_GRAPH).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert f"{FUSED_GRAPH} is not the graph that {FUSED_RECORD} tells of" in why_not(fused)
    (fused / FUSED_GRAPH).unlink()
    assert why_not(fused) == f"{FUSED_GRAPH} is missing"
    assert fuse(fused).changed


def _source(key: str, value: object) -> Edit:
    return lambda r: r["sources"]["model.onnx"].update({key: value})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda r: r.update(v=2), "of another version, 2"),
        (lambda r: r.pop("v"), "of another version, None"),
        (lambda r: r.update(more=1), "has not just"),
        (lambda r: r.pop("edged"), "has not just"),
        (lambda r: r.update(graph="../edged-fused.onnx"), "graph must be"),
        (lambda r: r.update(graph="/etc/passwd"), "graph must be"),
        (lambda r: r.update(graph="model.onnx"), "graph must be"),
        (lambda r: r.update(graph=None), "graph must be"),
        (lambda r: r.update(graph_sha256="0" * 64), "is not the graph"),
        (lambda r: r.update(graph_sha256=7), "64 hexadecimal digits"),
        (lambda r: r.update(placeholder=-1), "no id that the model has free"),
        (lambda r: r.update(placeholder=1 << 40), "no id that the model has free"),
        (lambda r: r.update(placeholder=5), "no id that the model has free"),
        (lambda r: r.update(placeholder=True), "placeholder must be a number"),
        (lambda r: r.update(placeholder="5"), "placeholder must be a number"),
        (lambda r: r.update(features="int8"), "features must be"),
        (lambda r: r.update(features=["float32"]), "features must be"),
        (lambda r: r.update(sources=[]), "a size and a sha256"),
        (lambda r: r.update(sources={}), "made of other files since"),
        (lambda r: r["sources"].update({"../x": r["sources"]["model.onnx"]}), "other files since"),
        (lambda r: r["sources"].pop("vision.onnx"), "other files since: vision.onnx"),
        (lambda r: r["sources"].update({"vision.onnx": 1}), "a size and a sha256"),
        (_source("size", 1), "stale: model.onnx has changed"),
        (_source("size", "1"), "size must be a number"),
        (_source("sha256", "F" * 64), "64 hexadecimal digits"),
        (_source("sha256", "0" * 64), "stale: model.onnx has changed"),
        (_source("mtime", 1), "a size and a sha256"),
        (lambda r: r.update(geometry=None), "a geometry has"),
        (lambda r: r["geometry"].update(more=1), "a geometry has"),
        (lambda r: r["geometry"].update(crop=0), "crop is 0"),
        (lambda r: r["geometry"].update(crop=1 << 20), "crop is"),
        (lambda r: r["geometry"].update(crop=336.0), "crop is 336.0"),
        (lambda r: r["geometry"].update(tokens_a_side=0), "tokens_a_side is 0"),
        (lambda r: r["geometry"].update(tokens_a_side=True), "tokens_a_side is True"),
        (lambda r: r["geometry"].update(max_crops=10**9), "max_crops is"),
        (lambda r: r["geometry"].update(mean=[0, 0]), "mean is not a list of three"),
        (lambda r: r["geometry"].update(mean=[0, 0, "0"]), "mean is not a list of three"),
        (lambda r: r["geometry"].update(std=[0, 1, 1]), "std has 0"),
        (lambda r: r["geometry"].update(std=[1, 1, 1e30]), "std has 1e+30"),
    ],
)
def test_a_record_that_edged_did_not_write_counts_for_nothing(
    fused: Path, edit: Edit, says: str
) -> None:
    change(fused, FUSED_RECORD, edit)
    assert says in why_not(fused)


def test_a_spoilt_record_is_made_anew(fused: Path) -> None:
    before = (fused / FUSED_RECORD).read_bytes()
    change(fused, FUSED_RECORD, lambda r: r.update(placeholder=5))
    assert fuse(fused).changed
    assert (fused / FUSED_RECORD).read_bytes() == before


@pytest.mark.parametrize(
    "text", ["", "[]", '{"v": 1, "v": 1}', "[" * 100_000, " " * (1 << 20) + "{}", '{"v": NaN}']
)
def test_a_record_that_is_no_json_object_counts_for_nothing(fused: Path, text: str) -> None:
    (fused / FUSED_RECORD).write_text(text)
    assert FUSED_RECORD in why_not(fused)


def test_a_fused_graph_whose_weights_are_others_counts_for_nothing(
    fused: Path, tmp_path: Path
) -> None:
    def elsewhere(model: Any) -> None:
        tensor = next(each for each in model.graph.initializer if each.external_data)
        next(e for e in tensor.external_data if e.key == "location").value = "../secret"

    change_graph(fused, FUSED_GRAPH, elsewhere)
    change(fused, FUSED_RECORD, lambda r: r.update(graph_sha256=digest(fused / FUSED_GRAPH)))
    assert why_not(fused) == f"{FUSED_GRAPH}: its weights are not the model's"


def test_a_fused_graph_that_is_a_link_is_refused_like_any_other(fused: Path) -> None:
    (fused / FUSED_GRAPH).rename(fused.parent / "elsewhere")
    (fused / FUSED_GRAPH).symlink_to(fused.parent / "elsewhere")
    with pytest.raises(ModelError, match="symbolic link"):
        inspect(fused)


# Geometry


@pytest.mark.parametrize(
    ("attrs", "preprocessor", "wanted"),
    [
        ({}, {}, {}),
        ({"num_crops": 4}, {"num_crops": 4}, {"max_crops": 16}),
        ({"image_mean": [0.5, 0.5, 0.5]}, {}, {"mean": [0.5, 0.5, 0.5]}),
        ({"image_std": [1, 1, 1]}, {"image_std": [2, 2, 2]}, {"std": [1, 1, 1]}),
        ({}, {"image_std": [2, 2, 2]}, {"std": [2, 2, 2]}),
        ({"image_size": 336}, {}, {}),
        ({"crop_size": [336, 336]}, {}, {}),
        ({}, {"crop_size": {"height": 336, "width": 336}}, {}),
    ],
)
def test_geometry_is_what_the_folder_says(
    stock: Path, attrs: dict[str, Any], preprocessor: dict[str, Any], wanted: dict[str, Any]
) -> None:
    change(stock, "processor_config.json", lambda c: attributes(c).update(attrs))
    if preprocessor:
        (stock / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    stated = fuse(stock).fused.geometry.as_dict()
    assert stated == fuse_plain() | wanted


def fuse_plain() -> dict[str, Any]:
    does = fusing.OPERATOR_DOES
    return {
        "crop": does["crop"],
        "tokens_a_side": 12,
        "max_crops": does["max_crops"],
        "mean": does["mean"],
        "std": does["std"],
    }


def _sized(model: Any, crops: int, side: int) -> None:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[1].dim_value, dims[3].dim_value, dims[4].dim_value = crops, side, side


def _of_96_pixels(folder: Path) -> None:
    """Make the vision graph one of 96-pixel crops with 3 tokens a side."""

    def edit(model: Any) -> None:
        for tensor in model.graph.initializer:
            value = numpy_helper.to_array(tensor, str(folder)) if tensor.external_data else None
            small = {"side": [3], "crop": [96], "flat": [-1, 3, 96, 96], "global_shape": [3, 3, 64]}
            if tensor.name in small:
                new = np.array(small[tensor.name], np.int64)
                tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
            elif tensor.name == "patch.weight":
                assert value is not None
                wider = np.pad(value, ((0, 0), (0, 0), (0, 1), (0, 1)))
                tensor.CopyFrom(numpy_helper.from_array(wider, tensor.name))
        for node in model.graph.node:
            if node.op_type == "Conv":
                node.attribute[0].ints[:] = [8, 8]

    change_graph(folder, "vision.onnx", edit)


@pytest.mark.parametrize("by", ["attributes", "shape", "both"])
def test_a_model_may_have_another_geometry(stock: Path, by: str) -> None:
    _of_96_pixels(stock)
    if by != "shape":
        attrs = {"image_size": 96, "num_img_tokens": 9}
        change(stock, "processor_config.json", lambda c: attributes(c).update(attrs))
    else:
        change(stock, "processor_config.json", lambda c: attributes(c).update(num_img_tokens=9))
    if by != "attributes":
        change_graph(stock, "vision.onnx", lambda m: _sized(m, 5, 96))
    geometry = fuse(stock).fused.geometry
    assert (geometry.crop, geometry.tokens_a_side) == (96, 3)
    assert geometry.max_crops == (16 if by == "attributes" else 4)
    assert geometry.tokens(1, 1) == 9 + 9 + 1 + 6


# Refusals


def _steps(*kinds: str) -> Edit:
    steps = [{"operation": {"name": kind, "type": kind}} for kind in kinds]
    return lambda c: c["processor"].update(transforms=steps)


def _all_ids(tokenizer: Any) -> None:
    size = json.loads((STOCK / "genai_config.json").read_text())["model"]["vocab_size"]
    tokenizer["model"]["vocab"] |= {f"extra {n}": n for n in range(size)}


def _processor(edit: Edit) -> Callable[[Path], None]:
    return lambda folder: change(folder, "processor_config.json", edit)


def _config(edit: Edit) -> Callable[[Path], None]:
    return lambda folder: change(folder, "genai_config.json", edit)


def _graph(name: str, edit: Edit) -> Callable[[Path], None]:
    return lambda folder: change_graph(folder, f"{name}.onnx", edit)


def _drop_tokens(model: Any) -> None:
    """Let the vision graph lose a token of each frame."""
    loop = next(node for node in model.graph.node if node.op_type == "Loop")
    body = loop.attribute[0].g
    join = next(node for node in body.node if "glb_GN" in node.input)
    join.input.remove("glb_GN")


def _nothing_but_nan(model: Any) -> None:
    tensor = next(each for each in model.graph.initializer if each.name == "up.bias")
    tensor.CopyFrom(numpy_helper.from_array(np.full(48, np.nan, np.float32), "up.bias"))


def _other_order(model: Any) -> None:
    """Let the embedding graph put images' features where their ids are not."""
    where = next(node for node in model.graph.node if node.op_type == "Less")
    where.op_type = "Greater"


def _renamed_input(model: Any) -> None:
    model.graph.input[1].name = "sizes"


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "vision.onnx").unlink(), "vision.onnx is missing"),
    (lambda f: (f / "embedding.onnx.data").unlink(), "embedding.onnx.data is missing"),
    (lambda f: (f / "processor_config.json").unlink(), "processor_config.json is missing"),
    (lambda f: (f / "processor_config.json").write_text("[]"), "not a JSON object"),
    (lambda f: (f / "vision.onnx").write_text("what"), "not an ONNX graph"),
    (_config(lambda c: c["model"].update(type="phi3")), r"a text model \(phi3\)"),
    (_config(lambda c: c["model"].pop("vision")), "names no vision graph"),
    (_config(lambda c: c["model"].pop("embedding")), "names no embedding graph"),
    (_config(lambda c: c["model"]["decoder"].update(hidden_size=65)), r"not \[tokens, 65\]"),
    (lambda f: change(f, "tokenizer.json", _all_ids), "none is free to stand for an image"),
    (_processor(_steps("DecodeImage", "Phi4VisionProcessor")), "knows Phi3ImageTransform"),
    (_processor(_steps("Phi3ImageTransform", "Normalize")), "knows Phi3ImageTransform"),
    (_processor(lambda c: c.clear()), "prepared by nothing"),
    (_processor(lambda c: attributes(c).update(num_img_tokens=143)), "143 tokens, which is no"),
    (_processor(lambda c: attributes(c).update(num_img_tokens="144")), "which is no square"),
    (_processor(lambda c: attributes(c).update(num_img_tokens=10**30)), "strange way"),
    (_processor(lambda c: attributes(c).update(num_img_tokens=100)), "not 221 tokens of 64"),
    (_processor(lambda c: attributes(c).update(image_size=[336, 448])), "strange way"),
    (_processor(lambda c: attributes(c).update(image_std=[0, 0, 0])), "strange way"),
    (_graph("vision", lambda m: _sized(m, 2, 448)), "cannot run vision.onnx"),
    (_graph("vision", _drop_tokens), r"gives \[312, 64\] for a frame of one crop of 336 pixels"),
    (_graph("vision", _nothing_but_nan), "features that are no numbers"),
    (_graph("vision", _renamed_input), "takes pixel_values, sizes, not pixel_values and image_si"),
    (_graph("embedding", _other_order), "cannot run embedding.onnx"),
    (_graph("model", lambda m: m.graph.input.pop(0)), "where in the sequence"),
]


@pytest.mark.parametrize(("spoil", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_understood_is_refused_and_left_as_it_is(
    stock: Path, spoil: Callable[[Path], object], says: str
) -> None:
    spoil(stock)
    before = contents(stock)
    with pytest.raises(ModelError, match=says) as caught:
        fuse(stock)
    assert caught.value.hint
    assert contents(stock) == before


def test_two_sources_that_contradict_each_other(stock: Path) -> None:
    change_graph(stock, "vision.onnx", lambda m: _sized(m, 17, 336))
    change(stock, "processor_config.json", lambda c: attributes(c).update(image_size=448))
    with pytest.raises(FuseError, match="crops of 336 pixels, but the folder's files say 448"):
        fuse(stock)


def test_a_text_model_has_nothing_to_fuse() -> None:
    with pytest.raises(FuseError, match=r"a text model \(phi3\)"):
        fuse(PHI3)
    found = inspect(PHI3)
    assert (found.fused, found.unfused) == (None, None)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FuseError, match="no such folder"):
        fuse(tmp_path / "absent")


def test_a_front_that_gives_something_else_is_found_out(
    stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that the whole depends on: here the placeholder is another than the record's."""
    real = join.join

    def off_by_one(*args: Any, placeholder: int, hidden: int) -> Any:
        return real(*args, placeholder=placeholder - 1, hidden=hidden)

    monkeypatch.setattr(join, "join", off_by_one)
    with pytest.raises(FuseError, match=r"gives other embeddings than embedding\.onnx"):
        fuse(stock)
    assert why_not(stock) == "not fused"


# Writing


def test_a_folder_that_cannot_be_written(stock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FuseError, match="cannot be written by this user") as caught:
        fuse(stock)
    assert "who owns the folder" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only"), (errno.EACCES, "this user")],
)
def test_a_disk_that_refuses(
    stock: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    before = contents(stock)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FuseError, match=says):
        fuse(stock)
    assert contents(stock) == before


_KILLED = """
import json, os, signal, sys
from edged.models import fuse

def killed(real):
    def call(*args, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    return call

os.fsync, os.replace = killed(os.fsync), killed(os.replace)
statuses = []
for left, folder in enumerate(sys.argv[1:], 1):
    child = os.fork()
    if child == 0:
        fuse.fuse(folder)
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""


def test_killed_at_any_step_it_is_as_unfused_as_before_and_can_be_fused(tmp_path: Path) -> None:
    folders = [stock_copy(tmp_path / str(step)) for step in range(8)]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, *map(str, folders)],
        check=True,
        capture_output=True,
        timeout=60,
    )
    # for the graph and for the record: the file, its name, the folder
    assert json.loads(done.stdout) == [-signal.SIGKILL] * 6 + [0, 0]
    left = 0
    for step, folder in enumerate(folders):
        hidden = {path for path in folder.iterdir() if path.name.startswith(".")}
        left += len(hidden)
        if step < 5:  # then the record has its name
            assert why_not(folder) == "not fused"
        done_again = fuse(folder)
        assert done_again.changed is (step < 5)
        assert inspect(folder).fused == done_again.fused
        assert not any(path.exists() for path in hidden)
    assert left > 0


def test_two_at_a_time_wait_for_each_other(stock: Path) -> None:
    handle = os.open(stock, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    other = subprocess.Popen([sys.executable, "-m", "edged", "models", "fuse", str(stock)])
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.5)
        assert not (stock / FUSED_GRAPH).exists()
        os.close(handle)
        assert other.wait(60) == 0
    finally:
        other.kill()
        other.wait()
    assert not fuse(stock).changed


# The command, and the check


def test_the_command_says_what_it_did(stock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "fuse", str(stock)]) == 0
    said = capsys.readouterr().out
    assert FUSED_GRAPH in said
    assert "313 tokens" in said
    assert cli.main(["models", "fuse", str(stock)]) == 0
    assert "nothing changed" in capsys.readouterr().out


def test_the_command_fails_with_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "fuse", str(PHI3)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 2


@pytest.mark.parametrize("arguments", [["models"], ["models", "fuse"], ["models", "melt", "x"]])
def test_the_command_used_wrongly(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_the_command_without_its_packages(
    stock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "edged.models.fuse")
    monkeypatch.delattr(edged.models, "fuse")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "edged.models.join")
    assert cli.main(["models", "fuse", str(stock)]) == 1
    assert "pip install 'edged[cpu]'" in capsys.readouterr().err


def test_the_check_says_what_to_run(stock: Path, fused: Path) -> None:
    def finding(path: Path) -> Any:
        found = {each.name: each for each in check_model(Settings(model=Model(path=path)))}
        return found.get("vision")

    warned = finding(stock)
    assert warned.status is Status.WARNING
    assert "not fused" in warned.message
    assert warned.remedy == f"edged models fuse {stock}"
    assert finding(fused) is None
