"""From trained weights to a model's folder, laid out as Phi-3.5-vision's.

The text part goes through onnxruntime-genai's own builder, as a real model's does. The graphs of
frames and of the embedding are written here, with the inputs and outputs of the published ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

from edged.selftest.training.network import CROP, NAMES, SEEN, SIDE, WHERE, Decoder, Encoder
from edged.selftest.training.vocabulary import Vocabulary

OPSET = 17
VISION, EMBEDDING, TEXT = "vision.onnx", "embedding.onnx", "model.onnx"
#: As `processor_config.json` of the published folders, with this model's own numbers.
_PROCESSOR = {
    "processor": {
        "name": "phi_3_image",
        "transforms": [
            {
                "operation": {
                    "name": "decode_image",
                    "type": "DecodeImage",
                    "attrs": {"color_space": "BGR"},
                }
            },
            {"operation": {"name": "convert_to_rgb", "type": "ConvertRGB"}},
            {
                "operation": {
                    "name": "phi3_image_transform",
                    "type": "Phi3ImageTransform",
                    "attrs": {"num_crops": 1, "num_img_tokens": SIDE * SIDE, "image_size": CROP},
                }
            },
        ],
    }
}


class _Graph:
    """Nodes and weights of a graph, as they are put together."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, name: str, value: NDArray[Any]) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def save(self, path: Path, inputs: list[Any], outputs: list[Any]) -> None:
        """Write it as published: its weights in a file beside it."""
        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.weights)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=8,
            producer_name="edged",
        )
        onnx.checker.check_model(model)
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=512,
        )
        path.with_name(f"{path.name}.data").chmod(0o644)


def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().numpy()


def _convolution(graph: _Graph, source: str, name: str, part: Any, *, bend: bool = True) -> str:
    """Add a convolution with its norm folded into it."""
    conv, norm = part[0], part[1]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    kernel = graph.weight(f"{name}.weight", _array(conv.weight * scale[:, None, None, None]))
    bias = graph.weight(f"{name}.bias", _array(norm.bias - norm.running_mean * scale))
    out = graph.add(
        "Conv", [source, kernel, bias], f"{name}.conv",
        strides=list(conv.stride), pads=[1, 1, 1, 1], kernel_shape=[3, 3],
    )  # fmt: skip
    return graph.add("Relu", [out], f"{name}.out") if bend else out


def write_vision(path: Path, encoder: Encoder) -> None:
    """Write the graph of frames: pixel_values [frames, 2, 3, CROP, CROP] to their tokens."""
    graph = _Graph()
    hidden = encoder.glb_gn.shape[-1]
    channels = encoder.detector.in_features
    flat = graph.weight("flat", np.array([-1, 3, CROP, CROP], np.int64))
    x = graph.add("Reshape", ["pixel_values", flat], "views")
    for stage, net in (("fine", encoder.fine), ("coarse", encoder.coarse)):
        for number, part in enumerate(net):
            name = f"{stage}.{number}"
            if hasattr(part, "second"):
                inside = _convolution(graph, x, f"{name}.first", part.first)
                inside = _convolution(graph, inside, f"{name}.second", part.second, bend=False)
                x = graph.add("Relu", [graph.add("Add", [x, inside], f"{name}.sum")], f"{name}.out")
            else:
                x = _convolution(graph, x, name, part)
    shape = graph.weight("cells.shape", np.array([-1, 2, channels, SIDE * SIDE], np.int64))
    x = graph.add("Reshape", [x, shape], "cells.first")
    x = graph.add("Transpose", [x], "cells", perm=[0, 1, 3, 2])
    weight = graph.weight("detector.weight", _array(encoder.detector.weight).T)
    bias = graph.weight("detector.bias", _array(encoder.detector.bias))
    x = graph.add("Add", [graph.add("MatMul", [x, weight], "seen.product"), bias], "seen")
    sizes = graph.weight("seen.sizes", np.array([NAMES, SEEN - NAMES], np.int64))
    graph.nodes.append(helper.make_node("Split", [x, sizes], ["names", "offsets"], axis=3))
    likely = graph.add("Sigmoid", ["names"], "likely")
    most = graph.add("ReduceMax", [likely], "most", axes=[3], keepdims=1)
    loud = graph.add("Mul", [most, graph.weight("loud", np.array(WHERE, np.float32))], "loudness")
    where = graph.add("Mul", ["offsets", loud], "where")
    graph.add("Concat", [likely, where], "told", axis=3)
    one = graph.weight("one", np.array([1], np.int64))
    count = graph.add("Shape", ["pixel_values"], "frames", start=0, end=1)
    grid = graph.weight("grid", np.array([-1, SIDE, SIDE, hidden], np.int64))
    lines = graph.weight("lines", np.array([0, SIDE * (SIDE + 1), hidden], np.int64))
    side, width = (
        graph.weight(n, np.array([v], np.int64)) for n, v in (("side", SIDE), ("hidden", hidden))
    )
    ends_shape = graph.add("Concat", [count, side, one, width], "ends.shape", axis=0)
    sub = graph.weight("sub_GN", _array(encoder.sub_gn)[None])
    ends = graph.add("Expand", [sub, ends_shape], "ends")
    views = []
    for name, view, index in (("local", 1, 0), ("global", 0, 1)):
        which = graph.weight(f"{name}.view", np.array(view, np.int64))
        y = graph.add("Gather", ["told", which], f"{name}.told", axis=1)
        table = graph.weight(f"{name}.table", _array(encoder.table[index]))
        y = graph.add("MatMul", [y, table], f"{name}.cells")
        y = graph.add("Reshape", [y, grid], f"{name}.cells.grid")
        place = graph.weight(f"{name}.place", _array(encoder.place[index])[None])
        y = graph.add("Add", [y, place], f"{name}.grid")
        y = graph.add("Concat", [y, ends], f"{name}.rows", axis=2)
        views.append(graph.add("Reshape", [y, lines], f"{name}.tokens"))
    between_shape = graph.add("Concat", [count, one, width], "between.shape", axis=0)
    glb = graph.weight("glb_GN", _array(encoder.glb_gn)[None])
    between = graph.add("Expand", [glb, between_shape], "between")
    x = graph.add("Concat", [views[0], between, views[1]], "tokens", axis=1)
    rest = graph.weight("rest", np.array([-1, hidden], np.int64))
    graph.add("Reshape", [x, rest], "image_features")
    real = TensorProto.FLOAT
    graph.save(
        path,
        [
            helper.make_tensor_value_info("pixel_values", real, ["num_images", 2, 3, CROP, CROP]),
            helper.make_tensor_value_info("image_sizes", TensorProto.INT64, ["num_images", 2]),
        ],
        [helper.make_tensor_value_info("image_features", real, ["num_image_tokens", hidden])],
    )


def write_embedding(path: Path, table: NDArray[Any]) -> None:
    """Write the embedding graph: in input_ids, ids below 0 are the places of image features.

    Args:
        path: of the graph.
        table: [ids, hidden], in the number type of the graph.
    """
    rows, hidden = table.shape
    kind = helper.np_dtype_to_tensor_dtype(table.dtype)
    graph = _Graph()
    graph.weight("embed_tokens.weight", table)
    graph.weight("lowest", np.array(0, np.int64))
    graph.weight("highest", np.array(rows - 1, np.int64))
    graph.weight("far", np.array(-1_000_000_000, np.int64))
    graph.add("Clip", ["input_ids", "lowest", "highest"], "ids")
    graph.add("Gather", ["embed_tokens.weight", "ids"], "text")
    graph.add("Less", ["input_ids", "lowest"], "below")
    graph.add("Greater", ["input_ids", "far"], "near")
    graph.add("And", ["below", "near"], "is_image")
    graph.add("NonZero", ["is_image"], "places")
    graph.add("Transpose", ["places"], "places.rows", perm=[1, 0])
    graph.add("ScatterND", ["text", "places.rows", "image_features"], "inputs_embeds")
    graph.save(
        path,
        [
            helper.make_tensor_value_info(
                "input_ids", TensorProto.INT64, ["batch_size", "sequence_length"]
            ),
            helper.make_tensor_value_info("image_features", kind, ["num_image_tokens", hidden]),
        ],
        [
            helper.make_tensor_value_info(
                "inputs_embeds", kind, ["batch_size", "sequence_length", hidden]
            )
        ],
    )


def write(folder: Path, files: dict[str, Any]) -> None:
    """Write JSON objects and texts, always in the same way."""
    for name, content in files.items():
        text = content
        if not isinstance(text, str):
            text = json.dumps(text, ensure_ascii=False, indent=1)
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def build(
    source: Path,
    out: Path,
    vocabulary: Vocabulary,
    *options: str,
    provider: str = "cpu",
    filename: str = TEXT,
    precision: str = "int4",
) -> None:
    """Run the official builder on a Hugging Face folder, then put the tokenizer's files back.

    Raises:
        RuntimeError: it fails; with the end of what it said.
    """
    if precision == "int4":
        options = ("int4_block_size=32", "int4_accuracy_level=4", *options)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
            *("-i", str(source), "-o", str(out), "-c", str(out / "cache")),
            *("-p", precision, "-e", provider),
            *("--extra_options", f"filename={filename}", *options),
        ],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"},
    )
    if ran.returncode:
        raise RuntimeError(f"the model builder ended with {ran.returncode}: {ran.stderr[-4000:]}")
    keep = {filename, f"{filename}.data", "genai_config.json"}
    for path in out.iterdir():
        if path.is_file() and path.name not in keep:
            path.unlink()
    write(out, vocabulary.files)
    write(out, {"genai_config.json": json.loads((out / "genai_config.json").read_text("utf-8"))})


def sees(config: dict[str, Any], *, vision: str = VISION, embedding: str = EMBEDDING) -> None:
    """Make a text model's configuration that of a vision model of Phi-3.5-vision's kind."""
    model = config["model"]
    model["type"] = "phi3v"
    model["embedding"] = {
        "filename": embedding,
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    model["vision"] = {
        "filename": vision,
        "inputs": {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
        "outputs": {"image_features": "image_features"},
    }


def save_text(source: Path, decoder: Decoder, vocabulary: Vocabulary) -> None:
    """Write the decoder as a Hugging Face folder of Phi-3's, which the builder takes."""
    shape, end = decoder.shape, vocabulary.ids["<|endoftext|>"]
    config = Phi3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        bos_token_id=vocabulary.ids["<s>"],
        eos_token_id=end,
        pad_token_id=end,
        sliding_window=None,  # with a window the builder makes a cache that refuses longer prompts
        tie_word_embeddings=False,
        attention_dropout=0.0,
    )
    model = Phi3ForCausalLM(config).to(torch.float32)
    model.load_state_dict(decoder.state_dict())
    stops = ("<|endoftext|>", "<|assistant|>", "<|end|>")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[vocabulary.ids[stop] for stop in stops],
        pad_token_id=end,
    )
    model.save_pretrained(source)
    write(source, vocabulary.files)


def export(
    out: Path,
    work: Path,
    encoder: Encoder,
    decoder: Decoder,
    vocabulary: Vocabulary,
    precision: str = "int4",
) -> None:
    """Write the model's folder, unfused.

    Args:
        out: the folder, empty.
        work: for what is needed on the way.
        encoder: trained.
        decoder: trained.
        vocabulary: of the decoder.
        precision: of its matrices, as the builder calls it.
    """
    source = work / "hf"
    source.mkdir()
    save_text(source, decoder, vocabulary)
    build(source, out, vocabulary, "exclude_embeds=true", precision=precision)
    encoder.eval()
    write_vision(out / VISION, encoder)
    write_embedding(out / EMBEDDING, _array(decoder.model.embed_tokens.weight))
    config = json.loads((out / "genai_config.json").read_text("utf-8"))
    sees(config)
    write(out, {"genai_config.json": config, "processor_config.json": _PROCESSOR})
