"""Corpora that other programs tokenized: the same documents from every format, read in place, and files that lie."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data.evaluation import evaluation_batches
from pretrain.data.reading.cut import cut
from pretrain.data.reading.readers import read
from pretrain.data.reading.token_files import open_tokens
from pretrain.data.reading.units import ReadOptions, SourceFile
from pretrain.data.sources.local import Local
from pretrain.data.store import token_shards
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization import encode
from pretrain.data.training_data import TrainingData
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import has_lasting_inodes, is_mount_without_inodes
from tests.data.token_writers import (
    ALL,
    DOCUMENTS,
    FORMATS,
    datatrove,
    llmc_header,
    megatron,
    nanogpt,
    npy,
)


def documents_in(store: TokenStore) -> list[list[int]]:
    return [
        part.tokens[start:end].tolist()
        for part in store.parts
        for start, end in zip([0, *part.ends[:-1]], part.ends, strict=True)
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_documents_are_read_in_place(tmp_path: Path, store_of: Callable[..., TokenStore], name: str) -> None:
    """By its path and by its folder: the same documents, none of whose tokens is written into the cache."""
    write, dtype, options = FORMATS[name]
    path = write(tmp_path / "corpus", DOCUMENTS, dtype)
    pattern = {"pattern": "*.npy"} if path.suffix == ".npy" else {}
    stores = [store_of(path, **options), store_of(path.parent, **options, **pattern)]
    for store in stores:
        assert documents_in(store) == DOCUMENTS
        assert [part.tokens_at and part.tokens_at[0] for part in store.parts] == [str(path)]
    assert stores[0].parts == stores[1].parts


def test_arrays_beside_text_are_not_taken_for_tokens(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    """A folder with embeddings, labels or somebody's .ds and .bin files: its text is read, as without them."""
    (tmp_path / "a.txt").write_text("one two")
    np.save(tmp_path / "labels.npy", np.arange(9))
    np.save(tmp_path / "embeddings.npy", np.ones(9))
    (tmp_path / "x.ds").write_bytes(b"anything")
    (tmp_path / "x.bin").write_bytes(b"anything")
    assert store_of(tmp_path).num_documents == 1


def test_every_format_holds_out_the_same_documents(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    found = set()
    for number, (write, dtype, options) in enumerate(FORMATS.values()):
        store = store_of(write(tmp_path / str(number), DOCUMENTS, dtype), **options)
        train, held_out = store.views(held_out=0.3)
        assert train.num_documents + held_out.num_documents == len(DOCUMENTS)
        found.add(tuple(held_out.read(0, held_out.num_tokens).tolist()))
    (tmp_path / "a.jsonl").write_text("".join(f'{{"input_ids": {document}}}\n' for document in DOCUMENTS))
    held_out = store_of(tmp_path / "a.jsonl").views(held_out=0.3)[1]
    assert {tuple(held_out.read(0, held_out.num_tokens).tolist())} == found


def test_the_bytes_of_text_are_unknown(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    """Bits per byte is null, not a number that was made up; tokens that are copied are decoded, and have one."""
    view = store_of(megatron(tmp_path, DOCUMENTS)).views(held_out=0.3)[0]
    assert view.num_bytes is None
    assert evaluation_batches(view, 4, 2).num_bytes is None


def test_documents_without_a_separator_are_copied_and_get_one(
    tmp_path: Path, store_of: Callable[..., TokenStore], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    without = [document[:-1] for document in DOCUMENTS]
    store = store_of(megatron(tmp_path, without))
    assert documents_in(store) == DOCUMENTS
    assert [part.tokens_at for part in store.parts] == [None]
    texts = [tokenizer.decode(document) for document in without]
    assert store.views(held_out=0)[0].num_bytes == sum(len(text.encode()) for text in texts)


def test_a_large_copy_is_announced(
    tmp_path: Path,
    store_of: Callable[..., TokenStore],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pretrain.data.tokenization.tokenize.OWN_UNIT_BYTES", 8)
    store_of(megatron(tmp_path, [[5, 6], [7]] * 3))
    assert "18 bytes of token ids" in capsys.readouterr().err


def test_a_stream_is_cut_anywhere_and_continues(
    tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a file without an index: the stream of tokens is that of the file, and all of it stays there."""
    monkeypatch.setattr("pretrain.data.reading.token_files.PIECE_BYTES", 10)
    monkeypatch.setattr("pretrain.data.reading.units.OWN_UNIT_BYTES", 1)
    store = store_of(npy(tmp_path / "a", DOCUMENTS))
    view = store.views(held_out=0)[0]
    assert view.read(0, view.num_tokens).tolist() == ALL
    assert len(store.parts) == 4
    assert all(part.tokens_at for part in store.parts)
    indexed = store_of(megatron(tmp_path / "b", DOCUMENTS))
    assert documents_in(indexed) == DOCUMENTS
    assert len(indexed.parts) == 3


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_the_first_tokens_of_a_corpus(tmp_path: Path, store_of: Callable[..., TokenStore], dtype: str) -> None:
    store = store_of(megatron(tmp_path, DOCUMENTS, dtype), max_tokens=12, deduplicate="near")
    assert documents_in(store) == DOCUMENTS[:3]
    assert all(part.tokens_at for part in store.parts)
    assert store.views(held_out=0, deduplicate="near")[0].num_documents == 3


def test_a_second_start_opens_nothing(
    tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = megatron(tmp_path / "corpus", DOCUMENTS)
    before = store_of(path)
    monkeypatch.setattr("pretrain.data.reading.token_files._megatron", lambda *_: pytest.fail("read again"))
    assert store_of(path).parts == before.parts


def test_a_changed_index_is_noticed(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    path = megatron(tmp_path, DOCUMENTS)
    before = store_of(path)
    joined = [DOCUMENTS[0] + DOCUMENTS[1], *DOCUMENTS[2:]]
    stamp = path.stat()
    megatron(tmp_path / "other", joined)
    (tmp_path / "other/a.idx").replace(tmp_path / "a.idx")
    assert path.stat() == stamp
    assert documents_in(store_of(path)) == joined
    assert before.num_documents == 5


def test_another_file_of_the_same_size_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for kind, count in (("<u2", 8), ("<u4", 4), ("<i8", 2)):
        np.save(tmp_path / "new.npy", np.arange(count, dtype=kind))
        (tmp_path / "new.npy").replace(path)
        assert path.stat().st_size == 128 + 16
        found = open_tokens(SourceFile(str(path), "npy"))
        assert found.read(0, found.count).tolist() == list(range(count))


def test_a_moved_corpus_is_found_again(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    """A part is named by its content; its file is where it was read last."""
    path = datatrove(tmp_path / "here", DOCUMENTS)
    before = store_of(path)
    (tmp_path / "here").rename(tmp_path / "there")
    after = store_of(tmp_path / "there/a.ds")
    assert [part.path for part in after.parts] == [part.path for part in before.parts]
    assert documents_in(after) == DOCUMENTS
    with pytest.raises(UserError, match=r"has lost files"):
        (tmp_path / "there/a.ds").unlink()
        TokenStore(after.path)


ROUGH: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: path.open("ab").write(b"\1\0"),
    "written anew": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one byte": lambda path: os.pwrite(os.open(path, os.O_WRONLY), b"\7", path.stat().st_size - 4),
}


@pytest.mark.parametrize("how", ROUGH)
@pytest.mark.parametrize("name", ["megatron", "nanoGPT"])
def test_a_file_that_is_written_to_during_a_run(
    tmp_path: Path, store_of: Callable[..., TokenStore], name: str, how: str
) -> None:
    """One line before any token of the new content is returned, and no SIGBUS, which would end the process."""
    write, dtype, options = FORMATS[name]
    path = write(tmp_path / "corpus", DOCUMENTS, dtype)
    view = store_of(path, **options).views(held_out=0)[0]
    assert view.read(0, 4).tolist() == ALL[:4]
    ROUGH[how](path)
    for begin in (0, view.num_tokens - 2):
        with pytest.raises(
            UserError, match=r"^[^\n]*corpus/a.bin: changed or cut off during the run, which reads its [^\n]*$"
        ):
            view.read(begin, begin + 2)


def test_the_watch_of_changed_files_leaves_out_those_read_in_place(
    tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that the run continues with its cached tokens."""
    monkeypatch.setattr("pretrain.data.reading.units.OWN_UNIT_BYTES", 1)
    in_place = megatron(tmp_path / "a", DOCUMENTS)
    copied = megatron(tmp_path / "b", [document[:-1] for document in DOCUMENTS])
    train = TrainingData.of(store_of(tmp_path).views(held_out=0)[0])
    assert {*train.files} == {str(in_place), str(copied)}
    assert {*train.copied_files} == {str(copied)}


@pytest.mark.parametrize("lasting", [True, False])
def test_an_inode_that_another_machine_does_not_have(
    lasting: bool, tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same file with another inode, as a node of a cluster sees it through FUSE: its store can be opened there. Elsewhere,
    another inode is another file."""
    monkeypatch.setattr("pretrain.runtime.filesystem.has_lasting_inodes", lambda device: lasting)
    path = megatron(tmp_path, DOCUMENTS)
    store = store_of(path)
    inode = path.stat().st_ino
    shutil.copy2(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    assert path.stat().st_ino != inode
    if lasting:
        with pytest.raises(UserError, match="has lost files"):
            TokenStore(store.path)
    else:
        assert documents_in(TokenStore(store.path)) == DOCUMENTS
        assert store_of(path).parts == store.parts


MOUNTS = {
    "52 27 0:47 / /data rw,nosuid - fuse.sshfs host:/data rw,user_id=0": True,
    "52 27 0:47 / /data rw,nosuid shared:3 master:1 - fuse gcsfuse rw": True,
    "52 27 0:47 / /data rw - 9p data rw": True,
    "52 27 0:47 / /mnt/a\\040b rw - cifs //host/b rw,noserverino": True,
    "52 27 0:47 / /data rw - fuseblk /dev/sdb1 rw": False,
    "52 27 0:47 / /data rw - nfs4 host:/data rw": False,
    "52 27 0:48 / /data rw - fuse.sshfs host:/data rw": False,
    "": False,
}


@pytest.mark.parametrize("line", MOUNTS)
def test_mounts_whose_inodes_differ_between_machines(line: str) -> None:
    assert is_mount_without_inodes(line, "0:47") == MOUNTS[line]
    assert has_lasting_inodes(Path(__file__).stat().st_dev)


def test_a_file_that_is_replaced_or_deleted_during_a_run_is_still_open(
    tmp_path: Path, store_of: Callable[..., TokenStore]
) -> None:
    path = megatron(tmp_path, DOCUMENTS)
    view = store_of(path).views(held_out=0)[0]
    assert view.read(0, 1).tolist() == ALL[:1]
    (tmp_path / "new").write_bytes(bytes(path.stat().st_size))
    (tmp_path / "new").replace(path)
    assert view.read(0, view.num_tokens).tolist() == ALL
    path.unlink()
    assert view.read(0, view.num_tokens).tolist() == ALL


def test_a_file_is_open_once_for_all_of_its_shards(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    """However many shards there are, and only a file of the same inode is opened again."""
    path = megatron(tmp_path, DOCUMENTS)
    view = store_of(path).views(held_out=0)[0]
    assert view.read(0, 1).tolist() == ALL[:1]
    content, times = path.read_bytes(), path.stat()
    path.rename(tmp_path / "kept")
    token_shards._tokens_elsewhere.cache_clear()  # as more than `MAX_OPEN` other shards would have done
    assert view.read(0, view.num_tokens).tolist() == ALL
    (tmp_path / "kept").write_bytes(content)
    path.write_bytes(bytes(len(content)))
    for file in (path, tmp_path / "kept"):
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    token_shards._tokens_elsewhere.cache_clear()
    token_shards._opened.cache_clear()
    with pytest.raises(UserError, match=r"a\.bin: changed or cut off during the run, .*\(another file, or"):
        view.read(0, 1)
    (tmp_path / "kept").rename(path)
    assert view.read(0, view.num_tokens).tolist() == ALL


@pytest.mark.parametrize("at", ["fits_in_place", "write_in_place"])
def test_a_file_that_is_truncated_while_it_is_tokenized(
    at: str, tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = nanogpt(tmp_path, DOCUMENTS, "uint16")
    work = getattr(encode, at)

    def truncated(*arguments: Any, **options: Any) -> Any:
        os.truncate(path, 8)
        return work(*arguments, **options)

    monkeypatch.setattr(encode, at, truncated)
    with pytest.raises(UserError, match=r"a\.bin: the file changed while it was being read; start again"):
        store_of(path, format="tokens")


def test_bos_is_added_where_the_corpus_has_none(tmp_path: Path, tokenizer_json: str) -> None:
    from pretrain.data.tokenization.tokenize import prepare

    with_bos = [[1, *document] for document in DOCUMENTS]
    for documents, in_place in ((DOCUMENTS, False), (with_bos, True)):
        path = megatron(tmp_path / str(in_place), documents)
        store = prepare(Local(nameOrPath=str(path)), tokenizer_json=tokenizer_json, eot=0, bos=1)
        assert documents_in(store) == with_bos
        assert [part.tokens_at is not None for part in store.parts] == [in_place]


def test_ids_of_another_tokenizer_name_their_place(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    path = datatrove(tmp_path, [[5, 0], [6, 7, 60_000, 0]])
    with pytest.raises(UserError, match=r"a\.ds, token 4: id 60000, but the model's tokenizer has ids 0 to 599"):
        store_of(path)
    path = npy(tmp_path, [[5, -3, 0]], "int32")
    with pytest.raises(UserError, match=r"a\.npy, token 1: id -3"):
        store_of(path)


# Files that lie -------------------------------------------------------------------------------------------------------


def header(version: int = 1, code: int = 8, sequences: int = 5, documents: int = 6) -> bytes:
    return b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, sequences, documents)


LENGTHS = np.array([4, 2, 5, 3, 4], np.int32)
STARTS = ((np.cumsum(LENGTHS) - LENGTHS) * 2).astype(np.int64)
BORDERS = np.arange(6, dtype=np.int64)


def index(head: bytes = header(), lengths: Any = LENGTHS, starts: Any = STARTS, borders: Any = BORDERS) -> bytes:
    return (
        head
        + np.array(lengths, np.int32).tobytes()
        + np.array(starts, np.int64).tobytes()
        + np.array(borders, np.int64).tobytes()
    )


LIES: dict[str, bytes] = {
    "cut off": index()[:-1],
    "only a header": header(),
    "half a header": header()[:20],
    "another version": index(header(version=2)),
    "floats": index(header(code=7)),
    "no such type": index(header(code=200)),
    "2^63 sequences": index(header(sequences=2**63)),
    "2^64 - 1 documents": index(header(documents=2**64 - 1)),
    "counts whose sizes overflow": index(header(sequences=2**64 - 12, documents=2**61)),
    "a negative length": index(lengths=[4, -2, 9, 3, 4]),
    "more tokens than the file": index(lengths=[4, 2, 5, 3, 2**31 - 1]),
    "fewer tokens than the file": index(lengths=[4, 2, 5, 3, 3]),
    "an offset behind the end": index(starts=[0, 8, 12, 22, 2**62]),
    "a negative offset": index(starts=[-8, 8, 12, 22, 28]),
    "sequences that overlap": index(starts=[0, 0, 12, 22, 28]),
    "documents that go back": index(borders=[0, 3, 2, 4, 5, 5]),
    "documents behind the last sequence": index(borders=[0, 1, 2, 3, 4, 2**40]),
    "negative documents": index(borders=[-1, 1, 2, 3, 4, 5]),
    "documents that leave sequences out": index(borders=[0, 1, 2, 3, 4, 4]),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_of_megatron_that_lies_is_one_line(
    tmp_path: Path, store_of: Callable[..., TokenStore], name: str
) -> None:
    path = megatron(tmp_path, DOCUMENTS)
    assert (tmp_path / "a.idx").read_bytes() == index()
    (tmp_path / "a.idx").write_bytes(LIES[name])
    with pytest.raises(UserError, match=r"^[^\n]*/a\.(idx|bin): [^\n]+$"):
        store_of(path)


def ends(*values: int) -> bytes:
    return np.array(values, np.uint64).tobytes()


DATATROVE_LIES = {
    "cut off": ends(4, 6, 11, 14, 18)[:-3],
    "empty": b"",
    "no documents": ends(0),
    "ends that go back": ends(4, 11, 6, 14, 18),
    "ends that overflow": ends(4, 6, 11, 14, 2**64 - 1),
    "fewer tokens than the file": ends(4, 6, 11, 14),
    "more tokens than the file": ends(4, 6, 11, 14, 19),
}


@pytest.mark.parametrize("name", DATATROVE_LIES)
def test_an_index_of_datatrove_that_lies_is_one_line(
    tmp_path: Path, store_of: Callable[..., TokenStore], name: str
) -> None:
    path = datatrove(tmp_path, DOCUMENTS)
    (tmp_path / "a.ds.index").write_bytes(DATATROVE_LIES[name])
    with pytest.raises(UserError, match=r"^[^\n]*/a\.ds(\.index)?: [^\n]+$"):
        store_of(path)


def numpy_file(shape: str, kind: str = "<u2", order: str = "False", data: bytes = b"\0" * 8) -> bytes:
    return numpy_header(f"{{'descr': '{kind}', 'fortran_order': {order}, 'shape': {shape}, }}", data)


def numpy_header(text: str, data: bytes = b"\0" * 8) -> bytes:
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


OTHER_LIES: dict[str, tuple[str, bytes, dict[str, Any]]] = {
    "npy of objects": ("a.npy", numpy_file("(4,)", "|O"), {}),
    "npy of floats": ("a.npy", numpy_file("(2,)", "<f4"), {}),
    "npy of big-endian ids": ("a.npy", numpy_file("(4,)", ">u2"), {}),
    "npy cut off": ("a.npy", numpy_file("(5,)"), {}),
    "npy of 2^60 ids": ("a.npy", numpy_file(f"({2**60},)"), {}),
    "npy of a negative shape": ("a.npy", numpy_file("(-4,)"), {}),
    "npy in Fortran order": ("a.npy", numpy_file("(2, 2)", order="True"), {}),
    "npy with code for a shape": ("a.npy", numpy_file("__import__('os').getpid()"), {}),
    "npy with an open parenthesis": ("a.npy", numpy_header("{'descr': ('<u2', 'fortran"), {}),
    "npy with an open string": ("a.npy", numpy_header("{'descr': '''<u2"), {}),
    "npy with many parentheses": ("a.npy", numpy_header("(" * 9000), {}),
    "npy with a truth value for a size": ("a.npy", numpy_file("(True,)"), {}),
    "npy with keys of two types": ("a.npy", numpy_header("{1: 2, 'descr': 3}"), {}),
    "npy with a list as key": ("a.npy", numpy_header("{[]: 2}"), {}),
    "no npy": ("a.npy", b"PK\x03\x04 and more bytes", {}),
    "empty npy": ("a.npy", b"", {}),
    "llm.c cut off": ("a.bin", llmc_header(10) + b"\0" * 18, {}),
    "llm.c with a negative count": ("a.bin", llmc_header(-1), {}),
    "half a token": ("a.bin", b"\1\0\2", {"format": "tokens"}),
    "a .bin without anything": ("a.bin", b"\1\0\2\0", {}),
    "a .ds without an index": ("a.ds", b"\1\0\2\0", {}),
}


@pytest.mark.parametrize("name", OTHER_LIES)
def test_another_file_that_lies_is_one_line(tmp_path: Path, store_of: Callable[..., TokenStore], name: str) -> None:
    ending, content, options = OTHER_LIES[name]
    (tmp_path / ending).write_bytes(content)
    with pytest.raises(UserError, match=rf"^[^\n]*/{ending}: [^\n]+$"):
        store_of(tmp_path / ending, **options)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_of_an_index_is_one_line_or_documents_of_the_file(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever bytes an index has: a ``UserError``, or documents that are made of the file's tokens."""
    write, name = data.draw(st.sampled_from([(megatron, "a.idx"), (datatrove, "a.ds.index")]))
    path = write(tmp_path, DOCUMENTS)
    raw = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 127, 128, 255]))
    (tmp_path / name).write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    found: list[int] = []
    try:
        for piece in cut(Local(nameOrPath=str(path)).files()[0], ReadOptions()):
            for document in read(piece, ReadOptions()):
                found += document.tolist()  # type: ignore[union-attr]
    except UserError:
        return
    assert found == ALL


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_files_of_datatrove_itself(tmp_path: Path, store_of: Callable[..., TokenStore], dtype: str) -> None:
    """Written by the package, where it is installed."""
    tokenizer = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    file = tokenizer.TokenizedFile(str(tmp_path), "a.ds", token_size=np.dtype(dtype).itemsize, save_final_metadata=True)
    for document in DOCUMENTS:
        file.write(document, None)
    file.close()
    assert documents_in(store_of(tmp_path)) == DOCUMENTS
