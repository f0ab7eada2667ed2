"""A part of the bench in a process of its own; parent and child talk in lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """The process, as the bench sees it; it ends with the `with` block.

    Args:
        module: of the program.
        name: for people, if it ends too early.
        arguments: of its command line.
        env: environment variables beyond our own.
    """

    def __init__(
        self, module: str, name: str, *arguments: str, env: Mapping[str, str] | None = None
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._name = name
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        return self._running.pid

    @property
    def _running(self) -> subprocess.Popen[str]:
        assert self._process is not None, f"{self._name} not started"
        return self._process

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._env,
        )
        self.greet()
        return self

    def greet(self) -> None:
        """Say and hear what comes before all else."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def say(self, line: dict[str, Any]) -> None:
        stdin = self._running.stdin
        assert stdin is not None
        stdin.write(json.dumps(line) + "\n")
        stdin.flush()

    def hear(self) -> dict[str, Any]:
        stdout = self._running.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with status {self._running.wait()}")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        self.say(line)
        return self.hear()
