"""Learning-rate schedules. They are pure functions of the step, so a checkpoint holds no scheduler state.

Each function returns the multiplier of the peak learning rate for update ``step`` (0-based). The builder passes
``total_steps`` and ``warmup_steps``, and ``peak_lr`` to a function that has it; the other arguments come from the YAML.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, SupportsFloat

from pydantic import Field, PositiveInt

from pretrain.runtime.errors import UserError

Ratio = Annotated[float, Field(ge=0, le=1)]
PositiveRatio = Annotated[float, Field(gt=0, le=1)]
StartLr = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Shape = Literal["sqrt", "linear", "cosine", "inverse_sqrt"]
STEEPNESS = 10.0  # of the shape inverse_sqrt: the factor of the time in 1 / sqrt(1 + time)


@dataclass(frozen=True)
class Schedule:
    """The schedule of one run: maps a step (0-based) to the multiplier of the peak learning rate.

    Attributes:
        multiplier: A function of ``step``, ``total_steps`` and ``warmup_steps``, such as those of this module.
        total_steps: The length of the run.
        warmup_steps: The length of the warm-up.
        peak_lr: The run's peak learning rate, for a function with a parameter of this name.
    """

    multiplier: Callable[..., float]
    total_steps: int
    warmup_steps: int
    peak_lr: float = 1.0

    def __call__(self, step: int) -> float:
        """Return the multiplier of ``step``. Raises ``UserError`` where the function returns no finite number."""
        multiplier = self.multiplier(
            step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, **self._peak_lr
        )
        if not isinstance(multiplier, SupportsFloat) or not math.isfinite(multiplier):
            function: Any = getattr(self.multiplier, "func", self.multiplier)  # of a partial
            name = getattr(function, "__qualname__", type(function).__qualname__)
            raise UserError(
                f"scheduler: {name} returns {multiplier!r} for step {step} of {self.total_steps}; a number is needed"
            )
        return multiplier

    @cached_property
    def _peak_lr(self) -> dict[str, float]:
        return {"peak_lr": self.peak_lr} if takes_peak_lr(self.multiplier) else {}


def takes_peak_lr(multiplier: Callable[..., float]) -> bool:
    """Return whether a schedule's function has the parameter ``peak_lr``."""
    return "peak_lr" in inspect.signature(multiplier).parameters


def with_multiplier(schedule: Callable[[int], float], multiplier: Callable[..., float]) -> Callable[[int], float]:
    """Return the schedule ``multiplier``, for the same run as ``schedule`` if that is a `Schedule`."""
    return replace(schedule, multiplier=multiplier) if isinstance(schedule, Schedule) else multiplier


def warmup(step: int, warmup_steps: int, start: float = 0.0) -> float:
    """Return the linear warm-up: 1 at step ``warmup_steps - 1``. It is ``start`` at the step before step 0, so that the first
    step trains also with ``start`` = 0."""
    return start + (1 - start) * min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def decayed(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the fraction of the decay that has passed, in [0, 1]: 0 at the end of the warm-up, 1 at the last step and after
    it. A decay of a single step stays at 0, the peak."""
    steps = total_steps - 1 - warmup_steps
    return min(1.0, max(0.0, (step - warmup_steps) / steps)) if steps > 0 else float(step > warmup_steps)


def decay_steps(total_steps: int, min_lr_ratio: float) -> int:
    """Return the number of steps over which a decay runs. It ends at the last step, but a decay to 0 ends one step later,
    because a step with learning rate 0 would train nothing."""
    return total_steps + (min_lr_ratio == 0)


def fallen(shape: Shape, passed: float) -> float:
    """Return which share of the way from its start to its end a decay has come when the fraction ``passed`` of its time is over;
    both are in [0, 1]."""
    if shape == "sqrt":
        return math.sqrt(passed)
    if shape == "linear":
        return passed
    if shape == "cosine":
        return (1 - math.cos(math.pi * passed)) / 2
    return (1 - 1 / math.sqrt(1 + STEEPNESS * passed)) / (1 - 1 / math.sqrt(1 + STEEPNESS))


def constant(step: int, *, total_steps: int, warmup_steps: int, peak_lr: float = 1.0, start_lr: StartLr = 0.0) -> float:
    """Return the warm-up, then 1.

    Args:
        start_lr: Learning rate from which the warm-up starts, such as the last one of the base model.
    """
    return warmup(step, warmup_steps, start_lr / peak_lr)


def linear(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak_lr: float = 1.0,
    min_lr_ratio: Ratio = 0.0,
    start_lr: StartLr = 0.0,
) -> float:
    """Return the warm-up, then a linear decay to ``min_lr_ratio`` at the last step. A decay to 0 ends after the last step.

    Args:
        min_lr_ratio: Learning rate of the last step as a share of the peak; 0 is reached only after the last step.
        start_lr: Learning rate from which the warm-up starts, such as the last one of the base model.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps, start_lr / peak_lr)
    return 1 - (1 - min_lr_ratio) * decayed(step, decay_steps(total_steps, min_lr_ratio), warmup_steps)


def cosine(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak_lr: float = 1.0,
    min_lr_ratio: Ratio = 0.0,
    cycles: PositiveInt = 1,
    start_lr: StartLr = 0.0,
) -> float:
    """Return the warm-up, then half a cosine down to ``min_lr_ratio`` at the last step. A decay to 0 ends after the last step.
    With ``cycles`` = n the decay is repeated n times, with n - 1 jumps back to 1.

    Source: SGDR, Loshchilov and Hutter 2017 (arXiv:1608.03983), with cycles of equal length.

    Args:
        min_lr_ratio: Learning rate of the last step as a share of the peak; 0 is reached only after the last step.
        cycles: Number of decays, with a jump back to the peak between them.
        start_lr: Learning rate from which the warm-up starts, such as the last one of the base model.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps, start_lr / peak_lr)
    turns = decayed(step, decay_steps(total_steps, min_lr_ratio), warmup_steps) * cycles
    within = 1.0 if turns >= cycles else turns % 1
    return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * within)) / 2


def inverse_sqrt(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak_lr: float = 1.0,
    timescale: PositiveInt | None = None,
    start_lr: StartLr = 0.0,
) -> float:
    """Return the warm-up, then ``sqrt(timescale / (timescale + n))`` for the n-th step after it. The values do not depend on the
    length of the run, so a run can be resumed with more steps at any time.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), where the timescale is the length of the warm-up.

    Args:
        timescale: Steps after the warm-up in which the learning rate falls to 0.71 of the peak; null: the warm-up's.
        start_lr: Learning rate from which the warm-up starts, such as the last one of the base model.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps, start_lr / peak_lr)
    scale = timescale or max(1, warmup_steps)
    return math.sqrt(scale / (scale + step - warmup_steps))


def wsd(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak_lr: float = 1.0,
    min_lr_ratio: Ratio = 0.0,
    decay_proportion: Ratio = 0.2,
    decay: Literal["sqrt", "linear", "cosine"] = "sqrt",
    start_lr: StartLr = 0.0,
) -> float:
    """Return the warm-up, then 1, then a decay over the last ``decay_proportion`` of the run, which reaches ``min_lr_ratio``
    after the last step (warmup-stable-decay).

    A run can be resumed with more steps from any point of the stable part. Source: Hägele et al. 2024 (arXiv:2405.18392),
    whose decay also starts at 1 and ends after the last update, and who found ``1 - sqrt`` better than a line.

    Args:
        min_lr_ratio: Learning rate after the last step, as a share of the peak.
        decay_proportion: Share of the run's steps in the final decay.
        decay: Shape of the decay: sqrt (1 - sqrt) · linear · cosine.
        start_lr: Learning rate from which the warm-up starts, such as the last one of the base model.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps, start_lr / peak_lr)
    first = decay_from(total_steps, warmup_steps, decay_proportion)
    if step < first:
        return 1.0
    return 1 - (1 - min_lr_ratio) * fallen(decay, decayed(step, total_steps + 1, first))


def infinite(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    peak_lr: float = 1.0,
    constant_lr_ratio: PositiveRatio = 0.5,
    cooldown_proportion: Ratio = 0.3,
    cooldown_steps: PositiveInt | None = None,
    cooldown: Literal["cosine", "inverse_sqrt"] = "cosine",
    decay_proportion: Ratio = 0.15,
    min_lr_ratio: PositiveRatio = 0.1,
    start_lr: StartLr = 0.0,
) -> float:
    """Return the warm-up, then a cooldown from 1 to ``constant_lr_ratio``, then a constant, then over the last
    ``decay_proportion`` of the run an exponential decay to ``min_lr_ratio`` at the last step.

    A run can be resumed with more steps or other data from any point of the constant part, without warming up again; with
    ``cooldown_steps`` the steps before the decay do not depend on the length of the run. Sources: Ibrahim et al. 2024
    (arXiv:2403.08763), Singh et al. 2025 (arXiv:2503.02844).

    Args:
        constant_lr_ratio: Learning rate of the constant part as a share of the peak.
        cooldown_proportion: Share of the run's steps in the cooldown after the warm-up.
        cooldown_steps: Number of steps in the cooldown, instead of cooldown_proportion; null: use the share.
        cooldown: Shape of the cooldown: cosine · inverse_sqrt.
        decay_proportion: Share of the run's steps in the final decay; 0: none, to continue the run later.
        min_lr_ratio: Learning rate of the last step as a share of the peak.
        start_lr: Learning rate from which the warm-up starts, such as the last one of the base model.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps, start_lr / peak_lr)
    if min_lr_ratio > constant_lr_ratio:
        raise UserError(
            f"scheduler.min_lr_ratio={min_lr_ratio}: above scheduler.constant_lr_ratio={constant_lr_ratio}, from which "
            "the learning rate decays"
        )
    first = decay_from(total_steps, warmup_steps, decay_proportion)
    length = cooldown_steps or round(total_steps * cooldown_proportion)
    last = min(step, first)
    passed = min(1.0, (last - warmup_steps) / length) if length else float(last > warmup_steps)
    level = 1 - (1 - constant_lr_ratio) * fallen(cooldown, passed)
    if step <= first or first >= total_steps:
        return level
    return level * (min_lr_ratio / level) ** decayed(step, total_steps, first)


def decay_from(total_steps: int, warmup_steps: int, decay_proportion: float) -> int:
    """Return the first step (0-based) of the decay of ``wsd`` and ``infinite``; that step is still at the level before it."""
    return max(warmup_steps, total_steps - round(total_steps * decay_proportion))
