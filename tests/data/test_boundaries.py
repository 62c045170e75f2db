"""BOS before each document: in the cache, in training sequences, in evaluation and in prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from pretrain.data.batch import IGNORE
from pretrain.data.blocks import Blocks
from pretrain.data.evaluation import evaluation_batches, first_tokens
from pretrain.data.sources.local import Local
from pretrain.data.store.token_store import TokenStore, TokenView
from pretrain.data.tokenization.tokenize import prepare

EOT, BOS = 0, 1
TEXTS = [
    "The sea is wide.",
    "A road of stone goes a long way up.",
    "x",
    "Ships and their crews went home again, at last.",
]
Make = Callable[..., TokenStore]


@pytest.fixture
def make(tmp_path: Path, tokenizer_json: str) -> Make:
    def made(**around: int) -> TokenStore:
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number}.txt").write_text(text)
        source = Local(nameOrPath=str(tmp_path / "*.txt"))
        return prepare(source, tokenizer_json=tokenizer_json, **({"eot": EOT} | around))

    return made


def whole(store: TokenStore) -> TokenView:
    return TokenView(store, lambda hashes: np.ones(len(hashes), bool))


def stream(store: TokenStore) -> list[int]:
    view = whole(store)
    return view.read(0, view.num_tokens).tolist()


def documents(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_the_stream(make: Make, tokenizer: Tokenizer) -> None:
    texts = documents(tokenizer)
    assert stream(make()) == [token for ids in texts for token in (*ids, EOT)]
    assert stream(make(bos=BOS)) == [token for ids in texts for token in (BOS, *ids, EOT)]
    assert stream(make(eot=5, bos=BOS)) == [token for ids in texts for token in (BOS, *ids, 5)]


def test_each_way_has_parts_of_its_own_and_the_one_without_bos_its_old_names(make: Make) -> None:
    stores = [make(), make(bos=BOS), make(bos=2), make(eot=5), make(eot=5, bos=BOS)]
    assert len({store.parts[0].path.name for store in stores}) == len(stores)
    assert [store.bos for store in stores] == [None, BOS, 2, None, BOS]
    assert "bos" not in stores[0].path.read_text()
    assert make(bos=BOS).path == stores[1].path
    assert {store.num_bytes for store in stores} == {sum(len(text) for text in TEXTS)}


@pytest.mark.parametrize("document_mask", [False, True])
def test_every_sequence_begins_with_bos_and_none_foresees_it(make: Make, document_mask: bool) -> None:
    view = whole(make(bos=BOS))
    blocks = Blocks(view, 7)
    batch = blocks.batch(np.arange(len(blocks)), document_mask=document_mask)
    tokens = view.read(0, len(blocks) * 7 + 1)
    assert batch.input_ids[:, 0].tolist() == [BOS] * len(blocks)
    expected = tokens[:-1].reshape(-1, 7)
    assert batch.input_ids[:, 1:].tolist() == expected[:, 1:].tolist()
    labels = np.where(tokens[1:] == BOS, IGNORE, tokens[1:]).reshape(-1, 7)
    assert batch.labels.tolist() == labels.tolist()
    assert batch.num_targets == int((labels != IGNORE).sum()) < labels.size
    assert (batch.position_ids is not None) == document_mask
    if batch.position_ids is not None:
        assert torch.equal(
            batch.position_ids[batch.input_ids == BOS], torch.zeros_like(batch.input_ids[batch.input_ids == BOS])
        )


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("length", [2, 5, 7, 64])
def test_evaluation_scores_every_token_of_the_texts_once(
    make: Make, tokenizer: Tokenizer, document_mask: bool, length: int
) -> None:
    view = whole(make(bos=BOS))
    batches = evaluation_batches(view, length, 3, document_mask)
    scored = torch.cat([batch.labels.view(-1) for batch in batches])
    assert scored[scored != IGNORE].tolist() == [token for ids in documents(tokenizer) for token in (*ids, EOT)]
    assert batches.num_tokens == sum(batch.num_targets for batch in batches) == len(scored[scored != IGNORE])
    assert all((batch.input_ids[:, 0] == BOS).all() for batch in batches)
    assert batches[0].input_ids[0, 1] == documents(tokenizer)[0][0], "one BOS, not two"
    assert batches.num_bytes == sum(len(text) for text in TEXTS)


def test_prompts_are_the_text_alone(make: Make, tokenizer: Tokenizer) -> None:
    expected = sorted(ids[:3] for ids in documents(tokenizer))
    assert sorted(first_tokens(whole(make(bos=BOS)), 9, 3)) == expected == sorted(first_tokens(whole(make()), 9, 3))


def test_token_ids_from_elsewhere_get_what_they_lack(tmp_path: Path, tokenizer_json: str) -> None:
    rows = [[5, 6], [BOS, 7, EOT], [BOS, 8], [9, EOT]]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "saved")
    source = Local(nameOrPath=str(tmp_path / "saved"))
    store = prepare(source, tokenizer_json=tokenizer_json, eot=EOT, bos=BOS)
    assert stream(store) == [BOS, 5, 6, EOT, BOS, 7, EOT, BOS, 8, EOT, BOS, 9, EOT]
