"""The mixture law on curves with known constants."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.advise.laws import NotSupported
from pretrain.advise.laws.mixture import ExpFit, choose_share, fit_domain

SHARES = np.arange(1, 10) / 10
NEW, OLD = (0.9, 0.2, -1.5), (0.5, -2.0, 2.5)
NOISE = 0.005


def law(constants: tuple[float, float, float], x):
    c, a, b = constants
    return np.exp(c) + np.exp(a + b * np.asarray(x))


@cache
def noisy_fits() -> list[tuple[ExpFit, ExpFit]]:
    rng = np.random.default_rng(1)
    return [
        tuple(fit_domain(SHARES, law(k, SHARES) + rng.normal(0, NOISE, 9)) for k in (NEW, OLD))  # type: ignore[misc]
        for _ in range(200)
    ]


@pytest.mark.parametrize("constants", [NEW, OLD, (1.0, -3.0, 0.3), (0.0, 0.0, -8.0)], ids=str)
def test_exact_points_give_their_constants_back(constants):
    fit = fit_domain(SHARES, law(constants, SHARES))
    assert (fit.c, fit.a, fit.b) == pytest.approx(constants, abs=2e-3)
    assert fit.residual < 1e-5
    assert fit.predict(0.55)[0] == pytest.approx(law(constants, 0.55), abs=1e-5)


def test_an_interval_covers_a_new_run_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = [
        low <= law(NEW, 0.55) + rng.normal(0, NOISE) <= high
        for fit, _ in noisy_fits()
        for _, low, high in [fit.predict(0.55)]
    ]
    assert 0.75 <= np.mean(covered) <= 0.88
    widths = [high - low for fit, _ in noisy_fits()[:20] for _, low, high in [fit.predict(0.55)]]
    assert np.mean(widths) < 4 * NOISE  # and it is not wide for it: 2 × 1.28 × 0.005 is the least possible


def test_the_chosen_share_and_its_interval():
    x = np.linspace(0.1, 0.9, 8001)
    kl = x * np.log(2 * x) + (1 - x) * np.log(2 - 2 * x)
    best = x[np.argmin((law(NEW, x) + law(OLD, x)) / 2 + 0.05 * kl)]
    choices = [choose_share({"new": new, "old": old}, None, 0.5) for new, old in noisy_fits()[:40]]
    assert all(abs(choice.share - best) < 0.04 for choice in choices)
    assert np.mean([c.low - 0.0025 <= best <= c.high + 0.0025 for c in choices]) >= 0.75
    assert choices[0].predicted["old"][0] == pytest.approx(law(OLD, choices[0].share), abs=3 * NOISE)
    assert len(choices[0].front) == 161  # one domain falls and the other rises: every share is on the front


def test_weights_prior_and_limits_move_the_share():
    fits = {"new": fit_domain(SHARES, law(NEW, SHARES)), "old": fit_domain(SHARES, law(OLD, SHARES))}
    assert choose_share(fits, {"new": 1, "old": 0}, 0.5, 0).share == pytest.approx(0.9)
    assert choose_share(fits, {"new": 0, "old": 1}, 0.5, 0).share == pytest.approx(0.1)
    assert choose_share(fits, None, 0.3, 1e3).share == pytest.approx(0.3, abs=0.01)
    assert choose_share(fits, {"new": 1, "old": 0}, 0.5, 0, limits=(0.2, 0.6)).share == pytest.approx(0.6)
    same = {"new": fits["new"], "newer": fits["new"]}
    assert [share for share, _ in choose_share(same, None, 0.5).front] == pytest.approx(
        [0.9]
    )  # no trade between the domains
    assert choose_share(fits, None, 1.0, 1e3).share == pytest.approx(0.9)  # no replay is a prior too
    with pytest.raises(ValueError, match="prior share of 0 to 1"):
        choose_share(fits, None, 1.5)
    with pytest.raises(ValueError, match="no share was measured"):
        choose_share(fits, None, 0.5, limits=(0.95, 1.0))


def test_an_outlier_moves_the_law_less_than_it_would_a_mean():
    rng = np.random.default_rng(3)
    losses = law(NEW, SHARES) + rng.normal(0, 0.002, 9)
    spoilt = losses + 0.15 * (np.arange(9) == 4)
    fit = fit_domain(SHARES, spoilt)
    assert abs(fit.predict(0.5)[0] - law(NEW, 0.5)) < 0.15 / 9  # what the mean of nine points would move by
    assert fit.residual < 0.02 < np.sqrt(np.mean((spoilt - law(NEW, SHARES)) ** 2))


def test_the_error_of_true_runs_widens_the_interval():
    fit = fit_domain(SHARES, law(NEW, SHARES))
    value, low, high = fit.widened(0.03).widened(0.04).predict(0.4)
    assert (high - low) / 2 == pytest.approx(
        0.05 * 1.44, rel=0.02
    )  # Student's 80 % half width with 6 degrees of freedom
    assert value == pytest.approx(fit.predict(0.4)[0], abs=1e-6)


U_SHAPE = 2 + (SHARES - 0.5) ** 2
SCATTER = 2 + 0.1 * np.array([1, -1, 1, 1, -1, 1, -1, -1, 1])


@pytest.mark.parametrize(
    ("shares", "losses", "reason"),
    [
        (SHARES[:4], law(NEW, SHARES[:4]), "4 different shares were measured, the mixture law needs 5"),
        ([0.1, 0.1, 0.5, 0.5, 0.9, 0.9], [3, 3, 2.5, 2.5, 2, 2], "3 different shares"),
        ([], [], "0 different shares"),
        (SHARES, [2.5] * 9, "the loss is the same at every share"),
        (SHARES, [math.nan] + [2.0] * 8, "one of the losses is not a finite number"),
        (SHARES, [1e9] * 9, "a loss lies outside 0 to 100 nats per token"),
        (SHARES, [-1.0] * 9, "a loss lies outside 0 to 100 nats per token"),
        (SHARES * 2, law(NEW, SHARES), "a share lies outside 0 to 1"),
        (SHARES, law(NEW, SHARES)[:8], "9 shares came with 8 losses"),
        (SHARES, U_SHAPE, "the losses rise and fall with the share"),
        (SHARES, SCATTER, "the losses scatter around the mixture law by 0.09"),
    ],
    ids=[
        "few",
        "few-different",
        "none",
        "constant",
        "nan",
        "huge",
        "negative",
        "share",
        "lengths",
        "u-shape",
        "scatter",
    ],
)
def test_points_that_do_not_carry_the_law_are_refused(shares, losses, reason):
    with pytest.raises(NotSupported) as refusal:
        fit_domain(shares, losses)
    assert refusal.value.reason.startswith(reason)


def test_a_flat_domain_is_no_reason_to_refuse():
    rng = np.random.default_rng(5)
    for _ in range(20):
        fit = fit_domain(SHARES, 2 + rng.normal(0, 0.001, 9))
        assert fit.predict(0.5)[0] == pytest.approx(2, abs=0.002)


@settings(max_examples=15, deadline=None)
@given(
    st.permutations(range(9)),
    st.tuples(st.floats(-1, 1.5), st.floats(-4, 0), st.floats(-4, 4)),
    st.lists(st.floats(-0.01, 0.01), min_size=9, max_size=9),
)
def test_the_order_of_the_points_does_not_matter_and_the_law_is_monotone(order, constants, noise):
    losses = law(constants, SHARES) + np.array(noise)
    try:
        fit = fit_domain(SHARES, losses)
    except NotSupported:
        with pytest.raises(NotSupported):
            fit_domain(SHARES[order], losses[order])
        return
    again = fit_domain(SHARES[order], losses[order])
    assert (again.c, again.a, again.b, again.predict(0.3)) == (fit.c, fit.a, fit.b, fit.predict(0.3))
    best = law((fit.c, fit.a, fit.b), np.linspace(0, 1, 50))
    assert (np.diff(best) * np.sign(fit.b) >= 0).all()
    _, low, high = fit.predict(0.3)
    wide = fit.predict(0.3, 0.95)
    assert wide[1] <= low <= fit.predict(0.3)[0] <= high <= wide[2]
