"""The documents say what the code does."""

import re
from pathlib import Path

from edged.errors import Code
from edged.protocol import CancelRequest, TextRequest, VisionRequest
from edged.schema import config_markdown

ROOT = Path(__file__).parents[2]


def test_the_settings_reference_is_the_codes() -> None:
    assert (ROOT / "SETTINGS.md").read_text().endswith(config_markdown()), "run `make docs`"


def test_the_protocol_names_every_field_of_a_request() -> None:
    text = (ROOT / "PROTOCOL.md").read_text()
    requests = text[text.index("## Requests") : text.index("## Events")]
    rows = re.findall(r"^\| (`.+?`) \|", requests, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    models = (TextRequest, VisionRequest, CancelRequest)
    assert named == {name for model in models for name in model.model_fields}


def test_the_protocol_names_every_code() -> None:
    text = (ROOT / "PROTOCOL.md").read_text()
    rows = text[text.index("| code | as |") :].split("\n\n", 1)[0]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows.splitlines())))
    assert named == set(Code)
