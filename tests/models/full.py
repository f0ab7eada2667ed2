"""Makes a vision model of Phi-3.5-vision's size with random weights, for `make bench-full`.

Speed and memory do not depend on the values of the weights, so this stands in for the real model
where nobody looks at the answers. The folder is laid out as the published one: an embedding graph,
a text graph (3.8 B parameters, INT4, by the official builder) and a vision graph (CLIP ViT-L/14 for
336 pixels without its last layer, which Phi-3.5-vision does not use, then its merge of patches and
its projection), each with its weights in a file beside it. All but the text graph is fp32; the
published vision graph for CPUs is quantised (0.45 GB, here 1.26 GB). The tokenizer is that of the
small models: 1211 of the 32064 ids have a text, and no other is ever the likeliest.

    python3 -m venv /tmp/models
    /tmp/models/bin/pip install torch==2.13.0 transformers==5.23.0 \
        onnx==1.23.2 onnx-ir==1.1.0 onnxruntime-genai==0.18.0
    PYTHONPATH=. /tmp/models/bin/python tests/models/full.py OUT

It takes 6 minutes on two cores, and while it works 24 GB of memory (mapped files among them; at
least 17 GB must be free) and 11 GB of disk; 4.0 GB stay. Then `edged models fuse OUT`, which takes
a minute and 1.4 GB of memory, and `make bench-full MODEL=OUT`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import make
import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from transformers import GenerationConfig, Phi3Config

#: Of the text part.
HIDDEN, INNER, LAYERS, HEADS, VOCABULARY, CONTEXT = 3072, 8192, 32, 32, 32064, 8192
#: Of the vision part: CLIP ViT-L/14-336. Its features are taken before the last of its 24 layers.
SEEN, SEEN_INNER, SEEN_LAYERS, SEEN_HEADS, CROP, PATCH = 1024, 4096, 23, 16, 336, 14
#: Patches a side of a crop, and tokens: 2 x 2 patches are one.
GRID, SIDE = CROP // PATCH, CROP // PATCH // 2
#: Small, as in a model before its training: nothing overflows.
STD = 0.02
#: Weights begin at multiples of this many bytes, so that they can be mapped.
PAGE = 65536
PARTS = make.Parts(
    vision="vision.onnx", embedding="embedding.onnx", text="model.onnx", half=False, provider="cpu"
)

Array = np.ndarray


# Text -------------------------------------------------------------------------------------------


def text_weights(hf: Path, vocabulary: make.Vocabulary) -> torch.Tensor:
    """Write a Hugging Face folder, a layer a file; return the table of embeddings."""
    ids = vocabulary.ids
    end = ids["<|endoftext|>"]
    Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        original_max_position_embeddings=CONTEXT,
        bos_token_id=ids["<s>"],
        eos_token_id=end,
        pad_token_id=end,
        sliding_window=None,
        tie_word_embeddings=False,
        architectures=["Phi3ForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(hf)
    stops = [ids[name] for name in ("<|endoftext|>", "<|assistant|>", "<|end|>")]
    GenerationConfig(bos_token_id=ids["<s>"], eos_token_id=stops, pad_token_id=end).save_pretrained(
        hf
    )
    make.write(hf, vocabulary.files)

    generator = torch.Generator().manual_seed(make.SEED)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * STD).to(torch.bfloat16)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    places: dict[str, str] = {}
    total = 0

    def put(file: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, hf / file, metadata={"format": "pt"})
        for name, tensor in tensors.items():
            places[name] = file
            total += tensor.numel() * tensor.element_size()

    table, head = normal(VOCABULARY, HIDDEN), normal(VOCABULARY, HIDDEN)
    # only a piece of text can be the likeliest: no answer ends early, and each token can be read
    silent = [number for text, number in ids.items() if text in vocabulary.bytes]
    head[silent] = 0
    head[[ids[control.text] for control in make.PHI3_HEAD]] = 0
    head[vocabulary.controls :] = 0
    put(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": table,
            "lm_head.weight": head,
            "model.norm.weight": ones.clone(),
        },
    )
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        put(
            f"layer{layer:02}.safetensors",
            {
                f"{name}.self_attn.qkv_proj.weight": normal(3 * HIDDEN, HIDDEN),
                f"{name}.self_attn.o_proj.weight": normal(HIDDEN, HIDDEN),
                f"{name}.mlp.gate_up_proj.weight": normal(2 * INNER, HIDDEN),
                f"{name}.mlp.down_proj.weight": normal(HIDDEN, INNER),
                f"{name}.input_layernorm.weight": ones.clone(),
                f"{name}.post_attention_layernorm.weight": ones.clone(),
            },
        )
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    return table


# Vision -----------------------------------------------------------------------------------------


class Weights:
    """A file of weights beside a graph, written as they are made: they need no memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._random = np.random.default_rng(make.SEED)
        self.tensors: list[TensorProto] = []

    def put(self, name: str, values: Array) -> str:
        """Add a tensor; return its name."""
        if values.nbytes < 1024:
            self.tensors.append(numpy_helper.from_array(values, name))
            return name
        self._file.write(bytes(-self._file.tell() % PAGE))
        tensor = TensorProto(
            name=name,
            dims=values.shape,
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": self._path.name, "offset": self._file.tell(), "length": values.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        self._file.write(values.tobytes())
        self.tensors.append(tensor)
        return name

    def normal(self, name: str, *shape: int) -> str:
        """Add random numbers."""
        return self.put(name, self._random.standard_normal(shape, np.float32) * np.float32(STD))

    def ones(self, name: str, *shape: int) -> str:
        """Add ones."""
        return self.put(name, np.ones(shape, np.float32))

    def close(self) -> None:
        """Write the last of it."""
        self._file.close()


def vision(out: Path) -> None:
    """Write the vision graph; it takes and gives what `make.make_vision`'s takes and gives."""
    weights = Weights(out / f"{PARTS.vision}.data")
    whole = {
        "zero": [0], "one": [1], "crop": [CROP], "side": [SIDE], "merged": [4 * SEEN],
        "flat": [-1, 3, CROP, CROP], "patches": [0, SEEN, GRID * GRID], "width": [SEEN],
        "last": [np.iinfo(np.int64).max], "tokens": [-1, 4 * SEEN],
        "pairs": [-1, SIDE, 2, SIDE, 2, SEEN], "by_crop": [SIDE * SIDE, 4 * SEEN],
        "global_shape": [SIDE, SIDE, 4 * SEEN],
    }  # fmt: skip
    for name, values in whole.items():
        weights.put(name, np.array(values, np.int64))
    weights.put("first", np.array(0, np.int64))
    weights.put("always", np.array(True))
    weights.put("nothing", np.zeros((0, 4 * SEEN), np.float32))
    nodes = [*_encoder(weights), *_merge(weights), *_projection(weights)]
    graph = helper.make_graph(
        nodes,
        "vision",
        [
            helper.make_tensor_value_info(
                "pixel_values",
                TensorProto.FLOAT,
                ["num_images", "max_num_crops", 3, "height", "width"],
            ),
            helper.make_tensor_value_info("image_sizes", TensorProto.INT64, ["num_images", 2]),
        ],
        [
            helper.make_tensor_value_info(
                "image_features", TensorProto.FLOAT, ["num_image_tokens", HIDDEN]
            )
        ],
        weights.tensors,
    )
    weights.close()
    sets = [helper.make_opsetid("", make.OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=8, producer_name="edged")
    (out / PARTS.vision).write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(out / PARTS.vision))


def _encoder(weights: Weights) -> list[onnx.NodeProto]:
    """Return the nodes from `pixel_values` to `seen`, [crops, patches, width], fused as published.

    The published graphs went through onnxruntime's optimizer for CLIP: one operator for a layer's
    attention, with the weights of queries, keys and values in one.
    """
    node = helper.make_node
    nodes = [
        node("Reshape", ["pixel_values", "flat"], ["pixels"]),
        node(
            "Conv",
            ["pixels", weights.normal("patch.weight", SEEN, 3, PATCH, PATCH)],
            ["patch.out"],
            strides=[PATCH, PATCH],
        ),
        node("Reshape", ["patch.out", "patches"], ["patch.flat"]),
        node("Transpose", ["patch.flat"], ["patch.rows"], perm=[0, 2, 1]),
        node("Shape", ["patch.rows"], ["crops.count"], start=0, end=1),
        node("Concat", ["crops.count", "one", "width"], ["class.shape"], axis=0),
        node("Expand", [weights.normal("class", 1, 1, SEEN), "class.shape"], ["class.rows"]),
        node("Concat", ["class.rows", "patch.rows"], ["embedded"], axis=1),
        node("Add", ["embedded", weights.normal("position", 1, GRID * GRID + 1, SEEN)], ["placed"]),
    ]

    def norm(name: str, of: str) -> str:
        scale = weights.ones(f"{name}.scale", SEEN)
        bias = weights.normal(f"{name}.bias", SEEN)
        nodes.append(node("LayerNormalization", [of, scale, bias], [name], axis=-1, epsilon=1e-5))
        return name

    def linear(name: str, of: str, rows: int, columns: int) -> str:
        weight = weights.normal(f"{name}.weight", rows, columns)
        nodes.append(node("MatMul", [of, weight], [f"{name}.product"]))
        bias = weights.normal(f"{name}.bias", columns)
        nodes.append(node("Add", [f"{name}.product", bias], [name]))
        return name

    def add(name: str, left: str, right: str) -> str:
        nodes.append(node("Add", [left, right], [name]))
        return name

    hidden = norm("norm", "placed")
    for layer in range(SEEN_LAYERS):
        name = f"layers.{layer}"
        packed = [
            norm(f"{name}.norm1", hidden),
            weights.normal(f"{name}.qkv.weight", SEEN, 3 * SEEN),
            weights.normal(f"{name}.qkv.bias", 3 * SEEN),
        ]
        nodes.append(
            node(
                "Attention", packed, [f"{name}.attention"], domain="com.microsoft",
                num_heads=SEEN_HEADS,
            )
        )  # fmt: skip
        looked = linear(f"{name}.out", f"{name}.attention", SEEN, SEEN)
        hidden = add(f"{name}.looked", hidden, looked)
        inner = linear(f"{name}.up", norm(f"{name}.norm2", hidden), SEEN, SEEN_INNER)
        nodes.append(
            node("QuickGelu", [inner], [f"{name}.act"], domain="com.microsoft", alpha=1.702)
        )
        down = linear(f"{name}.down", f"{name}.act", SEEN_INNER, SEEN)
        hidden = add(f"{name}.result", hidden, down)
    nodes.append(node("Slice", [hidden, "one", "last", "one"], ["seen"]))
    return nodes


def _merge(weights: Weights) -> list[onnx.NodeProto]:
    """Return the nodes from `seen` to `merged_tokens`, [tokens, 4 * width].

    2 x 2 patches become a token. Those of a frame's crops stand in the rows of the whole picture,
    each row ended by a separator; then come another separator and the global view, likewise.
    """
    node = helper.make_node
    weights.normal("sub_GN", 1, 1, 4 * SEEN)
    weights.normal("glb_GN", 1, 4 * SEEN)

    def separated(grid: str, name: str, count: str) -> list[onnx.NodeProto]:
        return [
            node("Concat", [count, "one", "merged"], [f"{name}.many"], axis=0),
            node("Expand", ["sub_GN", f"{name}.many"], [f"{name}.ends"]),
            node("Concat", [grid, f"{name}.ends"], [f"{name}.grid"], axis=1),
            node("Reshape", [f"{name}.grid", "tokens"], [f"{name}.tokens"]),
        ]

    frame = helper.make_graph(
        [
            node("Gather", ["by_frame", "frame"], ["all"], axis=0),  # [crops + 1, tokens, merged]
            node("Gather", ["image_sizes", "frame"], ["size"], axis=0),
            node("Div", ["size", "crop"], ["cut"]),
            node("Gather", ["cut", "zero"], ["rows"], axis=0),
            node("Gather", ["cut", "one"], ["columns"], axis=0),
            node("Mul", ["rows", "columns"], ["crops"]),
            node("Add", ["crops", "one"], ["end"]),
            node("Slice", ["all", "one", "end", "zero"], ["local"]),
            node("Concat", ["rows", "columns", "side", "side", "merged"], ["split"], axis=0),
            node("Reshape", ["local", "split"], ["local.crops"]),
            node("Transpose", ["local.crops"], ["local.lines"], perm=[0, 2, 1, 3, 4]),
            node("Mul", ["rows", "side"], ["lines"]),
            node("Mul", ["columns", "side"], ["across"]),
            node("Concat", ["lines", "across", "merged"], ["picture"], axis=0),
            node("Reshape", ["local.lines", "picture"], ["local.picture"]),
            *separated("local.picture", "local.out", "lines"),
            node("Gather", ["all", "first"], ["global"], axis=0),
            node("Reshape", ["global", "global_shape"], ["global.picture"]),
            *separated("global.picture", "global.out", "side"),
            node(
                "Concat",
                ["before", "local.out.tokens", "glb_GN", "global.out.tokens"],
                ["after"],
                axis=0,
            ),
            node("Identity", ["go_on"], ["goes_on"]),
        ],
        "frame",
        [
            helper.make_tensor_value_info("frame", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", TensorProto.FLOAT, [None, 4 * SEEN]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", TensorProto.FLOAT, [None, 4 * SEEN]),
        ],
    )
    return [
        node("Reshape", ["seen", "pairs"], ["paired"]),
        node("Transpose", ["paired"], ["paired.together"], perm=[0, 1, 3, 2, 4, 5]),
        node("Shape", ["pixel_values"], ["frames_and_crops"], start=0, end=2),
        node("Concat", ["frames_and_crops", "by_crop"], ["by_frame.shape"], axis=0),
        node("Reshape", ["paired.together", "by_frame.shape"], ["by_frame"]),
        node("Shape", ["image_sizes"], ["frames"], start=0, end=1),
        node("Squeeze", ["frames"], ["frames.count"]),
        node("Loop", ["frames.count", "always", "nothing"], ["merged_tokens"], body=frame),
    ]


def _projection(weights: Weights) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("MatMul", ["merged_tokens", weights.normal("project.0", 4 * SEEN, HIDDEN)], ["p0"]),
        node("Add", ["p0", weights.normal("project.0.bias", HIDDEN)], ["p1"]),
        node("Gelu", ["p1"], ["p2"], domain="com.microsoft"),
        node("MatMul", ["p2", weights.normal("project.2", HIDDEN, HIDDEN)], ["p3"]),
        node("Add", ["p3", weights.normal("project.2.bias", HIDDEN)], ["image_features"]),
    ]


# The folder -------------------------------------------------------------------------------------


def embedding(table: torch.Tensor, out: Path, scratch: Path) -> None:
    """Write the embedding graph, the same as the small model's."""
    scratch.mkdir()
    name = "model.embed_tokens.weight"
    save_file({name: table.to(torch.float32)}, scratch / "model.safetensors")
    make.make_embedding(scratch, out, PARTS)


def main() -> None:
    """Make the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {what}", flush=True)

    vocabulary = make.phi3_vocabulary(make.corpus(), 1200)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-") as name:
        scratch = Path(name)
        hf = scratch / "hf"
        hf.mkdir()
        say("weights")
        table = text_weights(hf, vocabulary)
        say("embedding graph")
        embedding(table, out, scratch / "table")
        del table
        say("text graph, by the official builder")
        built = scratch / "built"
        options = "int4_block_size=32 int4_accuracy_level=4 exclude_embeds=true"
        subprocess.run(
            [
                *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
                *("-i", str(hf), "-o", str(built), "-c", str(scratch / "cache")),
                *("-p", "int4", "-e", "cpu", "--extra_options", *options.split()),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for each in (PARTS.text, f"{PARTS.text}.data", "genai_config.json"):
            shutil.move(built / each, out / each)
    say("vision graph")
    vision(out)
    config = json.loads((out / "genai_config.json").read_text("utf-8"))
    config["model"] |= {
        "type": "phi3v",
        "embedding": {
            "filename": PARTS.embedding,
            "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
            "outputs": {"inputs_embeds": "inputs_embeds"},
        },
        "vision": {
            "filename": PARTS.vision,
            "inputs": {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
            "outputs": {"image_features": "image_features"},
        },
    }
    make.write(out, vocabulary.files)
    make.write(out, {"genai_config.json": config, "processor_config.json": make.PROCESSOR})
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"{out}: {size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
