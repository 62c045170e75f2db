from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.order import Permutation


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
