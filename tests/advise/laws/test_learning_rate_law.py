"""The choice of the learning rate on curves with a known best rate."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.advise.laws import NotSupported
from pretrain.advise.laws.learning_rate import LrPoint, choose_lr

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
PEAK = 2e-4


def gain(lr: float) -> float:
    """A parabola in log lr, highest at `PEAK`."""
    return 0.3 - 0.05 * math.log(lr / PEAK) ** 2


def forgetting(lr: float) -> float:
    return 500 * lr


def runs(rates=RATES, noise=0.0, rng=None, error=None) -> list[LrPoint]:
    error = noise if error is None else error
    draw = (lambda: rng.normal(0, noise)) if rng else (lambda: 0.0)
    return [LrPoint(lr, gain(lr) + draw(), forgetting(lr) + draw(), error, error) for lr in rates]


def test_without_a_limit_in_reach_it_is_the_rate_of_the_largest_gain():
    choice = choose_lr(runs(), 1.0)
    assert (choice.lr, choice.gain[0]) == (pytest.approx(PEAK, rel=0.02), pytest.approx(0.3, abs=1e-4))
    assert choice.limited_by == "gain"


def test_a_limit_of_forgetting_stops_it_earlier():
    choice = choose_lr(runs(), 0.05)
    assert (choice.lr, choice.limited_by) == (pytest.approx(1e-4, rel=0.02), "forgetting")
    assert choice.forgetting[0] <= 0.05
    between = choose_lr(runs(), 0.03)  # between two measured rates
    assert between.lr == pytest.approx(6e-5, rel=0.2)
    assert between.low <= 6e-5 <= between.high or between.lr < 6e-5


def test_the_ends_of_the_measured_rates_are_named():
    rising = [LrPoint(lr, 0.1 * i, 0.01) for i, lr in enumerate(RATES, 1)]
    assert choose_lr(rising, 1.0).limited_by == "edge"
    assert choose_lr(rising, 1.0).lr == pytest.approx(1e-3)
    diverged = choose_lr([*rising, LrPoint(3e-3, -math.inf, math.inf), LrPoint(1e-2, 0.9, 0.0)], 1.0)
    assert (diverged.lr, diverged.limited_by) == (pytest.approx(1e-3), "divergence")
    floor = choose_lr(runs(), 0.001)
    assert (floor.lr, floor.limited_by) == (pytest.approx(1e-5), "floor")


def test_slack_takes_the_lower_end_of_a_plateau():
    plateau = [
        LrPoint(lr, g, 0.01 * i) for i, (lr, g) in enumerate(zip(RATES, (0.1, 0.2, 0.25, 0.275, 0.28), strict=True))
    ]
    assert choose_lr(plateau, 1.0).lr > 7e-4
    assert choose_lr(plateau, 1.0, slack=0.04).lr < 1.1e-4


@pytest.mark.parametrize(("limit", "best"), [(1.0, PEAK), (0.03, 6e-5)], ids=["gain", "forgetting"])
def test_the_intervals_cover_as_often_as_they_say(limit, best):
    rng = np.random.default_rng(4)
    choices = [choose_lr(runs(noise=0.006, rng=rng), limit) for _ in range(200)]
    assert np.mean([c.low <= best <= c.high for c in choices]) >= 0.75
    again = [(c, gain(c.lr) + rng.normal(0, 0.006), forgetting(c.lr) + rng.normal(0, 0.006)) for c in choices]
    assert np.mean([c.gain[1] <= g <= c.gain[2] for c, g, _ in again]) >= 0.75
    assert np.mean([c.forgetting[1] <= f <= c.forgetting[2] for c, _, f in again]) >= 0.75
    assert np.median([c.high / c.low for c in choices]) < 3


def test_runs_of_one_rate_are_averaged_and_their_scatter_is_an_error():
    rng = np.random.default_rng(6)
    several = [point for _ in range(8) for point in runs(noise=0.01, rng=rng, error=0.0)]
    choice = choose_lr(several, 1.0)
    assert choice.lr == pytest.approx(PEAK, rel=0.15)
    assert choice.low < choice.lr < choice.high


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (runs(RATES[:2]), "2 different learning rates were measured and did not diverge, the choice needs 3"),
        (runs([1e-4, 1e-4, 1e-4, 3e-4]), "2 different learning rates"),
        ([*runs(RATES[:2]), LrPoint(1e-4, -math.inf, math.inf)], "2 different learning rates"),
        ([], "0 different learning rates"),
        ([*runs(RATES[:3]), LrPoint(1e-3, math.nan, 0.1)], "one of the gains is not a finite number"),
        ([*runs(RATES[:3]), LrPoint(1e-3, 0.1, math.nan)], "one of the values of forgetting is not a finite number"),
        ([LrPoint(lr, -0.1, 0.0) for lr in RATES], "no learning rate lowered the loss of the new text"),
        ([LrPoint(lr, 0.1, 0.0) for lr in RATES], "every learning rate gave the same result"),
        ([*runs(RATES[:3]), LrPoint(1e-3, 1e6, 0.1)], "a loss changed by more than 100 nats per token"),
        ([*runs(RATES[:3]), LrPoint(0.0, 0.1, 0.1)], "a learning rate is not positive"),
        (
            [*runs(RATES[:3]), LrPoint(1e-3, 0.1, 0.1, -1.0)],
            "a learning rate is not positive, or a standard error is negative",
        ),
    ],
    ids=[
        "few",
        "few-different",
        "diverged",
        "none",
        "nan",
        "nan-forgetting",
        "no-gain",
        "constant",
        "huge",
        "zero",
        "error",
    ],
)
def test_points_that_carry_no_choice_are_refused(points, reason):
    with pytest.raises(NotSupported) as refusal:
        choose_lr(points, 0.1)
    assert refusal.value.reason.startswith(reason)


values = st.lists(st.floats(-0.5, 1), min_size=5, max_size=5)


@settings(max_examples=25, deadline=None)
@given(values, values, st.permutations(range(5)), st.floats(0.001, 1))
def test_order_does_not_matter_and_a_looser_limit_never_gives_less_gain(gains, forgets, order, limit):
    points = [LrPoint(lr, g, f, 0.01, 0.01) for lr, g, f in zip(RATES, gains, forgets, strict=True)]
    try:
        choice = choose_lr(points, limit)
    except NotSupported:
        return
    assert choose_lr([points[i] for i in order], limit) == choice
    looser = choose_lr(points, 2 * limit)
    assert looser.gain[0] >= choice.gain[0] or choice.limited_by == "floor"
    assert choice.low <= choice.lr <= choice.high
    assert choice.forgetting[0] <= limit or choice.limited_by == "floor"
