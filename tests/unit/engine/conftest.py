"""The two small models' tokenizers, as the runtime itself sees them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edged.engine.prompts import STYLES, Prompts, Style
from edged.engine.tokens import Vocabulary, read_vocabulary
from edged.models.folder import inspect
from edged.ports import Turn

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = {
    "phi3": ROOT / "tests" / "models" / "phi3",
    "phi4-mini": ROOT / "tests" / "models" / "phi4-mini",
}


@dataclass(frozen=True)
class Kit:
    """A model's tokenizer, and what we make of it."""

    folder: Path
    model: Any
    encode: Callable[[str], list[int]]
    template: Callable[[Sequence[Turn]], str]
    vocabulary: Vocabulary
    style: Style
    prompts: Prompts


def _kit(name: str) -> Kit:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    og = pytest.importorskip("onnxruntime_genai", exc_type=ModuleNotFoundError)
    folder = FOLDERS[name]
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)

    def encode(text: str) -> list[int]:
        return [int(i) for i in tokenizer.encode(text)]

    def template(messages: Sequence[Turn]) -> str:
        return str(tokenizer.apply_chat_template(json.dumps(list(messages))))

    vocabulary = read_vocabulary(folder / "tokenizer.json")
    style = STYLES[inspect(folder).family]
    prompts = Prompts(encode, vocabulary, style)
    prompts.check(template)
    return Kit(folder, model, encode, template, vocabulary, style, prompts)


@pytest.fixture(scope="session", params=["phi3", "phi4-mini"])
def kit(request: pytest.FixtureRequest) -> Kit:
    return _kit(request.param)


@pytest.fixture(scope="session")
def phi3() -> Kit:
    return _kit("phi3")
