"""The base of optimizers that update one parameter after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class PerParameterOptimizer(Optimizer):
    """An optimizer whose step can be skipped on the device, as that of torch's fused AdamW: a loss scaler may set the attribute
    ``found_inf`` (a 0-d tensor); where it is 1, parameters and state stay unchanged."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, {"fused": True} | defaults)
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Return the loss of ``closure`` when it is given."""
        loss = closure() if closure is not None else None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, found_inf)
        return loss

    @abstractmethod
    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Update one parameter and its state in place."""
