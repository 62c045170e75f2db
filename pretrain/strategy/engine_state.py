"""What an engine writes to a checkpoint and restores from one: weights, optimizer state and loss scaler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.distributed import sharding as tensors
from pretrain.distributed.sharding import TensorFiles, TensorShard
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext
    from pretrain.models.language_model import LanguageModel
    from pretrain.strategy.loss_scaler import LossScaler


class EngineState:
    """The part of an `Engine` that saves and restores its state."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    skipped: Tensor
    world: DistributedContext

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return what this rank has to write to a checkpoint.

        ``model`` holds this rank's shards by Hugging Face parameter name, ``optimizer`` its shards by ``<parameter>/<key>``,
        ``scaler`` numbers, and ``tensors`` dtype and full shape of every tensor that any rank writes.
        """
        moments = {
            f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, parameter in self.model.hf_named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        weights = self.model.hf_state()
        return {
            "model": self._local_shards(weights),
            "optimizer": self._local_shards(moments),
            "tensors": {"model": tensors.manifest(weights), "optimizer": tensors.manifest(moments)},
            "scaler": self.scaler.state_dict() | {"skipped": int(self.skipped)},
        }

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, local shard) of the state that other ranks hold as well. Ranks that hold the same shards under the
        same names must hold the same bits."""
        yield from ((name, t) for name, t in self.model.hf_state().items() if tensors.is_replicated(t))
        for name, parameter in self.model.hf_named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and tensors.is_replicated(value):
                    yield f"{name}/{key}", value
        scale = self.scaler.scale_on(self.world.device)
        if scale is not None:
            yield "the loss scale", scale

    def _local_shards(self, named: dict[str, Tensor]) -> dict[str, TensorShard]:
        shards = ((name, tensors.local_shard(t, is_main=self.world.is_main)) for name, t in named.items())
        return {name: shard for name, shard in shards if shard is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from files written by any strategy on any number of ranks. Moments are restored in the dtype in
        which they were saved, never cast to the parameter's.

        Raises ``UserError`` for other names or shapes than the model's.
        """
        self.check_moments(state)
        self.model.load(state["model"])
        self.load_moments(state["optimizer"])
        scaler = dict(state["scaler"])
        self.skipped.fill_(scaler.pop("skipped", 0))
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)

    def check_moments(self, state: dict[str, Any]) -> None:
        """Raise ``UserError`` for moments that do not fit the parameters, and for parameters without moments if the checkpoint
        does not list its tensors: missing moments would silently be initialised again."""
        files: TensorFiles = state["optimizer"]
        trained = {n: p for n, p in self.model.hf_named_parameters() if p.requires_grad}
        slots = [(slot, *slot.rpartition("/")[::2]) for slot in sorted(files.keys())]
        for slot, name, key in slots:
            if name not in trained:
                raise UserError(f"optimizer state {slot}: the model has no such trainable parameter")
            shape = () if key == "step" else tuple(getattr(trained[name], "ds_shape", trained[name].shape))
            tensors.check_shape(slot, files, shape)
        missing = sorted(trained.keys() - {name for _, name, _ in slots})
        if slots and missing and state.get("tensors") is None:
            raise UserError(
                f"the checkpoint has no optimizer state for {len(missing)} parameters, e.g. {missing[0]}; resume from an "
                "earlier one (resume=<run>/checkpoints/step-…), or start a new run from its weights (model_name=<checkpoint>)"
            )

    def load_moments(self, files: TensorFiles) -> None:
        self.optimizer.state.clear()
        parameters = dict(self.model.hf_named_parameters())
        on_device = {
            id(p): group.get("fused") or group.get("capturable")
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        for slot in sorted(files.keys()):
            name, key = slot.rsplit("/", 1)
            parameter = parameters[name]
            if key == "step":  # a counter, which is never sharded
                value = files.read(slot).to(parameter.device if on_device[id(parameter)] else "cpu")
            else:
                start = tensors.start_of(parameter)
                rows = files.read(slot, start, start + len(tensors.local(parameter)))
                value = torch.empty_like(parameter, dtype=rows.dtype, requires_grad=False)
                tensors.local(value).copy_(rows)
            self.optimizer.state[parameter][key] = value
