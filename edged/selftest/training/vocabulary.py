"""Tokenizers of Phi-3's kind: SentencePiece-style BPE with byte fallback, control tokens behind it.

The files are laid out as they were published for the real models.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

#: Where pieces end: at a space, and digits and line ends stand alone, as in Llama's vocabulary.
_PHI3 = re.compile(r"[0-9\n]|▁?[^▁0-9\n]+|▁")
#: And between letters and others, so that a word is the same before a comma and in quotes.
_WHOLE = re.compile(r"[0-9\n]|▁?[^\W\d_]+|▁?(?:(?![^\W\d_])[^▁0-9\n])+|▁")
RARE = 40  # characters seen less often have no piece of their own: they become bytes


@dataclass(frozen=True)
class Control:
    """One added token, with the flag of the published tokenizers that matters to a prompt."""

    text: str
    rstrip: bool = True  # white space after it is swallowed with it
    special: bool = True

    def entry(self) -> dict[str, Any]:
        """Return it as the Hugging Face files write it."""
        flags = {"lstrip": False, "normalized": False, "rstrip": self.rstrip, "single_word": False}
        return {"content": self.text, **flags, "special": self.special}


PHI3_HEAD = (
    Control("<unk>", rstrip=False),
    Control("<s>", rstrip=False),
    Control("</s>", special=False),
)
PHI3_CONTROLS = (
    Control("<|endoftext|>", rstrip=False),
    Control("<|assistant|>"),
    *(Control(f"<|placeholder{i}|>") for i in range(1, 5)),
    Control("<|system|>"),
    Control("<|end|>"),
    *(Control(f"<|placeholder{i}|>") for i in range(5, 7)),
    Control("<|user|>"),
)
PHI3_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer's files, and what the model's configuration needs to know of them."""

    files: dict[str, Any]  # name -> JSON object, or text
    size: int
    ids: dict[str, int]
    controls: int  # the first control token behind the pieces
    bytes: dict[str, int]  # pieces that are one raw byte, not a character


def learn(
    words: Counter[tuple[str, ...]], pieces: list[str], size: int
) -> tuple[dict[str, int], list[str]]:
    """Learn byte-pair merges until there are `size` pieces; return the vocabulary and the merges.

    The usual algorithm, ties broken by the alphabet: the tokenizers library breaks them at random.
    """
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = []
    while len(vocabulary) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            sys.exit(f"the corpus gives only {len(vocabulary)} pieces, {size} were asked for")
        left, right = min(pairs, key=lambda pair: (-pairs[pair], pair))
        vocabulary.setdefault(left + right, len(vocabulary))
        merges.append(f"{left} {right}")
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            new: list[str] = []
            for piece in word:
                if new and new[-1] == left and piece == right:
                    new[-1] = left + right
                else:
                    new.append(piece)
            merged[tuple(new)] += count
        words = merged
    return vocabulary, merges


def _add_numbers(vocabulary: dict[str, int], merges: list[str]) -> None:
    """Give every number up to 999 a piece of its own, whichever two of its digits meet first.

    Phi-3 reads digit by digit; a model as small as this one learns to compare numbers many times
    sooner if each is one token.
    """
    for number in map(str, range(10, 1000)):
        vocabulary[number] = len(vocabulary)
    merges += [f"{n // 10} {n % 10}" for n in range(10, 100)]
    for number in map(str, range(100, 1000)):
        merges.append(f"{number[:2]} {number[2]}")
        if number[1] != "0":
            merges.append(f"{number[0]} {number[1:]}")


def phi3_vocabulary(lines: Iterable[str], base: int, *, whole: bool = False) -> Vocabulary:
    """Learn a vocabulary of Phi-3's kind: `base` pieces, then the control tokens.

    Args:
        lines: what it is learned from.
        base: how many pieces.
        whole: no piece is of letters and others, and each number up to 999 is one more piece.
    """
    split = _WHOLE if whole else _PHI3
    words = Counter(
        tuple(word) for line in lines for word in split.findall("▁" + line.replace(" ", "▁"))
    )
    letters = Counter(letter for word, n in words.items() for letter in word * n)
    common = sorted(letter for letter, n in letters.items() if n >= RARE and letter != "\n")
    known = set(common)
    head = [c.text for c in PHI3_HEAD] + [f"<0x{byte:02X}>" for byte in range(256)]
    words = Counter({word: n for word, n in words.items() if known.issuperset(word)})
    vocabulary, merges = learn(words, head + common, base)
    if whole:
        _add_numbers(vocabulary, merges)
    ids = dict(vocabulary)
    for control in PHI3_CONTROLS:
        ids[control.text] = len(ids)
    added = [{"id": ids[c.text], **c.entry()} for c in (*PHI3_HEAD, *PHI3_CONTROLS)]
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence],
            "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in added},
        "bos_token": "<s>",
        "chat_template": PHI3_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    single = {f"<0x{byte:02X}>": byte for byte in range(256)}
    return Vocabulary(files, len(ids), ids, len(vocabulary), single)
