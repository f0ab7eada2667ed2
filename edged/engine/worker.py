"""The engine process: `python -m edged.engine.worker --socket FD --parent PID`.

It is tethered to the daemon before anything large is imported: until then a daemon that is killed
would leave it behind. So this module, and what it imports, is small and from the standard library.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edged.engine.exits import EXIT_ORPHAN

if TYPE_CHECKING:
    from edged.engine.backend import Backend
    from edged.engine.wire import Pipe

_PR_SET_PDEATHSIG = 1
#: So that the kernel, short of memory, takes this process and not the daemon.
_OOM_SCORE_ADJ = 500


def main(
    argv: Sequence[str] | None = None,
    make_backend: Callable[[argparse.Namespace, Pipe], Backend] | None = None,
    parser: argparse.ArgumentParser | None = None,
) -> int:
    """Run an engine process until the daemon ends it; return its exit status."""
    parser = parser or argparse.ArgumentParser(prog="edged.engine.worker")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of our end")
    parser.add_argument("--parent", type=int, required=True, help="process id of the daemon")
    options = parser.parse_args(argv)
    if not tether(options.parent):
        return EXIT_ORPHAN
    settle()

    from edged.engine.serve import serve  # noqa: PLC0415  (large: only now)
    from edged.engine.wire import Pipe  # noqa: PLC0415

    pipe = Pipe(socket.socket(fileno=options.socket))
    try:
        return serve(pipe, lambda: (make_backend or _genai)(options, pipe))
    except (EOFError, BrokenPipeError):
        return EXIT_ORPHAN


def tether(parent: int) -> bool:
    """Have the kernel end this process with the daemon; return whether the daemon still lives.

    By the kernel and not by a thread of ours, because such a thread could not run while the model
    holds the GIL. The daemon may have died before this call, hence the look at our parent after it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


def settle() -> None:
    """Make this process what an engine process should be."""
    # systemd signals the whole group; when this process ends is the daemon's to say
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE_ADJ), "ascii")
    # a core file would hold prompts, and wear the card
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.enable()


def _genai(_options: argparse.Namespace, _pipe: Pipe) -> Backend:
    from edged.engine.genai import GenaiBackend  # noqa: PLC0415  (native libraries)

    return GenaiBackend()


if __name__ == "__main__":
    sys.exit(main())
