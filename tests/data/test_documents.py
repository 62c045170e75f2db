"""A dataset that is a generator: read once by its fingerprint, tokenized like files, and whole after any interruption."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from pretrain.data.reading import units
from pretrain.data.sources import kept
from pretrain.data.sources.base import Source
from pretrain.data.sources.local import Local
from pretrain.data.tokenization import tokenize
from pretrain.data.tokenization.tokenize import prepare, training_texts
from pretrain.runtime.errors import UserError
from pretrain.runtime.locks import Busy, Lock
from tests.conftest import sentences

TEXTS = [sentences(i, 20) for i in range(40)] + ["ünïcode", " \n ", "two\nlines"]
READ = []  # what has been read, over all generators


@dataclass(frozen=True, kw_only=True)
class Stories(Source):
    version: str
    fails_after: int | None = None

    def fingerprint(self) -> str:
        return self.version

    def documents(self) -> Iterator[str]:
        for i, text in enumerate(TEXTS):
            if i == self.fails_after:
                raise ConnectionError("lost")
            READ.append(i)
            yield text


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    READ.clear()
    monkeypatch.setattr(kept, "UNIT_BYTES", 5_000)
    monkeypatch.setattr(units, "OWN_UNIT_BYTES", 2_000)


@pytest.fixture
def store_of(tokenizer, tmp_path):
    json = tokenizer.to_str()
    return lambda source, **more: prepare(source, tokenizer_json=json, eot=0, cache=tmp_path / "cache", **more)


def tokens_of(store):
    return np.concatenate([part.tokens for part in store.parts]).tolist()


def test_the_tokens_are_those_of_the_same_text_in_a_file(store_of, tmp_path):
    import json

    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    store = store_of(Stories(version="1"))
    assert tokens_of(store) == tokens_of(store_of(Local(nameOrPath=str(file))))
    assert (store.name, store.num_documents) == ("stories", len(TEXTS) - 1)
    assert len(store.parts) > 3
    assert [*range(len(TEXTS))] == READ


def test_it_is_read_once_by_its_fingerprint(store_of):
    first = store_of(Stories(version="1"))
    again = store_of(Stories(version="1", held_out=0.5, name="other"))
    assert [part.path for part in again.parts] == [part.path for part in first.parts]
    assert [*range(len(TEXTS))] == READ
    store_of(Stories(version="2"))
    assert [*range(len(TEXTS))] * 2 == READ


def test_a_use_sets_the_time_by_which_they_are_deleted(store_of, tmp_path):
    store_of(Stories(version="1"))
    folder = next(tmp_path.glob("cache/documents/*"))
    os.utime(folder, (0, 0))
    store_of(Stories(version="1"))
    assert folder.stat().st_mtime > 0


def test_in_several_processes(store_of, monkeypatch):
    """The workers read the kept documents, and know nothing of the class."""
    one = store_of(Stories(version="1"))
    for part in one.parts:
        part.path.unlink()
    monkeypatch.setattr(tokenize, "WORKERS_FROM_BYTES", 0)
    assert tokens_of(store_of(Stories(version="1"), num_workers=2)) == tokens_of(one)
    assert [*range(len(TEXTS))] == READ


def test_an_interrupted_reading_starts_again(store_of, tmp_path):
    with pytest.raises(ConnectionError):
        store_of(Stories(version="1", fails_after=30))
    assert not list(tmp_path.rglob("segments.json"))
    assert tokens_of(store_of(Stories(version="1"))) == tokens_of(store_of(Stories(version="2")))


def test_lost_documents_are_read_again(store_of, tmp_path):
    before = tokens_of(store_of(Stories(version="1")))
    next(tmp_path.glob("cache/documents/*/00002.jsonl")).unlink()
    assert tokens_of(store_of(Stories(version="1"))) == before
    assert [*range(len(TEXTS))] * 2 == READ


def test_the_text_of_a_tokenizer(store_of):
    source = Stories(version="1", held_out=0.0, text_column="content")
    assert [*training_texts(source)] == [text for text in TEXTS if not text.isspace()]
    assert store_of(source).num_documents == len(TEXTS) - 1


def test_two_classes_of_one_name_share_nothing(store_of):
    def made(text):
        class Wiki(Stories):
            def documents(self):
                yield text

        Wiki.__module__ = f"lab_{text}"
        return Wiki(version="1")

    one, other = store_of(made("one")), store_of(made("other"))
    assert tokens_of(one) != tokens_of(other)
    assert tokens_of(one) == tokens_of(store_of(made("one")))


def test_the_cache_of_a_tokenizers_text_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(UserError, match="every user of this machine can write"):
        next(training_texts(Stories(version="1")))
    assert not READ


def test_one_process_at_a_time_reads(tmp_path, monkeypatch):
    """While the documents are read, their lock is held."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    held = []

    class Watched(Stories):
        def documents(self):
            for lock in tmp_path.glob("cache/locks/*"):
                with pytest.raises(Busy):
                    Lock(lock).acquire(timeout=0)
                held.append(lock.name)
            yield from super().documents()

    assert list(training_texts(Watched(version="1", held_out=0.0)))
    assert [name.partition("-")[0] for name in held] == ["documents"]
    Lock(next(tmp_path.glob("cache/locks/*"))).acquire(timeout=0).release()


def test_mistakes(store_of, monkeypatch):
    monkeypatch.setattr(f"{__name__}.TEXTS", [])
    with pytest.raises(UserError, match="dataset 'stories': no text: every document of dataset=stories is empty"):
        store_of(Stories(version="1"))
    monkeypatch.setattr(f"{__name__}.TEXTS", ["a", {"text": "b"}])
    with pytest.raises(UserError, match=r"dataset=stories: documents\(\) has yielded a dict, not a text"):
        store_of(Stories(version="3"))


def test_half_of_a_surrogate_pair(store_of, monkeypatch):
    """As in files: an error, which is not kept, or U+FFFD."""
    monkeypatch.setattr(f"{__name__}.TEXTS", [*TEXTS[:20], "half\ud83d of it", *TEXTS[20:40]])
    for _ in range(2):
        with pytest.raises(UserError) as refused:
            store_of(Stories(version="1"))
        assert str(refused.value) == (
            "dataset=stories: document 21 of documents() has half of a surrogate pair (\\ud83d) at character 4, which is not a "
            "character; yield it without, or read it with dataset.errors=replace"
        )
    replaced = store_of(Stories(version="1", errors="replace"))
    with pytest.raises(UserError, match="half of a surrogate pair"):
        store_of(Stories(version="1"))
    monkeypatch.setattr(f"{__name__}.TEXTS", [*TEXTS[:20], "half\ufffd of it", *TEXTS[21:]])
    assert tokens_of(replaced) == tokens_of(store_of(Stories(version="2")))


def test_a_source_of_files_has_documents_too(corpus):
    source = Local(nameOrPath=str(corpus))
    assert len(list(source.documents())) == 40
    assert source.fingerprint() == Local(nameOrPath=str(corpus)).fingerprint() != Local(nameOrPath="x").fingerprint()
