"""Statistics of a step for each layer: the norms of its weights, gradients and update, over the shards of all ranks.

They show what one global norm hides: a layer that no longer learns, or one whose updates are large for its weights. The
update is the difference to the weights before the step, so a measured step needs another copy of this rank's shards;
other steps cost nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pretrain.distributed.sharding import local
from pretrain.runtime.console import notice
from pretrain.telemetry.events import LayerNorms
from pretrain.telemetry.interval import Interval

if TYPE_CHECKING:
    from pretrain.strategy.engine import Engine


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: ``model.layers.3`` for ``model.layers.3.mlp.up_proj.weight``; for a parameter outside
    of the blocks its module, such as ``model.norm``."""
    block = re.match(r"(.*?\.\d+)\.", parameter)
    return block[1] if block else parameter.rpartition(".")[0] or parameter


class LayerStatistics:
    """Measures the optimizer's step every ``every`` steps. The results stay on the device."""

    def __init__(self, engine: Engine, every: Interval) -> None:
        self._engine = engine
        self._every = every
        self._found: LayerNorms | None = None
        if every.steps is not None and not engine.has_gradients:
            notice("telemetry.layers_every: DeepSpeed's stages 1 to 3 keep no gradients by layer; nothing is recorded")
            self._every = Interval(None)

    def step(self, number: int, max_norm: float | None, *, refuse: Callable[[Tensor], Tensor]) -> Tensor:
        """Run `Engine.step` as step ``number`` and measure it if that is due. A measured step is a collective."""
        if not self._every.due(number):
            return self._engine.step(max_norm, refuse=refuse)
        before = {name: local(p).detach().clone() for name, p in self._engine.model.hf_named_parameters()}
        gradients: dict[str, Tensor] = {}  # stays empty if the update is skipped

        def measure_gradients(*_: Any) -> None:
            for name, p in self._engine.model.hf_named_parameters():
                gradients[name] = squares(local(p.grad)) if p.grad is not None else torch.zeros_like(squares(local(p)))

        hook = self._engine.optimizer.register_step_pre_hook(measure_gradients)
        norm = self._engine.step(max_norm, refuse=refuse)
        hook.remove()
        clipped = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)  # torch's clipping factor
        self._found = self._norms(before, gradients, clipped)
        return norm

    def take(self) -> LayerNorms | None:
        """Return the statistics of the last step, or ``None`` if it was not measured."""
        found, self._found = self._found, None
        return found

    @torch.no_grad()
    def _norms(self, before: dict[str, Tensor], gradients: dict[str, Tensor], clipped: Tensor | float) -> LayerNorms:
        device, size = self._engine.world.device, self._engine.world.size
        sums: dict[str, Tensor] = {}
        for name, parameter in self._engine.model.hf_named_parameters():
            after, old = local(parameter).float(), before.pop(name)
            weight = squares(old)
            gradient = gradients[name] if gradients else torch.full_like(weight, torch.nan)
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
