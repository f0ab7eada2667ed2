"""Makes the small models of the tests: real INT4 Phi-3 graphs with random weights.

`tests/models/phi3` has a tokenizer of Phi-3's kind (SentencePiece-style BPE with byte fallback,
control tokens that swallow white space after them), `tests/models/phi4-mini` one of Phi-4-mini's
kind (byte-level BPE) and Phi-4-mini's graph (grouped queries, partial rotary, LongRoPE). Each
folder is made as the official builder makes a real model's folder, and then gets the tokenizer
files as they were published for the real model.

`tests/models/phi3v` and `tests/models/phi3v-fp16` are vision models as they are published for
Phi-3-vision and Phi-3.5-vision: three graphs (embedding, vision, text), the weights outside them,
for the CPU (fp32) and as for CUDA (fp16; onnxruntime's CPU kernels run it too).

It runs in an environment of its own; edged and its tests need neither torch nor transformers:

    python3 -m venv /tmp/models
    /tmp/models/bin/pip install torch==2.13.0 transformers==5.23.0 \
        onnx==1.23.2 onnx-ir==1.1.0 onnxruntime-genai==0.18.0
    PYTHONPATH=. /tmp/models/bin/python tests/models/make.py [--keep DIR] [--check] [--only FOLDER]

`--keep DIR` leaves the Hugging Face folders in DIR; `--check` makes the models somewhere else and
says whether the files in the tree are the same, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edged.selftest.training.vocabulary import (
    PHI3_HEAD,
    Control,
    Vocabulary,
    learn,
    phi3_vocabulary,
)

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[2]
MAX_FOLDER = 2_000_000
SEED = 20_240_423

# --- corpus ---------------------------------------------------------------------------------------

COLOURS = "red orange yellow green blue purple white black grey brown pink silver".split()
SHAPES = "circle square triangle star cross arrow box line ring dot".split()
PLACES = "door gate kitchen hall garage garden cellar workshop street roof stairs window".split()
THINGS = (
    "car truck bicycle person dog cat parcel ladder machine robot pump valve motor lamp".split()
)
SENSORS = "temperature humidity pressure vibration voltage current flow level noise light".split()
UNITS = "degrees percent bar millimetres volts amperes litres metres decibels lux".split()
STATES = "nominal ready degraded starting stopping offline high low stable rising falling".split()
MOVES = "moves stands turns stops waits opens closes enters leaves falls passes appears".split()
WAYS = "left right up down forward back slowly quickly twice again away".split()

SENTENCES = (
    "What do you see in these pictures? Answer in one short sentence.",
    "Describe what happens between the first frame and the last frame.",
    "Is anyone at the door? Answer yes or no, and say why you think so.",
    "The device is an agent on the edge of the network; it answers questions about its cameras.",
    "You are a helpful assistant. You answer briefly, in plain words, and you say what you do not know.",
    "Please tell me which of the readings is out of range and what should be done about it.",
    "There is nothing unusual to report. All of the sensors were read within the last minute.",
    "I can not see that from here, because the picture is too dark and the lamp has been switched off.",
    "How many people have been seen near the machine since this morning, and when was the last one?",
    "The broker was lost and found again, and every message that had been accepted was answered.",
    "The model runs on the processor of a small computer with four cores and eight gigabytes of memory.",
    "Write a summary of the events of the day, with their times, in the order in which they happened.",
    "If the pressure rises above the limit, close the valve, stop the pump and send a warning.",
    "Once upon a time there was a small robot that looked through a window and counted the cars.",
)
FOREIGN = (  # characters outside the alphabet become bytes: that is wanted
    "Die Tür ist offen, und der Motor läuft zu heiß.",
    "La température est élevée à l'entrée du garage.",
    "La cámara del jardín está apagada desde ayer por la mañana.",
    "Дверь закрыта, насос работает.",
    "门开着, 温度正常。 ドアは閉まっています。",
    "البوابة مغلقة",
    "Warning ⚠️ 🔥 at the gate 🚪, all fine 👍 otherwise ✅.",
)


def corpus() -> Iterator[str]:
    """Yield the lines both vocabularies are learned from: reports, questions, JSON, other tongues."""
    pick = random.Random(SEED).choice
    number = random.Random(SEED + 1).randint
    for turn in range(400):
        thing, place, colour = pick(THINGS), pick(PLACES), pick(COLOURS)
        yield f"A {colour} {thing} {pick(MOVES)} {pick(WAYS)} at the {place}."
        yield f"The {colour} {pick(SHAPES)} {pick(MOVES)} from {pick(WAYS)} to {pick(WAYS)}."
        yield f"The {pick(SENSORS)} in the {place} is {pick(STATES)}: {number(0, 99)} {pick(UNITS)}."
        yield f"There are {number(0, 9)} {thing}s near the {place}, and one of them is {colour}."
        reading = {
            "sensor": pick(SENSORS),
            "place": place,
            "value": number(0, 99),
            "unit": pick(UNITS),
        }
        seen = {"answer": pick(("yes", "no")), "colour": colour, "objects": [thing, pick(THINGS)]}
        yield json.dumps(reading)
        yield json.dumps(seen, indent=2)
        yield json.dumps(
            {"text": f"the {thing} is {colour}", "ok": pick((True, False)), "why": None}
        )
        yield SENTENCES[turn % len(SENTENCES)]
        if turn % 8 == 0:
            yield FOREIGN[turn // 8 % len(FOREIGN)]


# --- tokenizers -----------------------------------------------------------------------------------


PHI4_CONTROLS = (
    Control("<|endoftext|>", rstrip=False),
    Control("<|endofprompt|>", rstrip=False),
    Control("<|assistant|>"),
    Control("<|end|>"),
    Control("<|user|>"),
    Control("<|system|>"),
    *(Control(f"<|{n}|>", rstrip=False) for n in ("tool", "/tool", "tool_call", "/tool_call")),
    Control("<|tool_response|>", rstrip=False),
    Control("<|tag|>", rstrip=False),
)
PHI4_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools']"
    " + '<|/tool|>' + '<|end|>' }}{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
# GPT-4o's way to cut text into words, which Phi-4-mini uses
PHI4_WORD_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PHI4_WORDS = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        + PHI4_WORD_END,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        + PHI4_WORD_END,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def phi4_vocabulary(base: int) -> Vocabulary:
    """Learn a vocabulary of Phi-4-mini's kind: `base` byte-level pieces, then the control ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    shell = Tokenizer(models.BPE())
    shell.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PHI4_WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    shell.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    words = Counter(
        tuple(word) for line in corpus() for word, _ in shell.pre_tokenizer.pre_tokenize_str(line)
    )
    vocabulary, merges = learn(words, sorted(pre_tokenizers.ByteLevel.alphabet()), base)
    tokenizer = json.loads(shell.to_str())
    tokenizer["model"] |= {"vocab": vocabulary, "merges": merges}
    ids = dict(vocabulary)
    for control in PHI4_CONTROLS:
        ids[control.text] = len(ids)
    added = [{"id": ids[c.text], **c.entry()} for c in PHI4_CONTROLS]
    tokenizer["added_tokens"] = added
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in added},
        "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "chat_template.jinja": PHI4_TEMPLATE,
    }
    # the byte-level alphabet: printable bytes stand for themselves, the others begin at U+0100
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    single = {chr(byte): byte for byte in printable if byte >= 0x80}
    single |= {chr(0x100 + n): byte for n, byte in enumerate(others) if byte != ord(" ")}
    return Vocabulary(files, len(ids), ids, len(vocabulary), single)


# --- weights and graphs ---------------------------------------------------------------------------


def write(folder: Path, files: dict[str, Any]) -> None:
    """Write JSON objects and texts, always in the same way."""
    for name, content in files.items():
        if not isinstance(content, str):
            content = json.dumps(content, ensure_ascii=False, indent=1)  # noqa: PLW2901
        (folder / name).write_text(content.rstrip("\n") + "\n", encoding="utf-8")


def save_weights(hf: Path, vocabulary: Vocabulary, stops: list[str], **shape: Any) -> None:
    """Write a Hugging Face folder with random weights, large enough to give distinct logits."""
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    padded = -(-vocabulary.size // 32) * 32  # as real models: more rows than tokens
    if padded == vocabulary.size:
        padded += 32
    end = vocabulary.ids["<|endoftext|>"]
    config = Phi3Config(
        vocab_size=padded,
        num_hidden_layers=2,
        original_max_position_embeddings=4096,
        eos_token_id=end,
        pad_token_id=end,
        sliding_window=None,  # with a window the builder makes a cache that refuses longer prompts
        tie_word_embeddings=False,
        attention_dropout=0.0,
        **shape,
    )
    torch.manual_seed(SEED)
    model = Phi3ForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                embeds = name.startswith(("model.embed", "lm_head"))
                weight.normal_(std=1.0 if embeds else 3.0 / weight.shape[1] ** 0.5)
        # never the likeliest, as in a trained model: rows that no token has, control tokens that
        # end nothing, bytes that have a piece of their own or no meaning in a text; half as loud:
        # bytes that are a part of a character
        model.lm_head.weight[vocabulary.size :] = 0
        for token, number in vocabulary.ids.items():
            if token in vocabulary.bytes:
                byte = vocabulary.bytes[token]
                model.lm_head.weight[number] *= 0.5 if byte >= 0x80 else byte == 0x0A
            elif number >= vocabulary.controls or token in {c.text for c in PHI3_HEAD}:
                model.lm_head.weight[number] *= token in stops
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=[vocabulary.ids[stop] for stop in stops],
        pad_token_id=end,
    )
    model.save_pretrained(hf)
    if rope := shape.get("rope_parameters"):  # as published; the builder looks for these names
        saved = json.loads((hf / "config.json").read_text("utf-8"))
        del saved["rope_parameters"]
        scaling = {k: rope[k] for k in ("long_factor", "short_factor")}
        saved |= {"rope_scaling": {"type": "longrope", **scaling}, "rope_theta": rope["rope_theta"]}
        write(hf, {"config.json": saved})
    write(hf, vocabulary.files)


def build(
    hf: Path,
    out: Path,
    cache: Path,
    vocabulary: Vocabulary,
    *options: str,
    provider: str = "cpu",
    filename: str = "model.onnx",
) -> None:
    """Run the official builder, then put the tokenizer's files back as published."""
    subprocess.run(
        [
            *(sys.executable, "-m", "onnxruntime_genai.models.builder"),
            *("-i", str(hf), "-o", str(out), "-c", str(cache), "-p", "int4", "-e", provider),
            *("--extra_options", "int4_block_size=32", "int4_accuracy_level=4"),
            *(f"filename={filename}", *options),
        ],
        check=True,
        capture_output=True,
    )
    keep = {filename, f"{filename}.data", "genai_config.json"}
    for path in out.iterdir():
        if path.name not in keep:
            path.unlink()
    write(out, vocabulary.files)
    write(out, {"genai_config.json": json.loads((out / "genai_config.json").read_text("utf-8"))})


CARD = """# {title}

A test model of edged. A real Phi-3 graph, quantised to INT4 by onnxruntime-genai's own builder,
with **random weights: what it says is nonsense.** It stands in where the way of the tokens matters
and their sense does not.

- Tokenizer: {tokenizer}, {size} tokens, learned from a few hundred made-up sensor reports.
- Graph: {graph}.
- Template: `{template}`.
- Made by `tests/models/make.py` (in edged's repository), weights and vocabulary from fixed seeds.
- Licence: Apache-2.0, like edged. Nothing in it comes from a published model.
"""


def make_phi3(hf: Path, out: Path, cache: Path) -> None:
    """Make `tests/models/phi3`."""
    vocabulary = phi3_vocabulary(corpus(), 1200)
    save_weights(
        hf,
        vocabulary,
        ["<|endoftext|>", "<|assistant|>", "<|end|>"],
        bos_token_id=vocabulary.ids["<s>"],
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    build(hf, out, cache, vocabulary)
    card = CARD.format(
        title="A test model of Phi-3's kind",
        tokenizer="of Phi-3's kind (SentencePiece-style BPE, byte fallback, rstrip control tokens)",
        size=vocabulary.size,
        graph="2 layers, hidden size 64, 4 heads, context 4096",
        template="<|user|>\\n…<|end|>\\n<|assistant|>\\n",
    )
    write(out, {"README.md": card})


def make_phi4(hf: Path, out: Path, cache: Path) -> None:
    """Make `tests/models/phi4-mini`."""
    vocabulary = phi4_vocabulary(1200)
    rotary = 8  # frequencies: half of a head of 32, in pairs (the runtime wants a multiple of 8)
    save_weights(
        hf,
        vocabulary,
        ["<|end|>", "<|endoftext|>"],
        bos_token_id=vocabulary.ids["<|endoftext|>"],
        hidden_size=96,
        intermediate_size=160,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        partial_rotary_factor=0.5,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * rotary,
            "long_factor": [1.0 + 0.2 * step for step in range(rotary)],
        },
    )
    build(hf, out, cache, vocabulary)
    card = CARD.format(
        title="A test model of Phi-4-mini's kind",
        tokenizer="of Phi-4-mini's kind (byte-level BPE, GPT-4o's words)",
        size=vocabulary.size,
        graph="2 layers, hidden size 96, 3 query heads on 1 key head, half rotary, LongRoPE "
        "from 4096 to 8192",
        template="<|user|>…<|end|><|assistant|>",
    )
    write(out, {"README.md": card})


# --- vision ---------------------------------------------------------------------------------------

OPSET = 17
#: As published; the operator ignores both attributes.
PROCESSOR = {
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
                    "attrs": {"num_crops": 16, "num_img_tokens": 144},
                }
            },
        ],
    }
}


@dataclass(frozen=True)
class Parts:
    """What a vision folder's graphs are called, and what their numbers are."""

    vision: str
    embedding: str
    text: str
    half: bool  # fp16 instead of fp32
    provider: str  # that the official builder builds the text graph for
    crop: int = 336
    side: int = 12


def save_graph(out: Path, name: str, graph: Any) -> None:
    """Write a graph as published: its weights in a file beside it."""
    import onnx

    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", OPSET)],
        ir_version=8,
        producer_name="edged",
    )
    onnx.checker.check_model(model)
    onnx.save(
        model, out / name, save_as_external_data=True, location=f"{name}.data", size_threshold=512
    )
    (out / f"{name}.data").chmod(0o644)


def make_vision(out: Path, parts: Parts, hidden: int) -> None:
    """Write a vision graph with Phi-3-vision's geometry.

    A token is a small network's view of its own crop / side squared pixels and of nothing else. The
    tokens of a frame's crops stand in the rows of the whole picture, each row ended by a
    separator; then come another separator and the global view, likewise (`sub_glb`). As many
    frames of as many sizes as are given, each with crops behind it that do not count.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.FLOAT16 if parts.half else TensorProto.FLOAT
    real = np.float16 if parts.half else np.float32
    draw = np.random.default_rng(SEED)
    channels, side = 24, parts.side
    pool = next(n for n in (4, 2, 1) if parts.crop % (side * n) == 0)
    patch = parts.crop // side // pool

    def normal(*shape: int, std: float) -> Any:
        return draw.normal(scale=std, size=shape).astype(real)

    values = {
        "patch.weight": normal(channels, 3, patch, patch, std=2.0 / (3 * patch * patch) ** 0.5),
        "patch.bias": normal(channels, std=0.5),
        "up.weight": normal(channels, 2 * channels, std=(2 / channels) ** 0.5),
        "up.bias": normal(2 * channels, std=0.3),
        "down.weight": normal(2 * channels, hidden, std=(1 / channels) ** 0.5),
        "sub_GN": normal(1, 1, hidden, std=1.0),
        "glb_GN": normal(1, hidden, std=1.0),
        "nothing": np.zeros((0, hidden), real),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "side": np.array([side], np.int64),
        "hidden": np.array([hidden], np.int64),
        "rest": np.array([-1], np.int64),
        "crop": np.array([parts.crop], np.int64),
        "flat": np.array([-1, 3, parts.crop, parts.crop], np.int64),
        "tokens": np.array([-1, hidden], np.int64),
        "global_shape": np.array([side, side, hidden], np.int64),
        "first": np.array(0, np.int64),
        "always": np.array(True),
    }
    node = helper.make_node

    def separated(grid: str, name: str, count: str) -> list[Any]:
        """End each row of a grid [rows, columns, hidden] of tokens by a separator."""
        return [
            node("Concat", [count, "one", "hidden"], [f"{name}.many"], axis=0),
            node("Expand", ["sub_GN", f"{name}.many"], [f"{name}.ends"]),
            node("Concat", [grid, f"{name}.ends"], [f"{name}.grid"], axis=1),
            node("Reshape", [f"{name}.grid", "tokens"], [f"{name}.tokens"]),
        ]

    frame = helper.make_graph(
        [
            node("Gather", ["seen", "frame"], ["all"], axis=0),  # [crops + 1, side^2, hidden]
            node("Gather", ["image_sizes", "frame"], ["size"], axis=0),
            node("Div", ["size", "crop"], ["cut"]),
            node("Gather", ["cut", "zero"], ["rows"], axis=0),
            node("Gather", ["cut", "one"], ["columns"], axis=0),
            node("Mul", ["rows", "columns"], ["crops"]),
            node("Add", ["crops", "one"], ["end"]),
            node("Slice", ["all", "one", "end", "zero"], ["local"]),
            node("Concat", ["rows", "columns", "side", "side", "hidden"], ["split"], axis=0),
            node("Reshape", ["local", "split"], ["local.crops"]),
            node("Transpose", ["local.crops"], ["local.lines"], perm=[0, 2, 1, 3, 4]),
            node("Mul", ["rows", "side"], ["lines"]),
            node("Mul", ["columns", "side"], ["width"]),
            node("Concat", ["lines", "width", "hidden"], ["picture"], axis=0),
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
            helper.make_tensor_value_info("before", kind, [None, hidden]),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", kind, [None, hidden]),
        ],
    )
    graph = helper.make_graph(
        [
            node("Reshape", ["pixel_values", "flat"], ["pixels"]),
            node(
                "AveragePool",
                ["pixels"],
                ["pooled"],
                kernel_shape=[pool, pool],
                strides=[pool, pool],
            ),
            node(
                "Conv",
                ["pooled", "patch.weight", "patch.bias"],
                ["patches"],
                strides=[patch, patch],
            ),
            node("Transpose", ["patches"], ["patches.last"], perm=[0, 2, 3, 1]),
            node("MatMul", ["patches.last", "up.weight"], ["up"]),
            node("Add", ["up", "up.bias"], ["up.sum"]),
            node("Relu", ["up.sum"], ["up.out"]),
            node("MatMul", ["up.out", "down.weight"], ["down"]),
            node("Shape", ["pixel_values"], ["frames_and_crops"], start=0, end=2),
            node("Concat", ["frames_and_crops", "rest", "hidden"], ["by_frame"], axis=0),
            node("Reshape", ["down", "by_frame"], ["seen"]),
            node("Shape", ["image_sizes"], ["frames"], start=0, end=1),
            node("Squeeze", ["frames"], ["frames.count"]),
            node("Loop", ["frames.count", "always", "nothing"], ["image_features"], body=frame),
        ],
        "vision",
        [
            helper.make_tensor_value_info(
                "pixel_values", kind, ["num_images", "max_num_crops", 3, "height", "width"]
            ),
            helper.make_tensor_value_info("image_sizes", TensorProto.INT64, ["num_images", 2]),
        ],
        [helper.make_tensor_value_info("image_features", kind, ["num_image_tokens", hidden])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    save_graph(out, parts.vision, graph)


def make_embedding(hf: Path, out: Path, parts: Parts) -> None:
    """Write an embedding graph: in input_ids, ids below 0 are the places of image features."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper
    from safetensors.numpy import load_file

    kind = TensorProto.FLOAT16 if parts.half else TensorProto.FLOAT
    table = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    rows, hidden = table.shape
    values = {
        "embed_tokens.weight": table.astype(np.float16 if parts.half else np.float32),
        "lowest": np.array(0, np.int64),
        "highest": np.array(rows - 1, np.int64),
        "far": np.array(-1_000_000_000, np.int64),
    }
    node = helper.make_node
    graph = helper.make_graph(
        [
            node("Clip", ["input_ids", "lowest", "highest"], ["ids"]),
            node("Gather", ["embed_tokens.weight", "ids"], ["text"]),
            node("Less", ["input_ids", "lowest"], ["below"]),
            node("Greater", ["input_ids", "far"], ["near"]),
            node("And", ["below", "near"], ["is_image"]),
            node("NonZero", ["is_image"], ["places"]),
            node("Transpose", ["places"], ["places.rows"], perm=[1, 0]),
            node("ScatterND", ["text", "places.rows", "image_features"], ["inputs_embeds"]),
        ],
        "embedding",
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
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    save_graph(out, parts.embedding, graph)


def make_phi3v(hf: Path, out: Path, cache: Path, parts: Parts) -> None:
    """Make a vision folder as published: three graphs, their weights beside them."""
    vocabulary = phi3_vocabulary(corpus(), 1200)
    hidden = 64
    save_weights(
        hf,
        vocabulary,
        ["<|endoftext|>", "<|assistant|>", "<|end|>"],
        bos_token_id=vocabulary.ids["<s>"],
        hidden_size=hidden,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    build(
        hf,
        out,
        cache,
        vocabulary,
        "exclude_embeds=true",
        provider=parts.provider,
        filename=parts.text,
    )
    make_vision(out, parts, hidden)
    make_embedding(hf, out, parts)
    config = json.loads((out / "genai_config.json").read_text("utf-8"))
    model = config["model"]
    model["type"] = "phi3v"
    model["embedding"] = {
        "filename": parts.embedding,
        "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
        "outputs": {"inputs_embeds": "inputs_embeds"},
    }
    model["vision"] = {
        "filename": parts.vision,
        "inputs": {"pixel_values": "pixel_values", "image_sizes": "image_sizes"},
        "outputs": {"image_features": "image_features"},
    }
    write(out, {"genai_config.json": config, "processor_config.json": PROCESSOR})
    card = CARD.format(
        title="A test model of Phi-3.5-vision's kind",
        tokenizer="of Phi-3's kind (SentencePiece-style BPE, byte fallback, rstrip control tokens)",
        size=vocabulary.size,
        graph="embedding, vision and text, "
        + ("fp16, as for CUDA" if parts.half else "fp32, as for the CPU")
        + "; 2 layers, hidden size 64, 4 heads, context 4096; crops of 336 pixels, 144 tokens each",
        template="<|user|>\\n…<|end|>\\n<|assistant|>\\n",
    )
    write(out, {"README.md": card})


MODELS = {
    "tests/models/phi3": make_phi3,
    "tests/models/phi4-mini": make_phi4,
    "tests/models/phi3v": partial(
        make_phi3v,
        parts=Parts(
            vision="vision.onnx",
            embedding="embedding.onnx",
            text="model.onnx",
            half=False,
            provider="cpu",
        ),
    ),
    "tests/models/phi3v-fp16": partial(
        make_phi3v,
        parts=Parts(  # the published names
            vision="phi-3.5-v-instruct-vision.onnx",
            embedding="phi-3.5-v-instruct-embedding.onnx",
            text="phi-3.5-v-instruct-text.onnx",
            half=True,
            provider="cuda",
        ),
    ),
}


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def main() -> int:
    """Make or check the models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="leave the Hugging Face folders here"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the tree, change nothing"
    )
    parser.add_argument(
        "--only", choices=MODELS, metavar="FOLDER", help="this one, not all: %(choices)s"
    )
    options = parser.parse_args()
    same = True
    with tempfile.TemporaryDirectory() as scratch:
        for place, make in MODELS.items():
            if options.only not in (None, place):
                continue
            out, hf = Path(scratch, "out", place), Path(scratch, "hf", Path(place).name)
            out.mkdir(parents=True)
            hf.mkdir(parents=True)
            make(hf, out, Path(scratch, "cache"))
            size = sum(p.stat().st_size for p in out.iterdir())
            print(f"{place}: {size:,} bytes")
            if size > MAX_FOLDER:
                sys.exit(f"{place} is larger than {MAX_FOLDER:,} bytes")
            if options.keep:
                shutil.copytree(hf, options.keep / Path(place).name, dirs_exist_ok=True)
            new = digests(out)
            for name, digest in new.items():
                print(f"  {digest}  {name}")
            if options.check:
                old = digests(ROOT / place)
                for name in sorted(old.keys() | new.keys()):
                    if old.get(name) != new.get(name):
                        print(f"  differs: {name}")
                        same = False
            else:
                shutil.rmtree(ROOT / place, ignore_errors=True)
                shutil.copytree(out, ROOT / place)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
