"""A store of five documents in three parts, looked at by hand; any store: test_views.py."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from pretrain.data.store import token_shards as parts_module
from pretrain.data.store.token_shards import MAGIC, PartWriter, _mapped, open_part
from pretrain.data.store.token_store import DocumentOrigin, TokenStore, aranges, by_value
from pretrain.runtime.errors import UserError

SMALL, LARGE = 2**62, 3 * 2**62
# hash, tokens, bytes of text, piece, index
FIRST = [(SMALL, [1, 2, 0], 7, 0, 0), (LARGE, [3, 0], 5, 1, 0), (LARGE, [3, 0], 5, 1, 4)]
LAST = [(SMALL + 1, [4, 5, 6, 0], 9, 0, 2), (2**64 - 1, [7, 0], 3, 0, 3)]


def write(path: Path, documents, dtype="uint16", **facts) -> Path:
    with open(path, "wb") as file:
        writer = PartWriter(file, np.dtype(dtype))
        for digest, tokens, size, piece, index in documents:
            writer.append(np.array(tokens), digest=digest, size=size, piece=piece, index=index)
        writer.finish(facts)
    return path


@pytest.fixture
def store(tmp_path) -> TokenStore:
    _mapped.cache_clear()
    names = [write(tmp_path / f"{n}.tokens", part) for n, part in enumerate((FIRST, [], LAST))]
    manifest = {
        "name": "corpus",
        "eot": 0,
        "bos": 9,
        "parts": list(map(str, names)),
        "units": [[["a.txt", 0], ["b.txt", 64]], [["empty.txt", 0]], [["c.txt", 128]]],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return TokenStore(tmp_path / "manifest.json")


def test_the_bytes_of_a_part(tmp_path):
    """The layout on disk: caches of earlier versions are read by it."""
    raw = write(tmp_path / "p", FIRST[:2], made="now").read_bytes()
    assert raw[:16] == np.array([1, 2, 0, 3, 0], "<u2").tobytes() + bytes(6)
    columns = struct.pack("<2q2Q2q2I2I", 3, 5, SMALL, LARGE, 7, 5, 0, 1, 0, 0)
    assert raw[16 : 16 + len(columns)] == columns
    checksum = xxhash.xxh3_64_hexdigest(raw[: 16 + len(columns)])
    footer = (
        b'{"bytes": 12, "checksum": "%s", "documents": 2, "dtype": "uint16", "made": "now", "tokens": 5}'
        % checksum.encode()
    )
    assert raw[16 + len(columns) :] == footer + struct.pack("<Q", len(footer)) + b"PTTOKEN1"


def test_the_largest_numbers_that_a_part_holds(tmp_path):
    part = open_part(write(tmp_path / "p", [(2**64 - 1, [2**16 - 1, 0], 2**40, 2**32 - 1, 2**31)]))
    assert (part.hashes.tolist(), part.sizes.tolist()) == ([2**64 - 1], [2**40])
    assert (part.pieces.tolist(), part.indices.tolist(), part.tokens.tolist()) == ([2**32 - 1], [2**31], [2**16 - 1, 0])


def test_a_part_is_read_as_it_was_written(tmp_path):
    part = open_part(write(tmp_path / "p", FIRST, dtype="uint32"))
    assert (part.num_tokens, part.num_documents, part.num_bytes, part.dtype) == (7, 3, 17, np.dtype("uint32"))
    assert (part.tokens.dtype, part.tokens.tolist()) == (np.dtype("uint32"), [1, 2, 0, 3, 0, 3, 0])
    assert part.ends.tolist() == [3, 5, 7]
    assert part.hashes.tolist() == [SMALL, LARGE, LARGE]
    assert part.sizes.tolist() == [7, 5, 5]
    assert part.pieces.tolist() == [0, 1, 1]
    assert part.indices.tolist() == [0, 0, 4]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[8:],
        lambda raw: b"x" + raw,
        lambda raw: b"",
        lambda raw: raw[:-8] + b"PTTOKEN2",
        lambda raw: MAGIC,
        lambda raw: bytes(8) + MAGIC,
        lambda raw: struct.pack("<Q", 1) + MAGIC,
        lambda raw: raw[:-16] + struct.pack("<Q", len(raw) - 15) + MAGIC,
        lambda raw: raw[:-16] + struct.pack("<Q", 2**64 - 1) + MAGIC,
    ],
)
def test_a_part_that_is_not_all_there(damage, tmp_path):
    path = write(tmp_path / "p", FIRST)
    path.write_bytes(damage(path.read_bytes()))
    assert open_part(path) is None
    assert open_part(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("changes", "is_part"),
    [
        ({}, True),
        ({"more": [1]}, True),
        ({"dtype": "uint64"}, False),
        ({"dtype": "float16"}, False),
        ({"dtype": None}, False),
        ({"tokens": 4.0}, False),
        ({"tokens": -4, "documents": 1, "bytes": 4}, False),
        ({"documents": True}, False),
        ({"bytes": "4"}, False),
        ({"bytes": -1}, False),
        ({"documents": 2}, False),
        ({"tokens": 5}, False),
    ],
    ids=str,
)
def test_a_part_is_what_its_footer_says(changes, is_part, tmp_path):
    """Four tokens of 16 bits, one document."""
    footer = {"dtype": "uint16", "tokens": 4, "documents": 1, "bytes": 4} | changes
    raw = json.dumps(footer).encode()
    path = tmp_path / "p"
    path.write_bytes(bytes(4 * 2 + 8 + 8 + 8 + 4 + 4) + raw + struct.pack("<Q", len(raw)) + MAGIC)
    assert (open_part(path) is not None) == is_part


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_a_part_that_is_lost_under_a_run(content, tmp_path):
    _mapped.cache_clear()
    path = write(tmp_path / "p", FIRST)
    part = open_part(path)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as lost:
        _ = part.tokens
    expected = (
        f"{path} has disappeared from the token cache during the run; the same command creates it again and resumes"
    )
    assert str(lost.value) == expected


def test_a_part_is_mapped_once(tmp_path, monkeypatch):
    _mapped.cache_clear()
    part = open_part(write(tmp_path / "p", FIRST))
    asked = []
    keep = parts_module.mapped
    monkeypatch.setattr(parts_module, "mapped", lambda path: asked.append(path) or keep(path))
    for column in ("tokens", "ends", "hashes", "sizes", "pieces", "indices"):
        getattr(part, column)
    assert asked == [tmp_path / "p"]


def test_what_a_store_knows(store, tmp_path):
    assert (store.name, store.eot, store.bos, store.files) == ("corpus", 0, 9, {})
    assert store.path == tmp_path / "manifest.json"
    assert (store.num_tokens, store.num_documents, store.num_bytes) == (13, 5, 29)
    assert (store.part_tokens.tolist(), store.part_documents.tolist()) == ([0, 7, 7, 13], [0, 3, 3, 5])
    assert store.paths(0) == ["a.txt", "b.txt"]
    assert store.document(0) == DocumentOrigin(0, "a.txt", 0, 0, SMALL)
    assert store.document(2) == DocumentOrigin(2, "b.txt", 64, 4, LARGE)
    assert store.document(3) == DocumentOrigin(3, "c.txt", 128, 2, SMALL + 1)
    assert store.document(4) == DocumentOrigin(4, "c.txt", 128, 3, 2**64 - 1)


def test_a_manifest_of_before_there_was_a_bos(store, tmp_path):
    manifest = json.loads(store.path.read_text())
    del manifest["bos"]
    store.path.write_text(json.dumps(manifest))
    assert TokenStore(store.path).bos is None


def test_a_store_that_has_lost_a_part(store, tmp_path):
    (tmp_path / "2.tokens").unlink()
    with pytest.raises(UserError) as lost:
        TokenStore(store.path)
    assert (
        str(lost.value) == f"the token cache {tmp_path} has lost files since it was filled; run the same command again"
    )


def numbers(view) -> list[int]:
    return view.document_ids(0, view.num_tokens).tolist() if view.num_tokens else []


@pytest.mark.parametrize(
    ("held_out", "held"),
    [
        (0.0, []),
        (-1.0, []),
        (0.1, [0]),  # none is below it: the smallest
        (0.25, [0]),  # 2**62, exactly that of document 0
        (0.26, [0, 3]),
        (0.75, [0, 1, 2, 3]),
        (0.9999999, [0, 1, 2, 3]),  # all are: but not the largest
        (1.0, [0, 1, 2, 3, 4]),  # a dedicated test set
    ],
)
def test_who_is_held_out(held_out, held, store):
    train, views = store.views(held_out=held_out)
    assert numbers(views) == held
    assert numbers(train) == [n for n in range(5) if n not in held]


def test_the_largest_hash_alone_is_kept(tmp_path):
    """Where all would be held out; not the one next to it."""
    name = write(tmp_path / "0.tokens", [(2**63 + n, [1, 0], 1, 0, n) for n in range(3)])
    manifest = {"name": "x", "eot": 0, "parts": [str(name)], "units": [[["a", 0]]]}
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    train, held = TokenStore(tmp_path / "m.json").views(held_out=1 - 2**-53)
    assert (numbers(train), numbers(held)) == ([2], [0, 1])
    train, held = TokenStore(tmp_path / "m.json").views(held_out=1.0)
    assert (numbers(train), numbers(held)) == ([], [0, 1, 2]), "a dedicated test set"


def test_of_equal_documents_none_is_held_out(tmp_path):
    names = [str(write(tmp_path / f"{n}.tokens", FIRST[1:])) for n in range(2)]
    manifest = {"name": "x", "eot": 0, "parts": names, "units": [[["a", 0], ["b", 0]]] * 2}
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    train, held = TokenStore(tmp_path / "m.json").views(held_out=0.5)
    assert (train.num_documents, held.num_documents) == (4, 0)
    assert numbers(TokenStore(tmp_path / "m.json").views(held_out=0.5, deduplicate=True)[0]) == [0]


def test_views_by_hand(store):
    train, held = store.views(held_out=0.26)
    assert (train.num_tokens, train.num_documents, train.num_bytes) == (6, 3, 13)
    assert (held.num_tokens, held.num_documents, held.num_bytes) == (7, 2, 16)
    assert train.read(0, 6).tolist() == [3, 0, 3, 0, 7, 0]
    assert held.read(0, 7).tolist() == [1, 2, 0, 4, 5, 6, 0]
    assert train.read(0, 6).dtype == np.int64
    assert held.gather(np.array([1, 0, 4]), 3).tolist() == [[2, 0, 4], [1, 2, 0], [5, 6, 0]]
    assert held.gather_starts(np.array([0, 1, 3]), 4).astype(int).tolist() == [[1, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert train.gather_starts(np.array([0, 1]), 5).astype(int).tolist() == [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]]
    assert train.document_starts(1, 6).tolist() == [2, 4]
    assert train.document_ids(1, 5).tolist() == [1, 2, 4]
    assert train.document_ids(2, 3).tolist() == [2]
    assert held.document_ids(2, 4).tolist() == [0, 3]
    assert train.document_ids(2, 3).dtype == np.int64


def test_a_view_of_every_second_document(tmp_path):
    """Each is a run of its own."""
    hashes = [SMALL, LARGE, SMALL + 1, LARGE + 1, SMALL + 2]
    name = write(tmp_path / "0.tokens", [(h, [n + 1, 0], n, 0, n) for n, h in enumerate(hashes)])
    manifest = {"name": "x", "eot": 0, "parts": [str(name)], "units": [[["a", 0]]]}
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    train, held = TokenStore(tmp_path / "m.json").views(held_out=0.5)
    assert held.read(0, held.num_tokens).tolist() == [1, 0, 3, 0, 5, 0]
    assert train.read(0, train.num_tokens).tolist() == [2, 0, 4, 0]
    assert (numbers(held), numbers(train)) == ([0, 2, 4], [1, 3])


def test_equal_documents_are_read_once_when_asked(store):
    train, held = store.views(held_out=0.26, deduplicate=True)
    assert (numbers(train), numbers(held)) == ([1, 4], [0, 3])
    assert (train.num_documents, train.num_tokens, train.num_bytes) == (2, 4, 8)
    assert numbers(train.limited(2)) == [1], "the sample is of what is left"


def test_a_share_of_the_training_documents(store):
    """By the hashes mixed once more: another choice than that of the held-out ones, and the same on every machine."""
    assert numbers(store.views(held_out=0.0, train_data_ratio=1.0)[0]) == [0, 1, 2, 3, 4]
    assert numbers(store.views(held_out=0.0, train_data_ratio=0.0)[0]) == []
    from pretrain.data.order import mix_bits

    hashes = np.array([SMALL, LARGE, LARGE, SMALL + 1, 2**64 - 1], np.uint64)
    expected = np.flatnonzero(mix_bits(hashes) < np.uint64(2**63)).tolist()
    assert 0 < len(expected) < 5
    assert numbers(store.views(held_out=0.0, train_data_ratio=0.5)[0]) == expected


@pytest.mark.parametrize(
    ("max_tokens", "taken"),
    [(None, [0, 1, 2, 3, 4]), (13, [0, 1, 2, 3, 4]), (12, [0, 1, 2, 3]), (7, [0, 3]), (6, [0]), (3, [0]), (1, [0])],
)
def test_at_most_so_many_tokens(max_tokens, taken, store):
    """Whole documents, those with the smallest hashes; one at least."""
    view = store.views(held_out=0.0)[0]
    assert numbers(view.limited(max_tokens)) == taken
    assert (view.limited(max_tokens) is view) == (len(taken) == 5)


def test_ranges_and_places():
    assert aranges(np.array([3, 7, 7]), np.array([5, 7, 10])).tolist() == [3, 4, 7, 8, 9]
    assert aranges(np.empty(0, np.int64), np.empty(0, np.int64)).tolist() == []
    found = [(value, places.tolist()) for value, places in by_value(np.array([5, 2, 5, 2, 2]))]
    assert found == [(2, [1, 3, 4]), (5, [0, 2])]
    assert list(by_value(np.empty(0, np.int64))) == []
    many = np.random.default_rng(0).integers(0, 3, 5000)
    for value, places in by_value(many):
        assert np.array_equal(places, np.flatnonzero(many == value)), "in order, however many there are"
