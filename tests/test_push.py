"""`checkpoint.push_to_hub`: what a Hub on this machine receives, and what a run says when it can't be reached."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pretrain.checkpoint.config import CheckpointConfig
from pretrain.models.hub.push import Pusher, check_no_secrets
from pretrain.runtime.errors import UserError

TOKEN = "hf_" + "abcdefghijklmnop1234"


class Hub(BaseHTTPRequestHandler):
    """The few requests of an upload. The server's ``seen`` has each path with its body."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.server.refuses:
            return self.answer({"error": f"no such token: {TOKEN}"}, 401)
        if self.path == "/api/repos/create":
            return self.answer({"url": "https://huggingface.co/me/model", "id": "me/model"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        if "/commit/" in self.path:
            return self.answer(
                {"commitUrl": "https://huggingface.co/me/model/commit/1", "commitOid": "1", "success": True}
            )
        return self.answer({"warnings": [], "errors": []})

    def do_GET(self):
        self.answer({"error": "Not found"}, 404)

    do_HEAD = do_GET

    def answer(self, content, code=200):
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *given):
        pass


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub.constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.refuses = [], False
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()


def files_of(server):
    """The files of each commit, by name."""
    commits = []
    for path, _, body in server.seen:
        if "/commit/" in path:
            entries = [json.loads(line) for line in body.splitlines()]
            found = {e["value"]["path"]: base64.b64decode(e["value"]["content"]) for e in entries if e["key"] == "file"}
            commits.append((entries[0]["value"]["summary"], found))
    return commits


def test_a_run_uploads_what_it_exports(hub, base_arguments, command, tmp_path):
    words = [
        "checkpoint.push_to_hub=me/model",
        "checkpoint.export=save",
        "save_every=2",
        "max_steps=4",
        "evaluate_every=null",
    ]
    code, _, err = command([*base_arguments, *words, f"output_dir={tmp_path}"])
    assert code == 0, err
    assert "uploaded: https://huggingface.co/me/model/commit/1" in err
    create = next(json.loads(body) for path, _, body in hub.seen if path == "/api/repos/create")
    assert (create["name"], create["organization"]) == ("model", "me")
    assert create.get("visibility") == "private" or create.get("private") is True, "by the version of huggingface_hub"
    assert {authorization for _, authorization, _ in hub.seen} <= {f"Bearer {TOKEN}", None}
    (early, _), (last, files) = files_of(hub)
    assert (early, last) == ("step 2", "step 4")
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}
    assert not any(TOKEN.encode() in content for content in files.values())


def test_a_failure_is_one_line_and_a_command(hub, tmp_path, caplog):
    hub.refuses = True
    (tmp_path / "config.json").write_text("{}")
    with caplog.at_level("INFO", "pretrain"):
        Pusher("me/model").push(tmp_path, "step 1")
    assert "checkpoint.push_to_hub=me/model: " in caplog.text
    assert f"to try again: hf upload me/model {tmp_path} --private" in caplog.text
    assert TOKEN not in caplog.text
    assert files_of(hub) == []


def test_a_file_with_a_secret_stays_here(hub, tmp_path, caplog):
    (tmp_path / "notes.md").write_text(f"my token is {TOKEN}")
    with pytest.raises(UserError, match=r"notes.md holds the value of \$HF_TOKEN and is not uploaded"):
        check_no_secrets(tmp_path)
    with caplog.at_level("INFO", "pretrain"):
        Pusher("me/model").push(tmp_path, "step 1")
    assert "is not uploaded" in caplog.text
    assert hub.seen == []


def test_nothing_to_upload():
    with pytest.raises(
        UserError, match=r"checkpoint.push_to_hub=a/b: checkpoint.export=never leaves no model to upload"
    ):
        CheckpointConfig(push_to_hub="a/b", export="never").check({"a": "new"})
