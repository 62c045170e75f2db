# ruff: noqa: E501  (a row of a table is one line)
"""Data files as strangers have them: what is read of each, or the words of the one line that refuses it. Every row is read in
process, as a run reads it before the tokenizer; a few go through the command."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data.reading.compressed import _gzip_blocks, _zstd_blocks
from pretrain.runtime.errors import UserError
from tests.data.formats import WRITERS, arrow, arrow_file, documents_of, parquet, save_to_disk, zst

A, B = '{"text": "a"}', '{"text": "b"}'
LINES = f"{A}\n{B}\n".encode()
DEEP = "[" * 200_000
LONG_LINE = " ".join(
    random.Random(0).choices(["anarchism", "originated", "as", "a", "term"], k=2_200_000)
)  # 13 MB, no line end
LONG_CJK = "漢字" * 3_000_000  # 18 MB without a line end or a blank


def zst_long(raw: bytes, window_log: int) -> bytes:
    """As ``zstd --long=N`` does it, without the size of the content, so that the window is what the frame's header says."""
    options = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return packer.compress(raw) + packer.flush()


SKIPPABLE = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"  # as pzstd and the seekable format have it


def tar_of(content: bytes) -> bytes:
    file, info = io.BytesIO(), tarfile.TarInfo("a.txt")
    info.size = len(content)
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def table(column: Any, name: str = "text") -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({name: column}), file)
    return file.getvalue()


def stream(column: Any, name: str = "text") -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, pa.schema([(name, column.type)])) as writer:
        writer.write_batch(pa.record_batch([column], [name]))
    return file.getvalue()


def not_utf8() -> pa.Array:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 4, 10)))
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"fineb\xe9auty")[:10]])


BATCHES = arrow(["a", "b", "c", "d"] * 4)  # of two rows each
FIRST_BATCHES = BATCHES[: BATCHES.rindex(b"\xff\xff\xff\xff\x00\x00\x00\x00")]  # cut off between two messages
Expected = list[Any] | str  # documents, or words of the refusal (a regular expression)

# case: (name of the file, its bytes, options, documents or words)
TABLE: dict[str, tuple[str, bytes, dict[str, Any], Expected]] = {
    # JSON Lines
    "line ends of Windows, blank lines, no last line end": ("a.jsonl", f"{A}\r\n\r\n \n{B}".encode(), {}, ["a", "b"]),
    "a byte order mark": ("a.jsonl", codecs.BOM_UTF8 + LINES, {}, ["a", "b"]),
    "nulls and texts of white space": ("a.jsonl", b'{"text": null}\n{"text": " \\n"}\nnull\n' + LINES, {}, ["a", "b"]),
    "texts without records": ("a.jsonl", b'"a"\n"b"\n', {}, ["a", "b"]),
    "separators of Unicode inside a text": ("a.jsonl", '{"text": "a\u2028b\x85c"}\n'.encode(), {}, ["a\u2028b\x85c"]),
    "an escaped zero": ("a.jsonl", b'{"text": "a\\u0000b"}', {}, ["a\0b"]),
    "a zero byte": ("a.jsonl", LINES + b"\0\0\0\0", {}, r"a\.jsonl:3: broken JSON line"),
    "a last line cut off": ("a.jsonl", LINES + b'{"text": "c', {}, r"a\.jsonl:3: broken JSON line"),
    "two records on a line": ("a.jsonl", f"{A}\n{A}{B}\n".encode(), {}, r"a\.jsonl:2: broken JSON line \(Extra data"),
    "line ends of old Macs": ("a.jsonl", f"{A}\r{B}\r".encode(), {}, r"a\.jsonl:1: broken JSON line"),
    "half a surrogate pair": ("a.jsonl", A.encode() + b'\n{"text": "a\\ud83dz"}', {}, r"a\.jsonl:2: half of a surrogate pair \(\\ud83d\)"),
    "half a surrogate pair, replaced": ("a.jsonl", b'{"text": "a\\ud83dz"}', {"errors": "replace"}, ["a\ufffdz"]),
    "a whole surrogate pair": ("a.jsonl", b'{"text": "\\ud83d\\ude42"}', {}, ["🙂"]),
    "half a pair in a key": ("a.jsonl", b'{"\\ud83d": 1, "text": "a"}', {}, ["a"]),
    "nested 200,000 deep": ("a.jsonl", f"{A}\n{DEEP}\n".encode(), {}, r"a\.jsonl:2: broken JSON line \(nested too deep\)"),
    "nested deep inside a record": ("a.jsonl", f'{{"text": {DEEP}'.encode(), {}, r"a\.jsonl:1: broken JSON line"),
    "a list for a text": ("a.jsonl", f'{{"text": {"[" * 900}{"]" * 900}}}'.encode(), {}, r"a\.jsonl:1: neither text nor"),
    "an id beyond int64": ("a.jsonl", b'{"input_ids": [1, 9223372036854775808]}', {}, r"a\.jsonl:1: 9223372036854775808 is not a token id"),
    "an id of 5,000 digits": ("a.jsonl", f'{{"input_ids": [{"9" * 5000}]}}'.encode(), {}, r"a\.jsonl:1: broken JSON line"),
    "ids that are truths": ("a.jsonl", b'{"input_ids": [true]}', {}, r"a\.jsonl:1: neither text nor"),
    "UTF-16": ("a.jsonl", A.encode("utf-16"), {}, r"a\.jsonl: UTF-16, not UTF-8; .*iconv -f UTF-16"),
    # Text
    "UTF-16 of big endians, replaced": ("a.txt", codecs.BOM_UTF16_BE + "hi".encode("utf-16-be"), {"errors": "replace"}, "UTF-16, not"),
    "UTF-16 without a mark": ("a.txt", "hello world".encode("utf-16-le"), {}, "UTF-16LE, not UTF-8"),
    "UTF-32": ("a.txt", "hello".encode("utf-32"), {}, "UTF-32, not UTF-8"),
    "zero bytes in text": ("a.txt", b"some\0text", {}, ["some\0text"]),
    "Latin-1": ("a.txt", b"caf\xe9", {}, r"a\.txt: not UTF-8 at byte 3 \(0xe9\); .*errors=replace"),
    "Latin-1, replaced": ("a.txt", b"caf\xe9", {"errors": "replace"}, ["caf\ufffd"]),
    "Latin-1, compressed": ("a.txt.zst", zst(b"caf\xe9"), {}, "not UTF-8 at byte 3 of the decompressed file"),
    "surrogates of CESU-8": ("a.txt", b"a\xed\xa0\xbd", {}, "not UTF-8 at byte 1"),
    # JSON
    "two lists, one after the other": ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', {}, ["a", "b"]),
    "a list and then records": ("a.json", f"[{A}] {B}".encode(), {}, ["a", "b"]),
    "something behind the list": ("a.json", f"[{A}]\n\noops".encode(), {}, r"a\.json:3: broken JSON"),
    "two ends": ("a.json", f"[{A}]]".encode(), {}, r"a\.json:1: broken JSON"),
    "a comma behind the last": ("a.json", f"[{A},\n{B},\n]\n".encode(), {}, ["a", "b"]),
    "records on one line": ("a.json", f"{A}{B}".encode(), {}, ["a", "b"]),
    "a record over several lines": ("a.json", b'{\n "text":\n "a"\n}\n', {}, ["a"]),
    "a list of texts": ("a.json", b'["a", "b"]', {}, ["a", "b"]),
    "a list of ids": ("a.json", b'[[1, 2], [3]]', {}, [[1, 2], [3]]),
    "a list without its end": ("a.json", f"[{A},\n{B}".encode(), {}, r"a\.json:2: broken JSON \(the list has no end"),
    "a list cut off in a text": ("a.json", f'[{A},\n{{"text": "b'.encode(), {}, r"a\.json:2: broken JSON \(Unterminated .* cut off"),
    "a mistake far before the end": ("a.json", f"[{A},\n{{oops}},{',' * 100}{B}]".encode(), {}, r"a\.json:2: broken JSON"),
    "a record without text": ("a.json", f'[{A},\n\n{{"body": "b"}}]'.encode(), {}, r"a\.json:3, record 1: no column 'text'.*there: body"),
    "JSON nested 200,000 deep": ("a.json", f"[{A},\n{DEEP}".encode(), {}, r"a\.json:2: broken JSON \(nested too deep\)"),
    # CSV
    "a quoted field without its end": ("a.csv", b'id,text\n1,a\n2,"b\n3,c\n', {}, r"a\.csv:3: broken CSV \(a quoted field has no end\)"),
    "a line end in the header": ("a.csv", b'"the\nid",text\n1,a\n2,"b\nc"\n', {}, ["a", "b\nc"]),
    "a header alone": ("a.csv", b"id,text\n", {}, []),
    "more fields than the header": ("a.csv", b"id,text\n1,a\n2,b, and c\n", {}, r"a\.csv:3: a record of 3 fields, but the header has 2"),
    "empty fields behind the last": ("a.csv", b"id,text\n1,a,,\n2,b\n", {}, ["a", "b"]),
    "semicolons": ("a.csv", b"id;text\n1;a\n", {}, "no column 'text'.*there: id;text"),
    "quotes and zeros in a field": ("a.csv", b'id,text\n1,5" \0pipe\n2,"a ""b"""\n', {}, ['5" \0pipe', 'a "b"']),
    "a mark and line ends of Windows": ("a.csv", codecs.BOM_UTF8 + b'"text"\r\n"a"\r\n', {}, ["a"]),
    "a quote in the middle of a quoted field": ("a.csv", b'text\n"a" b\n', {}, r"a\.csv:2: broken CSV"),
    # Compressed
    "zst cut off": ("a.jsonl.zst", zst(LINES * 99)[:-1], {}, r"a\.jsonl\.zst: cannot be decompressed, perhaps cut off"),
    "zst cut off in its header": ("a.jsonl.zst", zst(LINES)[:5], {}, "cannot be decompressed, perhaps cut off"),
    "zst of two frames": ("a.jsonl.zst", zst(A.encode() + b"\n") + zst(B.encode()), {}, ["a", "b"]),
    "zst whose second frame is cut off": ("a.jsonl.zst", zst(LINES) + zst(LINES)[:-1], {}, "cannot be decompressed"),
    "zst with an index, as pzstd writes it": ("a.jsonl.zst", SKIPPABLE + zst(LINES) + SKIPPABLE, {}, ["a", "b"]),
    "zst with an index that is cut off": ("a.jsonl.zst", zst(LINES) + SKIPPABLE[:-1], {}, "cannot be decompressed"),
    "something behind zst": ("a.jsonl.zst", zst(LINES) + b"oops", {}, "cannot be decompressed"),
    "zst of nothing": ("a.jsonl.zst", zst(b""), {}, []),
    "zst with a window of 256 MB": ("a.jsonl.zst", zst_long(LINES, 28), {}, ["a", "b"]),
    "zst with a window of 2 GB": ("a.jsonl.zst", zst_long(LINES, 31), {}, ["a", "b"]),
    "gz cut off": ("a.csv.gz", gzip.compress(b"text\na\n")[:-1], {}, r"a\.csv\.gz: cannot be decompressed, perhaps cut off"),
    "gz without its checksum": ("a.csv.gz", gzip.compress(b"text\na\n")[:-8], {}, "cannot be decompressed"),
    "gz of two members": ("a.jsonl.gz", gzip.compress(A.encode()) + gzip.compress(b"\n" + B.encode()), {}, ["a", "b"]),
    "zeros behind gz": ("a.jsonl.gz", gzip.compress(LINES) + bytes(99), {}, ["a", "b"]),
    "something behind gz": ("a.jsonl.gz", gzip.compress(LINES) + b"oops", {}, "cannot be decompressed"),
    "an error on a line of gz": ("a.jsonl.gz", gzip.compress(LINES + b"oops"), {}, r"a\.jsonl\.gz:3: broken JSON line"),
    "gz under another name, replaced": ("a.jsonl", gzip.compress(LINES), {"errors": "replace"}, r"a\.jsonl: not text, but compressed by gzip: call it \.gz"),
    "zst under another name": ("a.csv", zst(b"text\na\n"), {}, "not text, but compressed by zstd"),
    "bzip2": ("a.jsonl.bz2", bz2.compress(LINES), {"errors": "replace"}, "not text, but compressed by bzip2"),
    "xz": ("a.jsonl.xz", lzma.compress(LINES), {}, "not text, but compressed by xz"),
    "a tar of text": ("a.tar", tar_of(b"some text"), {}, "not text, but a tar archive"),
    "a zip": ("a.zip", b"PK\x03\x04 and more", {"errors": "replace"}, "not text, but a zip archive"),
    "a tar inside of gz": ("a.txt.gz", gzip.compress(tar_of(b"some text")), {}, "not text, but a tar archive"),
    "parquet of no bytes": ("a.parquet", b"", {}, r"a\.parquet: cut off: the file is empty"),
    "zst of no bytes": ("a.jsonl.zst", b"", {}, r"a\.jsonl\.zst: cut off: the file is empty"),
    "text of no bytes": ("a.jsonl", b"", {}, []),
    # Tables
    "parquet cut off": ("a.parquet", parquet(["a", "b"])[:-1], {}, r"a\.parquet: not a readable parquet file, perhaps cut off"),
    "parquet of categories": ("a.parquet", table(pa.array(["a", "b", "a"]).dictionary_encode()), {}, ["a", "b", "a"]),
    "parquet of large texts": ("a.parquet", table(pa.array(["a", None, "é"], pa.large_string())), {}, ["a", "é"]),
    "parquet of bytes": ("a.parquet", table(pa.array([b"a", "é".encode()])), {}, ["a", "é"]),
    "parquet of bytes that are no text": ("a.parquet", table(pa.array([b"a", b"\xff"])), {}, "column 'text', row 1: not UTF-8 at byte 0"),
    "parquet with a byte that is not UTF-8": ("a.parquet", table(not_utf8()), {}, r"a\.parquet, column 'text', row 1: not UTF-8 at byte 1 of the text \(0xe9\)"),
    "a column with a dot in its name": ("a.parquet", table(pa.array(["a"]), "my.text"), {"text_column": "my.text"}, ["a"]),
    "parquet with ids beyond int64": ("a.parquet", table(pa.array([[2**63]], pa.list_(pa.uint64())), "input_ids"), {}, r"row 0: 9223372036854775808 is not a token id"),
    "parquet with numbers for text": ("a.parquet", table(pa.array([1])), {}, "column 'text', row 0: neither text nor"),
    "parquet without rows": ("a.parquet", table(pa.array([], pa.string())), {}, []),
    "arrow with a byte that is not UTF-8": ("a.arrow", stream(not_utf8()), {}, r"a\.arrow, column 'text', row 1 of the record batch at byte \d+: not UTF-8 at byte 1 of the text \(0xe9\)"),
    "arrow with such a byte, replaced": ("a.arrow", stream(not_utf8()), {"errors": "replace"}, ["fine", "b\ufffdauty"[:6]]),
    "arrow views of text": ("a.arrow", stream(pa.array(["a", "é" * 20], pa.string_view())), {}, ["a", "é" * 20]),
    "arrow cut off between batches": ("a.arrow", FIRST_BATCHES, {}, r"a\.arrow: not a readable arrow file, perhaps cut off \(it has no end"),
    "arrow cut off": ("a.arrow", BATCHES[:-20], {}, r"a\.arrow: not a readable arrow file, perhaps cut off"),
    "two arrow streams, one after the other": ("a.arrow", BATCHES * 2, {}, r"a\.arrow: not a readable arrow file \(the stream ends at byte"),
    "an arrow file cut off": ("a.arrow", arrow_file(["a"])[:-6], {}, r"a\.arrow: not a readable arrow file"),
    "arrow of categories": ("a.arrow", stream(pa.array(["a"]).dictionary_encode()), {}, "arrow file with dictionary messages"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_files(case: str, tmp_path: Path) -> None:
    name, content, options, expected = TABLE[case]
    (tmp_path / name).write_bytes(content)
    check(tmp_path / name, options, expected)


def check(path: Path, options: dict[str, Any], expected: Expected) -> None:
    if isinstance(expected, list):
        assert documents_of(path, **options) == expected
        return
    with pytest.raises(UserError) as raised:
        documents_of(path, **options)
    message = str(raised.value)
    assert re.search(expected, message), message
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("text", [LONG_LINE, LONG_CJK], ids=["words", "no blanks"])
def test_text_without_a_line_end(name: str, text: str, tmp_path: Path) -> None:
    """text8 is 100 MB on one line: nothing is lost, and documents end between words where there are any."""
    pack = {"a.txt": bytes, "a.txt.gz": lambda raw: gzip.compress(raw, 1), "a.txt.zst": zst}[name]
    (tmp_path / name).write_bytes(pack(text.encode()))
    found = documents_of(tmp_path / name)
    assert "".join(found) == text
    assert max(map(len, found)) <= 20_000
    assert text is LONG_CJK or all(document.endswith(" ") for document in found[:-1])


@pytest.mark.parametrize(
    ("pack", "blocks"), [(lambda raw: gzip.compress(raw, 1), _gzip_blocks), (zst, _zstd_blocks)], ids=["gz", "zst"]
)
def test_a_compressed_bomb_is_not_in_memory_at_once(pack: Callable, blocks: Callable) -> None:
    """100 MB out of some kB: what one step makes is bounded."""
    sizes = [len(block) for block in blocks(io.BytesIO(pack(bytes(100 << 20))))]
    assert sum(sizes) == 100 << 20
    assert max(sizes) <= 64 << 20


SAVED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no JSON": (lambda d: (d / "state.json").write_text("{"), r"state\.json: cannot be read"),
    "a list": (lambda d: (d / "state.json").write_text("[]"), r"state\.json: no list '_data_files'"),
    "no files": (lambda d: (d / "state.json").write_text("{}"), r"state\.json: no list '_data_files'"),
    "no names": (lambda d: (d / "state.json").write_text('{"_data_files": [1]}'), r"state\.json: '_data_files' names no files"),
    "an empty list": (lambda d: (d / "state.json").write_text('{"_data_files": []}'), r"state\.json: '_data_files' names no files"),
    "nested deep": (lambda d: (d / "state.json").write_text(DEEP), r"state\.json: cannot be read \(nested too deep\)"),
    "not UTF-8": (lambda d: (d / "state.json").write_bytes(b"\xff"), r"state\.json: cannot be read"),
    "a file elsewhere": (lambda d: (d / "state.json").write_text('{"_data_files": [{"filename": "/etc/passwd"}]}'), "outside the folder"),
    "a shard that is gone": (lambda d: next(d.glob("*.arrow")).unlink(), r"\.arrow: cannot be read \(No such file"),
    "a shard cut off": (lambda d: os.truncate(next(d.glob("*.arrow")), 200), r"\.arrow: not a readable arrow file"),
    "splits of no names": (lambda d: (d / "dataset_dict.json").write_text('{"splits": [1]}'), "'splits' is not a list of names"),
    "no splits": (lambda d: (d / "dataset_dict.json").write_text('{"splits": "train"}'), "no list 'splits'"),
    "a split that is gone": (lambda d: (d / "dataset_dict.json").write_text('{"splits": ["train"]}'), r"train/state\.json: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVED)
def test_broken_saved_folders(case: str, tmp_path: Path) -> None:
    save_to_disk(["a", "b"], tmp_path / "d")
    spoil, words = SAVED[case]
    spoil(tmp_path / "d")
    with pytest.raises(UserError, match=words) as raised:
        documents_of(tmp_path / "d")
    assert "\n" not in str(raised.value)


COMMANDS = [
    "zst cut off",
    "something behind the list",
    "half a surrogate pair",
    "arrow cut off between batches",
    "two lists, one after the other",
]


@pytest.mark.parametrize("case", COMMANDS)
def test_through_the_command(case: str, tmp_path: Path, base_arguments, command) -> None:
    name, content, _, expected = TABLE[case]
    (tmp_path / name).write_bytes(content)
    arguments = ["task=tokenization", f"dataset.nameOrPath={tmp_path / name}", f"output_dir={tmp_path / 'run'}"]
    code, out, err = command([*base_arguments, *arguments])
    if isinstance(expected, list):
        assert code == 0, err
        assert " 1 documents, 1 bytes of text" in out  # of two, one is held out
        return
    assert code == 2
    assert re.search(expected, err), err
    assert len([line for line in err.splitlines() if name in line]) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


# Whatever documents, whatever bytes ----------------------------------------------------------------------------------

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
# Without carriage returns, which CSV turns to line ends of its own, and surrogates, which no format can hold.
texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1).filter(
        lambda text: not text.isspace()
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("ending", WRITERS)
@same_folder
@given(documents=texts)
def test_any_documents_come_back(ending: str, tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(WRITERS[ending](documents))
    assert documents_of(path) == documents


@pytest.mark.parametrize("ending", [*WRITERS, "txt"])
@same_folder
@given(data=st.data(), errors=st.sampled_from(["strict", "replace"]))
def test_any_edit_ends_in_documents_or_one_line(ending: str, tmp_path: Path, data: st.DataObject, errors: str) -> None:
    """Of parquet not in its footer, which has no checksum: pyarrow 26 ends the process (`terminate called after throwing
    ParquetException`) for one whose sizes contradict each other."""
    documents = ["some text", "é漢🙂", 'a, "quoted"\nline'] * 5
    raw = bytearray(WRITERS[ending](documents) if ending != "txt" else "\n".join(documents).encode())
    footer = int.from_bytes(raw[-8:-4], "little") + 8 if ending == "parquet" else 0  # see below
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - footer))
        lost = data.draw(st.sampled_from([0, 1, 4, len(raw)]))
        if lost < len(raw):
            raw[at : min(at + lost, len(raw) - footer)] = data.draw(st.binary(max_size=8))
        else:  # cut off: the footer is gone
            del raw[at:]
            footer = 0
    path = tmp_path / f"a.{ending}"
    path.write_bytes(raw)
    for text in read_or_refused(path, errors):
        assert isinstance(text, list) or text.encode()


def read_or_refused(path: Path, errors: str) -> list[Any]:
    """The documents; none where one line about the file refuses it. Another exception fails the test."""
    try:
        return documents_of(path, errors=errors)
    except UserError as error:
        message = str(error)
    assert path.name in message
    assert "\n" not in message
    return []
