"""Whether CUDA can work here: what the graphics processor is, what the libraries were built for.

A wheel with CUDA installs anywhere, lists its provider, and then may have no kernel for this
processor: so it is on a Jetson with the published ones. Both sides are looked up before a model is
loaded, and no library is imported for it: its kernels stand in its file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

#: The libraries that hold kernels: their package, and where in it.
_LIBRARIES = {
    "onnxruntime": "capi/libonnxruntime_providers_cuda.so",
    "onnxruntime_genai": "libonnxruntime-genai-cuda.so",
}
_DRIVER = "libcuda.so.1"
#: cuDeviceGetAttribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76

HINT = (
    "on a Jetson install wheels built for it (deploy/jetson in edged's repository), or set "
    "model.provider to cpu"
)


# This box ---------------------------------------------------------------------------------------


def unfit() -> str | None:
    """Return why the installed libraries cannot compute on this box; None if nothing speaks for it.

    The driver's library is loaded into this process.
    """
    device = compute_capability()
    if device is None:
        return None
    for package, name in _LIBRARIES.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            with suppress(OSError, struct.error):
                built = kernels(Path(folder) / name)
                if built and not any(_runs(kind, of, device) for kind, of in built):
                    return (
                        f"the installed {package} has kernels for compute capability "
                        f"{_listed({of for _, of in built})}, this box's graphics processor is "
                        f"{_listed({device})}"
                    )
    return None


def compute_capability(load: Callable[[str], Any] = ctypes.CDLL) -> int | None:
    """Return the first device's compute capability, 87 for 8.7; None if there is no telling."""
    try:
        driver = load(_DRIVER)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else 10 * major.value + minor.value


def _runs(kind: int, built_for: int, device: int) -> bool:
    """Return whether a kernel runs on a device: PTX on any later, machine code within a major."""
    if kind == PTX:
        return built_for <= device
    return built_for // 10 == device // 10 and built_for <= device


def _listed(capabilities: set[int]) -> str:
    return ", ".join(f"{each // 10}.{each % 10}" for each in sorted(capabilities))


# A library's kernels ----------------------------------------------------------------------------

#: Kinds of kernels: for the driver to translate, and machine code.
PTX, MACHINE = 1, 2

_SECTION = b".nv_fatbin"
_MAGIC = 0xBA55ED50


def kernels(path: Path) -> set[tuple[int, int]]:
    """Return the kernels of a library: their kind, and the compute capability they are for.

    Only headers are read: milliseconds for hundreds of MB.

    Raises:
        OSError, struct.error: it cannot be read, or ends in the middle.
    """
    found: set[tuple[int, int]] = set()
    with path.open("rb") as file:
        at, end = _section(file)
        while at < end:
            magic, _, header, size = _read(file, at, "<IHHQ")
            if magic != _MAGIC:
                at += 8  # padding
                continue
            entry, at = at + header, at + max(header + size, 8)
            while entry < at:
                kind, _, header, size = _read(file, entry, "<HHIQ")
                found.add((kind, *_read(file, entry + 28, "<I")))
                entry += max(header + size, 8)
            at = (at + 7) // 8 * 8
    return found


def _section(file: BinaryIO) -> tuple[int, int]:
    """Return where the kernels begin and end in an ELF file of 64 bits; (0, 0) if it has none."""
    if _read(file, 0, "<5s") != (b"\x7fELF\2",):
        return 0, 0
    (table,) = _read(file, 0x28, "<Q")
    width, count, names_at = _read(file, 0x3A, "<HHH")
    sections = [_read(file, table + each * width, "<I20xQQ") for each in range(count)]
    if not sections:
        return 0, 0
    _, names, _ = sections[names_at]
    for name, start, size in sections:
        file.seek(names + name)
        if file.read(len(_SECTION) + 1) == _SECTION + b"\0":
            return start, start + size
    return 0, 0


def _read(file: BinaryIO, at: int, form: str) -> tuple[Any, ...]:
    file.seek(at)
    return struct.unpack(form, file.read(struct.calcsize(form)))


# What the libraries say -------------------------------------------------------------------------


def meaning(text: str) -> tuple[str, str] | None:
    """Return what an error of a CUDA library means, and what helps, if it is about this box."""
    missing = re.search(r"(lib[\w+.-]+\.so[.\d]*): cannot open shared object file", text)
    if missing:
        return f"the installed CUDA libraries need {missing[1]}, which is not here", (
            f"install the version of CUDA or cuDNN that has it; {HINT}"
        )
    if "no kernel image" in text:
        return (
            "the installed CUDA libraries have no kernels for this box's graphics processor",
            HINT,
        )
    if "driver version is insufficient" in text:
        return "the graphics driver is not here, or older than the installed CUDA libraries", (
            f"install or update the driver (a container: --runtime nvidia); {HINT}"
        )
    if "no CUDA-capable device" in text:
        return "CUDA finds no device here", (
            "give the service its devices (a container: --runtime nvidia), or set model.provider "
            "to cpu"
        )
    return None
