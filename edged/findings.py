"""What a check found, and how it is shown: `edged check`, with its exit codes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum

#: The area whose failures mean that the configuration is wrong.
CONFIGURATION = "configuration"

_EXIT_OK, _EXIT_WRONG, _EXIT_CONFIGURATION = 0, 1, 78
_COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "failed": "\x1b[31m"}
_INDENT = 10


class Status(StrEnum):
    """How a thing is: `warning` works now and should not stay."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. What is not ok has a remedy."""

    area: str
    name: str
    status: Status
    message: str
    remedy: str | None = None


def ok(area: str, name: str, message: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(area, name, Status.OK, message)


def warning(area: str, name: str, message: str, remedy: str) -> Finding:
    """Return a finding that something should not stay as it is."""
    return Finding(area, name, Status.WARNING, message, remedy)


def failed(area: str, name: str, message: str, remedy: str) -> Finding:
    """Return a finding that something is wrong."""
    return Finding(area, name, Status.FAILED, message, remedy)


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 78 if the configuration is wrong, 1 if anything else is, else 0."""
    wrong = [each for each in findings if each.status is Status.FAILED]
    if any(each.area == CONFIGURATION for each in wrong):
        return _EXIT_CONFIGURATION
    return _EXIT_WRONG if wrong else _EXIT_OK


def render_json(findings: Iterable[Finding]) -> str:
    """Return the findings as one JSON object: `ok`, `exit_status`, `findings`."""
    findings = list(findings)
    status = exit_status(findings)
    value = {"ok": status == 0, "exit_status": status, "findings": [asdict(f) for f in findings]}
    return json.dumps(value, indent=2, ensure_ascii=False)


def render_text(findings: Iterable[Finding], *, width: int = 100, colour: bool = False) -> str:
    """Return the findings for people, by area, remedies below, the count last."""
    findings = list(findings)
    lines: list[str] = []
    area = None
    for each in findings:
        if each.area != area:
            area = each.area
            lines += [*([""] if lines else []), area]
        label = f"  {each.status:<{_INDENT - 2}}"
        text = _wrap(f"{each.name}: {each.message}", width)
        if each.remedy:
            text += _wrap(f"-> {each.remedy}", width)
        lines.append(label + text[0][_INDENT:])
        lines += text[1:]
        if colour:
            at = len(lines) - len(text)
            painted = f"{_COLOURS[each.status]}{label}\x1b[0m"
            lines[at] = painted + lines[at][len(label) :]
    counts = {status: sum(f.status is status for f in findings) for status in Status}
    lines += ["", ", ".join(f"{count} {status}" for status, count in counts.items())]
    return "\n".join(lines)


def _wrap(text: str, width: int) -> list[str]:
    # What a broker or a file said must stay on its line, and must not steer the terminal.
    text = "".join(c if c.isprintable() else " " for c in text)
    indent = " " * _INDENT
    return textwrap.wrap(
        text,
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
