from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edged.engine.guidance import MAX_DEPTH, MAX_SCHEMA, Guidance
from edged.errors import Code, JobFailed
from edged.models.folder import inspect

pytestmark = pytest.mark.engine


@pytest.fixture(scope="session")
def guidance(kit: Any) -> Guidance:
    folder = inspect(kit.folder)
    return Guidance(kit.folder / "tokenizer.json", folder.vocab_size, folder.eos_ids)


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """A web server that notes what is asked of it."""
    seen: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type":"string"}')

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


def say(guidance: Guidance, kit: Any, schema: Any, text: str) -> tuple[bool, bool]:
    """Walk a text through a schema; return whether all of it could come, and then the end."""
    constraint = guidance.compile(schema)
    size = inspect(kit.folder).vocab_size
    ends = list(inspect(kit.folder).eos_ids)
    rest = text.encode()
    while rest:
        logits = np.zeros(size, np.float32)
        constraint.narrow(logits)
        allowed = [int(token) for token in np.flatnonzero(np.isfinite(logits))]
        pieces = [(kit.vocabulary.pieces[token], token) for token in allowed if token not in ends]
        fitting = [(len(piece), token) for piece, token in pieces if rest.startswith(piece)]
        if not fitting:
            return False, False
        length, token = max(fitting)
        assert length > 0
        constraint.accept(token)
        rest = rest[length:]
    logits = np.zeros(size, np.float32)
    constraint.narrow(logits)
    return True, bool(np.isfinite(logits[ends]).all())


OBJECT = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "possible", "complete"),
    [
        ('{"n":12}', True, True),
        ('{"n":12,"s":"a"}', True, True),
        ('{"n":12', True, False),
        ('{"n": 12}', False, False),
        ('{ "n":12}', False, False),
        ('{"n":1.5}', False, False),
        ('{"x":1}', False, False),
        (" {", False, False),
    ],
)
def test_only_what_the_schema_allows_can_come(
    guidance: Guidance, kit: Any, text: str, possible: bool, complete: bool
) -> None:
    assert say(guidance, kit, OBJECT, text) == (possible, complete)


def test_a_schema_cannot_loosen_the_guidance(guidance: Guidance, kit: Any) -> None:
    loose = {**OBJECT, "x-guidance": {"whitespace_flexible": True, "lenient": True}}
    assert say(guidance, kit, loose, '{ "n":1}') == (False, False)


def test_true_is_any_json(guidance: Guidance, kit: Any) -> None:
    assert say(guidance, kit, True, "[1,null]") == (True, True)


def test_after_the_last_brace_nothing_more_can_come(guidance: Guidance, kit: Any) -> None:
    constraint = guidance.compile(OBJECT)
    byte = {piece: n for n, piece in enumerate(kit.vocabulary.pieces) if len(piece) == 1}
    for raw in b'{"n":1}':
        assert not constraint.finished
        constraint.accept(byte[bytes([raw])])
    assert constraint.finished


deep: dict[str, Any] = {}
for _ in range(MAX_DEPTH):
    deep = {"properties": {"a": deep}}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (False, "nothing satisfies"),
        ({"type": "nope"}, "nope"),
        ({"type": 5}, "is not valid under any of the given schemas"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        (deep, f"more than {MAX_DEPTH} levels"),
        ({"enum": ["x" * MAX_SCHEMA]}, "longer than"),
    ],
    ids=range(8),
)
def test_a_schema_that_cannot_be_used_is_refused_in_one_short_line(
    guidance: Guidance, schema: Any, says: str
) -> None:
    with pytest.raises(JobFailed) as caught:
        guidance.compile(schema)
    assert caught.value.code is Code.INVALID
    assert says in caught.value.message
    assert len(caught.value.message) <= 300
    assert "\n" not in caught.value.message


def test_nothing_is_fetched_for_a_schema(
    guidance: Guidance, requests: tuple[str, list[str]]
) -> None:
    address, seen = requests
    for schema in (
        {"$ref": f"{address}/schema.json"},
        {"$schema": f"{address}/meta.json", "type": "string"},
        {"$id": f"{address}/me.json", "$ref": "other.json"},
        {"type": "string", "$defs": {"x": {"$ref": f"{address}/unused.json"}}},
    ):
        with contextlib.suppress(JobFailed):
            guidance.compile(schema).value('"x"')
    assert seen == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"n":', "no whole JSON"),
        ("", "no whole JSON"),
        ('{"n":"x"}', "does not satisfy"),
        ("[" * 5000, "no whole JSON"),
        ('{"n":NaN}', "no whole JSON"),
        ('{"n":1e999}', "cannot hold"),
        ('{"n":1,"s":"\\ud800"}', "cannot hold"),
        ('{"n":' + "9" * 5000 + "}", "no whole JSON"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_bad_output(
    guidance: Guidance, text: str, says: str
) -> None:
    with pytest.raises(JobFailed) as caught:
        guidance.compile(OBJECT).value(text)
    assert caught.value.code is Code.BAD_OUTPUT
    assert says in caught.value.message
    assert len(caught.value.message) <= 300


def test_a_pattern_that_would_be_matched_for_hours_is_not(
    guidance: Guidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.engine.guidance._CHECK_S", 0.2)
    constraint = guidance.compile({"type": "string", "pattern": "^(a+)+b$"})
    with pytest.raises(JobFailed, match="too long to check") as caught:
        constraint.value(json.dumps("a" * 60))
    assert caught.value.code is Code.INVALID
    assert guidance.compile(OBJECT).value('{"n":1}') == {"n": 1}


def test_a_good_answer_is_given_as_a_value(guidance: Guidance) -> None:
    assert guidance.compile(OBJECT).value(json.dumps({"n": 3, "s": "b"})) == {"n": 3, "s": "b"}


def test_a_token_that_the_schema_forbids_is_bad_output(guidance: Guidance, kit: Any) -> None:
    constraint = guidance.compile(OBJECT)
    with pytest.raises(JobFailed) as caught:
        constraint.accept(kit.encode("<|assistant|>hello")[-1])
    assert caught.value.code is Code.BAD_OUTPUT
