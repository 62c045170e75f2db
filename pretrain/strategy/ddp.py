"""``DistributedDataParallel``: every rank holds the full model, and gradients are averaged during the backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat

from pretrain.runtime.errors import UserError
from pretrain.strategy.base import StepConfig, Strategy

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.topology import Topology
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.strategy.engine import Engine


@dataclass(frozen=True)
class Ddp(Strategy):
    """torch's DDP. The fields are its arguments (``bucket_cap_mb`` in MiB), see
    https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html

    Attributes:
        find_unused_parameters: true: some weights get no gradient in some steps; slower.
        static_graph: true: every step uses the same weights in the same order; not with gradient accumulation.
        gradient_as_bucket_view: true: gradients are views of the communication buckets, without a second copy.
        bucket_cap_mb: Bucket size: MiB of gradients per communication.
        reduce_dtype: Dtype in which gradients are exchanged: float32 · bfloat16 (half the traffic, rounded sums).
    """

    find_unused_parameters: bool = False
    static_graph: bool = False
    gradient_as_bucket_view: bool = True
    bucket_cap_mb: PositiveFloat = 25
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"

    def check(self, step: StepConfig, topology: Topology) -> None:
        if self.static_graph and step.accumulation > 1:
            raise UserError(
                f"strategy.static_graph=true with gradient_accumulation_steps={step.accumulation}: torch's DDP can't "
                "skip the reduction of gradients of a static graph; use static_graph=false, or 1 step"
            )
        if self.static_graph and self.find_unused_parameters:
            raise UserError(
                "strategy.static_graph=true with strategy.find_unused_parameters=true: with a static graph DDP "
                "finds them itself; use one of the two"
            )

    def memory_saving_overrides(self, step: StepConfig, topology: Topology) -> list[str]:
        return ["strategy=fsdp"] if topology.world_size > 1 else []

    def setup(
        self,
        model: ModelFactory,
        optimizer: Callable[[LanguageModel], Optimizer],
        step: StepConfig,
        world: DistributedContext,
    ) -> Engine:
        from torch.nn.parallel import DistributedDataParallel

        from pretrain.strategy.engine import Engine

        class DdpEngine(Engine):
            def communication(self, last: bool) -> AbstractContextManager[object]:
                return nullcontext() if last else wrapped.no_sync()

        built = model.build(world.device)
        more: dict[str, Any] = {_buffers_keyword(DistributedDataParallel): False}  # the model's buffers are constants
        if world.device.type == "cuda":
            more["device_ids"] = [world.device]
        wrapped = DistributedDataParallel(
            built,
            find_unused_parameters=self.find_unused_parameters,
            static_graph=self.static_graph,
            gradient_as_bucket_view=self.gradient_as_bucket_view,
            bucket_cap_mb=self.bucket_cap_mb,
            **more,
        )
        if self.reduce_dtype == "bfloat16":
            from pretrain.strategy.ddp_hooks import average_in_bf16

            wrapped.register_comm_hook(None, average_in_bf16)
        return DdpEngine(
            built,
            optimizer(built),
            precision=step.precision,
            grad_clip=step.grad_clip,
            world=world,
            step_module=wrapped,
            replicas=world.size,
        )


def _buffers_keyword(ddp: type) -> str:
    """Return the name of DDP's argument that synchronises buffers. torch 2.13 renamed it."""
    known = inspect.signature(ddp).parameters
    return "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
