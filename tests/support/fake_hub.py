"""A small Hugging Face Hub on 127.0.0.1, with as much of its protocol as downloading models needs.

Models are local folders. A commit's sha is a hash of the folder's contents, so changing a file
makes a new commit.
``/api/models``, ``tree`` and ``resolve`` answer as the real Hub does, error headers included.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_fake"  # opens private and gated models
_LARGE = {".bin", ".safetensors", ".pt", ".onnx"}  # LFS files: their ETag is a sha256
_QUIET = ("/api/agent-harnesses", "/api/telemetry")  # huggingface_hub's own business, in no count


@dataclass
class Repo:
    """A model: branches (or tags) to folders."""

    branches: dict[str, Path] = field(default_factory=dict)
    gated: bool = False  # its facts are public, its files need the token
    private: bool = False  # nothing is shown without the token

    def commit(self, revision: str) -> tuple[str, Path] | None:
        """The sha and folder of a branch or sha."""
        for branch, folder in self.branches.items():
            sha = _commit_sha(folder)
            if revision in (branch, sha):
                return sha, folder
        return None


class FakeHub:
    """The server; use it as a context manager.

    ``requests`` lists the requests, as "GET /path" without the query. While ``fail_after_bytes`` is
    a number, file bodies break off after so many bytes in all since it was set, as when a network
    dies.
    """

    def __init__(self, repos: Mapping[str, Path] | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.status: int | None = None  # answer everything with this, e.g. 503
        self.lock = threading.Lock()
        self._budget: int | None = None
        for repo_id, folder in (repos or {}).items():
            self.add(repo_id, folder)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = False  # joined on close: no socket outlives the test
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread: threading.Thread | None = None
        self.env: dict[str, str] = {}  # for subprocesses; the fixture fills in the cache folder

    def add(
        self,
        repo_id: str,
        folder: Path,
        *,
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Serve a folder as a branch of a model; gives the commit's sha."""
        repo = self.repos.setdefault(repo_id, Repo())
        repo.branches[revision] = Path(folder)
        repo.gated, repo.private = gated, private
        return _commit_sha(Path(folder))

    def downloads(self) -> list[str]:
        """Names of the files whose bodies were asked for, in order."""
        return [
            path.split("/", 5)[5]
            for method, path in map(str.split, self.requests)
            if _is_body(method, path)
        ]

    @property
    def fail_after_bytes(self) -> int | None:
        return self._budget

    @fail_after_bytes.setter
    def fail_after_bytes(self, budget: int | None) -> None:
        with self.lock:
            self._budget = budget

    def spend(self, size: int) -> int:
        """How many of so many bytes may still go out."""
        with self.lock:
            if self._budget is None:
                return size
            sent = min(size, self._budget)
            self._budget -= sent
            return sent

    def stop(self) -> None:
        """Go offline: connections are refused from now on."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def __enter__(self) -> FakeHub:
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """Nothing can be written; the body is read, so that the client reads the refusal."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> FakeHub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        if not path.startswith(_QUIET):
            self.hub.requests.append(f"{self.command} {unquote(path)}")
        with suppress(ConnectionError):  # a client may leave at any time
            if self.hub.status is not None:
                self._refuse(self.hub.status)
            elif match := re.fullmatch(
                r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+))?", path
            ):
                self._facts(match[1], match[2], unquote(match[3] or "main"))
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(match[1], unquote(match[2]), unquote(match[3]))
            else:
                self._refuse(404)

    def _commit(self, repo_id: str, revision: str) -> tuple[str, Path] | None:
        """The commit asked for, or None when a refusal has been sent."""
        repo = self.hub.repos.get(repo_id)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            self._refuse(404 if known else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repo.commit(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _facts(self, repo_id: str, kind: str | None, revision: str) -> None:
        if (commit := self._commit(repo_id, revision)) is None:
            return
        sha, folder = commit
        entries = [_entry(folder, path) for path in sorted(folder.rglob("*"))]
        if kind == "tree":
            self._send(json.dumps(entries).encode(), {"Content-Type": "application/json"})
            return
        siblings = []
        for entry in entries:
            if entry["type"] == "file":
                sibling = {
                    "rfilename": entry["path"],
                    "size": entry["size"],
                    "blobId": entry["oid"],
                }
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {
                        "size": lfs["size"],
                        "sha256": lfs["oid"],
                        "pointerSize": lfs["pointerSize"],
                    }
                siblings.append(sibling)
        repo = self.hub.repos[repo_id]
        facts = {
            "id": repo_id,
            "modelId": repo_id,
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        self._send(json.dumps(facts).encode(), {"Content-Type": "application/json"})

    def _file(self, repo_id: str, revision: str, name: str) -> None:
        if (commit := self._commit(repo_id, revision)) is None:
            return
        sha, folder = commit
        authorization = self.headers.get("Authorization")
        if self.hub.repos[repo_id].gated and authorization != f"Bearer {TOKEN}":
            self._refuse(
                403 if authorization else 401,
                "GatedRepo",
                f"Access to model {repo_id} is restricted",
            )
            return
        path = folder / name
        if ".." in name.split("/") or not path.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": sha})
            return
        entry = _entry(folder, path)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        self._send_body(path.read_bytes(), headers)

    def _send_body(self, body: bytes, headers: dict[str, str]) -> None:
        """A file, or the range of it that was asked for, as far as the hub's bytes last."""
        status, size = 200, len(body)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
            if start >= size:
                self._refuse(416, extra={"Content-Range": f"bytes */{size}"})
                return
            status, body = 206, body[start:stop]
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        sent = len(body) if self.command == "HEAD" else self.hub.spend(len(body))
        self._send(body, headers, status, sent)

    def _refuse(
        self, status: int, code: str = "", message: str = "", extra: Mapping[str, str] | None = None
    ) -> None:
        headers = dict(extra or {})
        if code:
            headers |= {"X-Error-Code": code, "X-Error-Message": message}
        self._send(json.dumps({"error": message or "refused"}).encode(), headers, status)

    def _send(
        self, body: bytes, headers: Mapping[str, str], status: int = 200, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(
            "Connection", "close"
        )  # no thread waits for a client that keeps its connection
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])


def _is_body(method: str, path: str) -> bool:
    return method == "GET" and re.match(r"/[^/]+/[^/]+/resolve/", path) is not None


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    """A row of the Hub's ``tree``."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {
            "type": "directory",
            "path": name,
            "oid": hashlib.sha1(name.encode()).hexdigest(),
            "size": 0,
        }
    data = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "oid": oid, "size": len(data)}
    if path.suffix in _LARGE:
        entry["lfs"] = {
            "oid": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "pointerSize": 130,
        }
    return entry


def _commit_sha(folder: Path) -> str:
    rows = [
        (entry["path"], entry["oid"])
        for entry in (_entry(folder, path) for path in sorted(folder.rglob("*")))
    ]
    return hashlib.sha1(repr(rows).encode()).hexdigest()
