"""The update of Adafactor, for full and for sharded parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from pretrain.distributed.sharding import local
from pretrain.optim.per_parameter import PerParameterOptimizer

EPS = 1e-30  # added to squared gradients: the paper's first regularisation constant, for weights of any dtype


class FactoredOptimizer(PerParameterOptimizer):
    """Adafactor as ``torch.optim.Adafactor`` computes it with ``eps=(1e-30, 1e-3)`` (it can't update DTensors), without a wait
    for the device. The weight decay differs: torch's is ``lr * weight_decay``, this one is also multiplied by the size of the
    weights, as the update is. So it is as strong as AdamW's where the updates are as large.

    The state of a matrix [a, b], or of a stack of matrices, is ``row_var`` [a, 1], sharded as the parameter, and ``col_var``
    [1, b], which every rank has; of a vector ``variance``; and ``step``. All are fp32. Parameters in 16 bits also have
    ``compensation``, as in `CompensatedAdamW`. As in torch's fused AdamW, a loss scaler may set the attribute ``found_inf``
    (a 0-d tensor); where it is 1, parameters and state stay unchanged.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        beta2_decay: float = -0.8,
        smallest_scale: float = 1e-3,
        clip: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"beta2_decay": beta2_decay, "smallest_scale": smallest_scale, "clip": clip}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | settings)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Update one parameter in place.

        With t the step, R and C the averages of g^2 + 1e-30 over columns and rows, weighted by t^beta2_decay:
            u = g / sqrt(R C / mean(R)), scaled down to a root mean square of at most ``clip``
            a = max(smallest_scale, rms(p)) * min(lr, 1 / sqrt(t))
            p = p - a * wd * p - a * u
        """
        state = self.state[parameter]
        if not state:
            _create(parameter, state)
        grad, p = grad.float(), _whole_value(parameter, state)
        squares = grad.square() + EPS
        step = state["step"] + 1
        share = (step ** group["beta2_decay"]).to(torch.float32)
        new = {"step": step}
        if parameter.ndim > 1:
            new["row_var"] = state["row_var"] + share * (squares.mean(-1, keepdim=True) - state["row_var"])
            columns = _replicated(squares.mean(-2, keepdim=True))
            new["col_var"] = state["col_var"] + share * (columns - state["col_var"])
            mean = _replicated(new["row_var"].mean(-2, keepdim=True)).clamp(min=EPS)
            variance = new["row_var"] * (new["col_var"] / mean)
        else:
            new["variance"] = variance = state["variance"] + share * (squares - state["variance"])
        update = grad * variance.clamp(min=EPS).rsqrt()
        rate = torch.clamp(step.rsqrt(), max=group["lr"])
        size = _rms(p).clamp(min=group["smallest_scale"])
        rate = (size * rate.to(size.device)).to(torch.float32)
        factor = rate / (_rms(update) / group["clip"]).clamp(min=1.0)
        exact = p * (1 - rate * group["weight_decay"]) - factor * update
        rounded = exact.to(parameter.dtype)
        if "compensation" in state:
            new["compensation"] = (exact - rounded.float()).to(parameter.dtype)
        for stored, value in ((parameter, rounded), *((state[key], value) for key, value in new.items())):
            shard, value = local(stored), local(value)
            shard.copy_(value if found_inf is None else torch.where(found_inf == 1, shard, value))


def _create(parameter: Tensor, state: dict[str, Any]) -> None:
    """Create the state of a parameter before its first update."""
    state["step"] = torch.zeros((), device=parameter.device)
    if parameter.ndim > 1:
        state["row_var"] = torch.zeros_like(parameter[..., :1], dtype=torch.float32)
        columns = _replicated(parameter.float().mean(-2, keepdim=True))
        state["col_var"] = torch.zeros_like(columns)
    else:
        state["variance"] = torch.zeros_like(parameter, dtype=torch.float32)
    if parameter.dtype != torch.float32:
        state["compensation"] = torch.zeros_like(parameter)


def _whole_value(parameter: Tensor, state: dict[str, Any]) -> Tensor:
    """Return the value before the last rounding, in fp32."""
    return parameter.float() + state["compensation"] if "compensation" in state else parameter.detach()


def _rms(tensor: Tensor) -> Tensor:
    """Return the root of the mean square of all elements, a 0-d tensor that every rank has."""
    return local(_replicated(tensor.square().mean())).sqrt()


def _replicated(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with a copy on every rank, where a mean over sharded elements was left to be summed. For a stack that is
    sharded along its first dimension, means over the others stay sharded."""
    if not isinstance(tensor, DTensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(placements=placements)
