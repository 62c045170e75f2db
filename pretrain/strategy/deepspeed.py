"""DeepSpeed's ZeRO: gradients, moments and weights are sharded, depending on the stage. Schedule, accumulation and
checkpoints are this program's own.

Stage 0 shards nothing and equals DDP. From stage 1 on, 16-bit precisions keep the module's parameters in 16 bits and fp32
weights in the optimizer's shards: DeepSpeed's own mixed precision replaces autocast.
Source: https://www.deepspeed.ai/docs/config-json/
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.strategy.base import StepConfig, Strategy

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.topology import Topology
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.engine import Engine

OWNERS = {  # the keys of this program that determine a key of DeepSpeed's config
    "train_batch_size": "batch_size, gradient_accumulation_steps and the number of processes",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "grad_clip",
    "optimizer": "the optimizer group",
    "scheduler": "the scheduler group",
    "zero_optimization.stage": "strategy.zero_stage",
    "zero_optimization.offload_optimizer.device": "strategy.offload_optimizer",
    "zero_optimization.offload_param.device": "strategy.offload_parameters",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "bfloat16": "precision",
    "torch_autocast": "precision",
    # These write files or send records to a place that a config file must not choose.
    "tensorboard": "sink=[…,tensorboard]",
    "wandb": "sink=[…,wandb]",
    "csv_monitor": "sink=[…,csv]",
    "comet": "the sink group",
    "flops_profiler.output_file": "stdout",
    "autotuning": "batch_size=auto",
    "data_efficiency": "the dataset group",
}
COMPILED = {  # features for which DeepSpeed compiles C++ or CUDA at their first use
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zenflow",
    "zero_optimization.offload_optimizer.super_offload",
    "hybrid_engine.enabled",
    "compile.deepcompile",
}
ROOT_KEYS = set(  # the keys of DeepSpeed 0.19's config; it silently ignores any other
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile csv_monitor data_efficiency data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor hybrid_engine log_level
    managed_gradient_accumulation memory_breakdown optimizer pipeline prescale_gradients scheduler
    seq_parallel_communication_data_type steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
    """.split()
)


@dataclass(frozen=True)
class Deepspeed(Strategy):
    """DeepSpeed's ZeRO.

    Attributes:
        zero_stage: What is sharded: 0 nothing · 1 moments and fp32 weights · 2 also gradients · 3 all weights.
        offload_optimizer: true: keep moments and fp32 weights, and run the update, on the host; stages 1 to 3.
        offload_parameters: true: keep the weight shards on the host; stage 3.
        config: Other keys of DeepSpeed's config, https://www.deepspeed.ai/docs/config-json/
        state_dict_type: How the final model is written: full (by rank 0) · sharded (one file per rank).
    """

    independent_forward = False

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    state_dict_type: Literal["full", "sharded"] = "full"

    def check(self, step: StepConfig, topology: Topology) -> None:
        if find_spec("deepspeed") is None:
            raise UserError("strategy=deepspeed needs the package deepspeed: pip install 'pretrain[deepspeed]'")
        if self.offload_optimizer and self.zero_stage == 0:
            raise UserError(
                "strategy.offload_optimizer=true with strategy.zero_stage=0: only stages 1, 2 and 3 support it"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise UserError(
                f"strategy.offload_parameters=true with strategy.zero_stage={self.zero_stage}: only stage 3 supports it"
            )
        precision = step.precision
        if precision.weights != "float32":
            raise UserError(
                f"strategy=deepspeed with precision={precision.name}: ZeRO updates fp32 weights; use bf16-mixed"
            )
        if precision.compute == "float16" and topology.device_type == "cpu" and self.zero_stage > 0:
            raise UserError(
                f"strategy.zero_stage={self.zero_stage} with precision={precision.name}: ZeRO does not support fp16 on a CPU; "
                "use bf16-mixed or 32-true"
            )
        self.ds_config(step, topology)

    def ds_config(self, step: StepConfig, topology: Topology) -> dict[str, Any]:
        """Return DeepSpeed's config: the values that the run sets, those that ``config`` adds, and defaults for the rest.

        Raises ``UserError`` if ``config`` contradicts the run or has a key that DeepSpeed does not have.
        """
        for key in self.config:
            if key not in ROOT_KEYS:
                raise UserError(f"strategy.config.{key}: DeepSpeed has no such key{did_you_mean(key, ROOT_KEYS)}")
        zero: dict[str, Any] = {"stage": self.zero_stage}
        for name, wanted in (("optimizer", self.offload_optimizer), ("param", self.offload_parameters)):
            zero[f"offload_{name}"] = {"device": "cpu" if wanted else "none"}
        sharded = self.zero_stage > 0
        decided = {
            "train_batch_size": step.batch_size * step.accumulation * topology.world_size,
            "train_micro_batch_size_per_gpu": step.batch_size,
            "gradient_accumulation_steps": step.accumulation,
            "gradient_clipping": (step.grad_clip or 0.0) if sharded else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on the host, without a compiler
            "bf16": {"enabled": sharded and step.precision.compute == "bfloat16"},
            "fp16": {"enabled": sharded and step.precision.compute == "float16"},
        }
        pinned = {"pin_memory": topology.device_type == "cuda"}
        defaults = {
            "zero_optimization": {"offload_optimizer": pinned, "offload_param": pinned},
            "communication_data_type": "fp32",  # gradients are summed over ranks and micro-batches in fp32
            "data_types": {"grad_accum_dtype": "fp32"},
            "fp16": {"loss_scale_window": 2000, "hysteresis": 1},  # the defaults of torch's GradScaler
        }
        return merge(defaults, checked_config(decided, self.config))

    def memory_saving_overrides(self, step: StepConfig, topology: Topology) -> list[str]:
        ways = ["strategy.zero_stage=3"] if self.zero_stage < 3 and topology.world_size > 1 else []
        if topology.device_type == "cuda" and self.zero_stage > 0 and not self.offload_optimizer:
            ways.append("strategy.offload_optimizer=true")
        if topology.device_type == "cuda" and self.zero_stage == 3 and not self.offload_parameters:
            ways.append("strategy.offload_parameters=true")
        return ways

    def setup(
        self,
        model: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        step: StepConfig,
        world: DistributedContext,
    ) -> Engine:
        if self.zero_stage == 3 and getattr(model.spec, "gradient_checkpointing", False) == "selective":
            raise UserError(
                "strategy.zero_stage=3 with model.gradient_checkpointing=selective: stage 3 gathers weights inside of what is "
                "recomputed, which torch's selective policy can't follow; use true or N, or strategy=fsdp"
            )
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
        if world.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        from pretrain.strategy.deepspeed_engine import DeepspeedEngine, ReplicatedEngine

        engine = DeepspeedEngine if self.zero_stage > 0 else ReplicatedEngine
        return engine.build(
            self.compilable(model),
            optimizer,
            config=self.ds_config(step, world.topology),
            precision=step.precision,
            grad_clip=step.grad_clip,
            world=world,
            sharded_export=self.state_dict_type == "sharded",
        )

    def compilable(self, model: ModelFactory) -> ModelFactory:
        """Return ``model``, not compiled with stage 3: DeepSpeed gathers weights in hooks of every layer, each of which ends a
        graph, and the pieces are compiled again and again."""
        if self.zero_stage < 3 or not model.spec.compile:
            return model
        notice(
            f"model.compile={str(model.spec.compile).lower()}: not with strategy.zero_stage=3; this run is not compiled"
        )
        return replace(model, spec=replace(model.spec, compile=False))


def checked_config(
    decided: Mapping[str, Any], given: Mapping[str, Any], path: str = "strategy.config."
) -> dict[str, Any]:
    """Return ``decided`` with what ``given`` adds to it; the value "auto" stands for the value that the run sets.

    Raises ``UserError`` if ``given`` has another value than the run, or a feature that must be compiled.
    """
    result = dict(decided)
    for key, value in given.items():
        name, ours = f"{path}{key}", decided.get(key, value)
        short = name.removeprefix("strategy.config.")
        owner = OWNERS.get(short)
        if value == "auto":
            continue
        if short in COMPILED and value:
            raise UserError(f"{name}: not supported, because DeepSpeed compiles code for it at its first use")
        if isinstance(ours, Mapping) and isinstance(value, Mapping) and owner is None:
            result[key] = checked_config(decided.get(key, {}), value, f"{name}.")
        elif owner is not None and key not in decided:
            raise UserError(f"{name}: use {owner} instead")
        elif ours != value:
            raise UserError(f"{name}={json.dumps(value)}: the run sets it to {json.dumps(ours)} ({owner or 'always'})")
        else:
            result[key] = value
    return result


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` updated with ``top``; mappings are merged recursively."""
    merged = {
        key: merge(base[key], value) if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) else value
        for key, value in top.items()
    }
    return {**base, **merged}
