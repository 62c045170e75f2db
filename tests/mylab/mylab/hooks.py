"""A hook: an exponential moving average of the weights."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pretrain import Hook


@dataclass
class Ema(Hook):
    """Averages the trained weights, and counts its updates."""

    decay: float = 0.9
    average: dict[str, Tensor] = field(default_factory=dict, init=False)
    updates: int = field(default=0, init=False)

    def setup(self, engine: Any) -> None:
        self.updates = 0
        self.average = {n: p.detach().clone() for n, p in engine.model.hf_named_parameters() if p.requires_grad}

    @torch.no_grad()
    def after_step(self, state: Any, engine: Any) -> None:
        self.updates += 1
        for name, parameter in engine.model.hf_named_parameters():
            if parameter.requires_grad:
                self.average[name].lerp_(parameter, 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {**self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state.pop("updates")
        self.average = state
