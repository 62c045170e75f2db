from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Permutation, mix_bits


@settings(deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = Permutation(n, seed)(np.arange(n), epoch)
    assert np.array_equal(np.sort(image), np.arange(n))


@given(n=st.integers(2**33, 2**62), data=st.data())
def test_huge_domains_are_answered_point_by_point(n: int, data: st.DataObject) -> None:
    points = np.array(sorted(set(data.draw(st.lists(st.integers(0, n - 1), min_size=2, max_size=50)))))
    image = Permutation(n, 7)(points)
    assert ((image >= 0) & (image < n)).all()
    assert len(set(image.tolist())) == len(points)


def test_each_point_alone_is_what_it_is_among_others() -> None:
    order = Permutation(1000, 3)
    together = order(np.arange(1000), 2)
    assert [int(order(np.array([i]), 2)[0]) for i in range(0, 1000, 97)] == together[::97].tolist()


def test_seeds_and_epochs_give_unrelated_orders() -> None:
    n = 4096
    orders = [Permutation(n, seed)(np.arange(n), epoch) for seed in range(4) for epoch in range(4)]
    for i, one in enumerate(orders):
        for other in [np.arange(n), *orders[:i]]:
            assert (
                abs(np.corrcoef(one, other)[0, 1]) < 0.08
            )  # five standard deviations of a random pair: 5 / sqrt(4096)


def test_neighbours_are_torn_apart_and_every_place_is_reached() -> None:
    n, trials = 97, 4000
    firsts = np.array([Permutation(n, seed)(np.array([0, 1])) for seed in range(trials)])
    counts = np.bincount(firsts[:, 0], minlength=n)
    expected = trials / n
    assert ((counts - expected) ** 2 / expected).sum() < 170  # chi-square, 96 degrees of freedom: p < 1e-5
    steps = np.bincount((firsts[:, 1] - firsts[:, 0]) % n, minlength=n)[1:]
    assert ((steps - trials / (n - 1)) ** 2 / (trials / (n - 1))).sum() < 170


def test_all_orders_of_a_tiny_set_occur() -> None:
    seen = {tuple(Permutation(4, seed)(np.arange(4), epoch).tolist()) for seed in range(40) for epoch in range(40)}
    assert len(seen) >= 12  # at least the even ones


def test_the_order_is_that_of_every_version() -> None:
    """Another order would resume no run exactly. Sizes beside powers of two, where the width of the numbers changes."""
    known = {
        (2, 0, 0): [1, 0],
        (3, 0, 0): [2, 0, 1],
        (4, 1, 0): [3, 0, 1, 2],
        (8, 0, 0): [3, 7, 0, 5, 6, 2, 1, 4],
        (9, 0, 1): [3, 8, 7, 5, 6, 0, 4, 1, 2],
        (10, 7, 2): [1, 5, 9, 0, 6, 2, 4, 3, 7, 8],
        (16, 3, 5): [4, 8, 6, 10, 12, 15, 14, 3, 2, 13, 5, 11, 0, 7, 1, 9],
    }
    for (n, seed, epoch), order in known.items():
        assert Permutation(n, seed)(np.arange(n), epoch).tolist() == order
        assert Permutation(n, seed + 2**64)(np.arange(n), epoch).tolist() == order, "the seed's lower 64 bits"
    assert Permutation(8, 0)(np.arange(8)).tolist() == known[8, 0, 0], "of the first epoch, unless another is asked for"
    points = np.array([0, 1, 10**12 - 1])
    assert Permutation(10**12, 5)(points, 3).tolist() == [596902962203, 739077508614, 296623255229]


def test_mixing_is_splitmix64() -> None:
    """The first numbers of the reference code's generator with the seed 1234567 (prng.di.unimi.it/splitmix64.c)."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + i * gamma) % 2**64 for i in range(3)], dtype=np.uint64)
    assert mix_bits(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_nothing_has_no_order() -> None:
    with pytest.raises(ValueError, match="at least one element, not 0"):
        Permutation(0, 0)
