"""systemd's unit files, as a test reads them."""

from __future__ import annotations

import re
from pathlib import Path

SYSTEMD = Path(__file__).parents[2] / "systemd"
SERVICE = SYSTEMD / "edged.service"
DROP_INS = SYSTEMD / "edged.service.d"

_SPANS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}

#: Every assignment in order: (section, directive, value).
Lines = list[tuple[str, str, str]]


def read(*paths: Path) -> Lines:
    """Return what stands in a unit and its drop-ins."""
    found: Lines = []
    for path in paths:
        section = ""
        for text in path.read_text().splitlines():
            line = text.strip()
            if line.startswith("["):
                section = line.strip("[]")
            elif line and not line.startswith(("#", ";")):
                directive, separator, value = line.partition("=")
                assert separator, f"{path}: {line}"
                found.append((section, directive, value))
    return found


def last(lines: Lines, directive: str) -> str:
    """Return what a directive is set to."""
    return [value for _, name, value in lines if name == directive][-1]


def seconds(span: str) -> float:
    """Return a time span such as `10min` or `60`."""
    match = re.fullmatch(r"([\d.]+)([a-z]*)", span)
    assert match is not None, span
    return float(match[1]) * _SPANS[match[2]]
