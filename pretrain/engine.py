"""Model and optimizer under one strategy: the state of a run, and the two things done to it, backward and step.

The loss is summed and divided by the *global* number of target tokens, so that accumulation, packing and the number of
ranks change nothing but rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.batch import Batch

if TYPE_CHECKING:
    from pretrain.models.language_model import LanguageModel
    from pretrain.precision import Precision
    from pretrain.world import World


class Scorer:
    """A model that can be evaluated: all that `task=evaluation` needs."""

    def __init__(self, model: LanguageModel, *, precision: Precision, world: World) -> None:
        self.model = model
        self.precision = precision
        self.world = world

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """The summed loss of a batch (nats, fp32, on the device). The model must be in eval mode."""
        with self.precision.autocast(self.world.device.type):
            loss: Tensor = self.model(batch.input_ids, batch.labels, batch.position_ids)
        return loss


class Engine(Scorer):
    """One process, whole parameters. Strategies that shard or average derive from it."""

    def __init__(
        self, model: LanguageModel, optimizer: torch.optim.Optimizer, *, precision: Precision, world: World
    ) -> None:
        super().__init__(model, precision=precision, world=world)
        self.optimizer = optimizer
        self.scaler = precision.grad_scaler(world.device.type)
        self.skipped = torch.zeros((), dtype=torch.int64, device=world.device)
        self._base_lrs = [group["lr"] for group in optimizer.param_groups]

    # -- one step -----------------------------------------------------------------------------------------------------

    def backward(self, batch: Batch, *, tokens: int, last: bool) -> Tensor:
        """Add the gradients of one micro-batch; return its part of the global mean loss, on the device.

        ``tokens``: target tokens of the whole global batch. ``last``: no further micro-batch follows in this step.
        """
        with self.precision.autocast(self.world.device.type):
            loss = self.model(batch.input_ids, batch.labels, batch.position_ids)
        loss = loss / tokens
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self, max_norm: float | None) -> Tensor:
        """Clip to the global norm ``max_norm`` (``None``: measure only), update, clear; return the norm, on the device.

        Under 16-mixed a non-finite gradient leaves the weights alone and counts in ``skipped``.
        """
        self.scaler.unscale_(self.optimizer)
        norm = self.clip(max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():
            self.skipped += ~torch.isfinite(norm)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def clip(self, max_norm: float | None) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if max_norm is None:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    def set_lr(self, scale: float) -> float:
        """Set every group's learning rate to its base × ``scale``; return the first group's."""
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * scale
        return float(self.optimizer.param_groups[0]["lr"])

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """``model``: tensors by Hugging Face parameter name · ``optimizer``: ``<parameter>/<key>`` · ``scaler``: numbers."""
        moments = {
            f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
            for name, parameter in self.model.hf_named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        scaler = self.scaler.state_dict() | {"skipped": int(self.skipped)}
        return {"model": self.model.hf_state_dict(), "optimizer": moments, "scaler": scaler}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """The reverse. Moments are put back as they were saved, never cast to the parameter's type.

        Raises ``KeyError`` when a parameter's moments name a parameter that the model has not.
        """
        self.model.load_hf_state_dict(state["model"])
        parameters = dict(self.model.hf_named_parameters())
        on_device = {
            id(p): group.get("fused") or group.get("capturable")
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        for slot, value in state["optimizer"].items():
            name, key = slot.rsplit("/", 1)
            parameter = parameters[name]
            stays_on_host = key == "step" and not on_device[id(parameter)]
            self.optimizer.state[parameter][key] = value.to("cpu" if stays_on_host else parameter.device)
        scaler = dict(state["scaler"])
        self.skipped.fill_(scaler.pop("skipped", 0))
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)
