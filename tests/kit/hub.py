"""A server on loopback that speaks as much of the Hugging Face hub's API as a fetch needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: A file of so many bytes is "large": the hub knows its sha256, of others git's hash.
LARGE = 10_000


def blob(data: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """What the hub has and does; a test changes it as it likes."""

    #: The files of each repository's revisions: {id: {commit: {name: content}}}.
    repositories: dict[str, dict[str, Mapping[str, bytes]]] = field(default_factory=dict)
    #: Branches and tags: {id: {name: commit}}.
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    #: Names of files that are sent with a byte changed.
    corrupt: set[str] = field(default_factory=set)
    #: After so many bytes of files in all, every connection is cut; None: never.
    cut_after: int | None = None
    #: Repositories whose terms nobody has accepted.
    gated: set[str] = field(default_factory=set)
    #: (method, path, Range header) of every request.
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self, method: str) -> list[str]:
        return [path for each, path, _ in self.requests if each == method]

    def allowance(self, wanted: int) -> int:
        """Return how many of these bytes may still be sent."""
        with self.lock:
            left = wanted if self.cut_after is None else max(0, self.cut_after - self.sent)
            allowed = min(wanted, left)
            self.sent += allowed
            return allowed


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the hub on a free port while the context lasts."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            self._info("/".join(parts[2:4]), "/".join(parts[5:]))
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body=body)
        else:
            self._refuse(404, "EntryNotFound")

    def _commit(self, repository: str, revision: str) -> str | None:
        """Return the commit, or refuse as the hub does."""
        commits = self.hub.repositories.get(repository)
        if commits is None:
            self._refuse(401, "RepoNotFound")
            return None
        if repository in self.hub.gated:
            self._refuse(403, "GatedRepo")
            return None
        commit = self.hub.refs.get(repository, {}).get(revision, revision)
        if commit not in commits:
            self._refuse(404, "RevisionNotFound")
            return None
        return commit

    def _info(self, repository: str, revision: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        siblings = []
        for name, data in self.hub.repositories[repository][commit].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob(data)}
            if len(data) >= LARGE:
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        answer = {"_id": "1", "id": repository, "modelId": repository, "sha": commit,
                  "private": False, "tags": [], "downloads": 0, "likes": 0,
                  "siblings": siblings}  # fmt: skip
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, repository: str, revision: str, name: str, *, body: bool) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return
        data = self.hub.repositories[repository][commit].get(name)
        if data is None:
            self._refuse(404, "EntryNotFound")
            return
        tag = hashlib.sha256(data).hexdigest() if len(data) >= LARGE else blob(data)
        if name in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        begin = 0
        if (wanted := self.headers.get("Range")) is not None:
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", f'"{tag}"')
        self.send_header("Accept-Ranges", "bytes")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        if body:
            allowed = self.hub.allowance(len(data) - begin)
            self.wfile.write(data[begin : begin + allowed])
            if begin + allowed < len(data):
                self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
