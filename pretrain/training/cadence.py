"""The intervals in steps at which a run evaluates and saves, and notices where they differ from what its keys suggest."""

from __future__ import annotations

import math
from dataclasses import dataclass

LONG_STEPS = 100  # the default of save_every: a longer run without a checkpoint before its end gets a notice


@dataclass(frozen=True)
class Cadence:
    """The intervals in steps (``None``: only at the end). ``notices`` are shown to the user once per run."""

    evaluate_every: int | None
    save_every: int | None
    notices: tuple[str, ...] = ()


def cadence(
    *,
    steps: int,
    epoch_steps: int,
    evaluate_every: int | None,
    save_every: int | None,
    per_epoch: int | None = None,
    with_evaluation: bool = False,
    keep_every: int | None = None,
) -> Cadence:
    """Derive the intervals. ``steps`` is the length of the run and ``epoch_steps`` that of an epoch; the other arguments are
    the values of the keys of these names. A run that is to save with its evaluations but has none before its end saves
    every ``save_every`` steps."""
    notices = []
    if per_epoch:
        evaluate_every = max(1, epoch_steps // per_epoch)
        if per_epoch > epoch_steps:
            notices.append(
                f"evaluation.per_epoch={per_epoch}: an epoch has {epoch_steps} steps; the run evaluates after each of them"
            )
    saves, key = save_every, f"save_every={save_every}"
    if with_evaluation:
        key = f"checkpoint.with_evaluation=true, evaluate_every={evaluate_every or 'null'}"
        if _none_before(evaluate_every, steps) and save_every is not None:
            notices.append(
                f"{key}: no evaluation comes before the end of {steps} steps; the run saves every {save_every} (save_every)"
            )
        else:
            saves = evaluate_every
    asked_for_none = save_every is None and evaluate_every is None
    if _none_before(saves, steps) and steps > LONG_STEPS and not asked_for_none and saves is not None:
        notices.append(
            f"{key}: no checkpoint comes before the end of {steps} steps; a run that dies restarts at step 0"
        )
    if keep_every and saves and not _none_before(saves, steps) and math.lcm(saves, keep_every) > steps:
        notices.append(
            f"checkpoint.keep_every={keep_every}: keeps none, because checkpoints come every {saves} steps and no step "
            f"up to {steps} is a multiple of both"
        )
    return Cadence(evaluate_every, saves, tuple(notices))


def _none_before(every: int | None, steps: int) -> bool:
    """Return whether nothing is due before the last step."""
    return every is None or every >= steps
