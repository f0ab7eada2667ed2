"""The small model that ships with edged, and the jobs that `edged selftest` tries it with.

It is a real INT4 model of Phi-3-vision's kind, trained on drawings of simple shapes and on sensor
reports; `model/README.md` says what it can do, `training` made it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from edged.errors import EdgedError

_HERE = Path(__file__).parent
#: The files of the model as they were when it was made, in the form of `sha256sum`. It lies outside
#: the folder: whatever damages that leaves it alone.
PIN = _HERE / "model.sha256"
_REMEDY = "install edged again: pip install --force-reinstall --no-deps edged"


def model_dir() -> Path:
    """Return the folder of the model that ships with edged."""
    return _HERE / "model"


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a folder, by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def pin(folder: Path | None = None, to: Path = PIN) -> None:
    """Write down what a model's files are; for whoever makes the model that ships."""
    found = digests(folder or model_dir())
    to.write_text("".join(f"{digest}  {name}\n" for name, digest in found.items()), "utf-8")


def pinned(at: Path = PIN) -> dict[str, str]:
    """Return the sha256 of each file of the model that ships, by its name.

    Raises:
        EdgedError: it is not written down.
    """
    try:
        lines = at.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EdgedError(f"{at} cannot be read: {error}", hint=_REMEDY) from None
    found = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if not found:
        raise EdgedError(f"{at} names no file", hint=_REMEDY)
    return found


def verify(folder: Path | None = None, at: Path = PIN) -> Path:
    """Return the folder of the model that ships, every file as it was made.

    Raises:
        EdgedError: a file is missing or another one; the message names it.
    """
    folder = folder or model_dir()
    for name, digest in pinned(at).items():
        path = folder / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            what = f"{path} cannot be read: {error.strerror}"
            raise EdgedError(
                f"the model that ships with edged is not whole: {what}", hint=_REMEDY
            ) from None
        if found != digest:
            raise EdgedError(
                f"the model that ships with edged is damaged: {path} has the sha256 {found}, "
                f"{digest} is right",
                hint=_REMEDY,
            )
    return folder
