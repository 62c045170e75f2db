"""What the learning curves of the probes say about the planned length (arXiv:2505.07796)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.advise.probes import Measured

LENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the planned run
FAR = 7.0  # times the measured area of the learning rate, above which a prediction comes with a warning
MOST_EXTRAPOLATED = 30.0  # area of the learning rate, in those of the probes, beyond which the law is not used


@dataclass(frozen=True)
class Length:
    """The law of the learning curves.

    Attributes:
        lengths: Steps of shorter and the planned runs, each with its own decay.
        changes: Change of each domain's loss at their ends: (value, low, high); domains without a law have none.
        refused: Why a domain has no law.
        extrapolation: Area of the planned learning rate in those that were measured.
        enough: Steps after which a further tenth of the run gains less than advise.limit; ``None``: there are none.
    """

    lengths: list[int]
    changes: dict[str, list[tuple[float, float, float]]]
    refused: dict[str, str] = field(default_factory=dict)
    extrapolation: float = 0.0
    enough: int | None = None

    @property
    def warnings(self) -> list[str]:
        """Return a sentence where the law is used far outside of what was measured."""
        if not self.changes or self.extrapolation <= FAR:
            return []
        return [
            f"The learning rates of the planned run sum to {self.extrapolation:.0f} times what was measured: what is expected at "
            "its length is a rough guess. A larger advise.budget has longer probes."
        ]

    def record(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    runs: Sequence[Measured],
    schedule: Callable[[int], list[float] | None],
    *,
    steps: int,
    roles: Mapping[str, str],
    limit: float,
) -> Length:
    """Fit the law to the curves of ``runs``, which have one replay share, and predict runs of several lengths.

    Args:
        runs: Probes with full fine-tuning.
        schedule: The learning rate of every step of a run of so many steps; ``None`` where it is not known.
        steps: Steps of the planned run.
        roles: Role of each domain.
        limit: Gain for each further tenth of the run below which a shorter run is enough.
    """
    from pretrain.advise.laws import NotSupported
    from pretrain.advise.laws.dynamics import Curve, fit_dynamics

    usable = [run for run in runs if run.lrs and not run.diverged]
    lengths = sorted({max(1, round(steps * part)) for part in LENGTHS})
    changes: dict[str, list[tuple[float, float, float]]] = {}
    refused: dict[str, str] = {}
    extrapolation = 0.0
    for name in roles:
        rates = [schedule(length) for length in lengths]
        if not usable or None in rates:
            refused[name] = "the schedule is not one of this program's, so its learning rates are not known"
            continue
        try:
            law = fit_dynamics([Curve(run.lrs, *run.losses[name]) for run in usable])
            ends = [law.predict(lrs) for lrs in rates if lrs is not None]
        except NotSupported as error:
            refused[name] = error.reason
            continue
        extrapolation = law.extrapolation(rates[-1] or [])
        if extrapolation > MOST_EXTRAPOLATED:
            refused[name] = f"the planned run is {extrapolation:.0f} times what was measured"
            continue
        base = sum(run.losses[name][1][0] for run in usable) / len(usable)
        changes[name] = [(value - base, low - base, high - base) for value, low, high in ends]
    return Length(lengths, changes, refused, extrapolation, _enough(lengths, changes, roles, limit))


def _enough(
    lengths: Sequence[int],
    changes: Mapping[str, Sequence[tuple[float, float, float]]],
    roles: Mapping[str, str],
    limit: float,
) -> int | None:
    """Return the shortest length from which on each further tenth gains less than ``limit``; ``None`` where that is the last."""
    new = [name for name, role in roles.items() if role == "new"]
    if not new or any(name not in changes for name in new) or len(lengths) < len(LENGTHS):
        return None
    losses = [sum(changes[name][i][0] for name in new) / len(new) for i in range(len(lengths))]
    for i in range(len(lengths) - 1):
        if all(a - b < limit for a, b in zip(losses[i:], losses[i + 1 :], strict=False)):
            return lengths[i]
    return None
