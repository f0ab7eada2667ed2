"""The vision encoder: a graph of its own, run by onnxruntime one frame at a time.

Memory. onnxruntime's CPU arena would keep the working memory of the largest frame for good, and
hand it to nobody (1.1 GB were seen after a frame of 16 crops); it is off, so that the memory of a
call is free again after it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import onnxruntime

from edged.engine import footprint, memory
from edged.engine.loading import Provider, SetupError, cuda_options
from edged.engine.session import Features
from edged.engine.vision.transform import Crops
from edged.models.folder import ModelError, ModelFolder
from edged.models.geometry import Geometry

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class BadFeatures(Exception):
    """The encoder gave something else than the features of the frame it was given."""


class Encoder:
    """A model's vision encoder.

    Args:
        folder: the model's, fused.
        geometry: of its image transform.
        threads: of the graph.
        provider: what it runs on.

    Raises:
        ModelError: onnxruntime cannot load it, or it has other inputs than we know.
        SetupError: onnxruntime cannot use the provider.
    """

    def __init__(
        self, folder: ModelFolder, geometry: Geometry, *, threads: int, provider: Provider
    ) -> None:
        table = folder.config["model"]["vision"]
        path = folder.path / table["filename"]
        self._hidden = folder.hidden_size
        self._measured = False
        #: MB that it works in for one view, a crop or the global view: the most that was seen, an
        #: estimate before.
        self.view_mb = memory.view_mb(geometry)
        #: Seconds that a view took in the last frame; None before the first.
        self.view_s: float | None = None
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), _options(threads), providers=_providers(folder, provider)
            )
        except Exception as error:
            raise ModelError(
                f"{path}: onnxruntime cannot load it: {' '.join(str(error).split())[:400]}",
                hint="fetch the model again",
            ) from error
        if provider == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise SetupError(
                "onnxruntime cannot use CUDA, it would encode frames on the processor",
                hint="install edged[cuda] again (on a Jetson: wheels built for its CUDA), or set "
                "model.provider to cpu",
            )
        inputs, outputs = table.get("inputs", {}), table.get("outputs", {})
        self._pixels = inputs.get("pixel_values", "pixel_values")
        self._sizes = inputs.get("image_sizes", "image_sizes")
        self._output = outputs.get("image_features", "image_features")
        self._dtypes = {each.name: _DTYPES.get(each.type) for each in self._session.get_inputs()}
        shapes = {each.name: each.shape for each in self._session.get_inputs()}
        #: Views that the graph takes for every frame, if it leaves no choice.
        self._views = next((n for n in shapes.get(self._pixels, ())[1:2] if type(n) is int), None)
        if {self._pixels, self._sizes} != set(self._dtypes) or None in self._dtypes.values():
            raise ModelError(
                f"{path}: its inputs are {', '.join(sorted(self._dtypes))}; "
                f"{self._pixels} and {self._sizes} are known"
            )

    def encode(self, crops: Crops, tokens: int) -> Features:
        """Return a frame's features, [tokens, hidden size], in the graph's own number type.

        Args:
            crops: the frame.
            tokens: how many there have to be.

        Raises:
            BadFeatures: there are more or fewer, or what came is no number.
        """
        pixels = crops.pixel_values[np.newaxis]
        if self._views is not None and pixels.shape[1] < self._views:
            filled = np.zeros((1, self._views, *pixels.shape[2:]), pixels.dtype)
            filled[:, : pixels.shape[1]] = pixels
            pixels = filled
        feeds = {
            self._pixels: pixels.astype(self._dtypes[self._pixels], copy=False),
            self._sizes: np.asarray([crops.image_size], self._dtypes[self._sizes]),
        }
        features = self._run(feeds, views=len(crops.pixel_values))
        if features.size != tokens * self._hidden:
            raise BadFeatures(
                f"the vision encoder gave {features.size / self._hidden:g} tokens for a frame of "
                f"{crops.rows} x {crops.columns} crops, which has {tokens}"
            )
        if not np.isfinite(features).all():
            raise BadFeatures(
                "the vision encoder gave no finite numbers for a frame of "
                f"{crops.rows} x {crops.columns} crops"
            )
        return features.reshape(tokens, self._hidden)

    def _run(self, feeds: dict[str, Any], views: int) -> Features:
        """Run the graph, and note what it cost."""
        if not self._measured:
            footprint.give_back()  # what loading has left
        telling = footprint.begin_peak()
        before = footprint.resident_mb()
        began = time.perf_counter()
        (features,) = self._session.run([self._output], feeds)
        self.view_s = (time.perf_counter() - began) / views
        if telling:
            worked_in = (footprint.peak_mb() - before) / views
            self.view_mb = max(worked_in, self.view_mb if self._measured else 0.0)
            self._measured = True
        return np.asarray(features)


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    # threads that wait for the next frame by spinning would take the decoder's cores
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _providers(folder: ModelFolder, provider: Provider) -> list[Any]:
    if provider == "cpu":
        return ["CPUExecutionProvider"]
    options = cuda_options(folder)
    options.pop("enable_cuda_graph", None)
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]
