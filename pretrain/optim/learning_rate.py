"""The learning rate of a run: the peak that ``lr=auto`` stands for, and the comparison of two runs' schedules.

The functions take and return plain values. Of the functions that a config names, only the schedules of this package are
called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from pretrain.optim import schedule

AUTO = "auto"
# (number of parameters, peak learning rate of models below it). The peaks are roughly those of GPT-3 (Brown et al. 2020,
# arXiv:2005.14165, table 2.1: 350M 3e-4, 1.3B 2e-4, 6.7B 1.2e-4, 175B 6e-5), to which continual pretraining warms a model up
# again (Gupta et al. 2023, arXiv:2308.04014; Ibrahim et al. 2024, arXiv:2403.08763). Below 350M, GPT-3 used 6e-4, but a higher
# peak causes more forgetting: a model of 135M was better at 3e-4 than at 1e-3 on both new and old text. The first row is the
# shipped sample's.
PEAKS = ((30e6, 1e-3), (1e9, 3e-4), (5e9, 2e-4), (20e9, 1.2e-4), (math.inf, 6e-5))
SCHEDULES: dict[str, Callable[..., float]] = {
    f"{function.__module__}.{function.__name__}": function
    for function in (
        *(schedule.constant, schedule.linear, schedule.cosine, schedule.inverse_sqrt),
        *(schedule.wsd, schedule.infinite),
    )
}
NOTICED = 0.1  # the smallest relative change that is reported


def peak_lr(parameters: int) -> float:
    """Return the peak learning rate for a model with this number of parameters."""
    return next(peak for limit, peak in PEAKS if parameters < limit)


def with_lr(config: dict[str, Any], lr: float) -> dict[str, Any]:
    """Return ``config`` with ``auto`` replaced by ``lr``, also in the optimizer's settings that refer to it: those whose name
    ends in ``lr``, at any depth."""
    if config["lr"] != AUTO:
        return config
    return config | {"lr": lr, "optimizer": _with_lr(config.get("optimizer"), lr)}


def _with_lr(node: Any, lr: float) -> Any:
    if isinstance(node, list):
        return [_with_lr(item, lr) for item in node]
    if not isinstance(node, dict):
        return node
    return {k: lr if v == AUTO and str(k).endswith("lr") else _with_lr(v, lr) for k, v in node.items()}


def warmup_steps(total_steps: int, proportion: float) -> int:
    """Return the number of warm-up steps."""
    return round(total_steps * proportion)


def rate(config: Mapping[str, Any], *, total_steps: int, step: int) -> float | None:
    """Return the learning rate of update ``step`` (0-based) under a run's config. Return ``None`` when its schedule is not one
    of this package or when the config is malformed."""
    try:
        node = config["scheduler"]
        options = {key: value for key, value in node.items() if not key.startswith("_")} | {"peak_lr": config["lr"]}
        warm = warmup_steps(total_steps, config["warmup_proportion"])
        scale = SCHEDULES[node["_target_"]](step, total_steps=total_steps, warmup_steps=warm, **options)
        return float(config["lr"] * scale)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def stable_until(config: Mapping[str, Any], total_steps: int) -> int | None:
    """Return the last step before the decay of a run with schedule ``wsd`` or ``infinite``, up to which it can be extended
    without a jump; ``None`` for any other schedule."""
    try:
        node, warm = config["scheduler"], warmup_steps(total_steps, config["warmup_proportion"])
        function = SCHEDULES[node["_target_"]]
        if function not in (schedule.wsd, schedule.infinite):
            return None
        default = signature(function).parameters["decay_proportion"].default
        return schedule.decay_from(total_steps, warm, node.get("decay_proportion", default))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def change(
    old: Mapping[str, Any], old_steps: int, new: Mapping[str, Any], new_steps: int, *, step: int
) -> tuple[float, float] | None:
    """Return the learning rates of the last completed step and of the next one if resuming at ``step`` with another length,
    peak or schedule makes the learning rate jump; ``None`` if it does not."""
    before = rate(old, total_steps=old_steps, step=step - 1)
    planned = rate(old, total_steps=old_steps, step=step)
    after = rate(new, total_steps=new_steps, step=step)
    if before is None or planned is None or after is None or planned == after:
        return None
    return (before, after) if abs(after - before) > NOTICED * max(before, after) else None
