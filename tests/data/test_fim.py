"""Fill in the middle: every document can be put back together, and the rearrangement is a function of seed and sample."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import some_text

from pretrain.data.fim import KNOWN_TOKENS, FillInMiddle, fill_in_middle
from pretrain.data.loader import Loader
from pretrain.data.training_data import MixturePhase, Part, TrainingData
from pretrain.runtime.errors import UserError

EOT, BOS, PREFIX, SUFFIX, MIDDLE = 0, 1, 1000, 1001, 1002
AROUND = {EOT, BOS}


def restored(document: list[int]) -> list[int]:
    """The document before it was rearranged; as it is, if it was not."""
    head, tail = document[: document[0] == BOS], document[len(document) - (document[-1] == EOT) :]
    body = document[len(head) : len(document) - len(tail)]
    if body[:1] != [PREFIX]:
        return document
    if body[1] == SUFFIX and SUFFIX not in body[2:]:
        return head + body[body.index(MIDDLE) + 1 :] + body[2 : body.index(MIDDLE)] + tail
    prefix = body[1 : body.index(SUFFIX)]
    suffix = body[body.index(SUFFIX) + 1 : body.index(MIDDLE)]
    return head + prefix + body[body.index(MIDDLE) + 1 :] + suffix + tail


DOCUMENTS = st.lists(st.lists(st.integers(2, 999), min_size=0, max_size=12), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    documents=DOCUMENTS,
    with_bos=st.booleans(),
    rate=st.sampled_from([0.0, 0.5, 1.0]),
    spm=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**63),
)
def test_documents_can_be_put_back_together(documents, with_bos, rate, spm, seed):
    whole = [[BOS] * with_bos + document + [EOT] for document in documents]
    stream = list(itertools.chain(*whole))
    room = len(stream) + 3 * len(whole)  # nothing is cut off
    tokens = np.full((1, room), EOT)
    tokens[0, : len(stream)] = stream
    begins = np.zeros(tokens.shape, bool)
    begins[0, np.cumsum([0, *map(len, whole)])[: len(whole)]] = True
    begins[0, len(stream) :] = True  # padding
    FillInMiddle(rate, spm, PREFIX, SUFFIX, MIDDLE).apply(
        tokens, begins, np.array([0]), np.array([seed], np.uint64), around=AROUND
    )
    edges = [*np.flatnonzero(begins[0]).tolist(), room]
    found = [tokens[0, a:b].tolist() for a, b in itertools.pairwise(edges)][: len(whole)]
    assert [restored(document) for document in found] == whole
    changed = [a != b for a, b in zip(found, whole, strict=True)]
    may_change = [len(document) >= 3 for document in documents]
    if rate in (0.0, 1.0):
        assert changed == (may_change if rate else [False] * len(documents))


@pytest.fixture
def data(tmp_path, store_of):
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(some_text(number, 150))
    view = store_of(tmp_path).views(held_out=0.0)[0]
    plain = Part("plain", view)
    return plain, Part("fim", view, fim=FillInMiddle(0.5, 0.5, PREFIX, SUFFIX, MIDDLE))


def loader(*parts, **changes):
    phases = (MixturePhase(0.0, (1 / len(parts),) * len(parts)),)
    options = {"sequence_length": 64, "seed": 5, "batch_size": 2, "accumulation": 2} | changes
    return Loader(TrainingData(parts, phases), **options)


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_part_of_a_mixture_is_rearranged_and_the_others_are_not(data, document_mask):
    one = loader(*data, document_mask=document_mask)
    batch = one.batches(0, 12)
    parts, blocks = one.order(np.arange(48))
    rows = torch.cat([each.input_ids for each in batch]).numpy()
    for row, part, block in zip(rows, parts.tolist(), blocks.tolist(), strict=True):
        alone = one.blocks[part].batch(np.array([block]), document_mask=False).input_ids[0].numpy()
        assert part == 1 or (row == alone).all()
    marked = [(rows[parts == part] == PREFIX).any(1).mean() for part in (0, 1)]
    assert marked[0] == 0
    assert 0.3 < marked[1] < 0.9
    assert (batch[0].position_ids is not None) == document_mask


def test_the_same_on_any_ranks_and_after_a_resume_and_other_cuts_in_each_epoch(data):
    whole = loader(data[1])
    ranks = [loader(data[1], accumulation=1, rank=rank, world_size=2) for rank in range(2)]
    for first in (0, 40, 4_000):
        together = torch.cat([rank.batch(first).input_ids for rank in ranks])
        assert torch.equal(together, whole.batch(first).input_ids)
    n = len(whole.blocks[0])
    epochs = [
        {tuple(whole._rows(np.zeros(1, int), np.array([3]), np.array([e * n])).input_ids[0].tolist()) for e in range(8)}
    ]
    assert len(epochs[0]) > 2


def test_tokens_of_the_tokenizer():
    for names in KNOWN_TOKENS:
        vocabulary = {"a": 1} | {name: 7 + i for i, name in enumerate(names)}
        assert fill_in_middle(0.9, 0.1, vocabulary) == FillInMiddle(0.9, 0.1, 7, 8, 9)
    assert fill_in_middle(0.0, 0.5, {}) is None
    with pytest.raises(
        UserError, match=r"dataset.fim_rate=0.5: the tokenizer has no tokens for it, such as <fim_prefix>"
    ):
        fill_in_middle(0.5, 0.5, {"<fim_prefix>": 1})
