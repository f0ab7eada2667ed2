"""The vision encoder with the small models' real graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edged.engine import footprint
from edged.engine.loading import SetupError
from edged.engine.vision.encoder import BadFeatures, Encoder
from edged.engine.vision.transform import Crops
from edged.models.folder import ModelError, ModelFolder, inspect
from edged.models.fuse import fuse
from edged.models.geometry import Geometry
from tests.kit.vision import STOCK_FP16, frames, fused_folder, stock_copy
from tests.kit.vision import Encoder as Reference

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(vision_folder: Path) -> ModelFolder:
    return inspect(vision_folder)


def geometry(folder: ModelFolder) -> Geometry:
    assert folder.fused is not None
    return folder.fused.geometry


def encoder(folder: ModelFolder, **changes: Any) -> Encoder:
    given: dict[str, Any] = {"threads": 1, "provider": "cpu"} | changes
    return Encoder(folder, geometry(folder), **given)


def crops(rows: int, columns: int) -> Crops:
    values = frames(1, rows=rows, columns=columns)[0]
    return Crops(values, (rows * 336, columns * 336), rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (2, 3)])
def test_a_frame_has_as_many_rows_as_the_geometry_says(
    folder: ModelFolder, rows: int, columns: int
) -> None:
    tokens = geometry(folder).tokens(rows, columns)
    found = encoder(folder).encode(crops(rows, columns), tokens)
    assert found.shape == (tokens, 64)
    expected = Reference(folder)(crops(rows, columns).pixel_values, rows=rows, columns=columns)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_graph_that_leaves_no_choice_of_views_is_given_as_many(tmp_path: Path) -> None:
    path = stock_copy(tmp_path)
    graph = path / "vision.onnx"
    model = onnx.load(graph, load_external_data=False)
    pixels = next(each for each in model.graph.input if each.name == "pixel_values")
    pixels.type.tensor_type.shape.dim[1].dim_value = 5
    graph.write_bytes(model.SerializeToString())
    fuse(path)
    fixed = inspect(path)
    assert geometry(fixed).max_crops == 4
    for rows, columns in ((1, 1), (1, 3), (2, 2)):
        frame = crops(rows, columns)
        padded = np.zeros((5, 3, 336, 336), np.float32)
        padded[: 1 + rows * columns] = frame.pixel_values
        found = encoder(fixed).encode(frame, geometry(fixed).tokens(rows, columns))
        expected = Reference(fixed)(padded, rows=rows, columns=columns)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_another_count_of_rows_is_never_passed_on(folder: ModelFolder) -> None:
    with pytest.raises(BadFeatures, match=r"313 tokens for a frame of 1 x 1 crops, which has 300"):
        encoder(folder).encode(crops(1, 1), 300)


def test_features_are_of_the_graphs_own_type(tmp_path: Path) -> None:
    half = inspect(fused_folder(tmp_path, STOCK_FP16))
    found = encoder(half).encode(crops(1, 2), geometry(half).tokens(1, 2))
    assert found.dtype == np.float16


def test_its_cost_is_known_after_a_frame(folder: ModelFolder) -> None:
    this = encoder(folder)
    assert (this.view_s, this.view_mb) == (None, 64.0)
    this.encode(crops(1, 1), 313)
    assert this.view_s is not None
    assert 0 < this.view_s < 5
    assert 0 <= this.view_mb < 50
    most = this.view_mb
    this.encode(crops(1, 1), 313)
    assert this.view_mb >= most


def test_where_the_kernel_does_not_tell_the_estimate_stays(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(footprint, "begin_peak", lambda: False)
    this = encoder(folder)
    this.encode(crops(1, 1), 313)
    assert this.view_mb == 64.0


def test_a_graph_with_other_inputs_is_refused(folder: ModelFolder) -> None:
    folder.config["model"]["vision"]["inputs"]["pixel_values"] = "pictures"
    try:
        with pytest.raises(ModelError, match=r"its inputs are image_sizes, pixel_values; pictures"):
            encoder(folder)
    finally:
        folder.config["model"]["vision"]["inputs"]["pixel_values"] = "pixel_values"


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_without_cuda_there_is_no_silent_fall_back(folder: ModelFolder) -> None:
    with pytest.raises(SetupError, match="cannot use CUDA"):
        encoder(folder, provider="cuda")


def test_this_process_is_measured() -> None:
    assert footprint.begin_peak()
    before = footprint.resident_mb()
    block = np.ones(100_000_000, np.uint8)  # never from what is free
    assert footprint.resident_mb() > before + 80
    peak = footprint.peak_mb()
    assert peak >= before + 80
    del block
    assert footprint.peak_mb() > peak - 10  # the kernel counts in batches
    assert footprint.begin_peak()
    assert footprint.peak_mb() < peak - 50


def test_a_kernel_that_does_not_tell_is_no_error(tmp_path: Path) -> None:
    assert footprint.resident_mb(proc=tmp_path) == 0.0
    assert not footprint.begin_peak(proc=tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tx\n")
    assert footprint.peak_mb(proc=tmp_path) == 0.0
