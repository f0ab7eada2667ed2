"""Stop strings in a stream: found across the borders of tokens, and never let out."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Lets text through up to the first stop string.

    The first is the one that ends first, whatever pieces the text comes in; of those that end
    together, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        #: A stop string has come; nothing more is let through.
        self.hit = False

    def push(self, text: str) -> str:
        """Add text; return what surely stands before any stop string."""
        if not self._stops or self.hit:
            return "" if self.hit else text
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.hit = True
            self._held = ""
            return held[: min(found)[1]]
        keep = max(_overlap(held, stop) for stop in self._stops)
        cut = len(held) - keep
        self._held = held[cut:]
        return held[:cut]

    def flush(self) -> str:
        """Return what was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
