"""From messages to token ids, so that no text can be more than text.

The tokenizer turns a control token that somebody wrote into their text into the real control id,
and cuts a text silently at a NUL. So text is made harmless first, each message is encoded between
the control tokens of its role (a tokenizer of Phi-3's kind treats white space at such a place in
its own way), and what comes out is looked at before the model sees it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edged.engine.tokens import Vocabulary
from edged.errors import Code, EdgedError, JobFailed

Encode = Callable[[str], list[int]]
Message = dict[str, str]

_ROLES = ("system", "user", "assistant")
_END = "<|end|>"
_HALF = re.compile("[\ud800-\udfff]")
#: Stand for frames in vision prompts, and are no tokens of their own.
_TAGS = r"<\|(?:image|audio)_\d+\|>"

#: The conversation by which a model's own template is compared with ours: every role, two turns,
#: white space inside.
PROBE: tuple[Message, ...] = (
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is at the gate?\nName it."},
    {"role": "assistant", "content": "A red car, and a  dog."},
    {"role": "user", "content": "Since when? It is 12:30."},
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a family writes a conversation: what follows a role's token, and the end token."""

    name: str
    after_role: str
    after_end: str

    def render(self, messages: Sequence[Message], *, reply: bool = True) -> str:
        """Return the conversation as text, ready for the model's reply."""
        parts = [self.block(m["role"], m["content"]) for m in messages]
        if reply:
            parts.append(self.opening)
        return "".join(parts)

    def block(self, role: str, text: str) -> str:
        """Return one message as text."""
        return f"<|{role}|>{self.after_role}{text}{_END}{self.after_end}"

    @property
    def opening(self) -> str:
        """What makes the model reply."""
        return f"<|assistant|>{self.after_role}"


STYLES = {
    "phi3": Style("phi3", "\n", "\n"),
    "phi3.5": Style("phi3.5", "\n", "\n"),
    "phi4-mini": Style("phi4-mini", "", ""),
}


class TemplateMismatch(EdgedError):
    """The model's own chat template is not the one we know for its family."""


class Prompts:
    """Builds prompts for one loaded model."""

    def __init__(self, encode: Encode, vocabulary: Vocabulary, style: Style) -> None:
        self._encode = encode
        self._vocabulary = vocabulary
        self._style = style
        self._controls = frozenset(vocabulary.controls.values())
        self._roles = {role: vocabulary.controls[f"<|{role}|>"] for role in _ROLES}
        self._end = vocabulary.controls[_END]
        # the longest first: of two tokens that begin alike, the longer one must be found
        words = sorted((c for c in vocabulary.controls if len(c) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, words), _TAGS]))
        #: What comes before everything, by the tokenizer's own will.
        self._head: list[int] = []

    def build(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, ready for the model's reply.

        Raises:
            JobFailed: a text cannot be encoded as it stands.
        """
        ids = list(self._head)
        for message in messages:
            ids += self._message(message["role"], message["content"])
        return ids + self._bare(self._encode(self._style.opening))

    def check(self, template: Callable[[Sequence[Message]], str]) -> None:
        """Compare a probe conversation with the folder's own template, as the tokenizer encodes it.

        Raises:
            TemplateMismatch: they differ; the message says where.
        """
        rendered = template(PROBE)
        theirs = self._encode(rendered)
        lead = next((n for n, i in enumerate(theirs) if i in self._roles.values()), 0)
        self._head = theirs[:lead]  # a beginning-of-text token, with some tokenizers
        ours = self.build(PROBE)
        if ours == theirs:
            return
        at = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        raise TemplateMismatch(
            "a probe conversation has other tokens by the model's own chat template than by ours "
            f"({self._style.name}): from token {at} on, ours are {ours[at : at + 8]} "
            f"({len(ours)} in all), the template's {theirs[at : at + 8]} ({len(theirs)})",
            hint="take the model and its tokenizer files from their publisher, unchanged",
        )

    def harmless(self, text: str) -> str:
        """Return the text with a space put into everything that reads like a control token."""
        while self._pattern.search(text):
            text = self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def _message(self, role: str, text: str) -> list[int]:
        if role not in self._roles:
            raise JobFailed(Code.INVALID, f"an unknown role: {role[:40]!r}")
        if "\0" in text:
            raise JobFailed(Code.INVALID, "a text must not contain NUL: the tokenizer ends there")
        if _HALF.search(text):
            raise JobFailed(Code.INVALID, "a text has half a surrogate pair")
        text = self.harmless(text)
        ids = self._try(role, text)
        if ids is None:  # something else than the text itself reads as a control token
            ids = self._try(role, text.replace("<", "< "))
        if ids is None:
            raise JobFailed(Code.INVALID, "a text cannot be told from control tokens")
        return ids

    def _try(self, role: str, text: str) -> list[int] | None:
        """Encode one message; None if the text gave control ids or was not kept whole."""
        ids = self._bare(self._encode(self._style.block(role, text)))
        ends = [n for n, i in enumerate(ids) if i in self._controls]
        if len(ends) != 2 or ends[0] != 0 or ids[0] != self._roles[role]:
            return None
        if ids[ends[1]] != self._end:
            return None
        if not self._kept(text, ids[1 : ends[1]]):
            raise JobFailed(Code.INVALID, "the tokenizer does not keep a text whole")
        return ids

    def _kept(self, text: str, ids: list[int]) -> bool:
        """Tell whether nothing of a text was lost; white space at its ends does not count."""
        decoded = self._vocabulary.decode(ids)
        if self._vocabulary.leading_space:
            text = text.replace("\u2581", " ")
        return decoded.strip() == text.strip()

    def _bare(self, ids: list[int]) -> list[int]:
        """Return the ids without what the tokenizer puts before every text."""
        return ids[len(self._head) :] if self._head else ids
