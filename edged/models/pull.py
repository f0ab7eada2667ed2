"""`edged models pull`: a model's folder from the Hugging Face hub, whole and checked or not at all.

A revision is pinned to the commit it stands for before the first byte is fetched. Files are fetched
beside the folder they will become, so that a fetch that was ended goes on where it was; each is
compared with the hash the hub has of it, and the folder is inspected, before it gets its name. Only
what onnxruntime-genai reads is fetched: no code, whatever else a repository holds.
"""

from __future__ import annotations

import fcntl
import fnmatch
import glob
import hashlib
import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edged.models.folder import (
    CONFIG,
    MANIFEST,
    MAX_CONFIG,
    ModelError,
    ModelFolder,
    inspect,
    read_object,
)
from edged.models.record import digest

#: Says where a folder came from.
SOURCE = "edged-source.json"

#: The files of a model's folder that are fetched.
WANTED = (
    *("*.onnx", "*.onnx.data", "*.onnx_data"),
    *(CONFIG, "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    *("LICENSE*", "NOTICE*", "README.md"),
)
#: Bytes that a disk must have left after a fetch.
_SPARE = 100 << 20
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_AGAIN = "run it again: it goes on where it was"


class PullError(ModelError):
    """A model folder that cannot be fetched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a folder came from; written into it."""

    repository: str
    #: The part of the repository that holds the model; "": all of it.
    folder: str
    revision: str
    commit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it."""

    model: ModelFolder
    source: Source
    #: Whether anything was fetched; a folder that is there and whole is left alone.
    changed: bool
    #: Bytes of the model's files.
    size: int = 0
    #: Files of the repository's folder that were not fetched.
    left_out: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _File:
    """A file as the hub has it."""

    name: str
    size: int
    #: sha256 of a large file; of the others git's own hash is known.
    sha256: str | None
    blob: str


def pull(
    repository: str, to: Path, *, folder: str | None = None, revision: str = "main"
) -> Outcome:
    """Fetch a model's folder; do nothing if it is there.

    Args:
        repository: its id, `owner/name`.
        to: the folder to make.
        folder: the folder in the repository; None: the only one with a `genai_config.json`.
        revision: a commit, a tag or a branch.

    Raises:
        PullError: it could not be fetched, or is not what it has to be.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise PullError(f"{repository!r} is no id of a repository", hint="write owner/name")
    if folder is not None:
        folder = _part(PurePosixPath(folder.strip("/")))
    to = to.absolute()
    there = _there(to, repository, folder)
    if there and revision == there.commit:  # nobody has to be asked
        return _unchanged(to, there)
    commit, listed = _listing(repository, revision)
    if there:
        if there.commit != commit:
            raise PullError(
                f"{to} is {repository} at {there.commit}, and {revision} is {commit} now",
                hint="give the new one a folder of its own, with --to",
            )
        return _unchanged(to, there)
    folder = _choose(repository, folder, listed)
    files, left_out = _wanted(folder, listed)
    source = Source(repository=repository, folder=folder, revision=revision, commit=commit)
    with _stage(to) as stage:
        inside = stage / folder
        _room(stage, files, inside)
        _fetch(source, files, stage)
        _verify(files, inside)
        model = _finish(source, files, inside, to)
        shutil.rmtree(stage, ignore_errors=True)  # gone already, if it is what was renamed
    size = sum(file.size for file in files)
    return Outcome(model=model, source=source, changed=True, size=size, left_out=left_out)


# What is there already ----------------------------------------------------------------------------


def _there(to: Path, repository: str, folder: str | None) -> Source | None:
    """Return what `to` was fetched from, if it is there.

    Raises:
        PullError: it is something else.
    """
    if not os.path.lexists(to):
        return None
    other = PullError(
        f"{to} is there and is not {repository}", hint="name another folder with --to"
    )
    if not (to / SOURCE).is_file():
        raise other
    value = read_object(to, SOURCE, MAX_CONFIG)
    try:
        source = Source(**value)
    except TypeError:
        raise other from None
    if source.repository != repository or folder not in (None, source.folder):
        raise other
    return source


def _unchanged(to: Path, source: Source) -> Outcome:
    return Outcome(model=inspect(to), source=source, changed=False)


# What the hub has ---------------------------------------------------------------------------------


def _hub() -> Any:
    """Return the hub's client, which is an extra.

    Raises:
        PullError: it is not installed.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        importlib.import_module("huggingface_hub.errors")
        return importlib.import_module("huggingface_hub")  # reads the environment
    except ImportError as error:
        raise PullError(
            f"fetching needs a package that is not installed: {error.name or error}",
            hint="pip install 'edged[pull]'",
        ) from None


def _listing(repository: str, revision: str) -> tuple[str, list[_File]]:
    """Return the commit a revision stands for, and the files it has."""
    hub = _hub()
    with _explained(repository, revision):
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise PullError(f"{repository}: the hub names no commit for {revision}")
    files = [
        _File(
            file.rfilename,
            file.size or 0,
            file.lfs.sha256 if file.lfs else None,
            file.blob_id or "",
        )
        for file in info.siblings or ()
    ]
    return info.sha, files


def _choose(repository: str, folder: str | None, listed: Sequence[_File]) -> str:
    """Return the one folder of the repository that is meant."""
    found = sorted(
        _part(path.parent)
        for path in (PurePosixPath(file.name) for file in listed)
        if path.name == CONFIG and ".." not in path.parts and not path.is_absolute()
    )
    if folder in found:
        return folder
    if folder is None and len(found) == 1:
        return found[0]
    if not found:
        raise PullError(
            f"{repository}: no folder with a {CONFIG}",
            hint="take a repository made for onnxruntime-genai; their names end in -onnx",
        )
    names = ", ".join(name or "." for name in found)
    if folder is None:
        raise PullError(f"{repository} holds several models", hint=f"add --folder, one of: {names}")
    raise PullError(f"{repository} has no model in {folder or '.'}", hint=f"it has: {names}")


def _part(path: PurePosixPath) -> str:
    """Return a folder of a repository as it is named here: the repository itself is ""."""
    return "" if path == PurePosixPath() else str(path)


def _wanted(folder: str, listed: Sequence[_File]) -> tuple[list[_File], list[str]]:
    """Return the files to fetch, and the names of those beside them that are not."""
    beside = [file for file in listed if _part(PurePosixPath(file.name).parent) == folder]
    files = [
        file
        for file in beside
        if any(fnmatch.fnmatchcase(PurePosixPath(file.name).name, each) for each in WANTED)
    ]
    names = {file.name for file in files}
    return files, sorted(PurePosixPath(each.name).name for each in beside if each.name not in names)


# Fetching -----------------------------------------------------------------------------------------


@contextmanager
def _stage(to: Path) -> Iterator[Path]:
    """Make, or find again, the folder in which the files gather; it is nobody else's meanwhile."""
    stage = to.with_name(f".{to.name}.part")
    try:
        stage.mkdir(parents=True, exist_ok=True)
        handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise PullError(f"{stage}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PullError(f"{to} is being fetched by another process") from None
        yield stage
    finally:
        os.close(handle)


def _room(stage: Path, files: Sequence[_File], inside: Path) -> None:
    """Refuse before the first byte what the disk cannot take."""
    need = sum(file.size for file in files)
    for place in (inside, stage / ".cache"):
        need -= sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    free = shutil.disk_usage(stage).free
    if need + _SPARE > free:
        raise PullError(
            f"{stage.parent}: {need / 1e6:.0f} MB are to be fetched, {free / 1e6:.0f} MB are free",
            hint=f"make room (it leaves {_SPARE / 1e6:.0f} MB), then {_AGAIN}",
        )


def _fetch(source: Source, files: Sequence[_File], stage: Path) -> None:
    # A client that cannot reach the hub returns a folder as it is; `_verify` does not take it.
    with _explained(source.repository, source.commit):
        _hub().snapshot_download(
            source.repository,
            revision=source.commit,
            local_dir=stage,
            allow_patterns=[glob.escape(file.name) for file in files],
            max_workers=2,  # a card writes no faster with more
        )


@contextmanager
def _explained(repository: str, revision: str) -> Iterator[None]:
    """Turn what the client raises into a line that says what to do."""
    errors = _hub().errors
    where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        yield
    except errors.GatedRepoError:
        raise PullError(
            f"{repository} is given only to those who accepted its terms",
            hint=f"accept them at {where}/{repository}, and set HF_TOKEN",
        ) from None
    except errors.RepositoryNotFoundError:
        raise PullError(
            f"{where} has no {repository}",
            hint="see to its spelling; if it is private, set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise PullError(f"{repository} has no revision {revision}") from None
    except Exception as error:  # noqa: BLE001 - the client's versions differ in what they raise
        text = str(error).strip().partition("\n")[0]
        raise PullError(
            f"{repository} could not be fetched from {where}: {type(error).__name__}: {text}",
            hint=_AGAIN,
        ) from None


def _verify(files: Sequence[_File], inside: Path) -> None:
    """Compare every file with what the hub says of it; a wrong one is removed."""
    for file in files:
        path = inside / PurePosixPath(file.name).name
        if not path.is_file():
            raise PullError(f"{file.name} did not arrive", hint=_AGAIN)
        found = digest(path) if file.sha256 else _blob(path)
        if found != (file.sha256 or file.blob):
            path.unlink()
            raise PullError(
                f"{file.name} is not what the hub has: {found}, not {file.sha256 or file.blob}",
                hint="run it again; if that does not help, something changes files on their way",
            )


def _blob(path: Path) -> str:
    """Return git's hash of a file."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


# The folder ---------------------------------------------------------------------------------------


def _finish(source: Source, files: Sequence[_File], inside: Path, to: Path) -> ModelFolder:
    """Write what is known of the files, inspect the folder, and give it its name."""
    names = sorted(PurePosixPath(file.name).name for file in files)
    for path in inside.iterdir():  # the client's notes, and what a branch had before it moved on
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    hashes = {name: digest(inside / name) for name in names}
    (inside / MANIFEST).write_text(json.dumps(hashes, indent=1) + "\n")
    (inside / SOURCE).write_text(json.dumps(asdict(source), indent=1) + "\n")
    inspect(inside, verify=False)  # it was just hashed
    for path in (*inside.iterdir(), inside):
        path.chmod(0o755 if path.is_dir() else 0o644)
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    inside.rename(to)
    return inspect(to, verify=False)
