"""The schedule of a mixture: every prefix holds the shares to within one sample, from any position."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import draw
from pretrain.data.draw import Draw, schedule, whole_counts

SHARES = st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1e-9, 0.1, 0.25, 1 / 3, 1.0, 7.0]), min_size=1, max_size=12)


def deviations(one: Draw) -> np.ndarray:
    """How far the count of each part is from its share, after each number of samples of a period."""
    counts = np.cumsum(one.parts[:, None] == np.arange(len(one.counts)), axis=0)
    return np.abs(counts - np.arange(1, one.period + 1)[:, None] * one.shares)


@settings(max_examples=100, deadline=None)
@given(shares=SHARES.filter(lambda shares: sum(shares) > 0), longest=st.sampled_from([50, 700, 3000]))
def test_every_prefix_is_within_one_sample_of_the_shares(shares, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "MAX_PERIOD", longest)
        one = Draw(shares)
    assert one.period <= longest
    assert deviations(one).max() < 1
    assert [count > 0 for count in one.counts] == [share > 0 for share in shares]
    assert np.abs(one.shares - np.array(shares) / sum(shares)).max() <= len(shares) / longest


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(sum), samples=st.integers(0, 10**12))
def test_any_position_is_that_of_a_walk_from_the_start(counts, samples):
    one, period = Draw(counts), sum(counts) // math.gcd(*counts)
    order = schedule(tuple(one.counts.tolist()))
    part, index = one.locate(np.array([samples]))
    assert part[0] == order[samples % period]
    assert index[0] == samples // period * one.counts[part[0]] + order[: samples % period].count(part[0])
    assert one.taken(samples)[part[0]] == index[0]
    assert one.taken(samples).sum() == samples


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ([0.75, 0.25], [3, 1]),
        ([3, 1, 0], [3, 1, 0]),
        ([1 / 3, 2 / 3], [1, 2]),
        ([0.1, 0.2, 0.7], [1, 2, 7]),
        ([0.12345, 0.87655], [2469, 17531]),
        ([1e-12, 1], [1, 99_999]),
        ([0.675, 0.225, 0.1], [27, 9, 4]),
        ([0.75 * (1 - 0.1), 0.25 * (1 - 0.1), 0.1], [27, 9, 4]),
    ],
)
def test_shares_that_people_write_are_exact(shares, counts):
    assert whole_counts(shares).tolist() == counts
