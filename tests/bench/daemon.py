"""Runs the daemon as `edged run` does, from settings in JSON: `python -m tests.bench.daemon FILE`.

With `--faulty` its engine is the one without a model, so that the engine is not what is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edged import app, log
from edged.engine.faulty import faulty_command
from edged.settings import Settings


def main() -> int:
    """Run it until it is told to stop."""
    parser = argparse.ArgumentParser(prog="tests.bench.daemon")
    parser.add_argument("settings", type=Path)
    parser.add_argument("--faulty", action="store_true")
    options = parser.parse_args()
    settings = Settings.model_validate_json(options.settings.read_bytes())
    log.configure(settings.log)
    return app.main(settings, engine_command=faulty_command() if options.faulty else None)


if __name__ == "__main__":
    sys.exit(main())
