"""The mixture law: the loss of each domain as a function of the share of new text, and the share that suits both.

OP-Mix (Hu, Gandhi, Cho, Linzen and Sharma 2026, arXiv:2605.15220) trains two low-rank probes on the current model,
with a share of new text of 0.1 and 0.9, interpolates their adapters to nine mixtures, scores each, fits per domain
the mixing law

    y = exp(c) + exp(t · x),      x: the shares of the domains, which sum to 1,

with a Huber loss, and takes the mixture that minimises the mean of exp(t · x) plus 0.05 · KL(x ‖ prior). The form,
the shares and the penalty were read in the authors' code (github.com/michahu/on-policy-mix). For two domains, with x
the share of new text, t · x is a straight line in x, so the law is

    y = exp(c) + exp(a + b x),

which is monotone and convex. This module fits that form with its uncertainty (`separable`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pretrain.advise.laws.errors import NotSupported, finite, finite_losses
from pretrain.advise.laws.separable import Separable, fit

LEAST_SHARES = 5  # the law has three constants
STEEPEST = 6.0  # of u with b = sinh(u) / 10: |b| ≤ 20
SHARES = 161  # values of the share that the choice compares
DRAWS = 400


@dataclass(frozen=True)
class ExpFit:
    """The mixture law of one domain.

    Attributes:
        c, a, b: constants of the law; c is -inf where the data show no floor.
        residual: root mean square of the points around the law, nats per token.
        shares, losses: the points, in increasing order of the share.
        law: the fit with its uncertainty.
    """

    c: float
    a: float
    b: float
    residual: float
    shares: tuple[float, ...]
    losses: tuple[float, ...]
    law: Separable

    def predict(self, x: float, level: float = 0.8) -> tuple[float, float, float]:
        """Return the loss of a new run at the share `x` as (median, low, high) of the interval that covers it with `level`."""
        value, low, high = self.law.predict(np.array([[float(x)]]), level)[:, 0]
        return float(value), float(low), float(high)

    def curve(self, shares: np.ndarray) -> np.ndarray:
        """Return the expected loss at each of `shares`."""
        return self.law.curve(shares[:, None])

    def widened(self, error: float) -> "ExpFit":
        """Return this fit with `error` (a standard deviation, nats) added: the error of true runs held out of the fit.

        Interpolated adapters lie close to the law, and a true run lies further from it; the fitted points cannot show
        that error.
        """
        return replace(self, law=replace(self.law, extra=float(np.hypot(self.law.extra, error))))


@dataclass(frozen=True)
class Choice:
    """The share of new text that was chosen.

    Attributes:
        share: the share that minimises the objective.
        low, high: 80 % interval of that minimum, from the uncertainty of the fits.
        predicted: (median, low, high) of each domain's loss at the share.
        front: shares no other share beats in every domain, with the expected loss of each domain there.
    """

    share: float
    low: float
    high: float
    predicted: dict[str, tuple[float, float, float]]
    front: list[tuple[float, dict[str, float]]]


def _basis(theta: np.ndarray, points: np.ndarray) -> np.ndarray:
    """1 and exp(b x), scaled so that its largest value over shares in 0..1 is 1."""
    b = np.sinh(theta[:, :1]) / 10
    term = np.exp(b * points[None, :, 0] - b.clip(0))
    return np.stack([np.ones_like(term), term], -1)


def fit_domain(shares: Sequence[float], losses: Sequence[float], *, limit: float = 0.02) -> ExpFit:
    """Fit y = exp(c) + exp(a + b x) to the losses of one domain.

    Args:
        shares: share of new text of each point, 0 to 1; at least five different ones.
        losses: loss of the domain at each, nats per token.
        limit: largest root mean square residual, nats per token, at which the law counts as supported.
    Raises:
        NotSupported: too few shares; a value that is not finite or out of range; equal losses; a curve that rises and
            falls; a residual above the limit.
    """
    x, y = finite("shares", shares), finite_losses(losses)
    if x.size != y.size:
        raise NotSupported(f"{x.size} shares came with {y.size} losses")
    if x.size and (x.min() < 0 or x.max() > 1):
        raise NotSupported("a share lies outside 0 to 1")
    if np.unique(x).size < LEAST_SHARES:
        raise NotSupported(f"{np.unique(x).size} different shares were measured, the mixture law needs {LEAST_SHARES}")
    if np.ptp(y) < 1e-9:
        raise NotSupported("the loss is the same at every share")
    law = fit(_basis, x[:, None], y, [(-STEEPEST, STEEPEST)], 49, [[0, 1], [1]], [0, 1])
    order = np.lexsort((y, x))
    x, y = x[order], y[order]
    if law.residual > limit / 10 and _bends(x, y, law):
        raise NotSupported("the losses rise and fall with the share, the mixture law is monotone")
    if law.residual > limit:
        raise NotSupported(
            f"the losses scatter around the mixture law by {law.residual:.3g} nats, the limit is {limit:g}"
        )
    theta, (floor, height) = law.best
    b = float(np.sinh(theta[0]) / 10)
    with np.errstate(divide="ignore"):
        c, a = float(np.log(floor)), float(np.log(height) - max(b, 0.0))
    return ExpFit(c, a, b, law.residual, tuple(x.tolist()), tuple(y.tolist()), law)


def _bends(x: np.ndarray, y: np.ndarray, law: Separable) -> bool:
    """Return True if the law leaves most of the variation of the losses, and neighbours miss it on the same side.

    The second is the ratio of von Neumann (1941): near 2 for noise, near 0 for a curve of another shape.
    """
    error = y - law.curve(x[:, None])
    return bool(np.std(error) > np.std(y) / 2 and (np.diff(error) ** 2).sum() < 0.6 * (error**2).sum())


def choose_share(
    fits: Mapping[str, ExpFit],
    weights: Mapping[str, float] | None,
    prior_share: float,
    penalty: float = 0.05,
    *,
    limits: tuple[float, float] | None = None,
) -> Choice:
    """Return the share of new text that minimises Σ w_i y_i(x) + penalty · KL((x, 1-x) ‖ (prior, 1-prior)).

    The choice stays within the shares that every domain was measured at: the law is not trusted outside them.

    Args:
        fits: the law of each domain.
        weights: weight of each domain's loss; None weighs all alike, and the weights are scaled to sum to 1.
        prior_share: the share of new text to stay near, 0 to 1; closer than 0.001 to an end it counts as that.
        penalty: weight of the divergence from it, nats; 0 ignores the prior.
        limits: narrower limits of the share.
    Raises:
        ValueError: no fit, a negative weight, a prior share outside 0 to 1, or limits that leave no share.
        KeyError: a domain without a weight.
    """
    names = sorted(fits)
    w = np.array([1.0 if weights is None else weights[name] for name in names])
    if not names or w.min() < 0 or w.sum() <= 0 or not 0 <= prior_share <= 1:
        raise ValueError("choose_share needs fits, weights that are not negative and a prior share of 0 to 1")
    lowest = max(fits[name].shares[0] for name in names)
    highest = min(fits[name].shares[-1] for name in names)
    if limits is not None:
        lowest, highest = max(lowest, limits[0]), min(highest, limits[1])
    if lowest > highest:
        raise ValueError(f"no share was measured for every domain between {lowest:g} and {highest:g}")
    x = np.linspace(lowest, highest, SHARES)
    curves = np.stack([fits[name].curve(x) for name in names])
    price = penalty * _divergence(x, min(max(prior_share, 0.001), 0.999))
    best = int(np.argmin(w / w.sum() @ curves + price))
    drawn = np.stack([fits[name].law.draws(x[:, None], DRAWS, seed) for seed, name in enumerate(names)])
    minima = x[np.argmin(np.einsum("d,dcn->cn", w / w.sum(), drawn) + price, axis=1)]
    low, high = np.quantile(np.append(minima, x[best]), [0.1, 0.9])
    share = float(x[best])
    return Choice(
        share,
        min(float(low), share),
        max(float(high), share),
        {name: fits[name].predict(share) for name in names},
        [(float(x[i]), dict(zip(names, curves[:, i].tolist(), strict=True))) for i in _front(curves)],
    )


def _divergence(x: np.ndarray, prior: float) -> np.ndarray:
    """KL divergence of the mixture (x, 1-x) from (prior, 1-prior), nats."""
    x = x.clip(1e-12, 1 - 1e-12)
    return x * np.log(x / prior) + (1 - x) * np.log((1 - x) / (1 - prior))


def _front(curves: np.ndarray) -> list[int]:
    """Return the columns of `curves` ([domains, n]) that no other column matches in each domain and beats in one."""
    at_least = (curves[:, :, None] <= curves[:, None, :]).all(0)  # [i, j]: i is at least as good as j everywhere
    beats = np.logical_and(at_least, (curves[:, :, None] < curves[:, None, :]).any(0))
    return [j for j in range(curves.shape[1]) if not beats[:, j].any()]
