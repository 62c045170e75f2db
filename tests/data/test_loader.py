from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import some_text

from pretrain.data.batch import Batch
from pretrain.data.loader import Loader
from pretrain.data.store.token_store import TokenStore, TokenView
from pretrain.data.training_data import TrainingData, check_enough
from pretrain.runtime.errors import UserError


@pytest.fixture
def view(tmp_path: Path, store_of: Callable[..., TokenStore]) -> TokenView:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(some_text(number, 150))
    return store_of(tmp_path / "*.txt").views(held_out=0.1)[0]


def loader(view: TokenView, **changes) -> Loader:
    return Loader(view, **{"sequence_length": 16, "seed": 5, "batch_size": 2, "accumulation": 4} | changes)


def first(loader: Loader, count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def rows(batches: list[Batch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.input_ids.tolist()]


@pytest.mark.parametrize("document_mask", [False, True])
def test_global_batches_do_not_depend_on_the_number_of_ranks(view: TokenView, document_mask: bool) -> None:
    alone = first(loader(view, document_mask=document_mask), 50)
    for world_size in (2, 4):
        accumulation = 4 // world_size
        ranks = [
            first(
                loader(view, accumulation=accumulation, rank=rank, world_size=world_size, document_mask=document_mask),
                50,
            )
            for rank in range(world_size)
        ]
        for step, whole in enumerate(alone):
            for name in ("input_ids", "labels", "position_ids"):
                if getattr(whole, name) is None:
                    continue
                shares = [getattr(ranks[rank][step], name).split(2) for rank in range(world_size)]
                micro_batches = [shares[rank][m] for m in range(accumulation) for rank in range(world_size)]
                assert torch.equal(torch.cat(micro_batches), getattr(whole, name))
            assert sum(ranks[rank][step].num_targets for rank in range(world_size)) == whole.num_targets
            assert {ranks[rank][step].first_sample for rank in range(world_size)} == {whole.first_sample}


def test_an_epoch_shows_every_block_once_and_epochs_differ(view: TokenView) -> None:
    one = loader(view, batch_size=1, accumulation=1)
    n = len(one.blocks[0])
    seen = rows(first(one, 2 * n))
    assert (
        sorted(seen[:n])
        == sorted(seen[n:])
        == sorted(rows([one.blocks[0].batch(torch.arange(n).numpy(), document_mask=False)]))
    )
    assert seen[:n] != seen[n:]
    assert seen[:n] != sorted(seen[:n])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(samples=st.integers(0, 10**6), count=st.integers(1, 3))
def test_resume_at_any_sample_continues_the_sequence(view: TokenView, samples: int, count: int) -> None:
    samples -= samples % 8
    resumed = loader(view)
    resumed.load_state_dict({"samples": samples})
    batches = first(resumed, count)
    assert rows(batches) == rows([resumed.batch(samples + 8 * step) for step in range(count)])
    assert resumed.state_dict()["samples"] == samples + 8 * count


def test_the_cursor_counts_batches_taken_not_batches_made_ahead(view: TokenView) -> None:
    whole = rows(first(loader(view), 20))
    interrupted = loader(view)
    head = first(interrupted, 7)
    assert interrupted.state_dict() == {"samples": 7 * 8, "parts": {interrupted.train.parts[0].name: 7 * 8}}
    again = loader(view)
    again.load_state_dict(interrupted.state_dict())
    assert rows(head) + rows(first(again, 13)) == whole


def test_epoch_counts_passes_over_the_data(view: TokenView) -> None:
    assert loader(view, first_sample=0).epoch == 0
    n = len(loader(view).blocks[0])
    assert loader(view, first_sample=3 * n).epoch == 3


def test_an_error_of_the_thread_reaches_the_reader(view: TokenView, monkeypatch: pytest.MonkeyPatch) -> None:
    one = loader(view)
    batches = iter(one)
    next(batches)
    for part in view.store.parts:
        part.path.unlink()
    from pretrain.data.store.token_shards import _mapped

    _mapped.cache_clear()
    with pytest.raises(UserError, match="has disappeared from the token cache"):
        list(itertools.islice(batches, 10))


def test_the_thread_ends_with_the_iterator(view: TokenView) -> None:
    before = {*threading.enumerate()}
    batches = iter(loader(view))
    next(batches)
    (thread,) = {*threading.enumerate()} - before
    assert thread.name == "loader"
    batches.close()
    assert not thread.is_alive()


def test_the_documents_behind_a_batch_hold_its_tokens(view: TokenView, tokenizer) -> None:
    one = loader(view)
    batch = one.batch(16)
    documents = [document for document, _ in one.texts(16)]
    texts = [Path(document.path).read_text() for document in documents]
    for row in batch.input_ids.tolist():
        longest = max("".join(tokenizer.decode(row, skip_special_tokens=False)).split("<|endoftext|>"), key=len)
        assert any(longest.strip("\ufffd") in text for text in texts)
    assert len(texts) < len(list(Path(documents[0].path).parent.glob("*.txt")))


def test_too_little_text_for_one_global_batch(view: TokenView) -> None:
    n = len(loader(view).blocks[0])
    check_enough(TrainingData.of(view), sequence_length=16, global_batch=n)
    with pytest.raises(
        UserError, match=rf"{view.num_tokens:,} training tokens .* {n:,} sequences of 16.* {n + 1:,} seq"
    ):
        check_enough(TrainingData.of(view), sequence_length=16, global_batch=n + 1)
