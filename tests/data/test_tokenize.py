"""Every format gives the documents it holds; the cache is whole, shared, resumable and is not read twice."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from texts import TEXTS, parts_of, some_text, write_jsonl
from tokenizers import Tokenizer

from pretrain.data.cache import cache_dir, remove_abandoned
from pretrain.data.reading import cut, units
from pretrain.data.reading.sections import sections
from pretrain.data.sources.huggingface import HuggingFace
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization.tokenize import prepare, training_texts
from pretrain.runtime.files import partial_of

EOT = 0
StoreOf = Callable[..., TokenStore]


def texts_of(store: TokenStore, tokenizer: Tokenizer) -> list[str]:
    tokens = np.concatenate([part.tokens for part in store.parts]).tolist()
    ends = [0, *(int(end + store.part_tokens[index]) for index, part in enumerate(store.parts) for end in part.ends)]
    documents = [tokens[start:stop] for start, stop in pairwise(ends)]
    assert all(document[-1] == EOT and EOT not in document[:-1] for document in documents)
    return tokenizer.decode_batch([document[:-1] for document in documents])


# Formats -------------------------------------------------------------------------------------------------------------


def write_csv(path: Path) -> None:
    rows = [f'{i},"{text.replace(chr(34), chr(34) * 2)}"\n' for i, text in enumerate(TEXTS)]
    path.write_text("id,text\n" + "".join(rows))


def write_arrow_file(path: Path) -> None:
    table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def compressed(write: Callable[[Path], None], pack: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write_packed(path: Path) -> None:
        write(path)
        path.write_bytes(pack(path.read_bytes()))

    return write_packed


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "b.jsonl.gz": compressed(write_jsonl, gzip.compress),
    "c.jsonl.zst": compressed(write_jsonl, zstandard.ZstdCompressor().compress),
    "list.json": lambda path: path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1)),
    "lines.json": write_jsonl,
    "d.csv": write_csv,
    "e.parquet": lambda path: pq.write_table(pa.table({"n": [1] * len(TEXTS), "text": TEXTS}), path, row_group_size=40),
    "f.arrow": write_arrow_file,
    "saved": lambda path: datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path, num_shards=2),
    "dict": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(
        path
    ),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("unit_bytes", [units.UNIT_BYTES, 20_000])
def test_every_format_gives_its_documents(
    name: str, unit_bytes: int, tmp_path: Path, store_of: StoreOf, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 10_000)
    WRITERS[name](tmp_path / name)
    store = store_of(tmp_path / name)
    assert texts_of(store, tokenizer) == TEXTS
    assert store.num_bytes == sum(len(text.encode()) for text in TEXTS)
    if unit_bytes == 20_000 and name in ("a.jsonl", "d.csv", "e.parquet", "f.arrow"):
        assert len(store.parts) > 3


@pytest.mark.parametrize("unit_bytes", [units.UNIT_BYTES, 20_000])
@pytest.mark.parametrize("joint", ["\n\n", " ", ""])
def test_plain_text_is_cut_into_documents_and_nothing_is_lost(
    unit_bytes: int, joint: str, tmp_path: Path, store_of: StoreOf, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 10_000)
    text = joint.join(TEXTS) if joint else "".join(f"漢字{number}" for number in range(10_000))
    (tmp_path / "one.txt").write_text(text)
    store = store_of(tmp_path / "one.txt", max_document_chars=2000)
    found = texts_of(store, tokenizer)
    assert "".join(found) == text
    assert max(map(len, found)) <= 2000
    assert store.views(held_out=0.05)[1].num_documents >= 1
    assert len(store.parts) > 1 or unit_bytes > 20_000


def test_sections_end_where_a_reader_would_pause() -> None:
    text = "One two. Three four.\n\nFive six seven eight."
    assert list(sections(text, 30)) == ["One two. Three four.\n\n", "Five six seven eight."]
    assert list(sections("One two. Three four", 12)) == ["One two. ", "Three four"]
    assert list(sections("aaaaaaaaaa", 4)) == ["aaaa", "aaaa", "aa"]


def test_a_folder_is_read_in_order_by_ending_and_code_by_pattern(tmp_path: Path, store_of: StoreOf, tokenizer) -> None:
    folder = tmp_path / "docs"
    for name, text in {"b.txt": "two", "a.md": "one", "sub/c.txt": "three", "x.py": "code", ".git/d.txt": "no"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    assert texts_of(store_of(folder), tokenizer) == ["one", "two", "three"]
    assert texts_of(store_of(folder, pattern="*.py"), tokenizer) == ["code"]
    assert texts_of(store_of(f"{folder}/**/*.txt"), tokenizer) == ["two", "three"]
    assert texts_of(store_of(folder / "x.py"), tokenizer) == ["code"]


def test_byte_order_mark_and_empty_documents_are_no_text(tmp_path: Path, store_of: StoreOf, tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_text("")
    assert texts_of(store_of(tmp_path / "*.txt"), tokenizer) == ["hello"]


def test_the_text_of_a_special_token_ends_no_document(tmp_path: Path, store_of: StoreOf, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("before <|endoftext|> after")
    assert texts_of(store_of(tmp_path / "a.txt"), tokenizer) == ["before <|endoftext|> after"]


def test_data_tokenized_elsewhere_is_taken_as_it_is(tmp_path: Path, store_of: StoreOf) -> None:
    rows = [[5, 6, 7], [8, 9, EOT], [10]]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "saved")
    store = store_of(tmp_path / "saved")
    assert np.concatenate([part.tokens for part in store.parts]).tolist() == [5, 6, 7, EOT, 8, 9, EOT, 10, EOT]
    assert store.num_bytes > 0


def test_load_dataset_of_a_local_folder_works_offline(tmp_path: Path, tokenizer_json: str, tokenizer) -> None:
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl")
    for split, expected in {"train": TEXTS, "train[:10]": TEXTS[:10]}.items():
        source = HuggingFace(nameOrPath=str(tmp_path / "data"), split=split)
        assert texts_of(prepare(source, tokenizer_json=tokenizer_json, eot=EOT), tokenizer) == expected
    folder = Path(source.files()[0].path).parent
    assert folder.parent == cache_dir() / "huggingface"
    os.utime(folder, (0, 0))
    source.files()
    assert folder.stat().st_mtime > 0, "the time of its last use, by which it is deleted"


def test_large_vocabularies_take_four_bytes_a_token(tmp_path: Path, tokenizer_json: str) -> None:
    (tmp_path / "a.txt").write_text("hello")
    store = prepare(Local(nameOrPath=str(tmp_path / "a.txt")), tokenizer_json=tokenizer_json, eot=70_000)
    assert store.parts[0].tokens[-1] == 70_000


def test_training_texts_are_those_of_the_training_view(tmp_path: Path, tokenizer_json: str, tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    source = Local(nameOrPath=str(tmp_path / "a.jsonl"), held_out=0.3)
    train, _ = prepare(source, tokenizer_json=tokenizer_json, eot=EOT).views(held_out=0.3)
    found = list(training_texts(source))
    assert len(found) == train.num_documents < len(TEXTS)
    assert tokenizer.decode(train.read(0, train.num_tokens).tolist()) == "".join(found)


# The cache -----------------------------------------------------------------------------------------------------------

PREPARE = """
import sys
from itertools import pairwise
from pathlib import Path
from pretrain.data.tokenization import tokenize; from pretrain.data.reading import units
from pretrain.data.sources.local import Local
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
folder, tokenizer, threshold = sys.argv[1:]
tokenize.WORKERS_FROM_BYTES = int(threshold)
units.OWN_UNIT_BYTES = 100_000
store = tokenize.prepare(Local(nameOrPath=folder, num_workers=2), tokenizer_json=Path(tokenizer).read_text(), eot=0)
print(store.path, sum(name.startswith(folder) for name in opened), "tokenizers" in sys.modules, "torch" in sys.modules)
"""
IN_WORKERS, IN_PROCESS = 0, 2**60


def start(folder: Path, tokenizer_json: str, cache: Path, threshold: int) -> subprocess.Popen[str]:
    (folder.parent / "tokenizer.json").write_text(tokenizer_json)
    command = [sys.executable, "-c", PREPARE, str(folder), str(folder.parent / "tokenizer.json"), str(threshold)]
    environment = os.environ | {"PRETRAIN_CACHE": str(cache)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dozen files that are a unit each."""
    (tmp_path / "texts").mkdir()
    for number in range(12):
        (tmp_path / "texts" / f"{number}.txt").write_text(some_text(number, 30_000))
    return tmp_path / "texts"


def test_killed_at_any_moment_then_again_equals_undisturbed(folder: Path, tokenizer_json: str, tmp_path: Path) -> None:
    finish(start(folder, tokenizer_json, tmp_path / "undisturbed", IN_WORKERS))
    expected = parts_of(tmp_path / "undisturbed")
    assert len(expected) == 12
    for threshold in (IN_WORKERS, IN_PROCESS):
        cache = tmp_path / f"cache{threshold}"
        process = start(folder, tokenizer_json, cache, threshold)
        while len(parts_of(cache)) < 2:
            time.sleep(0.005)
            assert process.poll() is None, "it must be killed while it works"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept = parts_of(cache)
        assert 2 <= len(kept) < 12
        assert all(expected[name] == content for name, content in kept.items())
        finish(start(folder, tokenizer_json, cache, threshold))
        assert parts_of(cache) == expected


def test_two_runs_at_once_share_the_work(folder: Path, tokenizer_json: str, tmp_path: Path) -> None:
    both = [start(folder, tokenizer_json, tmp_path / "shared", IN_PROCESS) for _ in range(2)]
    outputs = [finish(process) for process in both]
    assert outputs[0][0] == outputs[1][0]
    assert sum(int(output[1]) for output in outputs) == 3 * 12, "each file is cut, hashed and read by one of them"
    assert len(parts_of(tmp_path / "shared")) == 12
    assert not list((tmp_path / "shared").rglob(".*.partial"))


def test_a_second_start_opens_no_file_and_loads_no_tokenizer(folder: Path, tokenizer_json: str, tmp_path: Path) -> None:
    first = finish(start(folder, tokenizer_json, tmp_path / "c", IN_PROCESS))
    again = finish(start(folder, tokenizer_json, tmp_path / "c", IN_PROCESS))
    assert int(first[1]) >= 24
    assert first[2:] == ["True", "False"]
    assert again == [first[0], "0", "False", "False"]


def test_only_new_files_are_tokenized(folder: Path, tokenizer_json: str, tmp_path: Path) -> None:
    finish(start(folder, tokenizer_json, tmp_path / "c", IN_PROCESS))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*.tokens")}
    (folder / "0a.txt").write_text(some_text(99, 1000))
    (_, opened, *_) = finish(start(folder, tokenizer_json, tmp_path / "c", IN_PROCESS))
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*.tokens")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    assert int(opened) <= 3  # the new file: cut, hashed, read


def test_a_changed_file_is_read_again_and_the_old_store_stays(tmp_path: Path, store_of: StoreOf, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("first")
    old = store_of(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("second")
    assert texts_of(store_of(tmp_path / "a.txt"), tokenizer) == ["second"]
    assert texts_of(TokenStore(old.path), tokenizer) == ["first"]


def test_a_file_changed_within_the_same_tick_of_the_clock_is_read_again(
    tmp_path: Path, store_of: StoreOf, tokenizer
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first")
    stamp = path.stat()
    store_of(path)
    with open(path, "r+") as file:  # the same inode, size and, as on a coarse clock, time
        file.write("other")
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert texts_of(store_of(path), tokenizer) == ["other"]


def test_a_torn_part_is_made_again(tmp_path: Path, store_of: StoreOf, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    part = store_of(tmp_path / "a.txt").parts[0].path
    whole = part.read_bytes()
    part.write_bytes(whole[:-10])
    store_of(tmp_path / "a.txt")
    assert part.read_bytes() == whole


def in_footer(raw: bytes, old: bytes, new: bytes) -> bytes:
    assert raw.count(old) == 1
    return raw.replace(old, new)


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "tokenizer: another token": ("tokenizers/*.json", lambda raw: raw.replace(b'"hel"', b'"hes"', 1) + b" "),
    "tokenizer: zeros": ("tokenizers/*.json", lambda raw: bytes(len(raw))),
    "store: another part": ("stores/*.json", lambda raw: raw.replace(b".tokens", b".tokenz")),
    "store: empty": ("stores/*.json", lambda raw: b""),
    "files: another place in the file": (
        "files/*.json",
        lambda raw: in_footer(raw, b'"text", 0, 11', b'"text", 4, 11'),
    ),
    "files: nested": ("files/*.json", lambda raw: b"[" * 100_000),
    "files: a number": ("files/*.json", lambda raw: b"5"),
    "part: no dtype": ("parts/*/*", lambda raw: in_footer(raw, b'"dtype"', b'"dtypf"')),
    "part: another dtype": ("parts/*/*", lambda raw: in_footer(raw, b'"uint16"', b'"uint8", ')),
    "part: fewer documents": ("parts/*/*", lambda raw: in_footer(raw, b'"documents": 1', b'"documents": 0')),
    "part: no number": ("parts/*/*", lambda raw: in_footer(raw, b'"documents": 1', b'"documents":[]')),
    "part: a footer without end": ("parts/*/*", lambda raw: raw[:-16] + b"\xff" * 8 + raw[-8:]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_a_disk_has_made_of_the_cache_is_made_again(
    name: str, tmp_path: Path, cache: Path, store_of: StoreOf
) -> None:
    """With the part gone, so that whatever is left is needed to make it."""
    path = tmp_path / "a.txt"
    path.write_text("hello world")
    os.utime(path, (1, 1))  # old enough to be remembered
    before = store_of(path)
    assert len(list(cache.glob("*/*.json"))) == 3
    kept = parts_of(cache)
    pattern, damage = DAMAGE[name]
    (file,) = [file for file in cache.glob(pattern) if file.is_file()] or list(cache.glob(f"{pattern}/*"))
    raw = file.read_bytes()
    file.write_bytes(damage(raw))
    assert file.read_bytes() != raw
    if not pattern.startswith("parts"):
        before.parts[0].path.unlink()
    store_of(path)
    assert parts_of(cache) == kept
    assert file.read_bytes() == raw


@pytest.mark.parametrize("pattern", ["tokenizers/*.json", "files/*.json", "stores/*.json", "parts/*/*.tokens"])
def test_what_cannot_be_opened_is_made_again(pattern: str, tmp_path: Path, cache: Path, store_of: StoreOf) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello world")
    os.utime(path, (1, 1))
    before = store_of(path)
    kept = parts_of(cache)
    (file,) = cache.glob(pattern)
    raw = file.read_bytes()
    file.unlink()
    file.symlink_to(file)  # errno 40, as any error of a disk would be another than "no such file"
    if not pattern.startswith("parts"):
        before.parts[0].path.unlink()
    store_of(path)
    assert parts_of(cache) == kept
    assert not file.is_symlink()
    assert file.read_bytes() == raw


def test_what_others_have_left_in_the_cache_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "parts/0"
    folder.mkdir(parents=True)
    (loop := folder / ".x.1.tmp").symlink_to(loop)
    (ours := partial_of(folder / "x")).touch()
    (kept := folder / ".y.1.tmp").mkdir()
    for left in (loop, ours, kept):
        os.utime(left, (1, 1), follow_symlinks=False)
    remove_abandoned(tmp_path / "parts")
    assert list(folder.iterdir()) == [kept]


def test_groups_of_small_files_move_only_near_a_new_one() -> None:
    def pieces(names: list[str]) -> list[units.FileRange]:
        return [units.FileRange(name, "text", 0, 40_000, 40_000, (0, 0, 0)) for name in sorted(names)]

    names = [f"{number:05}.txt" for number in range(2000)]
    before, after = [*units.group(pieces(names))], [*units.group(pieces([*names, "00700a.txt"]))]
    assert [piece for unit in before for piece in unit.pieces] == pieces(names)
    assert len(before) > 10
    assert len(set(after) - set(before)) <= 4
