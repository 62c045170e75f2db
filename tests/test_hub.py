"""Datasets of a server with the Hub's HTTP interface: streamed, killed in the middle, and by hf:// URLs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.hub_server import REPOSITORY, HubServer, hub_server

SHARDS = [f"data/train-{number:05d}-of-00004.jsonl" for number in range(4)]
STREAMED = ("dataset=huggingface", f"dataset.nameOrPath={REPOSITORY}", "dataset.streaming=true")
SECRET = "hf_" + "x" * 34


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """Four shards, each large enough to be a unit of its own."""
    with hub_server() as server:
        for shard in SHARDS:
            lines = (json.dumps({"text": f"Line {line} of {shard} " + "has words " * 30}) for line in range(4000))
            server.files[shard] = "\n".join(lines).encode()
        server.files["README.md"] = b"---\nlicense: mit\n---\n"
        yield server


def start(hub: HubServer, model: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a tokenization whose cache and caches of the Hub are in ``folder``."""
    places = {"PRETRAIN_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hub"), "HF_TOKEN": SECRET}
    environment = os.environ | places | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "pretrain", "task=tokenization", f"model_name={model}", "sequence_length=16"]
    command += ["evaluation=new_only", f"output_dir={folder / 'run'}", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate()
    return process.returncode, out + err


def parts(folder: Path) -> list[str]:
    """The parts of the only dataset of a cache, whose names are those of their content."""
    (manifest,) = folder.glob("cache/stores/*.json")
    return list(json.loads(manifest.read_text())["parts"])


@pytest.mark.slow
def test_a_streamed_dataset_is_killed_in_the_middle(hub: HubServer, tiny_model: Path, tmp_path: Path) -> None:
    """The second start requests no shard that the first one has finished, also where connections are lost, and writes no copy."""
    hub.stop_at = SHARDS[2]
    process = start(hub, tiny_model, tmp_path / "killed", *STREAMED)
    while process.poll() is None and len([*tmp_path.glob("killed/cache/progress/*/*/*.json")]) < 2:
        time.sleep(0.02)
    assert hub.stopped.wait(30)
    process.send_signal(signal.SIGKILL)
    assert ended(process)[0] == -signal.SIGKILL
    hub.stop_at, hub.drops = None, 2
    hub.go_on.set()
    hub.sent.clear()
    code, said = ended(start(hub, tiny_model, tmp_path / "killed", *STREAMED))
    assert code == 0, said
    assert {path for path, _, _ in hub.sent} - {"README.md"} == {SHARDS[2], SHARDS[3]}
    sizes = {shard: sum(count for path, _, count in hub.sent if path == shard) for shard in SHARDS}
    assert all(sizes[shard] <= 1.2 * len(hub.files[shard]) for shard in SHARDS), (
        "no byte twice, but for lost connections"
    )
    code, said = ended(start(hub, tiny_model, tmp_path / "at once", *STREAMED))
    assert code == 0, said
    assert parts(tmp_path / "killed") == parts(tmp_path / "at once")
    assert not [*tmp_path.glob("*/hub/**/*.arrow"), *tmp_path.glob("*/hub/**/*.jsonl")]
    hub.sent.clear()
    assert ended(start(hub, tiny_model, tmp_path / "killed", *STREAMED))[0] == 0
    assert {path for path, _, _ in hub.sent} <= {"README.md"}, "a later start requests no shard"


@pytest.mark.slow
def test_the_files_of_a_hub_by_their_urls(hub: HubServer, tiny_model: Path, tmp_path: Path) -> None:
    """The tokens are those of the same files on this machine; a login that is refused is one line without the secret."""
    place = f"hf://datasets/{REPOSITORY}"
    for shard in SHARDS:
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        (tmp_path / shard).write_bytes(hub.files[shard])
    found = {}
    for name, words in {
        "here": [f"dataset.nameOrPath={tmp_path / 'data'}"],
        "folder": [f"dataset.nameOrPath={place}/data"],
        "files": [f"dataset.nameOrPath=[{','.join(f'{place}/{shard}' for shard in SHARDS)}]"],
    }.items():
        code, said = ended(start(hub, tiny_model, tmp_path / name, "dataset=local", *words))
        assert code == 0, said
        found[name] = parts(tmp_path / name)
    assert found == dict.fromkeys(found, found["here"])
    assert f"Bearer {SECRET}" in hub.tokens
    hub.status = 403
    for words in (["dataset=local", f"dataset.nameOrPath={place}/data"], STREAMED):
        code, said = ended(start(hub, tiny_model, tmp_path / "denied", *words))
        assert (code, said.count("error: ")) == (2, 1), said
        assert said.splitlines()[-1].startswith(
            f"error: {place if 'dataset=local' in words else 'dataset.nameOrPath='}"
        )
        assert "after 6 attempts" not in said, "a refusal is not repeated"
        assert SECRET not in said
