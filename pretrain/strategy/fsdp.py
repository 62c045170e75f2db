"""FSDP2 (``fully_shard``): parameters, gradients and moments are sharded, and parameters are gathered block by block.

No rank ever holds the full model: parameters are created on the meta device, and every rank reads its own rows of the
weight files. Only random weights, and files that transformers has to convert, are built in full on rank 0 and broadcast.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.strategy.base import StepConfig, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.topology import Topology
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.engine import Engine, InferenceEngine
    from pretrain.strategy.precision import Precision

BLOCKS = {"gpt2": "GPT2Block", "llama": "LlamaDecoderLayer"}  # short names of the original design


@dataclass(frozen=True)
class Fsdp(Strategy):
    """torch's FSDP2. By ``sharding_strategy``:

    - FULL_SHARD: parameters are freed after each block's forward and gathered again for its backward.
    - SHARD_GRAD_OP: parameters stay gathered from forward to backward.
    - HYBRID_SHARD: FULL_SHARD inside each of ``replicas`` groups of ranks, replicated across the groups.
    - NO_SHARD: every rank holds a full copy, as in ddp.

    Attributes:
        auto_wrap_policy: Modules gathered at a time: auto (the model's blocks) · gpt2 · llama · a class name.
        sharding_strategy: FULL_SHARD · SHARD_GRAD_OP · HYBRID_SHARD · NO_SHARD (docs/strategies.md).
        replicas: HYBRID_SHARD: replicas of the model, each sharded over its group of ranks; null: one per node, at
            least 2.
        cpu_offload: true: keep shards and optimizer state in host memory; slow.
        prefetch: Blocks that are gathered ahead, for slow links; each needs the memory of its weights; 0: torch's own choice.
        reshard_root: false: embeddings and head stay gathered from forward to backward.
        reduce_dtype: Dtype in which gradients are exchanged: float32 · bfloat16 (half the traffic, rounded sums).
        accumulate_unsharded: true: only the last micro-batch reduces gradients; each rank then holds all of them.
        state_dict_type: How the final model is written: full (by rank 0) · sharded (one file per rank).
    """

    independent_forward = False

    auto_wrap_policy: str = "auto"
    sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"] = "FULL_SHARD"
    replicas: PositiveInt | None = None
    cpu_offload: bool = False
    prefetch: NonNegativeInt = 0
    reshard_root: bool = True
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    accumulate_unsharded: bool = False
    state_dict_type: Literal["full", "sharded"] = "full"

    def check(self, step: StepConfig, topology: Topology) -> None:
        hybrid = self.sharding_strategy == "HYBRID_SHARD"
        if self.replicas is not None and not hybrid:
            raise UserError(
                f"strategy.replicas={self.replicas} with strategy.sharding_strategy={self.sharding_strategy}: only "
                "HYBRID_SHARD has replicas"
            )
        if self.cpu_offload and topology.device_type == "cuda" and step.precision.compute == "float16":
            raise UserError(
                f"strategy.cpu_offload=true with precision={step.precision.name}: torch's loss scaler does not wait for "
                "what it copies from the GPU to the gradients on the host; use bf16-mixed, or strategy=deepspeed "
                "strategy.offload_optimizer=true"
            )
        replicas = self.replicas or max(topology.nodes, 2)
        if hybrid and (topology.world_size % replicas or topology.world_size // replicas < 2):
            raise UserError(
                f"strategy.sharding_strategy=HYBRID_SHARD with strategy.replicas={replicas}: {topology.world_size} processes "
                f"can't be split into {replicas} equal groups of at least 2; change devices or strategy.replicas"
            )

    def memory_saving_overrides(self, step: StepConfig, topology: Topology) -> list[str]:
        ways = []
        if topology.world_size > 1 and self.sharding_strategy != "FULL_SHARD":
            ways.append("strategy.sharding_strategy=FULL_SHARD")
        if topology.world_size > 1 and self.accumulate_unsharded:
            ways.append("strategy.accumulate_unsharded=false")
        if topology.device_type == "cuda" and not self.cpu_offload and step.precision.compute != "float16":
            ways.append("strategy.cpu_offload=true")
        return ways

    def setup(
        self,
        model: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        step: StepConfig,
        world: DistributedContext,
    ) -> Engine:
        from pretrain.strategy.fsdp_engine import FsdpEngine

        built, unsharded = self.sharded(model, step, world)
        return FsdpEngine(
            built,
            optimizer(built),
            precision=step.precision,
            grad_clip=step.grad_clip,
            world=world,
            replicas=world.size,
            exchange_always=not self.accumulate_unsharded,
            sharded_export=self.state_dict_type == "sharded",
            unsharded=unsharded,
        )

    def reference(
        self, model: ModelFactory, step: StepConfig, world: DistributedContext, *, offload: bool = False
    ) -> InferenceEngine:
        from pretrain.strategy.fsdp_engine import FsdpInferenceEngine

        built, _ = replace(self, cpu_offload=self.cpu_offload or offload).sharded(model, step, world)
        return FsdpInferenceEngine(built, precision=step.precision, world=world)

    def sharded(
        self, model: ModelFactory, step: StepConfig, world: DistributedContext
    ) -> tuple[LanguageModel, list[nn.Parameter]]:
        """Return the sharded model with its weights, and the parameters that every rank holds in full."""
        import torch
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        from pretrain.strategy.fsdp_engine import free_gathered

        built = model.build_on_meta()
        blocks = wrapped_blocks(built.hf, self.auto_wrap_policy)
        options: dict[str, Any] = {
            "mesh": self.mesh(world),
            "mp_policy": mixed_precision(step.precision, self.reduce_dtype),
            "reshard_after_forward": self.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD"),
            "offload_policy": self.offload(world),
        }
        kept = unsharded_fp32(built, step.precision)
        options["ignored_params"] = {p for name, p in built.hf_named_parameters() if name in kept}
        for block in blocks:
            fully_shard(block, **options)
        options["reshard_after_forward"] &= self.reshard_root
        fully_shard(built, **options)
        gather_ahead(blocks, self.prefetch)
        materialise(built, world, offload=self.cpu_offload)
        unsharded = [p for name, p in built.hf_named_parameters() if name in kept]
        for parameter in unsharded:
            parameter.data = parameter.data.to(world.device)
        load_weights(model, built, world)
        register_fsdp_forward_method(built, "probe")
        built.probe(torch.empty(0))
        free_gathered(built)
        return built, unsharded

    def mesh(self, world: DistributedContext) -> DeviceMesh:
        """Return the device mesh: one dimension of shards, or copies × shards."""
        from torch.distributed.device_mesh import init_device_mesh

        copies = {"HYBRID_SHARD": self.replicas or max(world.topology.nodes, 2), "NO_SHARD": world.size}
        kind = world.device.type
        if self.sharding_strategy not in copies:
            return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
        n = copies[self.sharding_strategy]
        return init_device_mesh(kind, (n, world.size // n), mesh_dim_names=("copy", "shard"))

    def offload(self, world: DistributedContext) -> OffloadPolicy:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

        return CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if self.cpu_offload else OffloadPolicy()


def wrapped_blocks(hf: Any, policy: str) -> list[nn.Module]:
    """Return the modules that ``policy`` names. Raises ``UserError`` listing the model's classes if it names none."""
    from pretrain.models.blocks import candidates, find_blocks

    if found := find_blocks(hf, None if policy == "auto" else {BLOCKS.get(policy, policy)}):
        return found
    classes = {type(m).__name__ for m in candidates(hf) if any(True for _ in m.parameters())}
    if policy == "auto":
        raise UserError(
            "strategy.auto_wrap_policy=auto: this model does not declare which of its blocks must not be split; "
            f"name their class: {', '.join(sorted(classes))}"
        )
    raise UserError(
        f"strategy.auto_wrap_policy={policy}: {type(hf).__name__} has no such class{did_you_mean(policy, classes)}"
    )


def gather_ahead(blocks: Sequence[Any], count: int) -> None:
    """Gather ``count`` blocks ahead of each, in the order in which forward and backward run them; 0: as torch does by itself."""
    if not count:
        return
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch([*blocks[i + 1 : i + 1 + count]])
        block.set_modules_to_backward_prefetch([*reversed(blocks[max(0, i - count) : i])])


def mixed_precision(precision: Precision, reduce_dtype: str = "float32") -> MixedPrecisionPolicy:
    """Return the policy: parameters are gathered in the matmul dtype, and gradients are summed over ranks in ``reduce_dtype``."""
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy

    gathered = None if precision.compute == "float32" else precision.compute_dtype
    if gathered is None and reduce_dtype == "float32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=getattr(torch, reduce_dtype))


def unsharded_fp32(model: LanguageModel, precision: Precision) -> set[str]:
    """Return the names of the fp32 parameters of a model whose other weights are in 16 bits. They are few and small (routers,
    decays), and FSDP shards one dtype at a time, so every rank keeps full copies of them."""
    import torch

    if precision.weights == "float32":
        return set()
    return {name for name, p in model.hf_named_parameters() if p.dtype == torch.float32}


def materialise(model: LanguageModel, world: DistributedContext, *, offload: bool) -> None:
    """Allocate the shards, and move the buffers, which already have their values, to the device."""
    import torch

    from pretrain.models.meta import put_buffers

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    model.to_empty(device=torch.device("cpu") if offload else world.device)
    put_buffers(model, buffers, world.device)


def load_weights(factory: ModelFactory, model: LanguageModel, world: DistributedContext) -> None:
    """Fill every shard, from the weight files or from a full model on rank 0."""
    files = factory.files(model)
    if files is not None:
        model.load(files)
        return
    import torch

    wanted = model.hf_state()
    source: dict[str, Tensor] = {}

    def build() -> None:
        source.update({n: t.detach() for n, t in factory.build(torch.device("cpu")).hf_state().items()})
        if mismatched := sorted(source.keys() ^ wanted.keys()):
            raise UserError(
                f"strategy=fsdp: the weights in the model's files do not fit its config: {mismatched[0]}; with "
                "tie_word_embeddings=true in config.json the head must not have a weight of its own"
            )

    world.on_main_rank(build)
    for name, tensor in wanted.items():
        receive(tensor, source.pop(name, None), world)


def receive(tensor: Tensor, source: Tensor | None, world: DistributedContext) -> None:
    """Fill this rank's shard of ``tensor`` from the full tensor that rank 0 has. This is a collective."""
    import torch
    import torch.distributed as dist

    from pretrain.distributed.sharding import local, start_of

    full = torch.empty(tensor.shape, dtype=tensor.dtype, device=world.device) if source is None else source
    full = full.to(world.device, tensor.dtype).contiguous()
    dist.broadcast(full, 0)
    part, start = local(tensor), start_of(tensor)
    with torch.no_grad():
        part.copy_(full[start : start + len(part)] if part.ndim else full)
