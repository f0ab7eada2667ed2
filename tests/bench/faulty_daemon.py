"""`edged run` with the engine that has no model, so that the engine is not what is measured."""

from __future__ import annotations

import sys
from functools import partial

from edged import app, cli
from edged.engine.faulty import faulty_command

if __name__ == "__main__":
    app.main = partial(app.main, engine_command=faulty_command())
    sys.exit(cli.main())
