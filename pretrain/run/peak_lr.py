"""The peak learning rate of a run with ``lr=auto``, and a notice where a resumed run departs from its schedule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.store import read_state
from pretrain.optim.learning_rate import AUTO, change, peak_lr, stable_until
from pretrain.run.leftovers import read_config, run_of
from pretrain.runtime.console import notice
from pretrain.telemetry.run_file import read_run_file

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


def chosen_lr(config: RunConfig, resume_from: Path | None, parameters: Callable[[], int]) -> float:
    """Return the peak learning rate: the config's, else that of the resumed run, else the optimizer's for a model of this many
    ``parameters``."""
    if config.lr != AUTO:
        return float(config.lr)
    earlier = read_config(resume_from).get("lr") if resume_from is not None else None
    if isinstance(earlier, int | float) and earlier > 0:
        return float(earlier)
    return getattr(config.optimizer, "peak_lr", peak_lr)(parameters())  # a plain function has no rate of its own


def report_lr_change(checkpoint: Path, config: RunConfig, steps: int) -> None:
    """Report a jump of the learning rate where the resumed run has another length, peak or schedule than before."""
    old, run = read_config(checkpoint), run_of(checkpoint)
    step = int(read_state(checkpoint)["progress"]["step"])
    planned = read_run_file(run).get("total_steps")
    if not isinstance(planned, int) or planned < 1 or step < 1:
        return
    found = change(old, planned, config.plain, steps, step=step)
    if found is None:
        return
    better = ""
    if steps > planned and found[1] > found[0]:
        better = (
            f": the schedule was made for {planned} steps and is now for {steps}. Better: a new run that warms up again, "
            f"model_name={run} output_dir=...; or {_before_decay(old, planned, run)} (docs/runs.md)"
        )
    verb = "jumps" if found[1] > found[0] else "drops"
    notice(f"the learning rate {verb} from {found[0]:.3g} to {found[1]:.3g} at step {step + 1}{better}")


def report_lr(asked: Any, lr: float, *, continued: bool) -> None:
    """Report the learning rate that ``lr=auto`` stands for."""
    if asked == AUTO:
        why = "as in this run so far" if continued else "by the model's size; docs/runs.md"
        notice(f"lr=auto: {lr:g} ({why})")


def _before_decay(old: dict[Any, Any], planned: int, run: Path) -> str:
    """Return the advice how a run whose schedule has a constant part, this one or the next, is extended without a jump."""
    first = stable_until(old, planned)
    if first is None:
        return "scheduler=wsd or infinite from the start, which can be extended from a checkpoint before its decay"
    return f"resume={run}/checkpoints/step-... of at most step {first}, before its decay"
