"""The learning dynamics of continual pretraining: the loss of a domain at each step, from the learning rates so far.

The law of Wang, Tissue, Wang, Li and Zeng (ICML 2025, arXiv:2505.07796) for the loss of one domain t steps into a
continued pretraining (cpt) is

    L(t) = L_0 + A · (S1_pt + S1_cpt)^(-α) - C1 · S2_pt - C2 · S2_cpt + B · (1 - (1 + E · S1_cpt)^(-β)),

S1: the sum of the learning rates (forward area), S2: the annealing area Σ_i m_i with m_i = λ m_(i-1) + lr_(i-1) - lr_i
and λ = 0.999 (arXiv:2408.11029). B is above zero for the old text, which is forgotten, and below zero for the new one.
The formula and λ were read in published notes on the paper and the area in published code, not in the paper itself.

Three changes, because the pretraining of a downloaded model is not known and its area is far above a probe's:

- L_0, A and S1_pt, S2_pt: the first four terms at S1_cpt = 0 are one constant, the loss of the base model. The rest of
  A · (…)^(-α) has the form of the last term (with E = 1/S1_pt), which is fitted once for both.
- A warm-up counts as annealing area 0 (the largest rate so far stands in for the rate), as in arXiv:2408.11029.
- One fit holds for one domain at one share of new text. The paper lets B depend on the share; here the caller fits
  each share.

An area is a sum over optimizer steps, so every curve of a fit has one batch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from pretrain.advise.laws.errors import NotSupported, finite, finite_losses
from pretrain.advise.laws.separable import Separable, fit

MEMORY = 0.999  # λ
LEAST_CURVES, LEAST_POINTS = 2, 10  # five constants
SPEED = (-3.0, 7.0)  # range of log(E · reach): from a straight line to a step within the first thousandth
POWER = (-3.0, 1.5)  # range of log β
SMALL = 1e-4  # nats; below it an error is one of the grid
ALIKE = 2.4  # errors correlated by more than 0.41; 36 of plain noise reach 0.34
FORM = 0.02  # of the change of the loss: a larger residual of errors that are alike is another curve than the law


@dataclass(frozen=True)
class Curve:
    """The losses of one domain over one run.

    Attributes:
        lrs: learning rate of each optimizer step of the run.
        steps: optimizer steps done at each evaluation, 0 to len(lrs); 0 is the base model.
        losses: loss of the domain at each evaluation, nats per token.
    """

    lrs: Sequence[float]
    steps: Sequence[int]
    losses: Sequence[float]


def areas(lrs: Sequence[float], memory: float = MEMORY) -> np.ndarray:
    """Return S1 and S2 after 0, 1, … len(lrs) steps, [len(lrs) + 1, 2]."""
    rates = finite("learning rates", lrs)
    if rates.size and rates.min() < 0:
        raise NotSupported("a learning rate is negative")
    peak = int(np.argmax(rates)) if rates.size else 0
    warmed = np.concatenate([np.full(min(peak, rates.size), rates.max(initial=0.0)), rates[peak:]])
    falls = -np.diff(warmed, prepend=warmed[:1])
    momentum = np.fromiter(accumulate(falls.tolist(), lambda m, fall: memory * m + fall), np.float64, falls.size)
    return np.concatenate([np.zeros((1, 2)), np.stack([np.cumsum(rates), np.cumsum(momentum)], -1)])


@dataclass(frozen=True)
class DynamicsFit:
    """The law of one domain at one share of new text.

    Attributes:
        base: loss of the base model under the law, nats per token.
        annealing: C2, the fall of the loss per unit of annealing area.
        shift, speed, power: B, E and β of the distribution shift.
        residual: root mean square of the points around the law, nats per token.
        reach: largest S1 that was fitted.
        annealed: whether a curve decayed its learning rate.
        law: the fit with its uncertainty.
    """

    base: float
    annealing: float
    shift: float
    speed: float
    power: float
    residual: float
    reach: float
    annealed: bool
    law: Separable

    def predict(self, lrs: Sequence[float], level: float = 0.8) -> tuple[float, float, float]:
        """Return the loss at the end of a run with these learning rates: (median, low, high), which covers it with `level`.

        Raises:
            NotSupported: the rates decay, and no fitted curve did; or a rate is not finite or negative.
        """
        value, low, high = self.law.predict(self._ends([lrs]), level)[:, 0]
        return float(value), float(low), float(high)

    def extrapolation(self, lrs: Sequence[float]) -> float:
        """Return the forward area of `lrs` in parts of the largest one that was fitted. Above 1 the law is extrapolated."""
        return float(areas(lrs)[-1, 0] / self.reach)

    def _ends(self, schedules: Sequence[Sequence[float]]) -> np.ndarray:
        """Areas at the end of each schedule, [n, 2], in the units of the fit."""
        ends = np.stack([areas(lrs)[-1] for lrs in schedules]) / self.reach
        if not self.annealed and ends[:, 1].max(initial=0.0) > 1e-9:
            raise NotSupported(
                "no measured run decayed its learning rate, so a schedule that decays can't be predicted"
            )
        return ends


def _basis(theta: np.ndarray, points: np.ndarray) -> np.ndarray:
    """1, -S2 and the shift (1 - (1 + E S1)^(-β)), which is 1 at the reach."""
    speed, power = np.exp(theta[:, :1]), np.exp(theta[:, 1:])
    shift = -np.expm1(-power * np.log1p(speed * points[None, :, 0])) / -np.expm1(-power * np.log1p(speed))
    return np.stack([np.ones_like(shift), np.broadcast_to(-points[None, :, 1], shift.shape), shift], -1)


def fit_dynamics(curves: Sequence[Curve], *, limit: float = 0.03) -> DynamicsFit:
    """Fit the law to the losses of one domain over runs of one share, one batch size and different learning rates.

    Errors that are alike from one evaluation to the next widen the intervals. With three curves or more each is predicted
    from the others, and the intervals are widened further where those predictions miss by more than they say.

    Args:
        curves: at least two runs with ten evaluations in all.
        limit: largest root mean square residual, nats per token, at which the law counts as supported.
    Raises:
        NotSupported: too few curves or points; a value that is not finite or out of range; losses that do not change,
            that follow another curve, or whose residual is above the limit.
    """
    pieces = [_points(curve) for curve in curves]
    count = sum(len(losses) for _, losses in pieces)
    if len(pieces) < LEAST_CURVES or count < LEAST_POINTS:
        needs = f"the law of learning dynamics needs {LEAST_CURVES} with {LEAST_POINTS}"
        raise NotSupported(f"{len(pieces)} curves with {count} evaluations were measured, {needs}")
    pieces.sort(key=lambda piece: (piece[0][-1].tolist(), piece[1].tolist()))
    reach = max(points[:, 0].max() for points, _ in pieces)
    if reach <= 0:
        raise NotSupported("every learning rate is 0")
    change = float(np.ptp(np.concatenate([losses for _, losses in pieces])))
    if change < 1e-9:
        raise NotSupported("the loss does not change during training")
    law = _fit(pieces, reach)
    repeats = _repeats(pieces, reach, law)
    _check_form(law, repeats, change, limit)
    honest = law if repeats == 1 else _fit(pieces, reach, repeats)
    (speed, power), (base, annealing, shift) = law.best
    annealed = max(points[:, 1].max() for points, _ in pieces) > 1e-9 * reach
    whole = -np.expm1(-np.exp(power) * np.log1p(np.exp(speed)))
    return DynamicsFit(
        float(base),
        float(annealing / reach),
        float(shift / whole),
        float(np.exp(speed) / reach),
        float(np.exp(power)),
        law.residual,
        float(reach),
        bool(annealed),
        replace(honest, noise=honest.noise * _misses(pieces, reach, repeats)),
    )


def _check_form(law: Separable, repeats: float, change: float, limit: float) -> None:
    """Raise `NotSupported` if the losses follow another curve, or lie too far from the law."""
    if repeats > ALIKE and law.residual > FORM * change:
        raise NotSupported(
            f"the losses follow another curve than the law of learning dynamics: several evaluations in a row miss it on "
            f"the same side, by {law.residual / change:.1%} of the change of the loss"
        )
    if law.residual > limit:
        raise NotSupported(
            f"the losses scatter around the law of learning dynamics by {law.residual:.3g} nats, the limit is {limit:g}"
        )


def _points(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Return the areas ([n, 2]) and losses ([n]) of the evaluations of a curve."""
    steps, losses = finite("steps", curve.steps), finite_losses(curve.losses)
    if steps.size != losses.size or not steps.size:
        raise NotSupported(f"a curve has {steps.size} steps and {losses.size} losses")
    if steps.min() < 0 or steps.max() > len(curve.lrs) or (steps % 1).any():
        raise NotSupported(f"an evaluation lies outside the {len(curve.lrs)} steps of its run")
    order = np.lexsort((losses, steps))
    return areas(curve.lrs)[steps[order].astype(np.int64)], losses[order]


def _fit(pieces: list[tuple[np.ndarray, np.ndarray]], reach: float, repeats: float = 1.0) -> Separable:
    points = np.concatenate([points for points, _ in pieces]) / reach
    losses = np.concatenate([losses for _, losses in pieces])
    return fit(_basis, points, losses, [SPEED, POWER], 13, [[0, 1, 2], [0, 2]], [1], repeats)


def _repeats(pieces: list[tuple[np.ndarray, np.ndarray]], reach: float, law: Separable) -> float:
    """Return how many evaluations count as one: (1 + ρ) / (1 - ρ), with ρ the correlation of neighbouring errors of a curve.

    Where a law has not quite the form of a curve, neighbours miss it on the same side, and more of them say no more.
    """
    if law.residual < SMALL:
        return 1.0
    errors = [losses - law.curve(points / reach) for points, losses in pieces]
    product = sum(float(error[:-1] @ error[1:]) / max(1, error.size - 1) for error in errors)
    square = sum(float(error @ error) / error.size for error in errors)
    correlation = min(max(product / square, 0.0), 0.9) if square > 0 else 0.0
    return (1 + correlation) / (1 - correlation)


def _misses(pieces: list[tuple[np.ndarray, np.ndarray]], reach: float, repeats: float) -> float:
    """Return the factor, 1 or more, by which the end of each curve lies further from the law of the others than it says."""
    if len(pieces) < 3:
        return 1.0
    ratios = []
    for i, (points, losses) in enumerate(pieces):
        value, low, high = _fit(pieces[:i] + pieces[i + 1 :], reach, repeats).predict(points[-1:] / reach)[:, 0]
        ratios.append(2 * 1.2816 * (losses[-1] - value) / (high - low))  # in standard deviations
    return max(1.0, float(np.sqrt(np.mean(np.square(ratios)))))
