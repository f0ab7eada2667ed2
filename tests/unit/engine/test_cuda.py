"""What CUDA's files, driver and errors say; none of it needs a graphics processor."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edged.engine import cuda
from edged.engine.cuda import MACHINE, PTX, compute_capability, kernels, meaning, unfit
from edged.engine.loading import SetupError
from edged.models.folder import ModelError

Kernel = tuple[int, int]


def library(path: Path, *groups: list[Kernel], section: bytes = b".nv_fatbin") -> Path:
    """Write an ELF file that holds kernels as nvcc lays them down, with padding between groups."""
    data = b""
    for group in groups:
        entries = b"".join(
            struct.pack("<HHIQ", kind, 0x101, 64, 24) + struct.pack("<12xI32x", of) + b"\1" * 24
            for kind, of in group
        )
        data += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries + bytes(24)
    names = b"\0.shstrtab\0" + section + b"\0"
    body = 64 + len(data)
    table = (
        bytes(64)
        + struct.pack("<II16xQQ24x", 1, 3, body, len(names))
        + struct.pack("<II16xQQ24x", 11, 1, 64, len(data))
    )
    head = struct.pack("<5s35xQ10xHHH", b"\x7fELF\2", body + len(names), 64, 3, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.ljust(64, b"\0") + data + names + table)
    return path


def test_the_kernels_of_a_library_are_read(tmp_path: Path) -> None:
    built = [[(MACHINE, 89), (MACHINE, 90)], [(MACHINE, 121), (PTX, 120)]]
    found = kernels(library(tmp_path / "lib.so", *built))
    assert found == {(MACHINE, 89), (MACHINE, 90), (MACHINE, 121), (PTX, 120)}


def test_a_file_without_kernels_has_none(tmp_path: Path) -> None:
    assert kernels(library(tmp_path / "lib.so", [(MACHINE, 87)], section=b".text")) == set()
    (tmp_path / "other").write_bytes(b"no ELF file, but long enough to be read as one" * 9)
    assert kernels(tmp_path / "other") == set()


def test_a_damaged_library_is_no_endless_loop(tmp_path: Path) -> None:
    path = library(tmp_path / "lib.so", [(MACHINE, 87)])
    whole = path.read_bytes()
    for size in range(0, len(whole) - 24, 7):  # the last 24 bytes say nothing
        path.write_bytes(whole[:size])
        with pytest.raises(struct.error):
            kernels(path)
    path.write_bytes(whole[:64] + struct.pack("<IHHQ", 0xBA55ED50, 1, 0, 0) + whole[80:])
    kernels(path)  # sizes of 0 lead nowhere, and it ends all the same


# The driver: a stand-in, as there is no device on the machines that test this.


class Driver:
    """Answers as libcuda does."""

    def __init__(self, capability: tuple[int, int], error: int = 0) -> None:
        self.capability = capability
        self.error = error

    def cuInit(self, flags: int) -> int:  # noqa: N802 - the driver's names
        return self.error

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.capability[attribute - 75]
        return 0


def test_the_driver_says_what_the_processor_is() -> None:
    assert compute_capability(lambda _: Driver((8, 7))) == 87
    assert compute_capability(lambda _: Driver((12, 1))) == 121
    assert compute_capability(lambda _: Driver((8, 7), error=100)) is None


def test_without_a_driver_nothing_is_known() -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    assert compute_capability(missing) is None


@pytest.fixture(name="installed")
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where packages with CUDA lie."""

    def find_spec(name: str) -> importlib.machinery.ModuleSpec:
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / name)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return tmp_path


PUBLISHED = [(MACHINE, 89), (MACHINE, 90), (MACHINE, 120), (MACHINE, 121)]
"""What the Arm wheels of onnxruntime-gpu 1.31.1 hold."""


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        (PUBLISHED, 87, False),  # Orin
        (PUBLISHED, 110, False),  # Thor
        (PUBLISHED, 90, True),
        (PUBLISHED, 121, True),
        ([(MACHINE, 87)], 87, True),
        ([(MACHINE, 80)], 86, True),  # machine code serves later ones of its major
        ([(MACHINE, 80)], 90, False),
        ([(PTX, 80)], 110, True),
        ([(PTX, 90)], 87, False),
    ],
)
def test_a_library_fits_a_processor_or_not(
    installed: Path, monkeypatch: pytest.MonkeyPatch, built: list[Kernel], device: int, runs: bool
) -> None:
    library(installed / "onnxruntime/capi/libonnxruntime_providers_cuda.so", built)
    monkeypatch.setattr(cuda, "compute_capability", lambda: device)
    why = unfit()
    assert (why is None) is runs
    if built is PUBLISHED and not runs:
        assert why == (
            "the installed onnxruntime has kernels for compute capability 8.9, 9.0, 12.0, 12.1, "
            f"this box's graphics processor is {device // 10}.{device % 10}"
        )


def test_what_cannot_be_read_is_not_held_against_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "compute_capability", lambda: 87)
    assert unfit() is None  # no such file
    path = library(installed / "onnxruntime_genai/libonnxruntime-genai-cuda.so", [(MACHINE, 90)])
    path.write_bytes(path.read_bytes()[:-30])
    assert unfit() is None
    monkeypatch.setattr(cuda, "compute_capability", lambda: None)
    library(path, [(MACHINE, 90)])
    assert unfit() is None  # no device to compare with


# What onnxruntime-genai-cuda 0.18.0 and onnxruntime said; the first two were seen.


@pytest.mark.parametrize(
    ("text", "says", "helps"),
    [
        (
            "Failed to load library: libcublasLt.so.13: cannot open shared object file: No such …",
            "need libcublasLt.so.13, which is not here",
            "Jetson",
        ),
        (
            "CUDA error in Create - CUDA driver version is insufficient for CUDA runtime version",
            "the graphics driver is not here, or older",
            "--runtime nvidia",
        ),
        (
            "cudaErrorNoKernelImageForDevice:no kernel image is available for execution on the …",
            "no kernels for this box's graphics processor",
            "Jetson",
        ),
        ("CUDA failure 100: no CUDA-capable device is detected", "no device", "--runtime nvidia"),
    ],
)
def test_an_error_about_this_box_is_explained(text: str, says: str, helps: str) -> None:
    found = meaning(text)
    assert found is not None
    assert says in found[0]
    assert helps in found[1]


def test_an_error_about_the_model_is_left_to_others() -> None:
    assert meaning("Load model from model.onnx failed: Protobuf parsing failed.") is None


def test_a_box_that_cannot_is_not_taken_for_a_bad_model() -> None:
    genai = pytest.importorskip("edged.engine.genai")
    folder = SimpleNamespace(path="/models/phi")
    error = RuntimeError("Failed to load library: libcudart.so.13: cannot open shared object file")
    assert isinstance(genai._refused(folder, "cuda", error), SetupError)
    assert isinstance(genai._refused(folder, "cpu", error), ModelError)
