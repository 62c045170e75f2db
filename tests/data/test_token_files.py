"""Corpora that other programs tokenized: the same documents from every format, read in place, and files that change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data.evaluation import evaluation_batches
from pretrain.data.reading.token_files import open_tokens
from pretrain.data.reading.units import SourceFile
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
