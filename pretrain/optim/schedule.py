"""Learning-rate schedules: pure functions of the step, so that there is nothing to save and nothing to get out of step.

Each returns the multiplier of the peak learning rate for the ``step``-th update (0-based). The builder gives
``total_steps`` and ``warmup_steps``; what is left comes from YAML.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field, PositiveInt

Ratio = Annotated[float, Field(ge=0, le=1)]


def warmup(step: int, warmup_steps: int) -> float:
    """Rises linearly to 1 at step ``warmup_steps - 1``; above 0 from the first step on, which so trains too."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def decayed(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the way after the warm-up, in [0, 1]; 1 at the last step and beyond. A single step is at the peak."""
    steps = total_steps - 1 - warmup_steps
    return min(1.0, max(0.0, (step - warmup_steps) / steps)) if steps > 0 else float(step > warmup_steps)


def decay_steps(total_steps: int, min_lr_ratio: float) -> int:
    """Steps until a decay is at its end: the last one, but an end of 0 comes after it. A step at 0 would train nothing."""
    return total_steps + (min_lr_ratio == 0)


def constant(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Warm-up, then 1."""
    return warmup(step, warmup_steps)


def linear(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: Ratio = 0.0) -> float:
    """Warm-up, then a straight line to ``min_lr_ratio`` at the last step; to 0 after it."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return 1 - (1 - min_lr_ratio) * decayed(step, decay_steps(total_steps, min_lr_ratio), warmup_steps)


def cosine(
    step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: Ratio = 0.0, cycles: PositiveInt = 1
) -> float:
    """Warm-up, then half a cosine to ``min_lr_ratio`` at the last step, to 0 after it; ``cycles`` = n does so n times, with
    n - 1 jumps back to 1.

    Source: SGDR, Loshchilov and Hutter 2017 (arXiv:1608.03983), with cycles of equal length.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    turns = decayed(step, decay_steps(total_steps, min_lr_ratio), warmup_steps) * cycles
    within = 1.0 if turns >= cycles else turns % 1
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * within)) / 2


def wsd(
    step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: Ratio = 0.0, decay_proportion: Ratio = 0.2
) -> float:
    """Warm-up, stable at 1, then ``1 - sqrt`` over the last ``decay_proportion`` of the run, down to ``min_lr_ratio`` after
    the last step.

    A run can be continued from any point of the stable part. Source: Hägele et al. 2024 (arXiv:2405.18392), whose decay also
    begins at 1 and ends after the last update.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    decay_from = wsd_decay_from(total_steps, warmup_steps, decay_proportion)
    if step < decay_from:
        return 1.0
    return 1 - (1 - min_lr_ratio) * math.sqrt(decayed(step, total_steps + 1, decay_from))


def wsd_decay_from(total_steps: int, warmup_steps: int, decay_proportion: float) -> int:
    """The first step (0-based) of the decay of ``wsd``; it is still at the peak."""
    return max(warmup_steps, total_steps - round(total_steps * decay_proportion))
