"""The small vision models of the tests: as published, and fused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.models.folder import ModelFolder
from edged.models.fuse import fuse

#: As published, never fused in place.
STOCK = Path(__file__).resolve().parents[1] / "models" / "phi3v"
STOCK_FP16 = STOCK.with_name("phi3v-fp16")

Array = NDArray[Any]


def stock_copy(to: Path, stock: Path = STOCK) -> Path:
    """A copy of a stock folder, under a folder of the test's."""
    return Path(shutil.copytree(stock, to / stock.name))


def fused_folder(to: Path, stock: Path = STOCK) -> Path:
    """A fused copy of a stock folder, under a folder of the test's."""
    path = stock_copy(to, stock)
    fuse(path)
    return path


def frames(count: int, *, rows: int = 1, columns: int = 1, seed: int = 1) -> Array:
    """Made-up frames as the vision graph takes them: [count, crops + 1, 3, 336, 336]."""
    draw = np.random.default_rng(seed)
    shape = (count, rows * columns + 1, 3, 336, 336)
    return draw.normal(size=shape).astype(np.float32)


class Encoder:
    """A folder's vision graph, run as it is by onnxruntime."""

    def __init__(self, folder: ModelFolder | Path) -> None:
        import onnxruntime  # noqa: PLC0415  (native)

        root = folder if isinstance(folder, Path) else folder.path
        model = json.loads((root / "genai_config.json").read_text())["model"]["vision"]
        self._session = onnxruntime.InferenceSession(
            str(root / model["filename"]), providers=["CPUExecutionProvider"]
        )
        kind = next(i.type for i in self._session.get_inputs() if i.name == "pixel_values")
        self.dtype: Any = np.float16 if kind == "tensor(float16)" else np.float32

    def __call__(self, pixels: Array, *, rows: int = 1, columns: int = 1) -> Array:
        """The features of a frame [crops + 1, 3, side, side], or of several of one size."""
        pixels = pixels if pixels.ndim == 5 else pixels[None]
        side = pixels.shape[-1]
        sizes = np.array([[rows * side, columns * side]] * len(pixels), np.int64)
        feed = {"pixel_values": pixels.astype(self.dtype), "image_sizes": sizes}
        features: Array = self._session.run(None, feed)[0]
        return features
