"""Encoded frames, kept so that one seen again is neither decoded nor encoded again."""

from __future__ import annotations

from collections import OrderedDict

from edged.engine.session import Features

#: Whose frame, the SHA-256 of its bytes, its crops. Nothing is shared between clients: how fast an
#: answer comes would tell one of them what another has looked at.
Key = tuple[str | None, bytes, int]


class FrameCache:
    """The features used last, as many as fit.

    Args:
        most_mb: what they may take, MB (10^6 bytes).
    """

    def __init__(self, most_mb: float) -> None:
        self._most = most_mb * 1e6
        self._kept: OrderedDict[Key, Features] = OrderedDict()
        self._bytes = 0
        #: How often a frame needed no encoding; counted by who looks.
        self.hits = 0

    @property
    def size_mb(self) -> float:
        """What the kept frames take, MB."""
        return self._bytes / 1e6

    def of(self, client: str | None) -> set[tuple[bytes, int]]:
        """Return which frames of a client are kept: digest and crops."""
        return {(digest, crops) for owner, digest, crops in self._kept if owner == client}

    def get(self, key: Key) -> Features | None:
        """Return the features kept under a key, now the last used; None if there are none."""
        features = self._kept.get(key)
        if features is not None:
            self._kept.move_to_end(key)
        return features

    def put(self, key: Key, features: Features) -> None:
        """Keep features, and let the longest unused go for them; nothing if they are too large."""
        if features.nbytes > self._most:
            return
        self._drop(key)
        self._kept[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._most:
            self._drop(next(iter(self._kept)))

    def let_go(self, mb: float) -> None:
        """Let the longest unused go until so many MB are free of them, or nothing is kept."""
        least = self._bytes - mb * 1e6
        while self._kept and self._bytes > least:
            self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Keep nothing, and forget that anything was ever found."""
        self._kept.clear()
        self._bytes = self.hits = 0

    def _drop(self, key: Key) -> None:
        features = self._kept.pop(key, None)
        if features is not None:
            self._bytes -= features.nbytes
