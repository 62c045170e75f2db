"""What a run has read, by source, against a count of its samples one by one; from any cursor, as often as one likes."""

import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from pretrain.data.loader import Loader
from pretrain.data.statistics import MAX_SOURCES, OTHERS, DataStatistics, _begun, names
from pretrain.data.store.token_shards import TokenShard
from tests.conftest import sentences

LENGTH = 24


@pytest.fixture
def make(tmp_path, store_of):
    """``make(files)``: a loader over texts of different lengths, several documents a file."""

    def loader(files: list[str]) -> Loader:
        for i, name in enumerate(files):
            (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"text": sentences(i * 9 + j, 2 + i)}) + "\n" for j in range(3))
            (tmp_path / "texts" / name).write_text("".join(lines))
        view, _ = store_of(tmp_path / "texts").views(held_out=0.2)
        return Loader(view, sequence_length=LENGTH, seed=3, batch_size=4)

    return loader


def one_by_one(loader: Loader, samples: int, name_of) -> dict[str, tuple[int, int]]:
    """(tokens, documents that begin) of each source, token by token."""
    view, tokens, documents = loader.blocks[0].view, Counter(), Counter()
    for sample in range(samples):
        start = int(loader.order(np.array([sample]))[1][0]) * LENGTH
        for at in range(start, start + LENGTH):
            (number,) = view.document_ids(at, at + 1)
            name = name_of(view.store.document(int(number)).path)
            tokens[name] += 1
            documents[name] += len(view.document_starts(at, at + 1))
    return {name: (tokens[name], documents[name]) for name in tokens}


def pairs(found):
    return {name: (seen.tokens, seen.documents) for name, seen in found.items() if seen.tokens}


def test_equals_a_count_one_by_one_at_every_cursor(make):
    loader = make(["a.jsonl", "b.jsonl", "deep/c.jsonl"])
    census, n = DataStatistics(loader), len(loader.blocks[0])
    for samples in (4, 9, n, n + 7, 2 * n + 1, 5):  # onward, into other epochs, and back as after a rollback
        expected = one_by_one(loader, samples, lambda path: path.partition("/texts/")[2])
        assert pairs(census.sources(samples)) == expected
        assert census.sources(samples) == DataStatistics(loader).sources(samples), (
            "as a process that has just been started has it"
        )
        assert sum(seen.tokens for seen in census.sources(samples).values()) == samples * LENGTH


@pytest.mark.parametrize("ends", [[3], [0, 0, 3, 3, 5, 8], [2, 4, 4], [1, 2, 3], [4, 4]])
def test_documents_that_have_begun(ends):
    starts = np.array([0, *ends[:-1]])
    tokens = np.arange(ends[-1] + 1)
    assert _begun(np.array(ends), tokens).tolist() == [(starts < t).sum() for t in tokens]


def test_a_count_copies_no_table_of_documents(make, monkeypatch):
    """A part may have 10⁸ of them, and every evaluation counts."""
    loader = make(["a.jsonl", "b.jsonl"])
    census, (part, *_) = DataStatistics(loader), loader.blocks[0].view.store.parts
    census.sources(4)  # what is looked up once
    ends = np.append(part.ends, np.full(1_000_000, part.ends[-1]))  # with empty documents
    monkeypatch.setattr(TokenShard, "ends", ends)
    tracemalloc.start()
    census.sources(8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < ends.nbytes / 2


def test_many_files_are_counted_by_folder_and_many_folders_in_part(make):
    folders = MAX_SOURCES + 3
    loader = make([f"{i:02}/{name}.jsonl" for i in range(folders) for name in "ab"])
    found = DataStatistics(loader).sources(len(loader.blocks[0]))
    assert len(found) == MAX_SOURCES
    assert sum(seen.tokens for seen in found.values()) == len(loader.blocks[0]) * LENGTH
    shown = [seen.tokens for name, seen in found.items() if name != OTHERS]
    every = one_by_one(loader, len(loader.blocks[0]), lambda path: path.split("/")[-2])
    assert sorted(shown) == sorted((tokens for tokens, _ in every.values()), reverse=True)[: MAX_SOURCES - 1][::-1]


def test_names():
    assert names({"/d/x/a.txt", "/d/x/b/c.txt"}) == {"/d/x/a.txt": "a.txt", "/d/x/b/c.txt": "b/c.txt"}
    assert names({"/d/only.txt"}) == {"/d/only.txt": "only.txt"}
    many = {f"/d/{i}.txt" for i in range(MAX_SOURCES)} | {"/d/b/c/e.txt"}
    assert set(names(many).values()) == {".", "b"}
