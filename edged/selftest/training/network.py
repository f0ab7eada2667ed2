"""The networks that are trained: a small encoder of frames, and a decoder with Phi-3's graph.

The decoder's parameters have the names of transformers' `Phi3ForCausalLM`, so that the official
builder takes them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edged.selftest.drawings import COLOURS, SHAPES
from edged.selftest.training.changes import CHANGES, EVENTS

#: Pixels a side of a crop, and tokens a side.
CROP, SIDE = 96, 3
#: Of a frame: its one crop, the global view, a separator at each row's end and one between them.
FRAME_TOKENS = 2 * SIDE * SIDE + 1 + 2 * SIDE
#: A scene has at most so many.
MOST_FRAMES, MOST_THINGS = 8, 4
#: Names of things.
NAMES = len(COLOURS) * len(SHAPES)
#: Numbers that the detector gives for a cell: names, and where.
SEEN = NAMES + 2
#: Where something is in its cell is from -0.5 to 0.5: too quiet beside the names.
WHERE = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the decoder."""

    vocabulary: int
    hidden: int = 192
    inner: int = 512
    layers: int = 6
    heads: int = 6


# The encoder --------------------------------------------------------------------------------------


class _Step(nn.Sequential):
    """A convolution that may halve the sides, a norm, and a bend."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )


class _Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _Step(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(self.first(x)))


class Encoder(nn.Module):
    """Turns frames of one crop into the decoder's tokens.

    A frame is seen in cells, SIDE a side. Of each cell the detector says which names are in it and
    where; a table turns that into what the decoder reads. The global view of a frame of one crop
    has the same pixels as the crop itself, and a table of its own.
    """

    def __init__(self, hidden: int, channels: int = 192) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            _Step(3, 24, 2), _Step(24, 48, 2), _Step(48, 48), _Step(48, 80, 2), _Block(80)
        )
        self.coarse = nn.Sequential(_Step(80, 128, 2), _Block(128), _Step(128, channels, 2))
        self.detector = nn.Linear(channels, SEEN)
        # only in training: what is where, more finely
        self.teacher = nn.Conv2d(80, 1 + NAMES, 1)
        #: What the decoder reads for what was seen, by view; see `name`.
        self.table = nn.Parameter(0.5 * torch.randn(2, SEEN, hidden))
        #: Says of which cell a token is, by view.
        self.place = nn.Parameter(0.6 * torch.randn(2, SIDE, SIDE, hidden))
        with torch.no_grad():
            # where something is speaks more softly than what it is; and from the start, a step to
            # the next cell looks like a step of the same length within one
            self.table[:, NAMES:] *= 0.4
            across = torch.arange(SIDE) - (SIDE - 1) / 2
            right, down = (WHERE * self.table[:, NAMES:]).unbind(1)
            self.place += (
                across[:, None] * right[:, None, None]
                + across[:, None, None] * (down[:, None, None])
            )
        self.sub_gn = nn.Parameter(torch.randn(1, 1, hidden))
        self.glb_gn = nn.Parameter(torch.randn(1, hidden))

    def name(self, words: Tensor) -> None:
        """Let each name begin as the sum of the decoder's tokens for its words.

        The decoder can copy words: so it can read a frame as it reads a text, from the start.

        Args:
            words: [NAMES, hidden].
        """
        with torch.no_grad():
            self.table[:, :NAMES] = words

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a frame's fine map [frames, 80, 12, 12] and what is in its cells.

        The latter is [frames, 9, SEEN]: the logits of names, then how far right and down of the
        cell's middle the thing is, in cells.
        """
        fine = self.fine(pixels)
        return fine, self.detector(self.coarse(fine).flatten(2).transpose(1, 2))

    def tokens(self, seen: Tensor) -> Tensor:
        """Return the tokens [frames, FRAME_TOKENS, hidden], rows ended by separators."""
        count = len(seen)
        likely = seen[..., :NAMES].sigmoid()
        where = seen[..., NAMES:] * likely.amax(-1, keepdim=True) * WHERE
        told = torch.cat([likely, where], -1)
        views = []
        for table, place in zip(self.table, self.place, strict=True):
            grid = (told @ table).view(count, SIDE, SIDE, -1) + place
            ends = self.sub_gn.expand(count, SIDE, -1).unsqueeze(2)
            views.append(torch.cat([grid, ends], 2).flatten(1, 2))
        between = self.glb_gn.expand(count, 1, -1)
        return torch.cat([views[0], between, views[1]], 1)


# The decoder --------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A matrix that may be rounded as the builder will round it, in the forward pass only."""

    rounding = False

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        weight = self.weight
        if Linear.rounding:
            weight = weight + (rounded(weight) - weight).detach()
        return functional.linear(x, weight)


def rounded(weight: Tensor, block: int = 32) -> Tensor:
    """Return weights in INT4, each block of a row with one scale.

    As onnxruntime's symmetric MatMulNBits quantizer (onnxruntime/core/mlas, q4_dq): the value that
    is farthest from 0 becomes -8.
    """
    blocks = weight.detach().view(len(weight), -1, block)
    most = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = most / -8
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((blocks / scale).round().clamp(-8, 7) * scale).view_as(weight)


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv_proj = Linear(shape.hidden, 3 * shape.hidden)
        self.o_proj = Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            each.view(batch, length, self.heads, -1).transpose(1, 2).float()
            for each in self.qkv_proj(x).chunk(3, -1)
        )
        with torch.autocast("cpu", enabled=False):  # in bfloat16 it is slower
            out = functional.scaled_dot_product_attention(
                _turned(q, turn), _turned(k, turn), v, mask
            )
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, hidden))


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class _Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up_proj = Linear(shape.hidden, 2 * shape.inner)
        self.down_proj = Linear(shape.inner, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(functional.silu(gate) * up)


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _Mlp(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=1e-5)

    def forward(
        self, x: Tensor, mask: Tensor, turn: tuple[Tensor, Tensor], wanted: Tensor | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, turn)
        if wanted is not None:
            x = x[wanted]
        return x + self.mlp(self.post_attention_layernorm(x))


class _Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)


class Decoder(nn.Module):
    """Phi-3's text graph."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = _Model(shape)
        self.lm_head = Linear(shape.hidden, shape.vocabulary)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # at first, every layer lets everything pass
            elif parameter.dim() == 2:
                # a token must stay the loudest voice in its own place, or nothing can be copied
                std = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std)

    def number(self, tokens: Tensor) -> None:
        """Let numbers begin as what their digits are worth, so that they can be compared.

        Args:
            tokens: [1000], those of 0 to 999.
        """
        number = torch.arange(len(tokens))
        digits = torch.stack([number // 100, number // 10 % 10, number % 10], 1)
        hidden = self.shape.hidden
        with torch.no_grad():
            self.model.embed_tokens.weight[tokens] = 0.6 * torch.randn(len(tokens), hidden) + (
                0.8 * (digits - 4.5) / 3 @ torch.randn(3, hidden)
            )

    def forward(
        self, embeds: Tensor, mask: Tensor, positions: Tensor, wanted: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last layer's states, normed, of the tokens that are wanted, [count, hidden].

        And what each layer was given, [batch, length, hidden].

        Args:
            embeds: [batch, length, hidden].
            mask: [batch, 1, length, length], true where one may look.
            positions: [batch, length].
            wanted: [batch, length], true where the next token is foretold.
        """
        half = self.shape.hidden // self.shape.heads // 2
        frequencies = 10000 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = positions[:, None, :, None] * torch.cat([frequencies, frequencies])
        turn = angles.cos(), angles.sin()
        x, given = embeds, []
        last = self.model.layers[-1]
        for layer in self.model.layers:
            given.append(x)
            x = layer(x, mask, turn, wanted if layer is last else None)
        return self.model.norm(x), given


class Watcher(nn.Module):
    """Asks the decoder, halfway up and only in training, what it makes of the frames so far.

    Questions alone say little about it, a whole scene in a word or two: it takes many thousand
    steps until frames are compared at all.
    """

    #: The layers that are given what the heads read: of cells, and of frames.
    CELLS, FRAMES = 3, 4

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cells = nn.Linear(hidden, len(CHANGES))
        #: What has happened, to what, since when, and in which frame we are.
        self.frames = nn.ModuleList(
            nn.Linear(hidden, n) for n in (len(EVENTS), 1 + NAMES, MOST_FRAMES, MOST_FRAMES)
        )
        #: How many there are of each shape and of each colour.
        self.counts = nn.Linear(hidden, (len(SHAPES) + len(COLOURS)) * (1 + MOST_THINGS))

    def forward(self, given: list[Tensor], frames: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the logits of all it asks.

        Args:
            given: what each layer was given.
            frames: [batch, length], true where a frame's token is.

        Returns:
            Of the cells in both views, [frames, 2, 9, changes]; of what has happened, each [frames,
            answers]; of counts, [frames, shapes and colours, 1 + MOST_THINGS].
        """
        cells = given[self.CELLS][frames].view(-1, FRAME_TOKENS, given[0].shape[-1])
        ends = given[self.FRAMES][frames].view_as(cells)[:, -1]
        places = [
            view * (FRAME_TOKENS // 2 + 1) + row * (SIDE + 1) + column
            for view in range(2) for row in range(SIDE) for column in range(SIDE)
        ]  # fmt: skip
        seen = cells[:, places].unflatten(1, (2, SIDE * SIDE))
        counts = self.counts(ends).unflatten(1, (-1, 1 + MOST_THINGS))
        return self.cells(seen), [head(ends) for head in self.frames], counts
