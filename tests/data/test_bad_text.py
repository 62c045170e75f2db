"""What goes wrong with people's text: one clear line each."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import some_text

from pretrain.data.reading import cut, units
from pretrain.data.sources.huggingface import HuggingFace
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization import encode, tokenize
from pretrain.data.tokenization.tokenize import prepare
from pretrain.runtime.errors import UserError

TEXTS = [some_text(seed, 30) for seed in range(300)]
LINES = [json.dumps({"text": text, "id": 1}) for text in TEXTS]


def folder_of(path: Path, files: dict[str, str]) -> None:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)


def torn(write: Callable[[Path], None], kept: float) -> Callable[[Path], None]:
    def write_torn(path: Path) -> None:
        write(path)
        raw = path.read_bytes()
        path.write_bytes(raw[: int(len(raw) * kept)])

    return write_torn


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), path)


def spoiled_parquet(path: Path) -> None:
    write_parquet(path)
    with open(path, "r+b") as file:
        file.seek(200)
        file.write(bytes(4000))


def write_arrow(path: Path) -> None:
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


# name of the file or folder, how it is made (None: not at all), options, what the message says
TABLE: dict[str, tuple[str, Callable[[Path], object] | None, dict[str, object], str]] = {
    "missing file": ("a.txt", None, {}, r"nameOrPath=.*a\.txt: no such file or folder"),
    "misspelt file": ("boks.txt", lambda p: (p.parent / "books.txt").write_text("x"), {}, "did you mean 'books.txt'"),
    "glob without a match": ("*.md", None, {}, r"nameOrPath=.*\*\.md: no file matches"),
    "empty folder": ("d", Path.mkdir, {}, "the folder is empty"),
    "folder without text": (
        "d",
        lambda p: folder_of(p, {"a.png": "x", "b.png": "y", "c": "z"}),
        {},
        r"no text in the folder; it holds 2 × \.png, 1 × no ending.* dataset\.pattern",
    ),
    "pattern without a match": ("d", lambda p: folder_of(p, {"a.txt": "x"}), {"pattern": "*.py"}, r"pattern=\*\.py"),
    "folder that is not saved": ("d", lambda p: folder_of(p, {"a.txt": "x"}), {"format": "hf"}, "save_to_disk"),
    "only empty documents": (
        "d",
        lambda p: folder_of(p, {"a.txt": " \n", "b.txt": ""}),
        {},
        "every document of .* is empty",
    ),
    "empty file": ("a.txt", Path.touch, {}, "every document of .* is empty"),
    "not UTF-8": (
        "a.txt",
        lambda p: p.write_bytes(b"caf\xe9 au lait"),
        {},
        r"a\.txt: not UTF-8 at byte 3 \(0xe9\).*errors=replace",
    ),
    "not UTF-8 far behind": (
        "a.txt",
        lambda p: p.write_bytes(b"word\n" * 10_000 + b"\xff"),
        {},
        r"a\.txt: not UTF-8 at byte 50000 \(0xff\)",
    ),
    "not UTF-8 in JSON lines": (
        "a.jsonl",
        lambda p: p.write_bytes(b'{"text":"a"}\n{"text":"\xe9"}'),
        {},
        "not UTF-8 at byte 22",
    ),
    "broken JSON line": (
        "a.jsonl",
        lambda p: p.write_text('{"text": "a"}\n\n{"text": "b\n'),
        {},
        r"a\.jsonl:3: broken JSON line",
    ),
    "broken JSON line far behind": (
        "a.jsonl",
        lambda p: p.write_text("\n".join([*LINES[:280], "{oops}", *LINES[280:]])),
        {},
        r"a\.jsonl:281: broken JSON line",
    ),
    "broken JSON": ("a.json", lambda p: p.write_text('[{"text": "a"}, {"text": ]'), {}, r"a\.json:1: broken JSON"),
    "cut-off JSON": ("a.json", lambda p: p.write_text('[{"text": "a"}, {"text": "b"}'), {}, "list has no end"),
    "no text column in JSON lines": (
        "a.jsonl",
        lambda p: p.write_text('{"text": "a"}\n{"content": "b", "id": 1}'),
        {},
        r"a\.jsonl:2: no column 'text' \(dataset\.text_column\); the columns there: content, id",
    ),
    "no text column in CSV": ("a.csv", lambda p: p.write_text("id,body\n1,a\n"), {}, "the columns there: id, body"),
    "no text column in parquet": ("a.parquet", write_parquet, {"text_column": "body"}, "no column 'body'.*there: text"),
    "no text column in arrow": ("a.arrow", write_arrow, {"text_column": "body"}, "no column 'body'.*there: text"),
    "no text column in a saved folder": (
        "d",
        lambda p: datasets.Dataset.from_dict({"content": ["a"]}).save_to_disk(p),
        {},
        "no column 'text'.*there: content",
    ),
    "a number for text": (
        "a.jsonl",
        lambda p: p.write_text('{"text": 12}'),
        {},
        r"a\.jsonl:1: neither text nor .* int",
    ),
    "short CSV row": (
        "a.csv",
        lambda p: p.write_text("id,text\n1,a\n2\n"),
        {},
        r"a\.csv:3: a record of 1 fields, but the header has 2",
    ),
    "cut-off parquet": (
        "a.parquet",
        torn(write_parquet, 0.7),
        {},
        r"a\.parquet: not a readable parquet file, perhaps cut off",
    ),
    "spoiled parquet": ("a.parquet", spoiled_parquet, {}, r"a\.parquet: not a readable parquet file"),
    "cut-off arrow": ("a.arrow", torn(write_arrow, 0.5), {}, r"a\.arrow: not a readable arrow file, perhaps cut off"),
    "text called arrow": ("a.arrow", lambda p: p.write_text("hello, world " * 9), {}, "not a readable arrow file"),
    "cut-off gzip": (
        "a.jsonl.gz",
        torn(lambda p: p.write_bytes(gzip.compress("\n".join(LINES).encode())), 0.5),
        {},
        r"a\.jsonl\.gz: cannot be decompressed, perhaps cut off",
    ),
    "text called gzip": ("a.txt.gz", lambda p: p.write_text("hello"), {}, "cannot be decompressed"),
    "text called zstd": ("a.txt.zst", lambda p: p.write_text("hello"), {}, "cannot be decompressed"),
    "ids of another tokenizer": (
        "d",
        lambda p: datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 99_999]]}).save_to_disk(p),
        {},
        "document 1: token id 99999, but the model's tokenizer has ids 0 to 599",
    ),
    "negative ids": ("a.jsonl", lambda p: p.write_text('{"input_ids": [1, -100]}'), {}, "token id -100"),
}


def message_for(case: str, folder: Path, store_of: Callable[..., TokenStore]) -> str:
    name, make, options, _ = TABLE[case]
    if make:
        make(folder / name)
    with pytest.raises(UserError) as raised:
        store_of(folder / name, num_workers=2, **options)
    return str(raised.value)


@pytest.mark.parametrize("case", TABLE)
def test_bad_text(case: str, tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    message = message_for(case, tmp_path, store_of)
    assert re.search(TABLE[case][3], message), message
    assert "\n" not in message


@pytest.mark.parametrize("case", ["not UTF-8 far behind", "broken JSON line far behind"])
def test_the_message_is_the_same_from_a_worker_process(
    case: str, tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize, "WORKERS_FROM_BYTES", 0)
    monkeypatch.setattr(cut, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 1)
    assert re.search(TABLE[case][3], message_for(case, tmp_path, store_of))


def test_replace_goes_on(tmp_path: Path, store_of: Callable[..., TokenStore], tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    store = store_of(tmp_path / "a.txt", errors="replace")
    assert tokenizer.decode(store.parts[0].tokens.tolist()) == "caf\ufffd au lait"


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    monkeypatch.setattr(encode, "BATCH_BYTES", 1000)
    whole = encode.Encoder._append

    def append_while_another_writes(self: encode.Encoder, *arguments: object) -> None:
        writer = threading.Thread(target=lambda: path.open("a").write(LINES[0] + "\n"))
        writer.start()
        writer.join()
        whole(self, *arguments)

    monkeypatch.setattr(encode.Encoder, "_append", append_while_another_writes)
    with pytest.raises(UserError, match=r"a\.jsonl: the file changed while it was being read"):
        store_of(path)


def test_hub_without_network_names_the_local_ways(tokenizer_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nameOrPath=nobody/nothing: .*dataset=local dataset\.nameOrPath="):
        prepare(HuggingFace(nameOrPath="nobody/nothing"), tokenizer_json=tokenizer_json, eot=0)


def test_unknown_split_of_a_local_folder(tmp_path: Path, tokenizer_json: str) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text("\n".join(LINES))
    with pytest.raises(UserError, match=r"split exam: .*exam"):
        prepare(HuggingFace(nameOrPath=str(tmp_path / "d"), split="exam"), tokenizer_json=tokenizer_json, eot=0)


FULL_DISK = """
import resource, sys
from pathlib import Path
from pretrain.data.tokenization import tokenize; from pretrain.data.reading import units
from pretrain.data.sources.local import Local
units.OWN_UNIT_BYTES = 100_000
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
tokenize.prepare(Local(nameOrPath=sys.argv[1]), tokenizer_json=Path(sys.argv[2]).read_text(), eot=0)
"""


def test_disk_full_keeps_what_was_finished(tmp_path: Path, tokenizer_json: str, cache: Path) -> None:
    """A real limit of the operating system on the size of files: the small part fits, the large one does not."""
    folder_of(tmp_path / "d", {"0.txt": some_text(0, 30_000), "1.txt": some_text(1, 120_000)})
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "d"), str(tmp_path / "tokenizer.json")]
    limited = subprocess.run([*command, "300000"], capture_output=True, text=True, env=os.environ, check=False)
    last = limited.stderr.strip().splitlines()[-1]
    assert "UserError: disk full while writing the token cache" in last
    assert "kept" in last
    kept = list(cache.rglob("*.tokens"))
    assert len(kept) == 1
    assert not list(cache.rglob(".*.partial"))
    written_at = kept[0].stat().st_mtime_ns
    subprocess.run([*command, "100000000"], check=True)
    assert len(list(cache.rglob("*.tokens"))) == 2
    assert kept[0].stat().st_mtime_ns == written_at


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer_json: str) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "file").write_text("not a folder")
    source = Local(nameOrPath=str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"cannot write the token cache .* set PRETRAIN_CACHE"):
        prepare(source, tokenizer_json=tokenizer_json, eot=0, cache=tmp_path / "file" / "c")
