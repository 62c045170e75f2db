"""ZeRO's memory, estimated from its settings: DeepSpeed's engine can't run on fake tensors.

Sources: Rajbhandari et al. 2020 (arXiv:1910.02054), table 1, for what each stage shards; DeepSpeed 0.19's defaults for the
sizes of its buffers (https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pretrain.distributed.topology import Topology
from pretrain.plan.memory import Kinds, StepMemory

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig

BUCKET = 500_000_000  # elements of reduce_bucket_size and allgather_bucket_size
LIVE = 1_000_000_000  # elements of stage3_max_live_parameters


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
    """The memory of a step of which the static part is replaced by ``static``. ``sent`` is what a step gathers and reduces."""

    static: Kinds = field(default_factory=dict)
    sent: Kinds = field(default_factory=dict)
    accumulates: bool = False

    def phase(self, name: str, rows: int) -> Kinds:
        kinds = super().phase(name, rows) | self.static | self.fixed
        if name in ("forward", "loss") and not self.accumulates:
            kinds["gradients"] = 0.0  # the first micro-batch of a step has none yet
        return kinds

    def between_steps(self) -> Kinds:
        return super().between_steps() | self.static | {"gradients": 0.0}

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
    strategy: Any = config.strategy
    ranks, stage = topology.world_size, strategy.zero_stage
    size = 4 if config.precision.compute == "float32" else 2
    shard = trained / ranks
    bucket = min(BUCKET, trained) * size
    if stage == 0:
        static = {"weights": 4.0 * trained, "gradients": 4.0 * trained, "moments": 8.0 * trained, "buffers": bucket}
    elif stage < 3:
        gradients = 4.0 * (shard if stage == 2 else trained)
        static = {
            "weights": size * trained + 4 * shard,
            "gradients": gradients,
            "moments": 8 * shard,
            "buffers": 2.0 * bucket,
        }
    else:
        live = min(LIVE, trained) * size
        static = {"weights": (size + 4) * shard, "gradients": 4 * shard, "moments": 8 * shard, "buffers": live + bucket}
    accumulates = config.gradient_accumulation_steps > 1
    sent = sent_in_a_step(config, trained)
    return _Zero(memory.layers, memory.corners, memory.fixed, {"casts": 0.0} | static, sent, accumulates)


def saved_by_zero(config: RunConfig, trained: int, topology: Topology) -> Kinds | None:
    """Return what each process writes to a checkpoint where ZeRO shards it: fp32 weights and two moments, in equal parts."""
    if not is_estimated(config) or not getattr(config.strategy, "zero_stage", None):
        return None
    return {"weights": 4.0 * trained / topology.world_size, "moments": 8.0 * trained / topology.world_size}
