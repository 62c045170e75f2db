"""What an engine writes to a checkpoint and restores from one: weights, optimizer state and loss scaler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.distributed import sharding as tensors

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel
    from pretrain.strategy.loss_scaler import LossScaler
    from pretrain.strategy.optimizer_state import OptimizerState


class EngineState:
    """The part of an `Engine` that saves and restores its state."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    optimizer_state: OptimizerState
    scaler: LossScaler
    skipped: Tensor
    world: DistributedContext

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what this rank has to write to a checkpoint. This is a collective.

        ``model`` holds this rank's shards by Hugging Face parameter name, ``optimizer`` those of the optimizer's state by
        ``<parameter>/<key>``, ``optimizer_values`` its plain values, if it has any, ``scaler`` numbers, and ``tensors`` dtype
        and full shape of every tensor that any rank writes. ``owners`` are the ranks that have each tensor which all ranks hold,
        if they share the writing.

        Raises ``UserError`` on every rank for an optimizer state that can't be saved.
        """
        owners: dict[str, dict[str, int]] = {"optimizer": {}}
        moments, moments_manifest, values = self.optimizer_state.pack(owners["optimizer"])
        weights = self.model.hf_state()
        owners["model"] = by = tensors.writers(weights, self.world.size)
        rank = self.world.rank
        shards = ((name, tensors.local_shard(t, is_main=by.get(name, 0) == rank)) for name, t in weights.items())
        plain = {"optimizer_values": values} if any((values["state"], *values["groups"], "layout" in values)) else {}
        plain |= {"owners": owners} if any(owners.values()) else {}
        return plain | {
            "model": {name: shard for name, shard in shards if shard is not None},
            "optimizer": moments,
            "tensors": {"model": tensors.manifest(weights), "optimizer": moments_manifest},
            "scaler": self.scaler.state_dict() | {"skipped": int(self.skipped)},
        }

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, local shard) of the state that other ranks hold as well. Ranks that hold the same shards under the
        same names must hold the same bits."""
        yield from ((name, t) for name, t in self.model.hf_state().items() if tensors.is_replicated(t))
        yield from self.optimizer_state.replicated()
        scale = self.scaler.scale_on(self.world.device)
        if scale is not None:
            yield "the loss scale", scale

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from files written by any strategy on any number of ranks. Moments are restored in the dtype in
        which they were saved, never cast to the parameter's.

        Raises ``UserError`` for other names or shapes than the model's.
        """
        complete = state.get("tensors") is not None
        self.optimizer_state.restore(state["optimizer"], state.get("optimizer_values"), complete=complete)
        self.model.load(state["model"])
        scaler = dict(state["scaler"])
        self.skipped.fill_(scaler.pop("skipped", 0))
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)
