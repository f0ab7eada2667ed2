from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edged.engine.stops import StopFilter
from edged.engine.tokens import Detokenizer, Vocabulary

SHARED = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.engine
@SHARED
@given(data=st.data())
def test_deltas_make_up_the_text_and_never_cut_a_character(kit: Any, data: st.DataObject) -> None:
    size = len(kit.vocabulary.pieces)
    ids = data.draw(st.lists(st.integers(0, size + 40), max_size=40))
    detokenizer = Detokenizer(kit.vocabulary)
    deltas = [detokenizer.feed(i) for i in ids]
    last = detokenizer.flush()
    text = "".join(deltas) + last
    assert text == kit.vocabulary.decode(ids)
    whole = b"".join(kit.vocabulary.pieces[i] for i in ids if i < size)
    if kit.vocabulary.leading_space:
        whole = whole.removeprefix(b" ")
    assert text == whole.decode("utf-8", "replace")
    for upto in range(len(ids) + 1):
        # what is out so far is what the bytes so far say, without a cut character
        so_far = b"".join(kit.vocabulary.pieces[i] for i in ids[:upto] if i < size)
        if kit.vocabulary.leading_space:
            so_far = so_far.removeprefix(b" ")
        assert so_far.decode("utf-8", "replace").startswith("".join(deltas[:upto]))


@pytest.mark.engine
@SHARED
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581")))
def test_what_the_tokenizer_encodes_is_decoded_to_the_same(kit: Any, text: str) -> None:
    text = kit.prompts.harmless(text)
    role = kit.vocabulary.controls["<|assistant|>"]
    ids = kit.encode(f"<|assistant|>x{text}")
    assert ids[0] == role
    assert kit.vocabulary.decode(ids[1:]) == f"x{text}"


@pytest.mark.engine
def test_our_text_is_the_runtimes_own(kit: Any) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    tokenizer = og.Tokenizer(kit.model)
    text = 'The red car: 12 m/s, é 🔥 {"a": [1, 2]}\n  done.'
    ids = kit.encode(f"<|assistant|>{text}")
    assert tokenizer.decode(np.array(ids, np.int32)) == kit.vocabulary.decode(ids) == text


@pytest.mark.engine
def test_bytes_become_a_character_with_its_last_one(phi3: Any) -> None:
    byte = {piece: n for n, piece in enumerate(phi3.vocabulary.pieces) if len(piece) == 1}
    detokenizer = Detokenizer(phi3.vocabulary)
    fire = [byte[bytes([b])] for b in "🔥".encode()]
    assert [detokenizer.feed(i) for i in fire] == ["", "", "", "🔥"]
    assert detokenizer.feed(fire[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_one_leading_space_is_the_tokenizers_and_no_more() -> None:
    vocabulary = Vocabulary(pieces=(b" a", b" ", b""), controls={}, leading_space=True)
    assert vocabulary.decode([2, 0, 0]) == "a a"
    assert vocabulary.decode([1, 0]) == " a"


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def _oracle(text: str, stops: list[str]) -> tuple[str, bool]:
    """Look after each character whether a stop string has just ended."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.text("ab\n", max_size=4), max_size=12), STOPS)
def test_stop_strings_are_found_across_any_borders_and_never_let_out(
    pieces: list[str], stops: list[str]
) -> None:
    filter_ = StopFilter(stops)
    out = ""
    for piece in pieces:
        out += filter_.push(piece)
        # nothing that is out can still turn out to be a part of a stop string
        assert _oracle("".join(pieces), stops)[0].startswith(out)
        if filter_.hit:
            break
    else:
        out += filter_.flush()
    assert (out, filter_.hit) == _oracle("".join(pieces), stops)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopFilter(()).push("anything") == "anything"


def test_only_as_much_is_held_back_as_could_be_a_stop_string() -> None:
    filter_ = StopFilter(["END"])
    assert filter_.push("the E") == "the "
    assert filter_.push("N") == ""
    assert filter_.push("d.") == "ENd."
    assert filter_.push("EN") == ""
    assert filter_.flush() == "EN"
