"""What tokens are as text: read from `tokenizer.json`, so that we know it byte by byte.

The runtime's own decoder works on whole texts and is vague about cut characters; a stream needs to
know which bytes a token adds.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Every token's bytes, and the tokens that mean something other than text."""

    #: By id; control tokens and ids that no token has are empty.
    pieces: tuple[bytes, ...] = field(repr=False)
    #: All added tokens, by their text. None of them may come from anybody's text.
    controls: Mapping[str, int]
    #: The tokenizer puts a space before a text, which is not part of it.
    leading_space: bool

    @property
    def longest(self) -> int:
        """Bytes of the longest piece."""
        return max(map(len, self.pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these tokens, as one answer."""
        detokenizer = Detokenizer(self)
        return "".join(map(detokenizer.feed, ids)) + detokenizer.flush()


class Detokenizer:
    """Turns tokens into text as they come, never cutting a character."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._pieces = vocabulary.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = vocabulary.leading_space

    def feed(self, token: int) -> str:
        """Return the whole characters that this token completes."""
        piece = self._pieces[token] if 0 <= token < len(self._pieces) else b""
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Return what is left: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def read_vocabulary(path: Path) -> Vocabulary:
    """Read `tokenizer.json`, which `edged.models.folder` has looked at."""
    table: dict[str, Any] = json.loads(path.read_text("utf-8"))
    model = table["model"]
    byte_level = _mentions(table.get("decoder"), "ByteLevel")
    added = {token["content"]: token for token in table["added_tokens"]}
    ids: dict[str, int] = dict(model["vocab"])
    ids.update((text, token["id"]) for text, token in added.items())
    pieces = [b""] * (max(ids.values()) + 1)
    alphabet = _byte_alphabet() if byte_level else {}
    for text, number in ids.items():
        if text in added:
            pieces[number] = b"" if added[text]["special"] else text.encode()
        elif byte_level:
            pieces[number] = b"".join(alphabet.get(char, char.encode()) for char in text)
        else:
            pieces[number] = _sentencepiece_bytes(text)
    return Vocabulary(
        pieces=tuple(pieces),
        controls={text: token["id"] for text, token in added.items()},
        leading_space=_mentions(table.get("decoder"), "Strip"),
    )


def _mentions(part: Any, kind: str) -> bool:
    """Tell whether a part of the tokenizer, or one it is made of, is of this kind."""
    if not isinstance(part, dict):
        return False
    inner = part.get("decoders", ())
    return part.get("type") == kind or any(_mentions(each, kind) for each in inner)


def _sentencepiece_bytes(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return text.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, bytes]:
    """Return what GPT-2's printable stand-ins for bytes stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    table.update((chr(256 + n), bytes([byte])) for n, byte in enumerate(others))
    return table
