"""From a picture to the vision encoder's input: a global view, and crops of a larger one.

Phi-3.5-V's HD transform. The picture is scaled to be a whole number of crops wide (a tall one:
high), as many as a budget of crops allows, and filled up with white to a whole number of crops the
other way. The model gets these crops and the whole, squeezed into one more crop.

Sources: `HD_transform` and `padding_336` in processing_phi3_v.py and image_processing_phi3_v.py of
microsoft/Phi-3.5-vision-instruct, and `phi3_hd_transform` in image_transforms_phi_3.hpp of
microsoft/onnxruntime-extensions, which is what onnxruntime-genai runs, always with 16 crops. The
two differ in the global view: there the reference takes every so many pixels (torch's bicubic
without smoothing), genai smooths as Pillow does. Here it is done as genai does: scaling with
Pillow's filters, the HD image in 8 bits, bilinear, the global view in floating point, bicubic,
after normalisation.

A picture so narrow that the formula leaves it no row of pixels (more than 336 : 1 at one crop of
336) keeps one; the sources end there with an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edged.engine.vision.decode import Picture
from edged.models.geometry import Geometry

_WHITE = 255


@dataclass(frozen=True, slots=True)
class Crops:
    """One frame as the vision encoder takes it."""

    #: [1 + rows * columns, 3, crop, crop], the global view first, then the crops row by row;
    #: channels red, green, blue, normalised.
    pixel_values: NDArray[np.float32] = field(repr=False)
    #: Height and width of the HD image, white margins included, pixels.
    image_size: tuple[int, int]
    rows: int
    columns: int


def grid(width: int, height: int, budget: int, geometry: Geometry) -> tuple[int, int]:
    """Return the rows and columns of crops that a picture gets for a budget of crops.

    There may be fewer crops than the budget. A budget of just those crops can, for rare sides
    (3.999 : 1 and the like), give still fewer: the formula counts a row that it then does not need.
    `grid_of` finds the grid of a known number of crops.

    Args:
        width: of the picture, pixels; more than 0, as all here.
        height: of the picture, pixels.
        budget: crops, the global view not counted.
        geometry: of the model.
    """
    ratio = _ratio(width, height)
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) / ratio) <= budget:
        scale += 1
    return _cells(width, height, scale, geometry)


def grid_of(width: int, height: int, crops: int, geometry: Geometry) -> tuple[int, int] | None:
    """Return the rows and columns of exactly so many crops; None if this picture cannot have them.

    For each picture there is at most one such grid.
    """
    for scale in range(1, crops + 1):
        rows, columns = _cells(width, height, scale, geometry)
        if rows * columns >= crops:
            return (rows, columns) if rows * columns == crops else None
    return None


def tokens(width: int, height: int, budget: int, geometry: Geometry) -> int:
    """Return the tokens of a picture for a budget of crops, its global view included."""
    return geometry.tokens(*grid(width, height, budget, geometry))


def needed(width: int, height: int, crops: int, geometry: Geometry) -> tuple[int, int]:
    """Return the width and height, pixels, to which `transform` will scale the picture.

    Raises:
        ValueError: the picture cannot have so many crops.
    """
    return _scaled(width, height, _scale(width, height, crops, geometry), geometry)


def transform(picture: Picture, crops: int, geometry: Geometry) -> Crops:
    """Return the encoder's input for a picture.

    Takes, at its peak, at most 28 bytes for each pixel of the HD image: 50 MB for 16 crops of 336,
    of which 24 MB are the result; and while the picture is scaled down, less than it takes itself.

    Args:
        picture: upright.
        crops: as `grid` has given them: rows times columns.
        geometry: of the model.

    Raises:
        ValueError: the picture cannot have so many crops.
    """
    scale = _scale(picture.width, picture.height, crops, geometry)
    rows, columns = _cells(picture.width, picture.height, scale, geometry)
    side = geometry.crop
    width, height = _scaled(picture.width, picture.height, scale, geometry)
    left, top = (columns * side - width) // 2, (rows * side - height) // 2

    large = np.full((rows * side, columns * side, 3), _WHITE, np.uint8)
    # in two steps: Pillow may choose the other order, which rounds differently
    squeezed = picture.image.resize((width, picture.image.height), Image.Resampling.BILINEAR)
    large[top : top + height, left : left + width] = np.asarray(
        squeezed.resize((width, height), Image.Resampling.BILINEAR), np.uint8
    )
    del squeezed
    values = np.empty((1 + rows * columns, 3, side, side), np.float32)
    for channel in range(3):
        plane = large[:, :, channel].astype(np.float32)
        plane /= np.float32(255)
        plane -= np.float32(geometry.mean[channel])
        plane /= np.float32(geometry.std[channel])
        values[0, channel] = np.asarray(
            Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC), np.float32
        )
        cut = plane.reshape(rows, side, columns, side).swapaxes(1, 2)
        values[1:, channel].reshape(rows, columns, side, side)[:] = cut
    return Crops(values, (rows * side, columns * side), rows, columns)


def _ratio(width: int, height: int) -> float:
    """Return the longer side over the shorter.

    A float, as in the sources: exact arithmetic would cut some pictures otherwise than they do.
    """
    return max(width, height) / min(width, height)


def _scaled(width: int, height: int, scale: int, geometry: Geometry) -> tuple[int, int]:
    """Return the width and height of the picture, its longer side so many crops long."""
    longer = scale * geometry.crop
    shorter = max(1, int(longer / _ratio(width, height)))
    return (longer, shorter) if width >= height else (shorter, longer)


def _cells(width: int, height: int, scale: int, geometry: Geometry) -> tuple[int, int]:
    """Return the rows and columns that the scaled picture, filled up with white, has."""
    wide, high = _scaled(width, height, scale, geometry)
    return math.ceil(high / geometry.crop), math.ceil(wide / geometry.crop)


def _scale(width: int, height: int, crops: int, geometry: Geometry) -> int:
    cells = grid_of(width, height, crops, geometry)
    if cells is None:
        raise ValueError(f"a picture of {width} x {height} cannot have {crops} crops")
    return max(cells)
