"""The learning rate of a run: its peak where the config leaves it open, and what a longer run does to it.

Plain values in and out; nothing that a config names is called but the schedules of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pretrain.optim import schedule

AUTO = "auto"
# Peak by number of parameters, below each limit: roughly those of GPT-3 (Brown et al. 2020, arXiv:2005.14165, table 2.1:
# 350M 3e-4, 1.3B 2e-4, 6.7B 1.2e-4, 175B 6e-5), to which a model is warmed up again (Gupta et al. 2023, arXiv:2308.04014;
# Ibrahim et al. 2024, arXiv:2403.08763). Below 350M they are 6e-4, but the higher the peak, the more is forgotten: a model of
# 135M was better at 3e-4 than at 1e-3 on new text and on old. The first row is that of the shipped sample.
PEAKS = ((30e6, 1e-3), (1e9, 3e-4), (5e9, 2e-4), (20e9, 1.2e-4), (math.inf, 6e-5))
SCHEDULES: dict[str, Callable[..., float]] = {
    f"{function.__module__}.{function.__name__}": function
    for function in (schedule.constant, schedule.linear, schedule.cosine, schedule.wsd)
}
NOTICED = 0.1  # the least relative change that is worth a line


def peak_lr(parameters: int) -> float:
    """The peak for a model of so many parameters."""
    return next(peak for limit, peak in PEAKS if parameters < limit)


def with_lr(config: dict[str, Any], lr: float) -> dict[str, Any]:
    """``config`` with ``lr`` in the place of ``auto``, the optimizer's that follows it too."""
    if config["lr"] != AUTO:
        return config
    optimizer = config.get("optimizer")
    if isinstance(optimizer, dict) and optimizer.get("lr") == AUTO:
        optimizer = optimizer | {"lr": lr}
    return config | {"lr": lr, "optimizer": optimizer}


def warmup_steps(total_steps: int, proportion: float) -> int:
    """How many of a run's steps warm up."""
    return round(total_steps * proportion)


def rate(config: Mapping[str, Any], *, total_steps: int, step: int) -> float | None:
    """The learning rate of the update ``step`` (0-based) by a run's config; ``None`` where its schedule is not one of ours or
    the config holds something else than it should."""
    try:
        node = config["scheduler"]
        options = {key: value for key, value in node.items() if not key.startswith("_")}
        warm = warmup_steps(total_steps, config["warmup_proportion"])
        scale = SCHEDULES[node["_target_"]](step, total_steps=total_steps, warmup_steps=warm, **options)
        return float(config["lr"] * scale)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def stable_until(config: Mapping[str, Any], total_steps: int) -> int | None:
    """The last step up to which a run with ``wsd`` is at its peak; ``None`` for another schedule."""
    try:
        node, warm = config["scheduler"], warmup_steps(total_steps, config["warmup_proportion"])
        if SCHEDULES[node["_target_"]] is not schedule.wsd:
            return None
        return schedule.wsd_decay_from(total_steps, warm, node.get("decay_proportion", 0.2))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def change(
    old: Mapping[str, Any], old_steps: int, new: Mapping[str, Any], new_steps: int, *, step: int
) -> tuple[float, float] | None:
    """The learning rates of the last step that was made and of the next one, where a run that is continued at ``step`` with
    another length, peak or schedule leaves its curve; ``None`` where it does not."""
    before = rate(old, total_steps=old_steps, step=step - 1)
    planned = rate(old, total_steps=old_steps, step=step)
    after = rate(new, total_steps=new_steps, step=step)
    if before is None or planned is None or after is None or planned == after:
        return None
    return (before, after) if abs(after - before) > NOTICED * max(before, after) else None
