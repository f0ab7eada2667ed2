"""Decides how a model is loaded on this box, before any native library is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edged.engine import box, cuda
from edged.errors import EdgedError
from edged.models.folder import ModelFolder
from edged.models.record import FUSED_IDS, Fused

_CPU_DIST = "onnxruntime-genai"
_CUDA_DIST = "onnxruntime-genai-cuda"
#: Where a CUDA device shows: a card, a Jetson's own graphics.
_DEVICES = ("nvidia0", "nvhost-gpu", "nvgpu/igpu0/as", "nvmap")
_VERSIONS = (*(_CPU_DIST, _CUDA_DIST, "onnxruntime", "onnxruntime-gpu", "llguidance", "numpy"),)

Provider = Literal["cpu", "cuda"]


class SetupError(EdgedError):
    """This installation cannot run a model."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is installed, and whether a CUDA device is there."""

    cpu: bool
    cuda: bool
    importable: bool
    device: bool
    #: Why CUDA cannot work here although both are, if that is certain.
    unfit: str | None = None


def look(dev: Path = Path("/dev")) -> Setup:
    """Look at the installation; imports nothing that is native but a CUDA device's driver.

    A native wheel on a processor that it was not built for ends the process on import, so its mere
    presence is found out first.
    """
    with_cuda = _installed(_CUDA_DIST)
    device = any((dev / name).exists() for name in _DEVICES)
    return Setup(
        cpu=_installed(_CPU_DIST),
        cuda=with_cuda,
        importable=importlib.util.find_spec("onnxruntime_genai") is not None,
        device=device,
        unfit=cuda.unfit() if with_cuda and device else None,
    )


def choose_provider(wanted: Literal["auto", "cpu", "cuda"], setup: Setup) -> Provider:
    """Return what the model runs on.

    Raises:
        SetupError: nothing installed, two that exclude each other, or not what is wanted.
    """
    if setup.cpu and setup.cuda:
        raise SetupError(
            f"{_CPU_DIST} and {_CUDA_DIST} are both installed and overwrite each other's files",
            hint=f"pip uninstall {_CPU_DIST} {_CUDA_DIST}, then install edged[cpu] or edged[cuda]",
        )
    if not setup.importable:
        raise SetupError(
            "onnxruntime-genai is not installed",
            hint="pip install 'edged[cpu]', or 'edged[cuda]' on a box with CUDA",
        )
    if wanted == "cuda" and not setup.cuda:
        raise SetupError(
            f"model.provider is cuda, but {_CUDA_DIST} is not installed",
            hint="pip install 'edged[cuda]' (on a Jetson: a wheel built for its CUDA)",
        )
    if wanted == "cuda" and not setup.device:
        raise SetupError(
            "model.provider is cuda, but no CUDA device is there",
            hint="set model.provider to cpu, or give the service its devices "
            "(/dev/nvidia*, /dev/nvhost-*; a container: --runtime nvidia)",
        )
    if wanted == "cuda" and setup.unfit is not None:
        raise SetupError(setup.unfit, hint=cuda.HINT)
    if wanted != "auto":
        return wanted
    return "cuda" if setup.cuda and setup.device and setup.unfit is None else "cpu"


def choose_threads(wanted: int | None) -> int:
    """Return how many threads a graph gets: always said, because the default is one or all."""
    return box.cores() if wanted is None else wanted


def overlay(threads: int, fused: Fused | None = None) -> dict[str, Any]:
    """Return what is laid over the folder's own configuration.

    Args:
        threads: of each graph.
        fused: a vision model's fused graph, if it is to be loaded: genai then runs it as the text
            model that it is, and loads neither of the graphs that it stands for, nor the vision
            graph.
    """
    decoder: dict[str, Any] = {"session_options": {"intra_op_num_threads": threads}}
    if fused is None:
        return {"model": {"decoder": decoder}}
    decoder |= {"filename": fused.graph, "inputs": {"input_ids": FUSED_IDS}}
    nothing = {"filename": ""}
    return {"model": {"type": "phi3", "decoder": decoder, "embedding": nothing, "vision": nothing}}


def cuda_options(folder: ModelFolder) -> dict[str, str]:
    """Return the CUDA options that the folder asks for, and those we insist on."""
    wanted: dict[str, str] = {}
    session = folder.config["model"]["decoder"].get("session_options", {})
    for options in session.get("provider_options", ()):
        wanted.update(options.get("cuda", {}))
    # a captured graph has one shape; our prefills come in chunks of any size, and rewind
    return wanted | {"enable_cuda_graph": "0"}


def versions() -> dict[str, str]:
    """Return the versions of what runs the model."""
    found = {}
    for name in _VERSIONS:
        if _installed(name):
            found[name] = importlib.metadata.version(name)
    return found


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
