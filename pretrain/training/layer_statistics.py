"""Statistics of a step for each layer: the norms of its weights, gradients and update, over the shards of all ranks.

They show what one global norm hides: a layer that no longer learns, or one whose updates are large for its weights. The
update is the difference to the weights before the step, so a measured step needs another copy of this rank's shards;
other steps cost nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pretrain.distributed.sharding import local
from pretrain.runtime.console import notice
from pretrain.telemetry.events import LayerNorms
from pretrain.telemetry.interval import Interval

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from pretrain.strategy.engine import Engine


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: ``model.layers.3`` for ``model.layers.3.mlp.up_proj.weight``; for a parameter outside
    of the blocks its module, such as ``model.norm``."""
    block = re.match(r"(.*?\.\d+)\.", parameter)
    return block[1] if block else parameter.rpartition(".")[0] or parameter


class LayerStatistics:
    """Observes the optimizer's step every ``every`` steps. The results stay on the device."""

    def __init__(self, engine: Engine, every: Interval) -> None:
        self._engine = engine
        self._every = every
        self._hook: RemovableHandle | None = None
        self._before: dict[str, Tensor] = {}  # this rank's shards of the weights, and the squares of its gradients;
        self._gradients: dict[str, Tensor] = {}  # both stay empty if the update is skipped
        if every.steps is not None and not engine.has_gradients:
            notice("telemetry.layers_every: DeepSpeed's stages 1 to 3 keep no gradients by layer; nothing is recorded")
            self._every = Interval(None)

    def before_step(self, step: int) -> None:
        """Prepare to observe the update of ``step``, if it is due."""
        if self._every.due(step):
            self._hook = self._engine.optimizer.register_step_pre_hook(self._observe)

    def _observe(self, *_: Any) -> None:
        for name, p in self._engine.model.hf_named_parameters():
            self._before[name] = local(p).detach().clone()
            self._gradients[name] = (
                squares(local(p.grad)) if p.grad is not None else torch.zeros_like(squares(local(p)))
            )

    def after_step(self, norm: Tensor) -> LayerNorms | None:
        """Return the statistics of the step, given its gradient norm, or ``None`` if it was not observed. The statistics of a
        step are a collective."""
        if self._hook is None:
            return None
        self._hook.remove()
        self._hook = None
        limit = self._engine.grad_clip
        clipped = 1.0 if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)  # torch's clipping factor
        return self._norms(clipped)

    @torch.no_grad()
    def _norms(self, clipped: Tensor | float) -> LayerNorms:
        device, size = self._engine.world.device, self._engine.world.size
        sums: dict[str, Tensor] = {}
        for name, parameter in self._engine.model.hf_named_parameters():
            after = local(parameter).float()
            old = self._before.pop(name, after)
            weight = squares(old)
            gradient = self._gradients.pop(name) if self._gradients else torch.full_like(weight, torch.nan)
            squared_norms = torch.stack([weight, gradient, squares(after - old)]).to(device, non_blocking=True)
            layer = layer_of(name)
            sums[layer] = sums.get(layer, 0) + squared_norms / replication_factor(parameter, size)
        total = self._engine.world.all_reduce_sum(torch.stack(list(sums.values()))).sqrt()
        weights, grads, updates = total.unbind(1)
        return LayerNorms(tuple(sums), torch.stack([weights, grads / clipped, updates, updates / weights], 1))


def squares(tensor: Tensor) -> Tensor:
    """Return the sum of squares (fp32, 0-d). Rows are summed first, which is more exact on a CPU (see `norm_of`)."""
    rows = torch.linalg.vector_norm(tensor, dim=-1, dtype=torch.float32) if tensor.ndim > 1 else tensor.float()
    return rows.square().sum()


def replication_factor(parameter: Tensor, world_size: int) -> int:
    """Return the replication factor of ``parameter``: the number of ranks that hold a copy of each element."""
    if not isinstance(parameter, DTensor):
        return world_size
    mesh = parameter.device_mesh
    shards = 1
    for dim, placement in enumerate(parameter.placements):
        shards *= mesh.size(dim) if isinstance(placement, Shard) else 1
    return world_size // shards
