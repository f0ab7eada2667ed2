"""Measured speeds: what the heartbeat tells, and what `eta_s` is learned from."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

from edged import payloads
from edged.jobs import Job
from edged.ports import Completed

#: How many recent jobs the medians are taken over.
RECENT = 20


class Speed:
    """What recent jobs cost on this box with this model."""

    def __init__(self) -> None:
        self._runs: deque[dict[str, float]] = deque(maxlen=RECENT)

    def learn(self, job: Job, completed: Completed) -> None:
        """Take in a finished run."""
        usage = [answer.usage for answer in completed.answers]
        timings = completed.timings
        prompt = sum(part.prompt_tokens - part.cached_tokens for part in usage)
        self._runs.append(
            {
                "prompt_tokens": prompt,
                "prompt_chars": max(1, prompt_chars(job)),
                "text_tokens": sum(part.prompt_tokens - part.image_tokens for part in usage),
                "image_tokens": sum(part.image_tokens for part in usage),
                "frames": job.frames,
                "look_s": (timings.decode_images_ms + timings.encode_ms) / 1e3,
                "tokens": sum(part.completion_tokens for part in usage),
                "prefill_s": timings.prefill_ms / 1e3,
                "generate_s": timings.generate_ms / 1e3,
                "ttft_ms": timings.ttft_ms,
                "tokens_per_second": timings.tokens_per_second,
            }
        )

    def _median(self, name: str) -> float | None:
        return median(run[name] for run in self._runs) if self._runs else None

    def typical_s(self) -> float | None:
        """Return what a job takes at the median, seconds; None before the first."""
        if not self._runs:
            return None
        return median(run["look_s"] + run["prefill_s"] + run["generate_s"] for run in self._runs)

    def estimate_s(self, job: Job) -> float | None:
        """Return what this job will likely take, in seconds; None before the first result.

        Prefill: the prompt's length in characters at the tokens a character and seconds a token
        seen, and likewise by its number of frames, which are also decoded and encoded. Generation:
        as many tokens as at the median, or `max_tokens` for each answer if that is less.
        """
        if not self._runs:
            return None
        prompt = prompt_chars(job) * self._per("text_tokens", "prompt_chars")
        prompt += job.frames * self._per("image_tokens", "frames")
        tokens = float(self._median("tokens") or 0.0)
        asked = job.request.get("max_tokens")
        if isinstance(asked, int):
            tokens = min(tokens, asked * job.answers)
        look = job.frames * self._per("look_s", "frames")
        prefill = prompt * self._per("prefill_s", "prompt_tokens")
        return look + prefill + tokens * self._per("generate_s", "tokens")

    def _per(self, cost: str, count: str) -> float:
        total = sum(run[count] for run in self._runs)
        return sum(run[cost] for run in self._runs) / total if total else 0.0

    def snapshot(self) -> payloads.Speed:
        """Return the heartbeat's `speed`."""
        prefill = self._per("prefill_s", "prompt_tokens")
        ttft = self._median("ttft_ms")
        # an answer of one token has no speed
        speeds = [run["tokens_per_second"] for run in self._runs if run["tokens_per_second"]]
        tokens = median(speeds) if speeds else None
        return {
            "ttft_ms_p50": None if ttft is None else round(ttft, 1),
            "prefill_tokens_per_second": round(1 / prefill, 2) if prefill else None,
            "tokens_per_second_p50": None if tokens is None else round(tokens, 2),
        }


def prompt_chars(job: Job) -> int:
    """Return the length of all text that a job puts in front of the model, in characters."""

    def count(value: Any) -> int:
        if isinstance(value, str):
            return len(value)
        if isinstance(value, list):
            return sum(count(item) for item in value)
        if isinstance(value, dict):
            return sum(count(item) for name, item in value.items() if name in {"content", "text"})
        return 0

    names = ("system", "prompt", "messages", "questions")
    return sum(count(job.request.get(name)) for name in names)
