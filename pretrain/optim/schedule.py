"""Learning-rate schedules. They are pure functions of the step, so a checkpoint holds no scheduler state.

Each function returns the multiplier of the peak learning rate for update ``step`` (0-based). The builder passes
``total_steps`` and ``warmup_steps``; the other arguments come from the YAML.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, SupportsFloat

from pydantic import Field, PositiveInt

from pretrain.runtime.errors import UserError

Ratio = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Schedule:
    """The schedule of one run: maps a step (0-based) to the multiplier of the peak learning rate.

    Attributes:
        multiplier: A function of ``step``, ``total_steps`` and ``warmup_steps``, such as those of this module.
        total_steps: The length of the run.
        warmup_steps: The length of the warm-up.
    """

    multiplier: Callable[..., float]
    total_steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        """Return the multiplier of ``step``. Raises ``UserError`` where the function returns no finite number."""
        multiplier = self.multiplier(step, total_steps=self.total_steps, warmup_steps=self.warmup_steps)
        if not isinstance(multiplier, SupportsFloat) or not math.isfinite(multiplier):
            function: Any = getattr(self.multiplier, "func", self.multiplier)  # of a partial
            name = getattr(function, "__qualname__", type(function).__qualname__)
            raise UserError(
                f"scheduler: {name} returns {multiplier!r} for step {step} of {self.total_steps}; a number is needed"
            )
        return multiplier


def with_multiplier(schedule: Callable[[int], float], multiplier: Callable[..., float]) -> Callable[[int], float]:
    """Return the schedule ``multiplier``, for the same run as ``schedule`` if that is a `Schedule`."""
    return replace(schedule, multiplier=multiplier) if isinstance(schedule, Schedule) else multiplier


def warmup(step: int, warmup_steps: int) -> float:
    """Return the linear warm-up: 1 at step ``warmup_steps - 1``, and above 0 at step 0, so that the first step trains."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def decayed(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the fraction of the decay that has passed, in [0, 1]: 0 at the end of the warm-up, 1 at the last step and after
    it. A decay of a single step stays at 0, the peak."""
    steps = total_steps - 1 - warmup_steps
    return min(1.0, max(0.0, (step - warmup_steps) / steps)) if steps > 0 else float(step > warmup_steps)


def decay_steps(total_steps: int, min_lr_ratio: float) -> int:
    """Return the number of steps over which a decay runs. It ends at the last step, but a decay to 0 ends one step later,
    because a step with learning rate 0 would train nothing."""
    return total_steps + (min_lr_ratio == 0)


def constant(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Return the warm-up, then 1."""
    return warmup(step, warmup_steps)


def linear(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: Ratio = 0.0) -> float:
    """Return the warm-up, then a linear decay to ``min_lr_ratio`` at the last step. A decay to 0 ends after the last step.

    Args:
        min_lr_ratio: Learning rate of the last step as a share of the peak; 0 is reached only after the last step.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return 1 - (1 - min_lr_ratio) * decayed(step, decay_steps(total_steps, min_lr_ratio), warmup_steps)


def cosine(
    step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: Ratio = 0.0, cycles: PositiveInt = 1
) -> float:
    """Return the warm-up, then half a cosine down to ``min_lr_ratio`` at the last step. A decay to 0 ends after the last step.
    With ``cycles`` = n the decay is repeated n times, with n - 1 jumps back to 1.

    Source: SGDR, Loshchilov and Hutter 2017 (arXiv:1608.03983), with cycles of equal length.

    Args:
        min_lr_ratio: Learning rate of the last step as a share of the peak; 0 is reached only after the last step.
        cycles: Number of decays, with a jump back to the peak between them.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    turns = decayed(step, decay_steps(total_steps, min_lr_ratio), warmup_steps) * cycles
    within = 1.0 if turns >= cycles else turns % 1
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * within)) / 2


def wsd(
    step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: Ratio = 0.0, decay_proportion: Ratio = 0.2
) -> float:
    """Return the warm-up, then 1, then a ``1 - sqrt`` decay over the last ``decay_proportion`` of the run, which reaches
    ``min_lr_ratio`` after the last step (warmup-stable-decay).

    A run can be resumed with more steps from any point of the stable part. Source: Hägele et al. 2024 (arXiv:2405.18392),
    whose decay also starts at 1 and ends after the last update.

    Args:
        min_lr_ratio: Learning rate after the last step, as a share of the peak.
        decay_proportion: Share of the run's steps in the final decay.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    decay_from = wsd_decay_from(total_steps, warmup_steps, decay_proportion)
    if step < decay_from:
        return 1.0
    return 1 - (1 - min_lr_ratio) * math.sqrt(decayed(step, total_steps + 1, decay_from))


def wsd_decay_from(total_steps: int, warmup_steps: int, decay_proportion: float) -> int:
    """Return the first step (0-based) of the decay of ``wsd``; that step is still at the peak."""
    return max(warmup_steps, total_steps - round(total_steps * decay_proportion))
