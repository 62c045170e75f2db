"""What an advice has found so far, and the check of the mixture law."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pretrain.advise.length import Length
from pretrain.advise.look import Look
from pretrain.advise.probes import Measured
from pretrain.advise.rate import RateChoice
from pretrain.advise.share import ShareChoice

MISSED = 0.05  # nats per token


@dataclass
class Found:
    """What an advice consists of, as far as it was measured.

    Attributes:
        look: Model and text.
        share: The replay share.
        rate: The learning rate.
        lr: The chosen rate, or that of the command.
        replay: The chosen replay share; ``None`` without old text.
        checks: Predicted and measured change of the losses between two shares.
        errors: Standard error of a change of the loss by role.
        notes: What was not tried or not supported, in sentences.
        length: What the law of the learning curve says.
        means: What was tried against forgetting.
        batch: What runs with several batch sizes say.
    """

    look: Look | None = None
    share: ShareChoice | None = None
    rate: RateChoice | None = None
    lr: float = 0.0
    replay: float | None = None
    checks: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    length: Length | None = None
    means: list[dict[str, Any]] = field(default_factory=list)
    batch: dict[str, Any] | None = None


def checks_of(chosen: ShareChoice, at: Measured, there: Measured) -> list[dict[str, Any]]:
    """Return for each role the change of the loss from one share to another as the law expects it and as true runs show it."""
    found = []
    for role in ("new", "base"):
        measured = [run.change(role) for run in (at, there)]
        expected = [chosen.change(run.probe.share or 0.0, role) for run in (at, there)]
        if measured[0] is None or measured[1] is None or expected[0] is None or expected[1] is None:
            continue
        found.append(
            {
                "role": role,
                "from": at.probe.share or 0.0,
                "to": there.probe.share or 0.0,
                "predicted": expected[1] - expected[0],
                "measured": measured[1] - measured[0],
            }
        )
    return found


def rms(checks: list[dict[str, Any]]) -> float:
    """Return by how much the mixture law misses true runs, root mean square in nats per token."""
    return math.sqrt(sum((check["measured"] - check["predicted"]) ** 2 for check in checks) / len(checks))


def missed(checks: list[dict[str, Any]]) -> list[str]:
    """Return a sentence where the mixture law and true runs differ by more than `MISSED`."""
    worst = max((abs(check["measured"] - check["predicted"]) for check in checks), default=0.0)
    if worst <= MISSED:
        return []
    return [
        f"Between two shares, true runs and the mixture of the LoRA probes differ by {worst:.2f} nats per token: the share "
        "is a rough one."
    ]
