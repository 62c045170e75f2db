"""ZeRO's memory, estimated from its settings: DeepSpeed's engine can't run on fake tensors.

Sources: Rajbhandari et al. 2020 (arXiv:1910.02054), table 1, for what each stage shards; DeepSpeed 0.19's defaults for the
sizes of its buffers (https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pretrain.distributed.topology import Topology
from pretrain.plan.memory import Kinds, StepMemory
from pretrain.plan.trace import PHASES

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig

REDUCE_BUCKET = 500_000_000  # elements of reduce_bucket_size, of which a run takes no more than the model has
LIVE = 1_000_000_000  # elements of stage3_max_live_parameters

BETWEEN = "between steps"
BACKWARD, END = PHASES[2:4]


def is_estimated(config: RunConfig) -> bool:
    """Return whether the strategy is DeepSpeed's."""
    return config.strategy.name == "deepspeed"


def as_traced(config: RunConfig, topology: Topology) -> tuple[RunConfig, Topology]:
    """Return config and topology of the step that is traced: for ZeRO that of one process, in the dtype of ZeRO's weights."""
    if not is_estimated(config):
        return config, topology
    from pretrain.strategy.single import Single

    precision, strategy = config.precision, Single()
    if getattr(config.strategy, "zero_stage", 0) and precision.compute != "float32":
        precision = replace(precision, weights="bfloat16", compute="bfloat16")
    return replace(config, strategy=strategy, precision=precision), Topology(topology.device_type)


@dataclass(frozen=True)
class _Zero(StepMemory):
    """The memory of a step of which the static part is replaced by ``static``, by phase. ``sent`` is what a step gathers and
    reduces."""

    static: dict[str, Kinds] = field(default_factory=dict)
    sent: Kinds = field(default_factory=dict)

    def phase(self, name: str, rows: int) -> Kinds:
        return super().phase(name, rows) | {"casts": 0.0} | self.static[name] | self.fixed

    def between_steps(self) -> Kinds:
        return super().between_steps() | self.static[BETWEEN]

    def communicated(self) -> Kinds:
        return self.sent


def sent_in_a_step(config: RunConfig, trained: int) -> Kinds:
    """Return the bytes that a process gathers and reduces in a step. Gradients are reduced in fp32 (`ds_config`), from stage 2 on
    for every micro-batch. The weights are gathered once after the update, at stage 3 for every forward and every backward."""
    strategy: Any = config.strategy
    stage, size = strategy.zero_stage, 4 if config.precision.compute == "float32" else 2
    micro_batches = config.gradient_accumulation_steps
    gathered = {0: 0, 1: 1, 2: 1, 3: 2 * micro_batches}[stage] * float(size * trained)
    return {"gathered": gathered, "reduced": 4.0 * trained * (micro_batches if stage > 1 else 1)}


def estimated(config: RunConfig, memory: StepMemory, trained: int, topology: Topology) -> StepMemory:
    """Return the memory of ZeRO for a model with ``trained`` parameters, of which ``memory`` is that of one process."""
    static, sent = _static(config, trained, topology.world_size), sent_in_a_step(config, trained)
    return _Zero(memory.layers, memory.corners, memory.fixed, static, sent)


def _static(config: RunConfig, trained: int, ranks: int) -> dict[str, Kinds]:
    """Return what does not depend on the number of sequences, by phase of a step.

    With N parameters, S = N / ranks and 16-bit weights, the optimizers of DeepSpeed hold

    - stage 1 (``BF16_Optimizer``): weights, 4 S of fp32 weights, 8 S of moments, and always 4 N of fp32 gradients
    - stage 1 in fp32, and stage 2: the same without these gradients, but in the backward a bucket of gradients, which is copied
      to fp32 for the reduction, and at its end 4 S of fp32 gradients
    - stage 3: shards of all of them, always a bucket in fp32, and in forward and backward the gathered weights
    """
    strategy: Any = config.strategy
    stage, size = strategy.zero_stage, 4 if config.precision.compute == "float32" else 2
    n, s = trained, trained / ranks
    given = strategy.config.get("zero_optimization", {}).get("reduce_bucket_size")
    bucket = float(given if isinstance(given, int) else min(REDUCE_BUCKET, n))
    accumulated = 4 * s if config.gradient_accumulation_steps > 1 else 0.0
    keeps: Kinds = {"weights": size * n + 4 * s, "moments": 8 * s, "gradients": accumulated, "buffers": 0.0}
    if stage == 0:
        keeps |= {"weights": 4.0 * n, "moments": 8.0 * n, "gradients": 4.0 * n, "buffers": 4 * bucket}
    elif stage == 1 and size == 2:
        keeps |= {"gradients": 4.0 * n}
    elif stage == 3:
        live = float(min(LIVE, n) * size)
        keeps |= {"weights": (size + 4) * s, "gradients": 4 * s, "buffers": live + 4 * bucket}
    phases = dict.fromkeys(PHASES, keeps)
    if stage in (1, 2):
        full = stage == 1 and size == 2
        reduced = {"gradients": 4.0 * n if full else 4 * s}
        phases[BACKWARD] = keeps | ({} if full else {"buffers": size * bucket})
        phases[END] = keeps | reduced | {"buffers": 4 * bucket + (0 if full or size == 4 else size * bucket)}
        phases["update"] = keeps | reduced
    phases[BETWEEN] = (
        keeps | ({"buffers": 4 * bucket} if stage == 3 else {}) | ({"gradients": 0.0} if stage in (0, 2) else {})
    )
    return phases


def saved_by_zero(config: RunConfig, trained: int, topology: Topology) -> Kinds | None:
    """Return what each process writes to a checkpoint where ZeRO shards it: fp32 weights and two moments, in equal parts."""
    if not is_estimated(config) or not getattr(config.strategy, "zero_stage", None):
        return None
    return {"weights": 4.0 * trained / topology.world_size, "moments": 8.0 * trained / topology.world_size}
