"""How a vision model cuts a frame into crops and how many tokens they are.

Everything here comes from the model's folder; see `edged.models.fuse` for where it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What a number may be, so that a frame's size stays one that a box can hold.
_CROPS = (16, 2048)
_TOKENS = (1, 64)
_MAX_CROPS = (1, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The numbers of one model's image transform."""

    #: Pixels a side of a crop.
    crop: int
    #: A crop is this many tokens a side.
    tokens_a_side: int
    #: Crops a frame, the global view not counted.
    max_crops: int
    #: By channel (red, green, blue), of values from 0 to 1.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def tokens(self, rows: int, columns: int) -> int:
        """Return the tokens of a frame cut into rows x columns crops, its global view included.

        The local crops and the global view are grids of tokens with a separator at each row's end,
        and one between the two: (rows * columns + 1) * t^2 + 1 + (rows + 1) * t, t tokens a side
        (microsoft/Phi-3.5-vision-instruct, processing_phi3_v.py).
        """
        side = self.tokens_a_side
        return (rows * columns + 1) * side * side + 1 + (rows + 1) * side

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON; `read` is the way back."""
        return {
            "crop": self.crop,
            "tokens_a_side": self.tokens_a_side,
            "max_crops": self.max_crops,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def read(cls, value: object) -> Geometry:
        """Return what `as_dict` wrote.

        Raises:
            ValueError: it is not that, or a number in it makes no sense.
        """
        names = {"crop", "tokens_a_side", "max_crops", "mean", "std"}
        if not isinstance(value, Mapping) or set(value) != names:
            raise ValueError(f"a geometry has {', '.join(sorted(names))}")
        return cls(
            crop=_whole(value, "crop", *_CROPS),
            tokens_a_side=_whole(value, "tokens_a_side", *_TOKENS),
            max_crops=_whole(value, "max_crops", *_MAX_CROPS),
            mean=_by_channel(value, "mean", -10.0),
            std=_by_channel(value, "std", 1e-3),
        )


def _whole(table: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = table[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} to {most}")
    return value


def _by_channel(table: Mapping[str, Any], name: str, least: float) -> tuple[float, float, float]:
    value = table[name]
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{name} is not a list of three numbers")
    for number in value:
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ValueError(f"{name} is not a list of three numbers")
        if not least <= number <= 10.0:
            raise ValueError(f"{name} has {number!r}, which is not from {least} to 10")
    red, green, blue = map(float, value)
    return red, green, blue
