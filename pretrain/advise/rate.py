"""The learning rate from short runs, with forgetting as the second axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pretrain.advise.probes import Measured
from pretrain.runtime.errors import UserError

FACTORS = {3: (0.316, 1.0, 3.16), 4: (0.1, 0.316, 1.0, 3.16), 5: (0.1, 0.316, 1.0, 1.78, 3.16)}  # of the prior


@dataclass(frozen=True)
class RateChoice:
    """The learning rate that was chosen.

    Attributes:
        lr: The rate.
        low: Lower end of its interval; equal to ``lr`` where it is not known.
        high: Its upper end.
        gain: Expected gain in a probe with it, with its interval.
        forgetting: Expected forgetting, likewise.
        reason: What limits the rate.
        within_limit: Whether forgetting in the probes is within advise.max_forgetting.
    """

    lr: float
    low: float
    high: float
    gain: tuple[float, float, float]
    forgetting: tuple[float, float, float]
    reason: str
    within_limit: bool = True


WHY = {
    "gain": "a larger rate gains less",
    "forgetting": "a larger rate forgets more than advise.max_forgetting",
    "edge": "the gain still grows at this rate, the largest that was tried",
    "divergence": "the next larger rate diverged",
    "floor": "even this smallest rate forgets more than advise.max_forgetting",
}


def rates_around(prior: float, count: int) -> list[float]:
    """Return the rates of the probes: up to a tenth of and to about three times the prior."""
    return [prior if factor == 1 else float(f"{prior * factor:.3g}") for factor in FACTORS[count]]


def choose(
    runs: Sequence[Measured], *, max_forgetting: float | None, gain_error: float, forgetting_error: float
) -> RateChoice:
    """Return the largest rate whose gain still grows while forgetting stays within the limit; the best measured one where the
    runs do not support more."""
    from pretrain.advise.laws import NotSupported
    from pretrain.advise.laws.learning_rate import LrPoint, choose_lr

    limit = math.inf if max_forgetting is None else max_forgetting
    points = [
        LrPoint(run.probe.lr, -math.inf if run.diverged else run.gain, run.forgetting, gain_error, forgetting_error)
        for run in runs
    ]
    try:
        best = choose_lr(points, limit, slack=gain_error)
    except NotSupported as refused:
        return _measured(runs, limit, refused.reason, gain_error, forgetting_error)
    lr = float(f"{best.lr:.2g}")
    expected = _forgetting([run for run in runs if not run.diverged], lr, best.forgetting, forgetting_error)
    low, high = min(best.low, lr), max(best.high, lr)
    return RateChoice(lr, low, high, best.gain, expected, WHY[best.limited_by], expected[0] <= limit)


def _forgetting(
    runs: Sequence[Measured], lr: float, chosen: tuple[float, float, float], error: float
) -> tuple[float, float, float]:
    """Return what is expected of forgetting at a rate. The choice takes it as growing with the rate: where the measured values
    around the rate are all smaller, the line between them in log lr is expected instead, within the same interval."""
    points = sorted((math.log(run.probe.lr), run.forgetting) for run in runs)
    place = min(max(math.log(lr), points[0][0]), points[-1][0])
    (x0, y0), (x1, y1) = next(pair for pair in pairwise(points) if place <= pair[1][0])
    if chosen[0] <= max(y0, y1):
        return chosen
    value = y0 + (y1 - y0) * (place - x0) / (x1 - x0)
    half = max(chosen[2] - chosen[0], chosen[0] - chosen[1], 1.28 * error)
    return value, value - half, value + half


def _measured(
    runs: Sequence[Measured], limit: float, why: str, gain_error: float, forgetting_error: float
) -> RateChoice:
    known = [run for run in runs if not run.diverged]
    if not known:
        raise UserError(
            "task=advise: every learning rate that was tried diverged; set a smaller lr, around which it searches"
        )
    within = [run for run in known if run.forgetting <= limit]
    best = max(within, key=lambda run: run.gain) if within else min(known, key=lambda run: run.forgetting)
    lr = best.probe.lr
    return RateChoice(
        lr,
        lr,
        lr,
        (best.gain, best.gain - 2 * gain_error, best.gain + 2 * gain_error),
        (best.forgetting, best.forgetting - 2 * forgetting_error, best.forgetting + 2 * forgetting_error),
        f"the best of the measured rates; {why}",
        bool(within),
    )
