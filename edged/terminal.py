"""Writing for people: an answer on standard output, notes about it on standard error."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

#: Control characters are shown as their pictures: what a model says must not steer a terminal.
_CONTROLS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    # The same for characters that reorder what stands around them.
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


def printable(text: str) -> str:
    """Return the text without anything that would act on a terminal, line ends and tabs apart."""
    return text.translate(_CONTROLS)


def one_line(text: str, limit: int = 200) -> str:
    """Return the text on one line, printable and not too long."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that understands how to move its cursor."""
    try:
        return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:  # closed
        return False


def width(default: int = 100) -> int:
    """Return the columns of the terminal."""
    return shutil.get_terminal_size((default, 24)).columns


class Screen:
    """Standard output and standard error of one program, which may be the same terminal.

    Streams are looked up when a screen is made, so that tests can put others in their place.
    """

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self.err = err or sys.stderr
        self.out_terminal = is_terminal(self.out)
        self.err_terminal = is_terminal(self.err)
        self.colours = self.out_terminal and not os.environ.get("NO_COLOR")
        self._within_line = False  # of the answer
        self._status = False

    def style(self, text: str, code: str) -> str:
        """Return the text in an SGR style, on a terminal that has colours."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text

    def bold(self, text: str) -> str:
        """Return the text in bold."""
        return self.style(text, "1")

    def dim(self, text: str) -> str:
        """Return the text so that it stands back."""
        return self.style(text, "2")

    def text(self, text: str) -> None:
        """Write a piece of the answer to standard output as it comes."""
        if not text:
            return
        self._wipe()
        self.out.write(printable(text) if self.out_terminal else text)
        self.out.flush()
        self._within_line = not text.endswith("\n")

    def end_line(self) -> None:
        """End the line of the answer, if one is open."""
        if self._within_line:
            self.out.write("\n")
            self.out.flush()
            self._within_line = False

    def line(self, text: str = "") -> None:
        """Write a line to standard output; it may be styled, so it must be printable already."""
        self._wipe()
        self.end_line()
        self.out.write(f"{text}\n")
        self.out.flush()

    def say(self, text: str) -> None:
        """Write a line to standard error."""
        self._wipe()
        if self.out_terminal and self.err_terminal:
            self.end_line()
        self.err.write(f"{printable(text)}\n")
        self.err.flush()

    def status(self, text: str) -> None:
        """Show a passing state on standard error, if it is a terminal; the next output wipes it."""
        if not self.err_terminal or (self._within_line and self.out_terminal):
            return
        self.err.write(f"\r\x1b[2K{one_line(text, max(10, width() - 1))}")
        self.err.flush()
        self._status = True

    def _wipe(self) -> None:
        if self._status:
            self.err.write("\r\x1b[2K")
            self.err.flush()
            self._status = False
