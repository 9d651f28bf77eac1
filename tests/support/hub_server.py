"""A server that speaks as much of the hub's HTTP as its client needs to fetch a model.

What it serves are real files of a folder; what it is told to do wrong, it does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" + "0" * 34
PIECE = 1 << 16

# Files from this size on are in large storage: they have a SHA-256, others what git calls them.
LARGE = 5_000


@dataclass
class Hub:
    """`repositories`: name -> folder. `refuses`: name -> (HTTP status, X-Error-Code)."""

    repositories: dict[str, Path] = field(default_factory=dict)
    refuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    license: str = "mit"
    commit: str = COMMIT
    # A GET of this file stops in the middle until `goes_on` is set.
    stops_at: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)
    damages: str = ""  # this file arrives with a byte changed
    asked: list[tuple[str, str]] = field(default_factory=list)  # (file, Range) of each GET
    tokens: set[str] = field(default_factory=set)  # what came as Authorization
    address: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.goes_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        if token := self.headers.get("Authorization"):
            self.served.tokens.add(token)
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(found[1])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[3], body)
        else:
            self._refuse(404, "EntryNotFound")

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _info(self, name: str, revision: str) -> None:
        hub = self.served
        if name in hub.refuses:
            self._refuse(*hub.refuses[name])
        elif name not in hub.repositories:
            self._refuse(404, "RepoNotFound")
        elif revision not in ("main", hub.commit):
            self._refuse(404, "RevisionNotFound")
        else:
            folder = hub.repositories[name]
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            answer = {
                "_id": "1", "id": name, "modelId": name, "sha": hub.commit, "private": False,
                "gated": False, "disabled": False, "downloads": 0, "likes": 0,
                "tags": [f"license:{hub.license}"], "cardData": {"license": hub.license},
                "siblings": [_sibling(folder, p) for p in files],
            }  # fmt: skip
            self._send(json.dumps(answer).encode(), "application/json")

    def _tree(self, name: str) -> None:
        folder = self.served.repositories[name]
        rows = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            found = _sibling(folder, path)
            row = {"type": "file", "path": found["rfilename"], "size": found["size"],
                   "oid": found["blobId"]}  # fmt: skip
            if lfs := found.get("lfs"):
                row["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 130}
            rows.append(row)
        self._send(json.dumps(rows).encode(), "application/json")

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _file(self, name: str, file: str, body: bool) -> None:
        hub = self.served
        path = hub.repositories.get(name, Path("/nowhere")) / file
        if not path.is_file():
            self._refuse(404, "EntryNotFound")
            return
        data = path.read_bytes()
        wanted = self.headers.get("Range", "")
        begin = int(wanted.removeprefix("bytes=").partition("-")[0] or 0) if wanted else 0
        self.send_response(206 if begin else 200)
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("ETag", f'"{_digest(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if not body:
            return
        hub.asked.append((file, wanted))
        if hub.damages == file:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._write(file, data, begin)

    def _write(self, file: str, data: bytes, begin: int) -> None:
        hub = self.served
        middle = len(data) // 2
        try:
            if hub.stops_at == file and begin < middle:
                self.wfile.write(data[begin:middle])
                self.wfile.flush()
                hub.stopped.set()
                hub.goes_on.wait()
                begin = middle
            self.wfile.write(data[begin:])
        except OSError:
            self.close_connection = True  # who asked has gone


def _sibling(folder: Path, path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    found = {"rfilename": path.relative_to(folder).as_posix(), "size": size, "blobId": _git(path)}
    if size < LARGE:
        return found
    return found | {"lfs": {"sha256": _sha256(path), "size": size, "pointerSize": 130}}


def _digest(path: Path) -> str:
    return _git(path) if path.stat().st_size < LARGE else _sha256(path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
