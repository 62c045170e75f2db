"""The learning rate: the largest one whose gain still grows while forgetting stays within a limit.

The points are short runs at the planned schedule's shape, re-warmed from 0 and decayed again (Ibrahim et al. 2024,
arXiv:2403.08763). Both curves are interpolated over the logarithm of the rate; between two points the curve blends
the parabolas through their neighbours, which passes through each point and is exact where a curve is a parabola in
log lr. Forgetting is then made monotone, since it grows with the rate. The interval comes from 400 draws of the
points within their standard errors and of the interpolation within a quarter of its distance from straight lines.
This is a rule of this project and no paper's law.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.advise.laws.errors import LARGEST_LOSS, NotSupported, finite

LEAST_RATES = 3
RATES = 241  # rates that the choice compares, evenly spread in log lr
DRAWS = 400
BEND_ERROR = 0.25  # standard deviation of the interpolation, in parts of its distance from straight lines


@dataclass(frozen=True)
class LrPoint:
    """One short run.

    Attributes:
        lr: its peak learning rate.
        gain: fall of the loss of the new text, nats per token; -inf if the run diverged.
        forgetting: rise of the loss of the old text, nats per token.
        gain_error, forgetting_error: standard errors of both, nats per token.
    """

    lr: float
    gain: float
    forgetting: float
    gain_error: float = 0.0
    forgetting_error: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The learning rate that was chosen.

    Attributes:
        lr: the rate.
        low, high: 80 % interval of it, from the errors of the points and of the interpolation.
        gain, forgetting: (value, low, high) at the rate; a new run of its measured values falls into low..high with 80 %.
        limited_by: "gain" (the gain has a maximum between the measured rates), "forgetting" (its limit comes first),
            "edge" (the gain still grows at the largest rate measured), "divergence" (the same, and the next rate measured
            diverged), or "floor" (even the smallest rate measured forgets more than the limit, and `lr` is that rate).
    """

    lr: float
    low: float
    high: float
    gain: tuple[float, float, float]
    forgetting: tuple[float, float, float]
    limited_by: str


def choose_lr(points: Sequence[LrPoint], max_forgetting: float, *, slack: float = 0.0) -> Choice:
    """Return the largest rate whose gain still grows while forgetting stays within `max_forgetting` nats per token.

    Args:
        points: at least three different rates that did not diverge; several runs of one rate are averaged.
        max_forgetting: largest rise of the loss of the old text, nats per token.
        slack: the gain counts as growing only where it is more than this below its best value, nats per token. The
            standard error of an evaluation is a good value: a plateau then gives its lower end, which forgets less.
    Raises:
        NotSupported: too few rates; a value that is not finite; a rate that is not positive; a negative error; no rate
            that gained.
    """
    rates, gain, forgetting, cut = _averaged(points)
    if rates.size < LEAST_RATES:
        raise NotSupported(
            f"{rates.size} different learning rates were measured and did not diverge, the choice needs {LEAST_RATES}"
        )
    if gain[0].max() <= 0:
        raise NotSupported("no learning rate lowered the loss of the new text")
    if np.ptp(gain[0]) == 0 and np.ptp(forgetting[0]) == 0:
        raise NotSupported("every learning rate gave the same result")
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, DRAWS, rates.size + 1))  # of each rate and of the interpolation
    noise[:, 0] = 0  # the first draw is the measured curve
    grid = np.linspace(np.log(rates[0]), np.log(rates[-1]), RATES)
    gains = _drawn(np.log(rates), gain, noise[0], grid)
    forgets = np.maximum.accumulate(_drawn(np.log(rates), forgetting, noise[1], grid), axis=1)
    allowed = forgets <= max_forgetting
    allowed[:, 0] = True  # the smallest rate stands where none is within the limit
    within = np.where(allowed, gains, -np.inf)
    chosen = np.argmax(within >= within.max(1, keepdims=True) - slack, axis=1)
    best = int(chosen[0])
    low, high = np.quantile(np.exp(grid[chosen]), [0.1, 0.9])
    lr = float(np.exp(grid[best]))
    return Choice(
        lr,
        min(float(low), lr),
        max(float(high), lr),
        _interval(gains[:, best], gain[1], rng),
        _interval(forgets[:, best], forgetting[1], rng),
        _reason(best, allowed[0], forgets[0, 0] > max_forgetting, gains[0], slack, cut),
    )


def _reason(best: int, allowed: np.ndarray, over: bool, gains: np.ndarray, slack: float, cut: bool) -> str:
    last = int(allowed.nonzero()[0][-1])
    if over:
        return "floor"
    if gains[best] < gains.max() - slack and last < RATES - 1 and np.argmax(gains) > last:
        return "forgetting"
    if best < RATES - 1:
        return "gain"
    return "divergence" if cut else "edge"


def _averaged(points: Iterable[LrPoint]) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Return rates ([n]), gain and forgetting with their standard errors ([2, n] each), and whether a larger rate diverged."""
    points = sorted(points, key=lambda p: (p.lr, p.gain, p.forgetting, p.gain_error, p.forgetting_error))
    diverged = min((p.lr for p in points if p.gain == -math.inf), default=math.inf)
    points = [p for p in points if p.lr < diverged]
    values = {name: finite(label, [getattr(p, name) for p in points]) for name, label in LABELS.items()}
    if any(p.lr <= 0 or p.gain_error < 0 or p.forgetting_error < 0 for p in points):
        raise NotSupported("a learning rate is not positive, or a standard error is negative")
    if points and max(np.abs(values["gain"]).max(), np.abs(values["forgetting"]).max()) > LARGEST_LOSS:
        raise NotSupported(f"a loss changed by more than {LARGEST_LOSS:g} nats per token")
    rates, place, count = np.unique(values["lr"], return_inverse=True, return_counts=True)
    columns = []
    for name in ("gain", "forgetting"):
        mean = np.bincount(place, values[name], rates.size) / count
        error = np.sqrt(np.bincount(place, values[f"{name}_error"] ** 2, rates.size)) / count
        scatter = np.sqrt(
            np.bincount(place, (values[name] - mean[place]) ** 2, rates.size) / np.maximum(1, count - 1) / count
        )
        columns.append(np.stack([mean, np.maximum(error, scatter)]))
    return rates, columns[0], columns[1], diverged < math.inf


LABELS = {
    "lr": "learning rates",
    "gain": "gains",
    "forgetting": "values of forgetting",
    "gain_error": "standard errors",
    "forgetting_error": "standard errors",
}


def _drawn(x: np.ndarray, measured: np.ndarray, noise: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return one curve through the points ([2, n]: values and errors) at `at` for each row of `noise` ([draws, n + 1])."""
    value, error = measured
    blend = _blend(x, at)
    bend = value @ blend - np.interp(at, x, value)
    return (value + error * noise[:, :-1]) @ blend + BEND_ERROR * noise[:, -1:] * bend


def _blend(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the matrix ([n, len(at)], n ≥ 3) that takes values at `x` to the blended parabolas at `at`."""
    left = np.clip(np.searchsorted(x, at, side="right") - 1, 0, x.size - 2)
    part = (at - x[left]) / (x[left + 1] - x[left])
    before = _parabola(x, np.clip(left - 1, 0, x.size - 3), at)
    after = _parabola(x, np.clip(left, 0, x.size - 3), at)
    return before * (1 - part) + after * part


def _parabola(x: np.ndarray, first: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the matrix of the parabola through the points first, first + 1 and first + 2 of each `at` (Lagrange)."""
    weights = np.zeros((x.size, at.size))
    for i in range(3):
        j, k = (first + (i + 1) % 3, first + (i + 2) % 3)
        weights[first + i, np.arange(at.size)] = (
            (at - x[j]) * (at - x[k]) / ((x[first + i] - x[j]) * (x[first + i] - x[k]))
        )
    return weights


def _interval(draws: np.ndarray, errors: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the first draw and the 80 % interval of a new measurement, whose error is like those of the points."""
    value = float(draws[0])
    low, high = np.quantile(draws + np.sqrt(np.mean(errors**2)) * rng.standard_normal(draws.size), [0.1, 0.9])
    return value, min(float(low), value), max(float(high), value)
