"""The replay share from two LoRA probes (OP-Mix, arXiv:2605.15220): adapters between them are scored, the mixture law is fitted
to each domain, and the share that suits both roles is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

PROBED = (0.1, 0.9)  # shares of new text of the two probes
UNCHECKED = 0.02  # nats per token by which true runs lie off the law of interpolated adapters, where none was compared
LORA_LR = 10.0  # LoRA's learning rate compared with that of full fine-tuning


@dataclass(frozen=True)
class ShareChoice:
    """The share that was chosen.

    Attributes:
        replay: Replay share.
        low: Lower end of the interval of that share; equal to ``replay`` where it is not known.
        high: Its upper end.
        shares: Shares of new text that were scored.
        losses: Losses of each domain there.
        base: Losses of the base model.
        roles: Role of each domain.
        front: Shares of new text that no other share beats, with the expected losses.
        curves: The law of each domain at shares of new text, with its interval: (share, value, low, high).
        law: Whether the mixture law holds for every domain.
        reason: Why the law was not used, or what it is.
    """

    replay: float
    low: float
    high: float
    shares: list[float]
    losses: dict[str, list[float]]
    base: dict[str, float]
    roles: dict[str, str]
    front: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)
    law: bool = False
    reason: str = ""

    def expected(self, replay: float) -> dict[str, float]:
        """Return the loss of each domain at a replay share: by the law, or between the scored points."""
        x = 1 - replay
        found = {}
        for name, ys in self.losses.items():
            points = (
                [(row[0], row[1]) for row in self.curves[name]] if self.law else list(zip(self.shares, ys, strict=True))
            )
            found[name] = _between(points, x)
        return found

    def change(self, replay: float, role: str) -> float | None:
        """Return the expected mean change of the domains of a role at a replay share."""
        found = self.expected(replay)
        changes = [found[name] - self.base[name] for name in found if self.roles[name] == role]
        return sum(changes) / len(changes) if changes else None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    """Return the value at ``x`` on the line through the points, which are in increasing order."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def weights_of(roles: Mapping[str, str]) -> dict[str, float]:
    """Return the weight of each domain's loss: the two roles weigh alike."""
    counts = {role: sum(r == role for r in roles.values()) for role in roles.values()}
    return {name: 1 / counts[role] for name, role in roles.items()}


def choose(
    shares: Sequence[float],
    losses: Mapping[str, Sequence[float]],
    base: Mapping[str, float],
    roles: Mapping[str, str],
    *,
    prior_replay: float,
    penalty: float,
    max_forgetting: float | None,
    error: float = UNCHECKED,
) -> ShareChoice:
    """Choose the share of a run from the losses of adapters at several shares of new text.

    With ``max_forgetting``, a share whose expected forgetting in the probes is above it gives way to the smallest replay share
    within it, if there is one. ``error`` is by how much true runs miss the law (a standard deviation, nats per token): intervals
    hold it too.
    """
    from pretrain.advise.laws import NotSupported
    from pretrain.advise.laws.mixture import choose_share, fit_domain

    given: dict[str, Any] = {
        "shares": list(shares),
        "losses": {name: list(ys) for name, ys in losses.items()},
        "base": dict(base),
        "roles": dict(roles),
    }
    try:
        fits = {name: fit_domain(shares, ys).widened(error) for name, ys in losses.items()}
    except NotSupported as refused:
        point = 1 - _best_point(given, 1 - prior_replay, penalty)
        found = ShareChoice(point, point, point, **given, reason=f"measured points; {refused.reason}")
        return _within_limit(found, max_forgetting)
    best = choose_share(fits, weights_of(roles), 1 - prior_replay, penalty)
    places = [min(shares) + (max(shares) - min(shares)) * i / 32 for i in range(33)]
    found = ShareChoice(
        1 - best.share,
        1 - best.high,
        1 - best.low,
        **given,
        front=best.front,
        curves={name: [(x, *fit.predict(x)) for x in places] for name, fit in fits.items()},
        law=True,
        reason=f"mixture law, residual {max(fit.residual for fit in fits.values()):.4f} nats per token",
    )
    return _within_limit(found, max_forgetting)


def _best_point(given: dict[str, Any], prior: float, penalty: float) -> float:
    """Return the scored share of new text with the smallest sum of the losses and the penalty."""
    weights = weights_of(given["roles"])
    total = sum(weights.values())

    def price(i: int) -> float:
        x = min(max(given["shares"][i], 1e-9), 1 - 1e-9)
        divergence = x * math.log(x / prior) + (1 - x) * math.log((1 - x) / (1 - prior))
        return sum(weights[n] * ys[i] for n, ys in given["losses"].items()) / total + penalty * divergence

    best: float = given["shares"][min(range(len(given["shares"])), key=price)]
    return best


def _within_limit(choice: ShareChoice, limit: float | None) -> ShareChoice:
    forgotten = choice.change(choice.replay, "base")
    if limit is None or forgotten is None or forgotten <= limit:
        return choice
    candidates = [i / 100 for i in range(math.ceil(100 * choice.replay), 91)]
    within = next((r for r in candidates if (choice.change(r, "base") or 0.0) <= limit), None)
    if within is None:
        return replace(
            choice, reason=f"{choice.reason}; no share keeps forgetting within advise.max_forgetting in the probes"
        )
    return replace(choice, replay=within, low=min(choice.low, within), high=max(choice.high, within))
