"""What `edged schema config` prints: the settings as JSON Schema, as a TOML file, as a table.

All three are made from `edged.options`, so they cannot say anything else than what is read.
"""

from __future__ import annotations

import textwrap
from typing import Any

from edged.options import Entry, Settings, entries, sections
from edged.settings import toml_value

_WIDTH = 100


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the TOML file; `x-default` words a derived default."""
    schema = Settings.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part.pop("title", None)
        for entry in part["properties"].values():
            entry.pop("title", None)
            if "$ref" in entry:
                # A group's default repeats those of its fields, derived ones without their words.
                entry.pop("default", None)
            if "x-default" in entry:
                entry.pop("default", None)
            _without_null(entry)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edged settings",
        **schema,
    }


def _without_null(entry: dict[str, Any]) -> None:
    """Leave out null, which TOML has not: an absent value is how nothing is said."""
    kinds = [kind for kind in entry.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) == 1:
        entry.pop("anyOf")
        entry.update(kinds[0])
    if entry.get("default", ...) is None:
        entry.pop("default")


def config_toml() -> str:
    """Return a settings file with every setting described and commented out.

    Lines that begin with `#` and no space are settings at their default; those that begin with
    `#e.g. ` have no fixed default, what stands there is an example.
    """
    lines = ["# The settings of edged. A setting that stands here as a comment has that value."]
    section = ""
    for entry in entries().values():
        if entry.section != section:
            section = entry.section
            lines += ["", f"[{section}]", *_comment(_summary(sections()[section]))]
        lines += ["", *_comment(f"{entry.info.description} {_takes(entry)}")]
        if entry.default is not None:
            lines.append(f"#{entry.key} = {toml_value(entry.default)}")
        else:
            lines.append(f"#e.g. {entry.key} = {toml_value(entry.example)}")
    return "\n".join(lines) + "\n"


def config_markdown() -> str:
    """Return the reference of the settings: a table for each group."""
    lines: list[str] = []
    section: str | None = None
    for entry in entries().values():
        if entry.section != section:
            section = entry.section
            if section:
                lines += ["", f"### `{section}`", "", _summary(sections()[section])]
            lines += ["", "| name | takes | default | meaning |", "|---|---|---|---|"]
        cells = (f"`{entry.name}`", entry.expected, _default(entry), entry.info.description or "")
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines).strip() + "\n"


def _cell(text: str) -> str:
    return text if text.startswith("`") else text.replace("|", "\\|").replace("<", "\\<")


def _takes(entry: Entry) -> str:
    default = f" Default: {entry.derived}." if entry.derived else ""
    return f"Takes {entry.expected}.{default}"


def _default(entry: Entry) -> str:
    if entry.derived:
        return entry.derived
    return "absent" if entry.default is None else f"`{toml_value(entry.default)}`"


def _summary(group: type[Any]) -> str:
    return (group.__doc__ or "").strip()


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )
