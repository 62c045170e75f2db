"""`dataset.deduplicate=near`: which documents are near duplicates, that the decision is cached, and what is counted."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from pretrain.data.domains import view_options
from pretrain.data.planned import _common
from pretrain.data.sources.local import Local
from pretrain.data.store import near_duplicates
from pretrain.data.store.document_counts import DocumentCounts
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization import tokenize
from pretrain.data.tokenization.tokenize import prepare
from pretrain.data.training_data import Part
from pretrain.runtime.errors import UserError

WORDS = " ".join(topics.values()).split()


def texts(count: int, seed: int, length: int = 120) -> list[str]:
    some = random.Random(seed)
    return [" ".join(some.choices(WORDS, k=length)) for _ in range(count)]


def with_other_words(text: str, *positions: int) -> str:
    words = text.split()
    for position in positions:
        words[position] = f"otherwise{position}"
    return " ".join(words)


def write(path: Path, documents: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def kept(store: TokenStore) -> list[int]:
    found = store.kept("near")
    assert found is not None
    return np.flatnonzero(found).tolist()


def test_near_duplicates_in_two_parts_of_a_mixture_are_counted(
    tmp_path: Path, store_of: Callable[..., TokenStore]
) -> None:
    """Each of the two has its own; of 12 of the second part the first one has a near or an exact duplicate."""
    first = texts(40, 1)
    second = [*first[:4], *(with_other_words(text, 60) for text in first[4:12]), *texts(20, 2)]
    views = {
        name: store_of(write(tmp_path / f"{name}.jsonl", [*some, some[0]]), deduplicate="near").views(
            held_out=0, deduplicate="near"
        )[0]
        for name, some in (("a", first), ("b", second))
    }
    for near, says in ((True, ["12 documents of part 'b' are near duplicates of documents of part 'a'"]), (False, [])):
        lines = [*_common([Part(name, view, near=near) for name, view in views.items()])]
        assert lines[0].startswith("parts 'a' and 'b' have 4 documents in common")
        assert [line.partition(":")[0] for line in lines[1:]] == says


def test_the_first_of_near_and_exact_duplicates_is_kept(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    first = texts(30, 1)
    near = [with_other_words(text, 60) for text in first[:10]]
    far = [with_other_words(text, *range(0, 120, 2)) for text in first[10:20]]
    path = write(tmp_path / "a.jsonl", [*first, *near, *far, *first[:5]])
    assert kept(store_of(path, deduplicate="near")) == [*range(30), *range(40, 50)]


def test_duplicates_of_duplicates_are_one_group(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    """Each version differs from the next in few words, the first from the last in all: one is kept, whatever the order."""
    versions = texts(1, 2)
    for position in range(0, 120, 2):
        versions.append(with_other_words(versions[-1], *range(position, position + 2)))
    for order in (versions, versions[::-1], random.Random(0).sample(versions, len(versions))):
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", [*order, *texts(3, 4)])
        assert kept(store_of(path, deduplicate="near")) == [0, *range(61, 64)]


def test_short_and_empty_documents(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    path = write(tmp_path / "a.jsonl", ["a", "b", "a", "a b", "b a", "a b"])
    assert kept(store_of(path, deduplicate="near")) == [0, 1, 3, 4]


def test_the_files_and_their_order_do_not_change_what_is_similar(
    tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one part or in many, in this process or in two others: the same documents are kept."""
    first = texts(40, 5, 400)
    documents = [*first, *(with_other_words(text, 7) for text in first)]
    (tmp_path / "parts").mkdir()
    for number in range(8):
        write(tmp_path / f"parts/{number}.jsonl", documents[number * 10 : number * 10 + 10])
    one = kept(store_of(write(tmp_path / "one.jsonl", documents), deduplicate="near"))
    assert one == [*range(40)]
    assert kept(store_of(tmp_path / "parts", deduplicate="near")) == one
    monkeypatch.setattr(tokenize, "WORKERS_FROM_BYTES", 0)
    monkeypatch.setattr("pretrain.data.reading.units.OWN_UNIT_BYTES", 100)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "other"))
    found = store_of(tmp_path / "parts", deduplicate="near", num_workers=2)
    assert len(found.parts) == 8
    assert kept(found) == one


def test_a_second_start_computes_nothing(
    tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write(tmp_path / "data/a.jsonl", [*texts(9, 6), *texts(9, 6)])
    before = kept(store_of(path, deduplicate="near"))
    monkeypatch.setattr(near_duplicates, "band_keys", lambda *_, **__: pytest.fail("computed again"))
    monkeypatch.setattr(near_duplicates, "_firsts", lambda *_: pytest.fail("decided again"))
    assert kept(store_of(path, deduplicate="near")) == before == [*range(9)]
    monkeypatch.undo()
    monkeypatch.setenv("PRETRAIN_CACHE", str(cache))
    shutil.rmtree(cache / "near")
    assert kept(store_of(path, deduplicate="near")) == before


def test_a_damaged_decision_is_made_again(tmp_path: Path, store_of: Callable[..., TokenStore], cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", [*texts(20, 7), *texts(20, 7)])
    before = kept(store_of(path, deduplicate="near"))
    for file in [*cache.glob("near/*.kept"), *cache.glob("near/*/*.keys")]:
        file.write_bytes(file.read_bytes()[:-1])
    assert kept(store_of(path, deduplicate="near")) == before


def test_the_tokens_are_those_without_deduplication(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    path = write(tmp_path / "a.jsonl", [*texts(5, 8), *texts(5, 8)])
    stores = [store_of(path, deduplicate=value) for value in (False, True, "exact", "near")]
    assert len({tuple(part.path for part in store.parts) for store in stores}) == 1
    views = [
        store.views(**view_options(Local(nameOrPath="x", held_out=0, deduplicate=value)))[0]
        for store, value in zip(stores, (False, True, "exact", "near"), strict=True)
    ]
    assert [view.num_documents for view in views] == [10, 5, 5, 5]
    same = [view_options(Local(nameOrPath="x", deduplicate=value)) for value in (True, "exact")]
    assert same[0] == same[1]


def test_keys_agree_with_the_index_of_the_library(tmp_path: Path, store_of: Callable[..., TokenStore]) -> None:
    """``MinHashLSH`` with the same bands finds the same pairs of documents."""
    first = texts(40, 9, 60)
    near = [with_other_words(text, *range(number % 30)) for number, text in enumerate(first)]
    store = store_of(write(tmp_path / "a.jsonl", [*first, *near]))
    (part,) = store.parts
    keys = np.array(list(near_duplicates.band_keys(part, eot=store.eot, bos=store.bos)))
    ours = {(i, j) for i in range(80) for j in range(i) if (keys[i] == keys[j]).any()}
    index = MinHashLSH(num_perm=112, params=(near_duplicates.BANDS, near_duplicates.ROWS))
    sketches = []
    for number, (start, end) in enumerate(zip([0, *part.ends[:-1]], part.ends, strict=True)):
        sketch = MinHash(112, seed=near_duplicates.SEED, hashfunc=int, scheme="affine32")
        sketch.update_batch(near_duplicates._shingles(part.tokens[start : end - 1].astype(np.uint64)).tolist())
        index.insert(number, sketch)
        sketches.append(sketch)
    theirs = {(i, j) for i in range(80) for j in index.query(sketches[i]) if j < i}
    assert ours == theirs
    assert 10 < len(ours) < 40


def test_without_the_library_it_is_one_line(
    tmp_path: Path, store_of: Callable[..., TokenStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^dataset\.deduplicate=near needs datasketch: pip install 'pretrain\[near\]'$"
    ):
        store_of(write(tmp_path / "a.jsonl", texts(2, 1)), deduplicate="near")


def test_counts(tmp_path: Path, tokenizer_json: str) -> None:
    path = write(tmp_path / "a.jsonl", [*texts(100, 3), *texts(20, 3), *(["too short"] * 30)])
    options: dict[str, Any] = {
        "where": "len(text) > 20",
        "deduplicate": "near",
        "held_out": 0.2,
        "train_data_ratio": 0.5,
    }
    source = Local(nameOrPath=str(path), **options)
    for _ in range(2):
        counts = DocumentCounts.of(*prepare(source, tokenizer_json=tokenizer_json, eot=0).views(**view_options(source)))
        assert (counts.read, counts.filtered, counts.duplicates) == (150, 30, 20)
        assert counts.held_out + counts.trained + counts.unused == 100
        assert 0 < counts.held_out < counts.trained
        assert counts.unused > 0
        path.touch()
    assert counts.described() == (
        f"150 documents: 30 removed by dataset.where, 20 removed as duplicates, {counts.held_out} held out, "
        f"{counts.unused} left out by train_data_ratio, {counts.trained} to train on"
    )
    plain = prepare(Local(nameOrPath=str(path)), tokenizer_json=tokenizer_json, eot=0)
    assert DocumentCounts.of(*plain.views(held_out=0.2)).described() is None


def test_a_long_chain_takes_few_passes(tmp_path, monkeypatch):
    """Each document shares a key with the next one only, in no order: one group, found without a pass for each link."""
    count, generator = 3000, np.random.default_rng(0)
    numbers = generator.permutation(count)
    keys = generator.integers(1, 2**63, size=(near_duplicates.BANDS, count), dtype=np.uint64)
    for link, (one, other) in enumerate(itertools.pairwise(numbers)):
        keys[link % 2, other] = keys[link % 2, one]
    (tmp_path / "keys").write_bytes(keys.astype("<u8").tobytes())
    bands = []
    groups = near_duplicates._groups
    monkeypatch.setattr(near_duplicates, "_groups", lambda *given: bands.append(given[-1]) or groups(*given))
    assert near_duplicates._firsts([tmp_path / "keys"], [count]).nonzero()[0].tolist() == [0]
    assert len(bands) / near_duplicates.BANDS < 15
