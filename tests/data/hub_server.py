"""A server with the part of the Hub's HTTP interface that reading a dataset needs, in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote

import xxhash

REPOSITORY = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """A dataset repository on a Hub.

    Attributes:
        files: path in the repository → content.
        sent: (path, first byte, bytes) of each complete answer with content of a file.
        tokens: what the requests sent as ``Authorization``.
        stop_at: path of a file that is never sent; ``stopped`` is set when it is requested, and ``go_on`` ends the connection.
        drops: number of answers after whose first half the connection is lost.
        status: status code of every answer; ``None``: as it should be.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sent: list[tuple[str, int, int]] = []
        self.tokens: set[str | None] = set()
        self.stop_at: str | None = None
        self.stopped, self.go_on = Event(), Event()
        self.drops = 0
        self.status: int | None = None
        self.url = ""

    def entry(self, path: str) -> dict[str, Any]:
        """Return what the Hub tells of a file or folder."""
        if path in self.files:
            digest = xxhash.xxh3_128_hexdigest(self.files[path])
            return {"type": "file", "path": path, "size": len(self.files[path]), "oid": digest}
        return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Return the files and folders below a folder."""
        found = set()
        for path in self.files:
            below = path[len(folder) + 1 :] if folder and path.startswith(f"{folder}/") else "" if folder else path
            names = below.split("/") if below else []
            for depth in range(1, (len(names) if recursive else min(1, len(names))) + 1):
                found.add("/".join([*([folder] if folder else []), *names[:depth]]))
        return [self.entry(path) for path in sorted(found)]


class Handler(BaseHTTPRequestHandler):
    """Answers for a `HubServer`, which the server has as its ``state``."""

    protocol_version = "HTTP/1.1"

    @property
    def state(self) -> HubServer:
        return self.server.state  # type: ignore[attr-defined,no-any-return]

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        self.state.tokens.add(self.headers.get("Authorization"))
        if self.state.status:
            self._answer(b"{}", status=self.state.status)
        elif path in (f"/api/datasets/{REPOSITORY}", f"/api/datasets/{REPOSITORY}/revision/{self._revision(path)}"):
            names = [{"rfilename": name} for name in self.state.files]
            self._json({"id": REPOSITORY, "sha": COMMIT, "private": False, "siblings": names, "tags": []})
        elif found := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/[^/]+/?(.*)", path):
            entries = self.state.tree(found[1], recursive=parse_qs(query).get("recursive") in (["True"], ["true"]))
            self._json(entries) if entries else self._missing("EntryNotFound")
        elif found := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/[^/]+/(.+)", path):
            self._file(found[1]) if found[1] in self.state.files else self._missing("EntryNotFound")
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(raw)["paths"] if is_json else parse_qs(raw).get("paths", [])
        if not self.path.startswith(f"/api/datasets/{REPOSITORY}/paths-info/"):
            self._missing("RepoNotFound")
            return
        folders = {"/".join(name.split("/")[:-1]) for name in self.state.files}
        self._json([self.state.entry(path) for path in paths if path in self.state.files or path in folders])

    def _revision(self, path: str) -> str:
        return path.rpartition("/")[2]

    def _file(self, path: str) -> None:
        content = self.state.files[path]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(span[1]) if span else 0
        stop = min(int(span[2]) + 1 if span and span[2] else len(content), len(content))
        headers = {"ETag": f'"{self.state.entry(path)["oid"]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        if self.command == "GET" and path == self.state.stop_at:
            self.state.stopped.set()
            self.state.go_on.wait(60)
            self.close_connection = True
            return
        self._answer(content[start:stop], status=206 if span else 200, of=(path, start), **headers)

    def _json(self, value: Any) -> None:
        self._answer(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._answer(b"{}", status=404, **{"X-Error-Code": code})

    def _answer(self, body: bytes, *, status: int = 200, of: tuple[str, int] | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if of and self.state.drops and len(body) > 1:
            self.state.drops -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        elif of:
            self.state.sent.append((*of, len(body)))
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client was killed
            super().handle()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    state = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.state = True, state  # type: ignore[attr-defined]
    state.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        state.go_on.set()
        server.shutdown()
        server.server_close()
