"""A small tokenizer trained on the spot and text out of what every Python carries: no file of anybody's is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.data.remote import stream
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization.tokenize import prepare
from tests.data.servers import WebServer, web_server

EOT = 0


@pytest.fixture(scope="session")
def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store_of(tokenizer_json: str) -> Callable[..., TokenStore]:
    """``store_of(path, **options)``: the prepared store of a local source."""
    return lambda path, **options: prepare(
        Local(nameOrPath=str(path), **options), tokenizer_json=tokenizer_json, eot=EOT
    )


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    monkeypatch.setattr(stream, "BACKOFF_SECONDS", 0.0)
    stream.KEPT.clear()
    with web_server() as server:
        yield server
