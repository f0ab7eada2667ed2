"""The small model that ships with edged, for `edged selftest`, `edged demo` and tests.

It is a real INT4 Phi-3 graph with random weights: everything but sense. `model/README.md` says how
it was made.
"""

from pathlib import Path


def model_dir() -> Path:
    """Return the folder of the model that ships with edged."""
    return Path(__file__).parent / "model"
