"""The stock way to ask a vision model: onnxruntime-genai's own `phi3v` pipeline, in a process.

Nothing of edged is in it: the model's folder as it was published, genai's own processor for the
pictures, one generator for the whole context. All three graphs get the threads that edged uses;
genai's default would be slower. The parent talks to it in lines of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.child import Child
from tests.bench.machine import Meter, memory_mb

#: Of a folder's configuration: the parts that are graphs.
_GRAPHS = ("embedding", "vision", "decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What a question about pictures took. Seconds."""

    tokens: int
    image_tokens: int
    #: Crops that the encoder saw, of all pictures, the global views and the padding included.
    crops: int
    #: Pictures to tensors: genai decodes, scales and cuts them.
    processor_s: float
    #: The encoder, the embedding and the whole prefill are one call.
    inputs_s: float
    #: From the pictures' bytes to the first token's text.
    first_s: float
    #: Of the tokens after the first.
    token_s: float
    text: str
    #: Of the process, from its start, weights included: the most it ever had.
    peak_mb: float


class Stock(Child):
    """The process, as the bench sees it."""

    def __init__(self, model: Path, *, threads: int, max_length: int) -> None:
        env = {"ORT_DISABLE_TELEMETRY": "1"}
        super().__init__("tests.bench.stock", "the stock pipeline", env=env)
        self._order = {"model": str(model), "threads": threads, "max_length": max_length}
        self.load_s = 0.0

    def greet(self) -> None:
        """Let it load the model."""
        self.load_s = self.ask(self._order)["load_s"]

    def look(self, paths: Sequence[Path], question: str, tokens: int) -> Looked:
        """Ask about these PNG files, greedily."""
        return Looked(
            **self.ask({"look": [str(p) for p in paths], "ask": question, "tokens": tokens})
        )

    def encode(self, path: Path) -> tuple[int, float]:
        """Run the encoder alone, by onnxruntime, on one picture; return its crops and seconds.

        The model is let go for it: nothing can be asked afterwards.
        """
        answer = self.ask({"encode": str(path)})
        return answer["crops"], answer["seconds"]


# In the process ---------------------------------------------------------------------------------


class _Pipeline:
    def __init__(self, model: str, threads: int, max_length: int) -> None:
        import onnxruntime_genai as og  # noqa: PLC0415  (the parent must not load it)

        config = og.Config(model)
        options = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": dict.fromkeys(_GRAPHS, options)}))
        self._folder, self._threads, self._max_length = Path(model), threads, max_length
        self._og = og
        self._model = og.Model(config)
        self._processor = self._model.create_multimodal_processor()

    def look(self, paths: list[str], question: str, tokens: int) -> Looked:
        og = self._og
        tags = "".join(f"<|image_{n}|>\n" for n, _ in enumerate(paths, 1))
        stream = self._processor.create_stream()
        began = time.perf_counter()
        images = og.Images.open(*paths)
        prompt = f"<|user|>\n{tags}{question}<|end|>\n<|assistant|>\n"
        inputs = self._processor(prompt, images=images)
        processed = time.perf_counter()
        ids, pixels = inputs["input_ids"].as_numpy(), inputs["pixel_values"].shape()
        params = og.GeneratorParams(self._model)
        params.set_search_options(max_length=self._max_length, do_sample=False)
        generator = og.Generator(self._model, params)
        generator.set_inputs(inputs)
        filled = time.perf_counter()
        texts: list[str] = []
        first_s = 0.0
        while len(texts) < tokens and not generator.is_done():
            generator.generate_next_token()
            texts.append(stream.decode(generator.get_next_tokens()[0]))
            first_s = first_s or time.perf_counter() - began
        return Looked(
            tokens=int(ids.size),
            image_tokens=int((ids < 0).sum()),
            crops=pixels[0] * pixels[1],
            processor_s=processed - began,
            inputs_s=filled - processed,
            first_s=first_s,
            token_s=(time.perf_counter() - began - first_s) / max(1, len(texts) - 1),
            text="".join(texts),
            peak_mb=memory_mb(os.getpid())["peak"],
        )

    def encode(self, path: str) -> dict[str, Any]:
        import onnxruntime  # noqa: PLC0415

        inputs = self._processor("<|image_1|>", images=self._og.Images.open(path))
        pixels, sizes = inputs["pixel_values"].as_numpy(), inputs["image_sizes"].as_numpy()
        del self._model, self._processor
        table = json.loads((self._folder / "genai_config.json").read_text())["model"]["vision"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        session = onnxruntime.InferenceSession(
            str(self._folder / table["filename"]), options, providers=["CPUExecutionProvider"]
        )
        names = table["inputs"]
        feeds = {names["pixel_values"]: pixels, names["image_sizes"]: sizes}
        session.run(None, {**feeds, names["pixel_values"]: pixels[:, :2], **_one_crop(names)})
        began = time.perf_counter()
        session.run(None, feeds)
        return {"crops": pixels.shape[1], "seconds": time.perf_counter() - began}


def _one_crop(names: dict[str, str]) -> dict[str, Any]:
    import numpy as np  # noqa: PLC0415

    return {names["image_sizes"]: np.array([[336, 336]], np.int64)}


def main() -> None:
    """Serve the parent; or, by hand, look at pictures once and print what it took."""
    if len(sys.argv) > 1:
        _by_hand()
        return

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), flush=True)

    began = time.perf_counter()
    pipeline = _Pipeline(**json.loads(sys.stdin.readline()))
    say({"load_s": time.perf_counter() - began})
    for line in sys.stdin:
        question = json.loads(line)
        if "encode" in question:
            say(pipeline.encode(question["encode"]))
        else:
            say(asdict(pipeline.look(question["look"], question["ask"], question["tokens"])))


def _by_hand() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stock", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PNG")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=4)
    given = parser.parse_args()
    with (
        Stock(given.model, threads=given.threads, max_length=given.max_length) as stock,
        Meter({"stock": stock.pid}) as meter,
    ):
        looked = asdict(stock.look(given.pictures, "What happens here?", given.tokens))
        looked["load_s"] = stock.load_s
        looked["encoder_crops"], looked["encoder_s"] = stock.encode(given.pictures[0])
    print(json.dumps(looked | {"use": meter.use.as_dict()}, indent=1))


if __name__ == "__main__":
    main()
