"""The error message for a device that is out of memory: how much was needed, where, and which settings need less.

The user has to change a setting, so it is a ``UserError``: one line, exit code 2, and no restart of the workers.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

from pretrain.plan.advice import expectation, other_settings
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    import torch

    from pretrain.config.schema import RunConfig
    from pretrain.runtime.out_of_memory import OutOfMemory
    from pretrain.training.micro_batching import MicroBatching


def explained(
    failure: OutOfMemory,
    config: RunConfig,
    *,
    split: MicroBatching,
    memory_saving_overrides: list[str],
    device: torch.device,
    step: int,
    plan: dict[str, Any] | None = None,
) -> UserError:
    """Return the failure as one line, with the settings that would need less memory in this config.

    Args:
        failure: The failed allocation, and what the run was doing.
        config: The config of the run.
        split: How the global batch is split into micro-batches.
        memory_saving_overrides: The settings of the strategy that need less memory.
        device: The device that is out of memory.
        step: Optimizer steps done so far.
        plan: The record of the run's plan, if it has one.
    """
    length = f"sequence_length={config.sequence_length}"
    evaluation_size = config.evaluation.batch_size
    evaluation_size = split.batch_size if evaluation_size == "auto" else evaluation_size
    where = {
        "setup": "while the model was being built",
        "step": f"at step {step + 1} with batch_size={split.batch_size} × {length}",
        "evaluation": f"in the evaluation after step {step} with evaluation.batch_size={evaluation_size} × {length}",
        "run": f"after step {step}",
    }[failure.doing]
    advice = {"step": smaller_step(split), "evaluation": smaller_evaluation(evaluation_size)}.get(failure.doing, [])
    more = [
        *(other_settings(config, is_gpu=device.type == "cuda") if failure.doing in ("step", "run") else ()),
        *memory_saving_overrides,
    ]
    if failure.doing == "step" and split.batch_size == 1:
        more.append("a shorter sequence_length (another run)")
    if more:
        advice.append(f"{'less is needed' if not advice else 'less still'} with {', '.join(more)}")
    if step:
        advice.append("the run resumes from its last checkpoint")
    expected = [] if plan is None else [f"the plan {expectation(plan)}"]
    return UserError(f"out of memory {where} on {device}: {'; '.join([str(failure), *expected, *advice])}")


def smaller_step(split: MicroBatching) -> list[str]:
    """Return the setting that splits the same global batch into smaller micro-batches; nothing at batch size 1."""
    if split.batch_size == 1:
        return []
    smaller = split.smaller()
    return [
        f"batch_size={smaller.batch_size} gradient_accumulation_steps={smaller.accumulation} keeps the global batch with about "
        f"{Fraction(smaller.batch_size, split.batch_size)} of the activations"
    ]


def smaller_evaluation(evaluation_size: int) -> list[str]:
    """Return the setting that halves the evaluation's batch of ``evaluation_size`` sequences; nothing at batch size 1."""
    return [f"evaluation.batch_size={evaluation_size // 2} gives the same scores"] if evaluation_size > 1 else []
