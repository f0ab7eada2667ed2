"""`edged models pull` as a process, with the hub's own client, against a hub on loopback."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edged.models.folder import MANIFEST, inspect
from edged.models.pull import SOURCE
from tests.kit.daemon import ROOT
from tests.kit.hub import Hub, serve

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)

ID = "someone/phi-onnx"
COMMIT, NEWER = "a" * 40, "b" * 40
MODEL = {path.name: path.read_bytes() for path in (ROOT / "tests" / "models" / "phi3").iterdir()}
CODE = {"configuration_phi3.py": b"import os\n", "run.sh": b"#!/bin/sh\n", "lib.so": b"\x7fELF"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.repositories[ID] = {COMMIT: MODEL | CODE}
    hub.refs[ID] = {"main": COMMIT}
    with serve(hub):
        yield hub


def run(hub: Hub, to: Path, *more: str, repository: str = ID) -> subprocess.CompletedProcess[str]:
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("EDGED_", "HF_"))
    }
    env |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(to.parent / "hf")}
    return subprocess.run(
        [sys.executable, "-m", "edged", "models", "pull", repository, "--to", str(to), *more],
        cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All that a second run must leave as it is."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            path.read_bytes(),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_model_arrives_whole_recorded_and_without_code(hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "models" / "phi"
    done = run(hub, to)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path.name for path in to.iterdir()} == MODEL.keys() | {MANIFEST, SOURCE}
    assert all((to / name).read_bytes() == data for name, data in MODEL.items())
    assert json.loads((to / MANIFEST).read_text()) == {
        name: hashlib.sha256(data).hexdigest() for name, data in MODEL.items()
    }
    assert json.loads((to / SOURCE).read_text()) == {
        "repository": ID, "folder": "", "revision": "main", "commit": COMMIT,
    }  # fmt: skip
    assert inspect(to).type == "phi3"
    assert all(name in done.stdout for name in CODE)
    assert not any(path.endswith(name) for path in hub.paths("GET") for name in CODE)
    assert [path.name for path in to.parent.iterdir()] == ["phi"]


def test_a_second_run_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "phi"
    assert run(hub, to).returncode == 0
    before = contents(to)
    hub.requests.clear()
    done = run(hub, to)
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing changed" in done.stdout
    assert contents(to) == before
    assert not any("/resolve/" in path for _, path, _ in hub.requests)

    hub.requests.clear()  # nobody need be asked what a commit is
    assert run(hub, to, "--revision", COMMIT).returncode == 0
    assert hub.requests == []


def test_a_branch_that_moved_on_does_not_change_a_folder(hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "phi"
    assert run(hub, to).returncode == 0
    before = contents(to)
    hub.repositories[ID][NEWER] = MODEL | {"README.md": b"newer\n"}
    hub.refs[ID]["main"] = NEWER
    done = run(hub, to)
    assert done.returncode == 1
    assert COMMIT in done.stderr
    assert NEWER in done.stderr
    assert contents(to) == before


def test_a_fetch_that_was_cut_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "phi"
    large = {"vision.onnx.data": random.Random(1).randbytes(25_000_000)}  # kept in steps of 10 MiB
    hub.repositories[ID][COMMIT] = MODEL | large
    hub.cut_after = 16_000_000
    done = run(hub, to)
    assert done.returncode == 1
    assert "goes on where it was" in done.stderr
    assert not to.exists()
    hub.cut_after = None
    hub.requests.clear()
    done = run(hub, to)
    assert done.returncode == 0, done.stderr
    assert all((to / name).read_bytes() == data for name, data in (MODEL | large).items())
    asked = [wanted for how, path, wanted in hub.requests if path.endswith(".onnx.data") and wanted]
    assert asked
    assert all(int(wanted.removeprefix("bytes=").strip("-")) >= 10 << 20 for wanted in asked)
    assert [path.name for path in tmp_path.iterdir() if path.name != "hf"] == ["phi"]


@pytest.mark.parametrize("name", ["model.onnx.data", "genai_config.json"])  # sha256; git's hash
def test_a_file_that_changed_on_its_way_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    to = tmp_path / "phi"
    hub.corrupt = {name}
    done = run(hub, to)
    assert done.returncode == 1
    assert name in done.stderr
    assert not to.exists()
    hub.corrupt = set()
    assert run(hub, to).returncode == 0
    assert (to / name).read_bytes() == MODEL[name]


def test_a_configuration_that_loads_code_is_refused(hub: Hub, tmp_path: Path) -> None:
    config = json.loads(MODEL["genai_config.json"])
    config["model"]["decoder"]["session_options"]["custom_ops_library"] = "lib.so"
    hub.repositories[ID][COMMIT] = MODEL | {"genai_config.json": json.dumps(config).encode()}
    done = run(hub, tmp_path / "phi")
    assert done.returncode == 1
    assert "custom_ops_library" in done.stderr
    assert not (tmp_path / "phi").exists()


def test_one_of_several_models_has_to_be_named(hub: Hub, tmp_path: Path) -> None:
    folders = ("cpu/int4", "cuda/int4")
    hub.repositories[ID][COMMIT] = {
        f"{folder}/{name}": data for folder in folders for name, data in (MODEL | CODE).items()
    }
    done = run(hub, tmp_path / "phi")
    assert done.returncode == 1
    assert all(folder in done.stderr for folder in folders)
    assert run(hub, tmp_path / "phi", "--folder", "gpu").returncode == 1
    assert run(hub, tmp_path / "phi", "--folder", "cpu/int4/").returncode == 0
    assert {path.name for path in (tmp_path / "phi").iterdir()} == MODEL.keys() | {MANIFEST, SOURCE}
    assert not any("cuda/" in path for path in hub.paths("GET"))
    assert not (tmp_path / ".phi.part").exists()


def test_what_cannot_be_had_is_said_with_its_remedy(hub: Hub, tmp_path: Path) -> None:
    to = tmp_path / "phi"
    hub.gated.add("someone/gated")
    hub.repositories["someone/gated"] = {COMMIT: MODEL}
    hub.refs["someone/gated"] = {"main": COMMIT}
    hub.repositories["someone/empty"] = {COMMIT: {"README.md": b""}}
    hub.refs["someone/empty"] = {"main": COMMIT}
    for repository, more, said in (
        ("phi", (), "owner/name"),
        ("someone/none", (), "has no someone/none"),
        ("someone/gated", (), "HF_TOKEN"),
        ("someone/empty", (), "genai_config.json"),
        (ID, ("--revision", "nightly"), "no revision nightly"),
    ):
        done = run(hub, to, *more, repository=repository)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    assert not to.exists()
    (to / "mine").mkdir(parents=True)
    done = run(hub, to)
    assert done.returncode == 1
    assert "--to" in done.stderr
    assert [path.name for path in to.iterdir()] == ["mine"]


def test_a_hub_that_is_not_there(tmp_path: Path, unused_tcp_port: int) -> None:
    done = run(Hub(url=f"http://127.0.0.1:{unused_tcp_port}"), tmp_path / "phi")
    assert done.returncode == 1
    assert "run it again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "phi").exists()
