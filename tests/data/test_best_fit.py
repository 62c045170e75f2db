"""Best-fit packing: documents in one piece, every token a target once, and batches that depend on the sample alone."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.batch import IGNORE
from pretrain.data.best_fit import BestFitBlocks, best_fit
from pretrain.data.loader import Loader
from pretrain.data.statistics import PartStatistics
from pretrain.data.store.token_store import TokenStore, TokenView
from pretrain.data.training_data import Part, TrainingData

LENGTHS = [3, 17, 2, 5, 40, 1, 9, 8, 8, 2, 30, 6]


@pytest.fixture
def view(tmp_path: Path, store_of: Callable[..., TokenStore]) -> TokenView:
    """Documents of ``LENGTHS`` tokens, each of ids of its own, in two files."""
    first = np.cumsum([0, *LENGTHS]) + 100
    documents = [[*range(start, start + length - 1), 0] for start, length in zip(first, LENGTHS, strict=False)]
    for name, some in (("a", documents[:5]), ("b", documents[5:])):
        lines = "".join(json.dumps({"input_ids": [int(t) for t in document]}) + "\n" for document in some)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return store_of(tmp_path / "*.jsonl").views(held_out=0)[0]


def targets(batch) -> Counter:
    return Counter(batch.labels[batch.labels != IGNORE].tolist())


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("length", [4, 16, 64])
def test_every_token_but_the_first_of_a_document_is_a_target_once(view, length, document_mask):
    blocks = BestFitBlocks(view, length)
    batch = blocks.batch(np.arange(len(blocks)), document_mask=document_mask)
    documents = np.split(view.read(0, view.num_tokens), np.cumsum(LENGTHS)[:-1])
    assert targets(batch) == Counter(token for document in documents for token in document[1:].tolist())
    assert batch.num_targets == sum(LENGTHS) - len(LENGTHS)
    assert blocks.mean_targets(document_mask=document_mask) * len(blocks) == pytest.approx(batch.num_targets)
    followed = {(a, b) for document in documents for a, b in itertools.pairwise(document)}
    found = zip(batch.input_ids.flatten().tolist(), batch.labels.flatten().tolist(), strict=True)
    assert {pair for pair in found if pair[1] != IGNORE} == followed
    assert blocks.padding == pytest.approx(
        1 - (sum(LENGTHS) - 1 + sum((n - 2) // length for n in LENGTHS if n > 1)) / len(blocks) / (length + 1)
    )


def test_documents_that_fit_are_in_one_piece(view):
    """With room for 17 tokens; 40 is cut into 17, 17 and 8, and 30 into 17 and 14, which overlap by one."""
    blocks = BestFitBlocks(view, 16)
    found = [[len(tokens) for _, tokens in blocks.documents(i)] for i in range(len(blocks))]
    assert found == [[17], [17], [17], [17], [3, 14], [8, 9], [8, 8], [2, 5, 2, 6]]
    numbers = [number for i in range(len(blocks)) for number, _ in blocks.documents(i)]
    assert set(numbers) == set(range(12)) - {5}, "a document of one token has no target"


def test_positions_restart_at_each_document(view):
    batch = BestFitBlocks(view, 16).batch(np.array([5]), document_mask=True)
    assert batch.position_ids[0].tolist() == [*range(8), *range(8)]
    last = BestFitBlocks(view, 16).batch(np.array([7]), document_mask=True)
    assert last.position_ids[0].tolist() == [*range(2), *range(5), *range(2), *range(6), 0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 20), max_size=40))
def test_each_item_goes_where_the_least_room_is_left(lengths):
    order, first = best_fit(np.array(lengths, np.int64), 20)
    blocks = [[lengths[i] for i in order[a:b]] for a, b in itertools.pairwise(first)]
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert all(0 < sum(block) <= 20 for block in blocks)
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 20) - length)
    assert sorted(20 - sum(block) for block in blocks) == sorted(rooms)


def test_batches_depend_on_the_sample_alone(view):
    """One rank or two, from the beginning or resumed, beside a part that is a stream: the same rows."""
    data = TrainingData((Part("a", view, packing="best_fit"),))
    whole = Loader(data, sequence_length=16, seed=3, batch_size=4)
    for first in (0, 4, 400):
        batch = whole.batch(first)
        halves = [
            Loader(data, sequence_length=16, seed=3, batch_size=2, rank=r, world_size=2).batch(first) for r in (0, 1)
        ]
        assert batch.labels.tolist() == [row for half in halves for row in half.labels.tolist()]
        assert batch.num_targets == sum(half.num_targets for half in halves)
    resumed = Loader(data, sequence_length=16, seed=3, batch_size=4)
    resumed.load_state_dict({"samples": 8, "parts": {"a": 8}})
    rest = iter(resumed)
    assert next(rest).labels.tolist() == whole.batch(8).labels.tolist()
    rest.close()
    texts = [(origin.number, len(tokens)) for origin, tokens in whole.texts(0)]
    assert len(texts) == len(set(texts))


def test_a_mixture_of_both(view):
    from pretrain.data.training_data import MixturePhase

    parts = (Part("packed", view, packing="best_fit"), Part("stream", view))
    loader = Loader(TrainingData(parts, (MixturePhase(0.0, (0.5, 0.5)),)), sequence_length=16, seed=3, batch_size=8)
    batch = loader.batch(0)
    of_parts, blocks = loader.order(np.arange(8))
    for row, (part, block) in enumerate(zip(of_parts.tolist(), blocks.tolist(), strict=True)):
        alone = loader.blocks[part].batch(np.array([block]), document_mask=False)
        assert batch.labels[row].tolist() == alone.labels[0].tolist()
        assert batch.input_ids[row].tolist() == alone.input_ids[0].tolist()


def test_statistics_count_inputs_without_padding(view):
    blocks = BestFitBlocks(view, 16)
    counts = PartStatistics(blocks, lambda indices: indices).at(len(blocks) - 1)
    inputs = sum(min(16, sum(len(tokens) for _, tokens in blocks.documents(i))) for i in range(len(blocks) - 1))
    assert sum(count.tokens for count in counts.values()) == inputs
