"""W&B without its servers: a reader of its run files, and a server that does as much as a run needs, or fails in some way."""

import gzip
import json
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BLOCK, HEADER = 32768, 7


def run_file(folder: Path) -> list:
    """The records of a run file (LevelDB's log format), as wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, records, parts = path.read_bytes(), HEADER, [], b""
    assert data[:4] == b":W&B"
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little room for a record: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def rows(records: list) -> dict[int, dict]:
    """Number → row of the history. A number that comes twice is a mistake."""
    found = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            assert record.history.step.num not in found
            found[record.history.step.num] = row
    return found


def of_kind(records: list, kind: str) -> list:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


class Server(ThreadingHTTPServer):
    """``mood``: fine · slow (takes a request, answers nothing) · broken (500) · dying (broken once it knows of a run).
    ``history``: the rows it has been sent, by the line of the history that they were meant for, as W&B keeps them."""

    daemon_threads = True

    def __init__(self, mood: str = "fine") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.mood = mood
        self.history: dict[int, dict] = {}
        self.upserts: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def lines(self) -> list[dict]:
        return [self.history[line] for line in sorted(self.history)]

    def answer(self, path: str, request: dict) -> dict:
        if path.endswith("file_stream"):
            sent = request.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for line, row in enumerate(sent["content"], start=sent["offset"]):
                self.history[line] = json.loads(row)
        if "graphql" not in path:
            return {}
        return {
            "data": getattr(self, f"_{request.get('operationName')}", lambda **given: {})(
                **request.get("variables") or {}
            )
        }

    def _RunResumeStatus(self, **given) -> dict:
        if not self.upserts:
            return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": None}}
        tail = [json.dumps(row) for row in self.lines()[-1:]]
        bucket = {"id": "b", "name": given["name"], "config": "{}", "wandbConfig": json.dumps({"t": 1}), "tags": []}
        bucket |= {"summaryMetrics": "{}", "displayName": "n", "notes": None, "eventsTail": "[]", "logLineCount": 0}
        bucket |= {"historyTail": json.dumps(tail), "historyLineCount": len(self.history), "eventsLineCount": 0}
        return {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"}, "bucket": bucket}}

    def _UpsertBucket(self, **given) -> dict:
        self.upserts.append(given)
        if self.mood == "dying":
            self.mood = "broken"
        project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": given.get("name"), "displayName": "n", "description": "", "config": "{}"}
        bucket |= {"sweepName": None, "historyLineCount": 0, "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _CreateRunFiles(self, **given) -> dict:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}

    def _Viewer(self, **given) -> dict:
        return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.mood == "slow":
            time.sleep(3600)
        if self.server.mood == "broken":
            self.send_error(500)
            return
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        request = {} if self.path.startswith("/upload") else json.loads(body or b"{}")
        answer = json.dumps(self.server.answer(self.path, request)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *arguments) -> None:
        pass
