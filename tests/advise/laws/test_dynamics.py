"""The law of learning dynamics on curves with known constants."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.advise.laws import NotSupported
from pretrain.advise.laws.dynamics import Curve, areas, fit_dynamics

NEW, OLD = (3.0, 1.5, -0.8, 40.0, 0.5), (2.5, 0.8, 0.3, 20.0, 0.7)  # base, C2, B, E, β
PEAKS = (3e-4, 6e-4, 1e-3, 3e-3)


def schedule(steps: int, peak: float = 1e-3) -> np.ndarray:
    """A warm-up of a tenth, then half a cosine to a tenth of the peak."""
    warmup, t = max(1, steps // 10), np.arange(steps)
    cosine = 0.1 + 0.45 * (1 + np.cos(np.pi * (t - warmup) / max(1, steps - warmup)))
    return peak * np.where(t < warmup, (t + 1) / warmup, cosine)


def law(constants, lrs, at=-1):
    base, annealing, shift, speed, power = constants
    s1, s2 = areas(lrs)[at].T
    return base - annealing * s2 + shift * (1 - (1 + speed * s1) ** -power)


def runs(constants, noise=0.0, rng=None, peaks=PEAKS, steps=200) -> list[Curve]:
    at = np.linspace(0, steps, 9).astype(int)
    curves = []
    for peak in peaks:
        losses = law(constants, schedule(steps, peak), at)
        curves.append(Curve(schedule(steps, peak), at, losses + (rng.normal(0, noise, 9) if rng else 0)))
    return curves


def test_the_areas_are_those_of_the_definition():
    lrs = [0.1, 0.2, 0.4, 0.3, 0.3, 0.1]
    momentum, s2 = 0.0, 0.0
    expected = [0.0, 0.0, 0.0, 0.0]  # nothing before the first fall
    for before, now in pairwise(lrs[2:]):
        momentum = 0.9 * momentum + before - now
        s2 += momentum
        expected.append(s2)
    assert areas(lrs, 0.9)[:, 1] == pytest.approx(expected)
    assert areas(lrs, 0.9)[:, 0] == pytest.approx([0, 0.1, 0.3, 0.7, 1.0, 1.3, 1.4])
    assert (areas([0.1] * 5)[:, 1] == 0).all()


@pytest.mark.parametrize("constants", [NEW, OLD], ids=["new", "old"])
def test_exact_curves_give_their_constants_back_and_predict_longer_runs(constants):
    fit = fit_dynamics(runs(constants))
    assert (fit.base, fit.annealing) == pytest.approx(constants[:2], rel=0.01)
    assert (fit.shift, fit.speed, fit.power) == pytest.approx(constants[2:], rel=0.1)  # they trade off along a ridge
    assert fit.residual < 1e-4
    for steps, within in ((200, 2e-4), (800, 3e-4), (2000, 1e-3)):
        assert fit.predict(schedule(steps))[0] == pytest.approx(law(constants, schedule(steps)), abs=within)
    assert fit.extrapolation(schedule(2000)) == pytest.approx(3.31, abs=0.01)


def coverage(constants, noise, steps, draws):
    rng = np.random.default_rng(9)
    covered, widths = [], []
    for _ in range(draws):
        _, low, high = fit_dynamics(runs(constants, noise, rng)).predict(schedule(steps))
        covered.append(low <= law(constants, schedule(steps)) + rng.normal(0, noise) <= high)
        widths.append(high - low)
    return np.mean(covered), np.median(widths)


def test_an_interval_covers_a_run_of_four_times_the_length():
    covered, width = coverage(NEW, 0.004, 800, 10)
    assert covered >= 0.7
    assert width < 8 * 0.004


@pytest.mark.slow
@pytest.mark.parametrize(("constants", "noise"), [(NEW, 0.002), (NEW, 0.005), (OLD, 0.002), (OLD, 0.005)])
@pytest.mark.parametrize("steps", [200, 800])
def test_an_interval_covers_as_often_as_it_says(constants, noise, steps):
    covered, width = coverage(constants, noise, steps, 200)
    assert covered >= 0.75
    assert width < 8 * noise


def test_curves_that_follow_another_law_widen_the_interval():
    rng = np.random.default_rng(10)
    plain = runs(NEW, 0.001, rng)
    shifted = [Curve(c.lrs, c.steps, np.asarray(c.losses) + off * np.asarray(c.steps) / 200)
               for c, off in zip(plain, (0.02, -0.02, 0.02, -0.02), strict=True)]  # fmt: skip
    widths = [np.ptp(fit_dynamics(curves).predict(schedule(200))[1:]) for curves in (plain, shifted)]
    assert widths[1] > 0.04 > 5 * widths[0]


def test_a_schedule_with_decay_needs_a_run_with_decay():
    at = np.arange(0, 101, 10)
    flat = [Curve([peak] * 100, at, law(NEW, [peak] * 100, at)) for peak in (1e-3, 2e-3)]
    fit = fit_dynamics(flat)
    assert fit.predict([1e-3] * 150)[0] == pytest.approx(law(NEW, [1e-3] * 150), abs=1e-3)
    with pytest.raises(NotSupported, match="no measured run decayed its learning rate"):
        fit.predict(schedule(150))


FULL = runs(NEW)
SLOW_START = [Curve(c.lrs, c.steps, 3 - 0.3 * np.exp(-((areas(c.lrs)[c.steps, 0] / 0.1) ** 2))) for c in FULL]
ZIGZAG = 0.3 * (-1.0) ** np.arange(9)


@pytest.mark.parametrize(
    ("curves", "reason"),
    [
        ([], "0 curves with 0 evaluations were measured, the law of learning dynamics needs 2 with 10"),
        (FULL[:1], "1 curves with 9 evaluations"),
        ([Curve(c.lrs, c.steps[:3], c.losses[:3]) for c in FULL[:3]], "3 curves with 9 evaluations"),
        ([Curve(c.lrs, c.steps, [2.0] * 9) for c in FULL], "the loss does not change during training"),
        ([*FULL[:3], Curve(FULL[3].lrs, FULL[3].steps, [math.nan] * 9)], "one of the losses is not a finite number"),
        ([*FULL[:3], Curve(FULL[3].lrs, FULL[3].steps, [1e8] * 9)], "a loss lies outside 0 to 100 nats per token"),
        (
            [*FULL[:3], Curve([math.inf] * 200, FULL[3].steps, FULL[3].losses)],
            "one of the learning rates is not a finite",
        ),
        ([*FULL[:3], Curve([-1.0] * 200, FULL[3].steps, FULL[3].losses)], "a learning rate is negative"),
        ([Curve([0.0] * 200, c.steps, c.losses) for c in FULL], "every learning rate is 0"),
        (
            [*FULL[:3], Curve(FULL[3].lrs[:50], FULL[3].steps, FULL[3].losses)],
            "an evaluation lies outside the 50 steps",
        ),
        ([*FULL[:3], Curve(FULL[3].lrs, [0, 1], FULL[3].losses)], "a curve has 2 steps and 9 losses"),
        (
            [Curve(c.lrs, c.steps, c.losses + ZIGZAG) for c in FULL],
            "the losses scatter around the law of learning dynamics",
        ),
        (SLOW_START, "the losses follow another curve than the law of learning dynamics"),
    ],
    ids="none one few constant nan huge inf-lr negative-lr zero-lr outside lengths zigzag form".split(),
)
def test_curves_that_do_not_carry_the_law_are_refused(curves, reason):
    with pytest.raises(NotSupported) as refusal:
        fit_dynamics(curves)
    assert refusal.value.reason.startswith(reason)


@settings(max_examples=3, deadline=None)
@given(st.permutations(range(3)), st.permutations(range(9)), st.integers(0, 99))
def test_the_order_of_curves_and_points_does_not_matter(curves, points, seed):
    measured = runs(OLD, 0.003, np.random.default_rng(seed), PEAKS[1:])
    mixed = [Curve(measured[i].lrs, measured[i].steps[points], np.asarray(measured[i].losses)[points]) for i in curves]
    assert fit_dynamics(mixed).predict(schedule(400)) == fit_dynamics(measured).predict(schedule(400))


@settings(max_examples=3, deadline=None)
@given(st.floats(-2, -0.05), st.floats(5, 200), st.floats(0.2, 2), st.integers(0, 99))
def test_without_noise_more_training_at_one_rate_never_loses_what_the_law_gains(shift, speed, power, seed):
    fit = fit_dynamics(runs((3.0, 0.5, shift, speed, power), 1e-4, np.random.default_rng(seed)))
    ends = [fit.predict([1e-3] * steps)[0] for steps in (10, 50, 100, 200, 300)]
    assert all(later < earlier + 1e-3 for earlier, later in pairwise(ends))
