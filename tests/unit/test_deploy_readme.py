"""deploy/README.md says of every file how it was tried, or that it was not."""

from __future__ import annotations

import re
import subprocess

from tests.kit.daemon import ROOT

ROWS = re.findall(
    r"^\| (`.+`) \| .+ \| (.+) \|$", (ROOT / "deploy" / "README.md").read_text(), re.MULTILINE
)


def test_every_file_is_there_and_no_other() -> None:
    named = [file for files, _ in ROWS for file in re.findall(r"`([^`]+)`", files)]
    there = subprocess.run(
        ["git", "ls-files", "deploy", "systemd"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert sorted(named) == sorted(each for each in there if not each.endswith("README.md"))


def test_what_it_was_tried_by_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for _, tried in ROWS:
        commands = re.findall(r"`([^`]+)`", tried)
        assert commands or "not run" in tried
        for each in commands:
            if each.startswith("make "):
                assert f"\n{each.removeprefix('make ')}:" in makefile
            else:
                assert (ROOT / each).exists()
