"""The documents say what the code does."""

import re
from pathlib import Path

from edged.asyncapi import document, topics_markdown
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


def test_the_protocols_topics_are_the_codes() -> None:
    told = "put the output of `edged schema asyncapi --format markdown` into PROTOCOL.md"
    assert f"\n\n{topics_markdown()}\n" in (ROOT / "PROTOCOL.md").read_text(), told


def test_the_protocol_names_every_code_as_what_it_comes() -> None:
    text = (ROOT / "PROTOCOL.md").read_text()
    rows = text[text.index("| code | as |") :].split("\n\n", 1)[0].splitlines()[2:]
    told: dict[str, set[str]] = {"refused": set(), "final": set()}
    for row in rows:
        _, codes, kinds, *_ = row.split("|")
        for kind in kinds.split(","):
            told[kind.strip()] |= set(re.findall(r"`(\w+)`", codes))
    assert told["refused"] | told["final"] == set(Code)
    schemas = document()["components"]["schemas"]
    for kind, name in {"refused": "Refused", "final": "Error"}.items():
        assert told[kind] == set(schemas[name]["properties"]["code"]["enum"]), kind


def test_the_protocol_names_every_event_its_qos_and_its_fields() -> None:
    text = (ROOT / "PROTOCOL.md").read_text()
    rows = text[text.index("| type | QoS | fields |") :].split("\n\n", 1)[0].splitlines()[2:]
    events = {row.split("|")[1].strip(" `"): row.split("|") for row in rows}
    made = document()
    for qos in (0, 1):
        messages = made["operations"][f"sendResponseQos{qos}"]["messages"]
        names = {message["$ref"].rsplit("/", 1)[1] for message in messages}
        assert {name for name, row in events.items() if row[2].strip() == str(qos)} == names
    for name, row in events.items():
        fields = set(made["components"]["schemas"][name.title()]["properties"])
        missing = fields - set(re.findall(r"`(\w+)`", row[3])) - {"v", "id", "type", "client"}
        assert missing == ({"answers"} if name == "result" else set()), "told below the table"


def test_the_protocol_names_every_field_of_what_is_retained() -> None:
    text = (ROOT / "PROTOCOL.md").read_text()
    schemas = document()["components"]["schemas"]
    for name, begin in {
        "Status": "`status`: `{", "Info": "`info`: `{", "Heartbeat": "`health`: `{",
        "CameraStatus": "`camera/<camera>/status`: `{",
    }.items():  # fmt: skip
        said = text[text.index(begin) + len(begin) :].split("}`", 1)[0]
        fields = set(schemas[name]["properties"])
        for part in schemas[name]["properties"].values():
            below = schemas.get(part.get("$ref", "").rsplit("/", 1)[-1], {})
            fields |= set(below.get("properties", {})) if name == "Heartbeat" else set()
        assert fields <= set(re.findall(r"\w+", said)), name
