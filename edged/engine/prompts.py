r"""From messages to token ids, so that no text can be more than text.

The tokenizer turns a control token that somebody wrote into their text into the real control id,
and cuts a text silently at a NUL. So text is made harmless first, each message is encoded between
the control tokens of its role (a tokenizer of Phi-3's kind treats white space at such a place in
its own way), and what comes out is looked at before the model sees it.

Frames. A frame stands in a prompt as the tag `<|image_n|>`, and the processors that the models come
with split the prompt at its tags and encode each part alone (microsoft/Phi-3.5-vision-instruct,
processing_phi3_v.py; onnxruntime-genai, phi_image_processor.cpp). So do we, and whatever the
tokenizer puts before a text it puts before each part. The tag itself has no tokens: the frame's
take its place.

A turn's content is texts and frames in their order. The model card writes
`<|user|>\n<|image_1|>\n<|image_2|>\nquestion<|end|>\n`: each tag ends its line. Hence:
- a newline follows a frame, unless the text after it begins with one: `[0, 1, "question"]` and
  `[0, "\n", 1, "\nquestion"]` are the same;
- nothing is put before a frame, and nothing between two texts;
- a frame that is left out leaves nothing behind, but ends the line of a text before it, so that
  what was said of it does not run into what follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

from edged.engine.tokens import Vocabulary
from edged.errors import Code, EdgedError, JobFailed
from edged.ports import Turn

Encode = Callable[[str], list[int]]

_ROLES = ("system", "user", "assistant")
_END = "<|end|>"
_HALF = re.compile("[\ud800-\udfff]")
#: Stand for frames in vision prompts, and are no tokens of their own.
_TAGS = r"<\|(?:image|audio)_\d+\|>"
_TAG = re.compile(r"<\|image_\d+\|>")

#: The conversation by which a model's own template is compared with ours: every role, two turns,
#: white space inside.
PROBE: tuple[Turn, ...] = (
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is at the gate?\nName it."},
    {"role": "assistant", "content": "A red car, and a  dog."},
    {"role": "user", "content": "Since when? It is 12:30."},
)
#: The same for vision: frames one after the other, between texts, and at the end.
VISION_PROBE: tuple[Turn, ...] = (
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": [0, 1, "What moves\nthere?"]},
    {"role": "assistant", "content": "A red car."},
    {"role": "user", "content": ["And now: ", 2, "Since 12:30?  ", 3]},
)


@dataclass(frozen=True, slots=True)
class Style:
    """How a family writes a conversation: what follows a role's token, and the end token."""

    name: str
    after_role: str
    after_end: str

    def begin(self, role: str) -> str:
        """Return what comes before the text of a turn, or makes the model reply."""
        return f"<|{role}|>{self.after_role}"

    @property
    def end(self) -> str:
        """What comes after the text of a turn."""
        return f"{_END}{self.after_end}"


STYLES = {
    "phi3": Style("phi3", "\n", "\n"),
    "phi3.5": Style("phi3.5", "\n", "\n"),
    "phi3.5-vision": Style("phi3.5-vision", "\n", "\n"),
    "phi4-mini": Style("phi4-mini", "", ""),
}


class TemplateMismatch(EdgedError):
    """The model's own chat template is not the one we know for its family."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A prompt whose frames are known by their indexes only: token ids, and frames between them."""

    parts: tuple[list[int] | int, ...]

    @property
    def text_tokens(self) -> int:
        """How many tokens are not a frame's."""
        return sum(len(part) for part in self.parts if isinstance(part, list))

    @property
    def start(self) -> list[int]:
        """The ids before the first frame."""
        first = self.parts[0]
        return first if isinstance(first, list) else []

    def fill(self, tokens: Mapping[int, int], placeholder: int) -> tuple[list[int], dict[int, int]]:
        """Put the frames' tokens into their places.

        Args:
            tokens: how many each frame has, by its index.
            placeholder: the id that stands for each of them.

        Returns:
            The prompt's ids, and where each frame begins in them, by its index.
        """
        ids: list[int] = []
        places = {}
        for part in self.parts:
            if isinstance(part, list):
                ids += part
            else:
                places[part] = len(ids)
                ids += [placeholder] * tokens[part]
        return ids, places


class Prompts:
    """Builds prompts for one loaded model.

    Args:
        encode: the tokenizer, control tokens in a text and all.
        vocabulary: the same tokenizer, as we read it.
        style: how the model's family writes a conversation.
        placeholder: the id that stands for a frame's tokens; None without vision. Text never gives
            it.
    """

    def __init__(
        self,
        encode: Encode,
        vocabulary: Vocabulary,
        style: Style,
        placeholder: int | None = None,
    ) -> None:
        self._encode = encode
        self._vocabulary = vocabulary
        self._style = style
        self._controls = frozenset(vocabulary.controls.values())
        if placeholder is not None:
            self._controls |= {placeholder}
        self._roles = {role: vocabulary.controls[f"<|{role}|>"] for role in _ROLES}
        self._end = vocabulary.controls[_END]
        # the longest first: of two tokens that begin alike, the longer one must be found
        words = sorted((c for c in vocabulary.controls if len(c) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join([*map(re.escape, words), _TAGS]))
        #: What comes before every text, by the tokenizer's own will.
        self._head: list[int] = []

    def build(self, messages: Sequence[Turn]) -> list[int]:
        """Return the ids of a conversation without frames, ready for the model's reply.

        Raises:
            JobFailed: a text cannot be encoded as it stands.
        """
        return self.outline(messages, ()).fill({}, 0)[0]

    def outline(
        self,
        messages: Sequence[Turn],
        kept: Collection[int] | None = None,
        known: dict[Hashable, list[int]] | None = None,
    ) -> Outline:
        """Return a conversation, ready for the model's reply, with places for its frames.

        Args:
            messages: the conversation.
            kept: the indexes of the frames that are not left out; None: all.
            known: where the ids of texts are kept, if the same ones are to be encoded many times.

        Raises:
            JobFailed: a text cannot be encoded as it stands.
        """
        cached = {} if known is None else known
        ids = list(self._head)
        parts: list[list[int] | int] = [ids]
        for message in messages:
            role = message["role"]
            if role not in self._roles:
                raise JobFailed(Code.INVALID, f"an unknown role: {role[:40]!r}")
            texts, frames = _pieces(message["content"], kept)
            for n, text in enumerate(texts):
                if n > 0:
                    ids = list(self._head)
                    parts += [frames[n - 1], ids]
                key = (text, role if n == 0 else None, n == len(texts) - 1)
                if key not in cached:
                    cached[key] = self._text(*key)
                ids += cached[key]
        ids += self._bare(self._encode(self._style.begin("assistant")))
        return Outline(tuple(parts))

    def check(self, template: Callable[[Sequence[Turn]], str], *, vision: bool = False) -> None:
        """Compare a probe conversation with the folder's own template, as the tokenizer encodes it.

        Args:
            template: the folder's own, for turns of text.
            vision: compare one with frames as well, cut at its tags as the model's own processor
                does it.

        Raises:
            TemplateMismatch: they differ; the message says where.
        """
        theirs = self._encode(template(PROBE))
        lead = next((n for n, i in enumerate(theirs) if i in self._roles.values()), 0)
        self._head = theirs[:lead]  # a beginning-of-text token, with some tokenizers
        self._compare("a probe conversation", self.build(PROBE), theirs)
        if not vision:
            return
        shown = []
        for part in _TAG.split(template(tagged(VISION_PROBE))):
            shown += [*self._encode(part), _FRAME]
        ours, _ = self.outline(VISION_PROBE).fill(dict.fromkeys(range(4), 1), _FRAME)
        self._compare(f"a probe conversation with frames ({_FRAME})", ours, shown[:-1])

    def harmless(self, text: str) -> str:
        """Return the text with a space put into everything that reads like a control token."""
        while self._pattern.search(text):
            text = self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def _compare(self, what: str, ours: list[int], theirs: list[int]) -> None:
        if ours == theirs:
            return
        at = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        raise TemplateMismatch(
            f"{what} has other tokens by the model's own chat template than by ours "
            f"({self._style.name}): from token {at} on, ours are {ours[at : at + 8]} "
            f"({len(ours)} in all), the template's {theirs[at : at + 8]} ({len(theirs)})",
            hint="take the model and its tokenizer files from their publisher, unchanged",
        )

    def _text(self, text: str, role: str | None, ends: bool) -> list[int]:  # noqa: FBT001
        """Encode a text of a turn: the first after its role's token, the last before its end's."""
        if "\0" in text:
            raise JobFailed(Code.INVALID, "a text must not contain NUL: the tokenizer ends there")
        if _HALF.search(text):
            raise JobFailed(Code.INVALID, "a text has half a surrogate pair")
        text = self.harmless(text)
        ids = self._try(text, role, ends=ends)
        if ids is None:  # something else than the text itself reads as a control token
            ids = self._try(text.replace("<", "< "), role, ends=ends)
        if ids is None:
            raise JobFailed(Code.INVALID, "a text cannot be told from control tokens")
        return ids

    def _try(self, text: str, role: str | None, *, ends: bool) -> list[int] | None:
        """Encode one text; None if it gave control ids of its own or was not kept whole."""
        before = "" if role is None else self._style.begin(role)
        after = self._style.end if ends else ""
        ids = self._bare(self._encode(before + text + after))
        placed = [n for n, i in enumerate(ids) if i in self._controls]
        wanted = ([] if role is None else [self._roles[role]]) + ([self._end] if ends else [])
        if [ids[n] for n in placed] != wanted or (role is not None and placed[0] != 0):
            return None
        body = ids[0 if role is None else 1 : placed[-1] if ends else None]
        if not self._kept(text, body):
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


#: Stands for a frame where two prompts are compared; no token has this id.
_FRAME = -1


def tagged(messages: Sequence[Turn]) -> list[Turn]:
    """Return a conversation with its frames written as tags, as the model's own processor wants it.

    The tags are numbered from 1, by the frames' indexes.
    """
    written: list[Turn] = []
    for message in messages:
        texts, frames = _pieces(message["content"], None)
        tags = [*(f"<|image_{index + 1}|>" for index in frames), ""]
        content = "".join(text + tag for text, tag in zip(texts, tags, strict=True))
        written.append({"role": message["role"], "content": content})
    return written


def asked(messages: Sequence[Turn], question: str) -> tuple[Turn, ...]:
    """Return the conversation with a question put at the end of its last turn, on a new line."""
    *before, last = messages
    content = last["content"]
    parts: list[str | int] = [content] if isinstance(content, str) else list(content)
    end = parts[-1] if parts else ""
    if isinstance(end, str) and end and not end.endswith("\n"):
        parts.append("\n")
    return (*before, {"role": last["role"], "content": [*parts, question]})


def text_bytes(messages: Sequence[Turn]) -> int:
    """Return how long the texts of a conversation are, in UTF-8."""
    count = 0
    for message in messages:
        content = message["content"]
        for part in [content] if isinstance(content, str) else content:
            if isinstance(part, str):
                count += len(part.encode("utf-8", "replace"))
    return count


def _pieces(
    content: str | list[str | int], kept: Collection[int] | None
) -> tuple[list[str], list[int]]:
    """Return a turn's texts and the frames between them: one text more than frames.

    The rules are at the top of this module.
    """
    if isinstance(content, str):
        return [content], []
    texts, frames = [""], []
    ended = False  # a frame has ended the line
    for part in content:
        if isinstance(part, str):
            texts[-1] += part.removeprefix("\n") if ended else part
            ended = ended and not part
        elif kept is None or part in kept:
            frames.append(part)
            texts.append("\n")
            ended = True
        else:
            texts[-1] += "\n" if texts[-1] and not texts[-1].endswith("\n") else ""
            ended = True
    return texts, frames
