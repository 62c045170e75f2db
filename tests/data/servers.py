"""A real S3 server and a web server with faults, both in this process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

BUCKET = "texts"


@contextmanager
def s3_server() -> Iterator[Any]:
    """Start moto's server, set the environment to it, and yield an ``s3fs`` file system with an empty bucket."""
    s3fs = pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tester")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "not-so-secret-tests")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        files.mkdir(BUCKET)
        yield files
    server.stop()


class WebServer:
    """A web server of the files in ``files``, which answers requests of ranges.

    Attributes:
        files: path → content.
        drops: number of requests after whose first ``dropped_after`` bytes the connection is lost.
        status: status code of every answer; ``None``: as it should be.
        headers: headers that replace those of an answer; ``None`` as value: it is left out.
        sent: bytes of content that were sent.
        requests: number of requests.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.drops, self.dropped_after = 0, 0
        self.status: int | None = None
        self.headers: dict[str, str | None] = {}
        self.sent = self.requests = 0
        self.url = ""


@contextmanager
def web_server() -> Iterator[WebServer]:
    state = WebServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests += 1
            path = unquote(self.path.partition("?")[0])
            if state.status or path not in state.files:
                self.send_response(state.status or 404)
                for name, value in state.headers.items():
                    self.send_header(name, value or "")
                self.end_headers()
                return
            content = state.files[path]
            start, stop = (int(x) for x in re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())  # type: ignore[union-attr]
            body = content[start : stop + 1]
            headers: dict[str, str | None] = {
                "Content-Range": f"bytes {start}-{start + len(body) - 1}/{len(content)}",
                "Content-Length": str(len(body)),
                "ETag": f'"{hash(content)}"',
            } | state.headers
            self.send_response(206)
            for name, value in headers.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            if state.drops and len(body) > 1:
                state.drops -= 1
                body = body[: state.dropped_after]
            state.sent += len(body)
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
