"""The critical batch size on branches with a known one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.advise.laws import NotSupported
from pretrain.advise.laws.batch import Branch, critical_batch

BATCHES = [16, 32, 64, 128, 256]
TRUE = {16: 2.5, 32: 2.499, 64: 2.503, 128: 2.53, 256: 2.6}  # 64 is the largest within 0.01 of those below it


def branches(noise=0.0, rng=None, steps=40) -> list[Branch]:
    def losses(batch):
        trend = 0.2 * np.exp(-np.arange(steps) / 3)  # the optimizer adapts to the new batch
        return TRUE[batch] + trend - trend[-1] + (rng.normal(0, noise, steps) if rng else 0)

    return [Branch(batch, losses(batch), tokens=10**6) for batch in BATCHES]


def test_the_largest_batch_that_costs_nothing():
    found = critical_batch(branches())
    assert (found.batch, found.at_edge, found.lr_factor) == (64, False, 2.0)
    assert found.losses[128] == pytest.approx(2.53, abs=1e-4)
    assert critical_batch(branches(), tolerance=0.05).batch == 128
    assert critical_batch(branches(), tolerance=0.002).batch == 32
    everything = critical_batch(branches(), tolerance=1.0)
    assert (everything.batch, everything.at_edge, everything.lr_factor) == (256, True, 4.0)


def test_one_loss_of_each_branch_is_enough():
    found = critical_batch([Branch(batch, [loss]) for batch, loss in TRUE.items()])
    assert (found.batch, found.low, found.high) == (64, 64, 64)


def test_the_interval_covers_the_true_batch():
    rng = np.random.default_rng(7)
    found = [critical_batch(branches(0.012, rng)) for _ in range(200)]
    assert np.mean([f.low <= 64 <= f.high for f in found]) >= 0.75
    assert np.mean([f.batch == 64 for f in found]) > 0.5
    assert np.mean([f.low > 16 or f.high < 256 for f in found]) > 0.9  # and it says something


def test_more_branches_of_a_batch_narrow_it():
    rng = np.random.default_rng(8)
    one = critical_batch(branches(0.03, rng))
    many = critical_batch([branch for _ in range(30) for branch in branches(0.03, rng)])
    assert (many.batch, many.low, many.high) == (64, 64, 64)
    assert (one.low, one.high) != (64, 64)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "0 batch sizes were measured, a critical batch size needs 2"),
        ([Branch(8, [2.0]), Branch(8, [2.1])], "1 batch sizes were measured"),
        ([Branch(8, [2.0]), Branch(16, [])], "a branch has no losses"),
        ([Branch(0, [2.0]), Branch(16, [2.0])], "a branch has no losses, or a batch that is not positive"),
        ([Branch(8, [2.0]), Branch(16, [math.nan])], "one of the losses is not a finite number"),
        ([Branch(8, [2.0]), Branch(16, [math.inf])], "one of the losses is not a finite number"),
        ([Branch(8, [2.0]), Branch(16, [1e6])], "a loss lies outside 0 to 100 nats per token"),
        (
            [Branch(8, [2.0], 1000), Branch(16, [2.0], 2000)],
            "the branches read different amounts of text: 1000 to 2000",
        ),
        ([Branch(8, [2, 3, 2, 3, 2.5]), Branch(16, [2, 3, 2, 3, 2.5])], "the final losses are known to 0.37 nats only"),
    ],
    ids=["none", "one", "empty", "zero", "nan", "inf", "huge", "tokens", "noise"],
)
def test_branches_that_give_no_answer_are_refused(given, reason):
    with pytest.raises(NotSupported) as refusal:
        critical_batch(given)
    assert refusal.value.reason.startswith(reason)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1, 4), min_size=5, max_size=5), st.permutations(range(5)), st.floats(0, 0.5))
def test_order_does_not_matter_and_more_tolerance_never_gives_a_smaller_batch(losses, order, tolerance):
    given_ = [Branch(batch, [loss]) for batch, loss in zip(BATCHES, losses, strict=True)]
    found = critical_batch(given_, tolerance)
    assert critical_batch([given_[i] for i in order], tolerance) == found
    assert critical_batch(given_, 2 * tolerance).batch >= found.batch
    smaller = [loss for batch, loss in zip(BATCHES, losses, strict=True) if batch < found.batch]
    assert all(found.losses[found.batch] <= loss + tolerance for loss in smaller)
