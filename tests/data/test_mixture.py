"""A mixture of several parts: true shares, each part in epochs of its own order, the same on any ranks and after any resume."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import some_text

from pretrain.data.loader import Loader
from pretrain.data.statistics import DataStatistics
from pretrain.data.training_data import MixturePhase, Part, TrainingData, check_enough, check_epochs
from pretrain.runtime.errors import UserError

LENGTH = 16
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture
def views(tmp_path_factory, store_of):
    """Three sets of documents of different size, whose tokens tell them apart."""
    found = []
    for number, size in enumerate((90, 40, 15)):
        folder = tmp_path_factory.mktemp(f"part{number}")
        for document in range(size):
            (folder / f"{document}.txt").write_text(some_text(1000 * number + document, 60))
        found.append(store_of(folder).views(held_out=0.0)[0])
    return found


def mixture(views, *phases, **changes) -> TrainingData:
    parts = [Part(name, view, **changes.get(name, {})) for name, view in zip("abc", views, strict=False)]
    return TrainingData(tuple(parts), tuple(phases) or (MixturePhase(0.0, WEIGHTS[: len(parts)]),))


def loader(data, **changes) -> Loader:
    return Loader(
        data, **{"sequence_length": LENGTH, "seed": 5, "batch_size": 2, "accumulation": 4, "steps": 100} | changes
    )


def located(one: Loader, samples) -> list[tuple[int, int]]:
    parts, blocks = one.order(np.asarray(samples))
    return list(zip(parts.tolist(), blocks.tolist(), strict=True))


def rows(batches):
    return [row for batch in batches for row in batch.input_ids.tolist()]


def test_shares_of_every_prefix_and_each_part_in_its_own_epochs(views):
    one = loader(mixture(views))
    found = located(one, range(8000))
    counts = np.cumsum(np.array([part for part, _ in found])[:, None] == np.arange(3), axis=0)
    assert np.abs(counts - np.arange(1, 8001)[:, None] * WEIGHTS).max() < 1
    for part, blocks in enumerate(one.blocks):
        own = [block for p, block in found if p == part]
        epochs = [own[i : i + len(blocks)] for i in range(0, len(own), len(blocks))]
        assert len(epochs) > 2, "parts repeat"
        assert all(sorted(epoch) == list(range(len(blocks))) for epoch in epochs[:-1])
        assert epochs[0] != epochs[1]
        assert one.order.taken(8000)[part] == len(own)


@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_are_the_blocks_of_their_parts(views, document_mask):
    one = loader(mixture(views), document_mask=document_mask)
    batch = one.batch(32)
    for row, (part, block) in enumerate(located(one, 32 + one._own)):
        alone = one.blocks[part].batch(np.array([block]), document_mask=document_mask)
        assert torch.equal(batch.input_ids[row], alone.input_ids[0])
        assert torch.equal(batch.labels[row], alone.labels[0])
        assert not document_mask or torch.equal(batch.position_ids[row], alone.position_ids[0])
    assert batch.num_targets == int((batch.labels != -100).sum())


def test_batches_made_together_are_those_made_alone(views):
    one = loader(mixture(views, a={"loss_weight": 0.5}), document_mask=True)
    for number, batch in enumerate(one.batches(8, 5)):
        alone = one.batch(8 + 8 * number)
        assert (batch.num_targets, batch.first_sample) == (alone.num_targets, alone.first_sample)
        for name in ("input_ids", "labels", "position_ids", "loss_weights"):
            assert torch.equal(getattr(batch, name), getattr(alone, name))


def test_global_batches_do_not_depend_on_the_number_of_ranks(views):
    data = mixture(views)
    alone = list(itertools.islice(loader(data), 20))
    ranks = [list(itertools.islice(loader(data, accumulation=1, rank=r, world_size=4), 20)) for r in range(4)]
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([ranks[r][step].input_ids for r in range(4)]), batch.input_ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(step=st.integers(0, 10**9))
def test_resume_at_any_sample_continues_the_sequence(views, step):
    data = mixture(views, MixturePhase(0.0, (0.5, 0.5, 0.0)), MixturePhase(0.6, (0.1, 0.0, 0.9)))
    whole = loader(data)
    whole.samples = 8 * step
    resumed = loader(data)
    resumed.load_state_dict(whole.state_dict())
    assert rows(itertools.islice(resumed, 3)) == rows([whole.batch(8 * (step + i)) for i in range(3)])
    assert resumed.state_dict()["samples"] == 8 * (step + 3)


def test_phases_change_the_shares_where_they_begin(views):
    data = mixture(views, MixturePhase(0.0, (0.75, 0.25, 0.0)), MixturePhase(0.5, (0.0, 0.0, 1.0)))
    one = loader(data, steps=100)
    parts = np.array([part for part, _ in located(one, range(800))])
    assert np.bincount(parts[:400], minlength=3).tolist() == [300, 100, 0]
    assert set(parts[400:].tolist()) == {2}
    assert one.wanted_shares(400) == [0.75, 0.25, 0.0]
    assert one.wanted_shares(800) == [0.375, 0.125, 0.5]


def test_a_part_continues_where_it_was_after_a_phase_without_it(views):
    data = mixture(
        views, *(MixturePhase(s, w) for s, w in ((0.0, (1.0, 0, 0)), (0.4, (0, 1.0, 0)), (0.6, (1.0, 0, 0))))
    )
    one = loader(data, steps=10, accumulation=1)  # 20 samples; phases begin at 8 and 12
    own = [block for part, block in located(one, range(20)) if part == 0]
    assert len(set(own)) == len(own) == 16, "no block is repeated within an epoch of more than 16"


def test_after_a_change_of_mixture_each_part_continues_behind_what_was_taken(views):
    before = loader(mixture(views[:2], MixturePhase(0.0, (0.5, 0.5))))
    before.samples = 200
    after = loader(mixture(views, MixturePhase(0.0, (0.25, 0.25, 0.5))))
    after.load_state_dict(before.state_dict())
    assert after.order.taken(200).tolist() == [100, 100, 0]
    found = located(after, range(200, 600))
    first = {part: next(block for p, block in found if p == part) for part in range(3)}
    assert first == {part: int(after.order.blocks(part, np.array([n]))[0]) for part, n in enumerate((100, 100, 0))}
    list(itertools.islice(after, 5))
    resumed = loader(mixture(views, MixturePhase(0.0, (0.25, 0.25, 0.5))))
    resumed.load_state_dict(after.state_dict())
    assert rows([resumed.batch(240)]) == rows([after.batch(240)]), "resumed again with the same mixture"
    assert after.state_dict()["parts"] == {"a": 110, "b": 110, "c": 20}


def test_parts_that_join_or_leave_do_not_change_the_order_of_a_part(views):
    """Within a pass nothing is read twice: with replay added to a run, and taken away again."""
    plain = loader(views[0])
    name = plain.train.parts[0].name
    plain.samples = 80
    phase = MixturePhase(0.0, (0.75, 0.25))
    replayed = loader(TrainingData((Part(name, views[0]), Part("replay", views[1], replay=True)), (phase,)))
    replayed.load_state_dict(plain.state_dict())
    replayed.samples = 160
    again = loader(views[0])
    again.load_state_dict(replayed.state_dict())
    read = [block for _, block in located(plain, range(80))]
    read += [block for part, block in located(replayed, range(80, 160)) if part == 0]
    read += [block for _, block in located(again, range(160, 300))]
    assert read == [block for _, block in located(plain, range(80 + 60 + 140))]


def test_a_checkpoint_without_parts_is_one_of_a_dataset_alone(views):
    one = loader(views[0])
    one.load_state_dict({"samples": 24})
    assert rows([one.batch(24)]) == rows([loader(views[0]).batch(24)])
    one.load_state_dict({"samples": 24, "parts": {"the name it had": 24}})
    assert rows([one.batch(24)]) == rows([loader(views[0]).batch(24)])


def test_shares_are_of_target_tokens_where_documents_begin_without_a_target(views, tmp_path, store_of):
    for number in range(600):
        (tmp_path / f"{number}.txt").write_text("ab")  # a few tokens each: many first tokens that are no targets
    data = TrainingData(
        (Part("long", views[0]), Part("short", store_of(tmp_path).views(held_out=0.0)[0])),
        (MixturePhase(0.0, (0.5, 0.5)),),
    )
    one = loader(data, document_mask=True)
    assert one.mean_targets[1] < 0.8 * one.mean_targets[0]
    targets = [0, 0]
    for part, block in located(one, range(2000)):
        targets[part] += one.blocks[part].batch(np.array([block]), document_mask=True).num_targets
    assert targets[0] / sum(targets) == pytest.approx(0.5, abs=0.005)
    counts = DataStatistics(one).parts(2000)
    assert [counts[name].tokens for name in ("long", "short")] == pytest.approx(targets, rel=0.01)


def test_statistics_count_parts_and_their_sources(views):
    one = loader(mixture(views))
    counts, sources = DataStatistics(one).parts(1000), DataStatistics(one).sources(1000)
    assert {name: count.tokens for name, count in counts.items()} == {
        "a": 500 * LENGTH,
        "b": 300 * LENGTH,
        "c": 200 * LENGTH,
    }
    assert [count.share for count in counts.values()] == [count.wanted for count in counts.values()] == list(WEIGHTS)
    assert counts["c"].epochs == 200 / len(one.blocks[2])
    for name, count in counts.items():
        assert sum(seen.tokens for key, seen in sources.items() if key.startswith(f"{name}/")) == count.tokens


def test_an_epoch_is_the_new_text_once_with_its_replay(views):
    data = mixture(views, MixturePhase(0.0, (0.5, 0.25, 0.25)), c={"replay": True})
    new = sum(len(blocks) for blocks in data.blocks(LENGTH)[:2])
    assert data.epoch_samples(LENGTH) == new / 0.75
    phases = MixturePhase(0.0, (0.5, 0.5, 0.0)), MixturePhase(0.8, (0.5, 0.0, 0.5))
    assert mixture(views, *phases, c={"replay": True}).epoch_samples(LENGTH) == pytest.approx(new / 0.9)


def test_a_part_without_a_sequence_is_an_error_only_where_it_has_a_share(views, tmp_path, store_of):
    (tmp_path / "x.txt").write_text("short")
    parts = Part("a", views[0]), Part("tiny", store_of(tmp_path).views(held_out=0.0)[0])
    with pytest.raises(UserError, match="'tiny' has too little text for its share: 5 training tokens"):
        check_enough(TrainingData(parts, (MixturePhase(0.0, (0.9, 0.1)),)), sequence_length=LENGTH, global_batch=8)
    left_out = TrainingData(parts, (MixturePhase(0.0, (1.0, 0.0)),))
    check_enough(left_out, sequence_length=LENGTH, global_batch=8)
    assert {part for part, _ in located(loader(left_out), range(50))} == {0}


def test_a_part_that_would_be_read_too_often_is_an_error_with_its_numbers(views):
    phases = MixturePhase(0.0, (0.9, 0.0, 0.1)), MixturePhase(0.5, (0.5, 0.0, 0.5))
    run = {"steps": 100, "global_batch": 8, "sequence_length": LENGTH, "document_mask": False}
    data = mixture(views, *phases)
    assert data.samples_taken(**run) == loader(data, steps=100).order.taken(800).tolist() == [560, 0, 240]
    there = len(data.blocks(LENGTH)[2])
    check_epochs(mixture(views, *phases, c={"max_epochs": 240 / there}), **run)
    message = f"max_epochs=1 of part 'c': the run would read it {240 / there:.3g} times: {there * LENGTH:,} tokens"
    with pytest.raises(UserError, match=message):
        check_epochs(mixture(views, *phases, c={"max_epochs": 1.0}), **run)
