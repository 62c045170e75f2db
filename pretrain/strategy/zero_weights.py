"""The weights of DeepSpeed's stages 1 to 3: fp32, in flat shards of the optimizer. The model has copies of them in the matmul
dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from pretrain.distributed.sharding import TensorFiles, full_tensor
from pretrain.strategy.replaced import EngineWeights

if TYPE_CHECKING:
    from pretrain.strategy.deepspeed_engine import DeepspeedEngine


class ZeroWeights(EngineWeights):
    """The weights of a `DeepspeedEngine`. A part is the piece of a weight in this rank's shard: 1-d, fp32. At the stages 1 and 2
    a rank has no part of some weights. Frozen weights and buffers keep their values."""

    # Whatever needs a full weight goes through the shards: other values are copied into them, DeepSpeed gathers each full
    # weight or takes its shard of one, and the shards get their own values back. The model's copies are renewed from the
    # shards, as after a step, so they have the same bits afterwards.

    _engine: DeepspeedEngine

    @cached_property
    def _mesh(self) -> DeviceMesh:
        world = self._engine.world
        return init_device_mesh(world.device.type, (world.size,))

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._engine.model.hf_named_parameters() if p.requires_grad}

    def trained(self) -> dict[str, Tensor]:
        parts = {name: self._engine.shards.weight_part(p) for name, p in self._parameters().items()}
        return {name: part for name, part in parts.items() if part is not None}

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: self._engine.shards.gradient_part(p) for name, p in self._parameters().items()}

    @property
    def gradient_scale(self) -> float:
        return self._engine.zero.loss_scale if self._engine.scaler.is_enabled() else 1.0

    def gradient_changed(self, name: str, gradient: Tensor) -> None:
        self._engine.shards.note_gradient(self._parameters()[name], gradient)

    def distance(self, differences: Iterable[Tensor]) -> Tensor:
        device = self._engine.world.device
        squares = [torch.linalg.vector_norm(part.float()).double().square().to(device) for part in differences]
        total = torch.stack([torch.zeros((), dtype=torch.float64, device=device), *squares]).sum()
        return self._engine.world.all_reduce_sum(total).sqrt()

    def to_save(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with self._in_shards(parts):  # one full weight at a time, of which this rank keeps its rows
            full = ((name, self._engine.whole(p)) for name, p in self._parameters().items())
            return {name: distribute_tensor(t, self._mesh, [Shard(0)], src_data_rank=None) for name, t in full}

    def from_saved(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        with self._in_shards({}):
            for name, parameter in self._parameters().items():
                self._engine.assign(parameter, full_tensor(saved[name]))
            return {name: part.clone() for name, part in self.trained().items()}

    @contextmanager
    def replaced(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        with self._in_shards(parts, renew=True):
            self._engine.zero.update_weights()
            yield

    @contextmanager
    def blended(self, files: Sequence[TensorFiles], blend: Callable[..., Tensor]) -> Iterator[None]:
        with self._in_shards({}, renew=True):
            for name, parameter in self._parameters().items():
                own = self._engine.whole(parameter).cpu()
                value = blend(own, *(file.read(name) for file in files))
                self._engine.assign(parameter, value.to(self._engine.world.device))
            self._engine.zero.update_weights()
            yield

    @contextmanager
    def _in_shards(self, parts: Mapping[str, Tensor], *, renew: bool = False) -> Iterator[None]:
        """Inside this context the shards have ``parts``; afterwards they have their own values again. With ``renew`` the model's
        copies are then renewed from them."""
        own = self.trained()
        kept = {name: part.to("cpu", copy=True) for name, part in own.items()}
        try:
            _copy(parts, own)
            yield
        finally:
            _copy(kept, own)
            if renew:
                self._engine.zero.update_weights()


@torch.no_grad()
def _copy(parts: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    for name, part in parts.items():
        into[name].copy_(part)
