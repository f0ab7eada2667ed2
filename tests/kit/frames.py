"""Frames for an engine that does not look into them: it answers `!frames` with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def marked(what: object, size: int = 200) -> bytes:
    """Return bytes that begin as a JPEG does and differ for each `what`."""
    return b"\xff\xd8\xff\xe0" + f"frame {what} ".encode().ljust(size - 4, b".")


def digest(frame: bytes) -> str:
    """Return what stands for a frame in the engine's answer."""
    return hashlib.sha256(frame).hexdigest()[:16]


def digests(frames: Iterable[bytes]) -> str:
    """Return what the engine answers to `!frames` if it was given these."""
    return " ".join(map(digest, frames))
