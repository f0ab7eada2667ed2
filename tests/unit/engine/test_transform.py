from __future__ import annotations

import io
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from edged.engine.vision.decode import Picture, decode
from edged.engine.vision.transform import grid, grid_of, needed, tokens, transform
from edged.models.geometry import Geometry

MODEL = Path(__file__).resolve().parents[2] / "models" / "phi3v"
PHI = Geometry(
    crop=336,
    tokens_a_side=12,
    max_crops=16,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
#: Small, so that many pictures can be transformed.
TINY = Geometry(crop=8, tokens_a_side=2, max_crops=16, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))

sides = st.integers(1, 8000)
budgets = st.integers(1, 16)
Values = NDArray[np.float32]


def photo(width: int, height: int) -> Picture:
    """Smooth shapes, edges and noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    smooth = np.stack([np.sin(x / 37 + y / 91), np.cos(x / 11), np.sin(x * y / 9000)], -1)
    edges = ((x // 13 + y // 29) % 2)[..., None]
    noise = np.random.default_rng(width * 10_000 + height).random((height, width, 3))
    pixels = (127 + 60 * smooth + 40 * edges + 60 * (noise - 0.5)).clip(0, 255).astype(np.uint8)
    return Picture(Image.fromarray(pixels), width, height)


# Against genai ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor() -> Callable[[Picture], tuple[Values, list[int], int]]:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(MODEL))
    made = model.create_multimodal_processor()

    def process(picture: Picture) -> tuple[Values, list[int], int]:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG", compress_level=1)
        images = og.Images.open_bytes(buffer.getvalue())
        prompt = "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n"
        tensors: Any = made(prompt, images=images)
        values = np.array(tensors["pixel_values"].as_numpy())
        size = np.array(tensors["image_sizes"].as_numpy()).ravel().tolist()
        count = int(np.array(tensors["num_image_tokens"].as_numpy()).ravel()[0])
        return values.reshape(-1, 3, PHI.crop, PHI.crop), size, count

    return process


@pytest.mark.parametrize(
    "size",
    [
        (640, 480),
        (480, 640),
        (1920, 1080),
        (777, 3001),  # tall: Pillow by itself would scale in another order
        (1344, 1344),  # nothing to scale
        (1, 1),
        (2, 3),
        (1000, 3),
        (3, 1000),
        (5376, 1),  # the narrowest that the formula leaves a row
        (3999, 1000),  # a row is counted that is not needed
    ],
)
def test_with_all_crops_it_is_what_genai_does(
    size: tuple[int, int], processor: Callable[[Picture], tuple[Values, list[int], int]]
) -> None:
    picture = photo(*size)
    rows, columns = grid(*size, PHI.max_crops, PHI)

    crops = transform(picture, rows * columns, PHI)

    values, image_size, count = processor(picture)
    assert list(crops.image_size) == image_size
    assert PHI.tokens(rows, columns) == tokens(*size, PHI.max_crops, PHI) == count
    used = 1 + rows * columns
    assert crops.pixel_values.shape == (used, 3, 336, 336)
    assert not values[used:].any()
    std = np.array(PHI.std, np.float32).reshape(3, 1, 1)
    levels = np.abs(values[:used] - crops.pixel_values) * std * 255
    assert levels.max() < 0.001


# The grid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "budget", "expected"),
    [
        ((640, 480), 1, (1, 1)),
        ((640, 480), 3, (1, 1)),
        ((640, 480), 4, (2, 2)),
        ((640, 480), 16, (3, 4)),
        ((480, 640), 16, (4, 3)),
        ((1920, 1080), 2, (1, 1)),
        ((1920, 1080), 4, (2, 2)),
        ((1920, 1080), 6, (2, 3)),
        ((2000, 1000), 2, (1, 2)),
        ((8000, 1), 16, (1, 16)),
        ((1, 8000), 16, (16, 1)),
    ],
)
def test_grids(size: tuple[int, int], budget: int, expected: tuple[int, int]) -> None:
    assert grid(*size, budget, PHI) == expected


def test_tokens_of_common_frames() -> None:
    assert tokens(640, 480, 1, PHI) == 313
    assert tokens(640, 480, 4, PHI) == 757
    assert tokens(640, 480, 16, PHI) == 1921
    assert tokens(1920, 1080, 16, PHI) == 2353


@given(sides, sides, budgets)
@example(3999, 1000, 14)
@example(8000, 1, 1)
def test_a_grid_keeps_its_budget_and_can_be_found_again(w: int, h: int, budget: int) -> None:
    rows, columns = grid(w, h, budget, PHI)

    assert 1 <= rows * columns <= budget
    assert grid_of(w, h, rows * columns, PHI) == (rows, columns)
    assert tokens(w, h, budget, PHI) == PHI.tokens(rows, columns)
    assert grid(h, w, budget, PHI) == (columns, rows)


@given(sides, sides, st.integers(1, 15))
def test_a_larger_budget_never_gives_fewer_crops(w: int, h: int, budget: int) -> None:
    rows, columns = grid(w, h, budget, PHI)
    more_rows, more_columns = grid(w, h, budget + 1, PHI)

    assert more_rows >= rows
    assert more_columns >= columns


@given(sides, sides, budgets)
def test_the_needed_size_fills_the_grid(w: int, h: int, budget: int) -> None:
    rows, columns = grid(w, h, budget, PHI)

    wide, high = needed(w, h, rows * columns, PHI)

    assert (columns - 1) * 336 < wide <= columns * 336
    assert (rows - 1) * 336 < high <= rows * 336
    assert wide == columns * 336 if w >= h else high == rows * 336


def test_a_grid_that_a_picture_cannot_have_is_told() -> None:
    assert grid_of(640, 480, 2, PHI) is None
    assert grid_of(640, 480, 0, PHI) is None
    with pytest.raises(ValueError, match="cannot have 2 crops"):
        needed(640, 480, 2, PHI)
    with pytest.raises(ValueError, match="cannot have 2 crops"):
        transform(photo(640, 480), 2, PHI)


# The pixels -------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 60), budgets)
def test_the_grid_is_what_the_transform_gives(w: int, h: int, budget: int) -> None:
    rows, columns = grid(w, h, budget, TINY)

    crops = transform(photo(w, h), rows * columns, TINY)

    assert (crops.rows, crops.columns) == (rows, columns)
    assert crops.image_size == (rows * 8, columns * 8)
    assert crops.pixel_values.shape == (1 + rows * columns, 3, 8, 8)
    assert crops.pixel_values.dtype == np.float32
    assert np.isfinite(crops.pixel_values).all()


def test_one_colour_stays_that_colour_between_white_margins() -> None:
    picture = Picture(Image.new("RGB", (160, 80), (255, 51, 102)), 160, 80)

    crops = transform(picture, 1, TINY)

    colour = [(1.0 - 0.5) / 0.5, (0.2 - 0.25) / 0.25, 0.4 / 2]
    white = [1.0, 3.0, 0.5]
    only = crops.pixel_values[1]
    assert np.allclose(only[:, 2:6], np.reshape(colour, (3, 1, 1)), atol=1e-6)
    assert np.allclose(only[:, :2], np.reshape(white, (3, 1, 1)), atol=1e-6)
    assert np.allclose(only[:, 6:], np.reshape(white, (3, 1, 1)), atol=1e-6)
    assert np.allclose(crops.pixel_values[0], only, atol=1e-5)  # one crop is the whole


def test_crops_come_row_by_row() -> None:
    pixels = np.zeros((160, 160, 3), np.uint8)
    pixels[:80, 80:], pixels[80:, :80], pixels[80:, 80:] = 80, 160, 240
    picture = Picture(Image.fromarray(pixels), 160, 160)

    values = transform(picture, 4, TINY).pixel_values

    middles = values[1:, 0, 4, 4] * 0.5 + 0.5
    assert np.allclose(middles * 255, [0, 80, 160, 240])


def test_the_narrowest_picture_keeps_a_row() -> None:
    crops = transform(photo(8000, 1), 1, TINY)

    margins = crops.pixel_values[1, 2] == np.float32(0.5)
    assert (~margins).any(axis=1).sum() == 1


def test_a_picture_decoded_small_gives_nearly_the_same() -> None:
    buffer = io.BytesIO()
    large = photo(1600, 1200).image.resize((3200, 2400), Image.Resampling.BICUBIC)
    large.save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()

    small = decode(data, needed(3200, 2400, 4, PHI))

    assert small.image.size == (1600, 1200)
    std = np.array(PHI.std, np.float32).reshape(3, 1, 1)
    mine, whole = (transform(p, 4, PHI) for p in (small, decode(data)))
    assert mine.image_size == whole.image_size
    levels = np.abs(mine.pixel_values - whole.pixel_values) * std * 255
    assert levels.mean() < 1
    assert np.quantile(levels, 0.999) < 8


def test_no_more_memory_is_taken_than_said() -> None:
    picture = photo(1344, 1344)
    transform(picture, 16, PHI)
    tracemalloc.start()
    try:
        transform(picture, 16, PHI)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 28 * 1344 * 1344  # numpy's; Pillow's pictures are not seen here
