"""The update of Muon: momentum whose singular values are all made about 1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from pretrain.distributed.sharding import local
from pretrain.optim.per_parameter import PerParameterOptimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial, from Jordan's post
EPS = 1e-7


class OrthogonalizedMomentum(PerParameterOptimizer):
    """Muon for matrices, of which it equals ``torch.optim.Muon``, and for stacks of matrices [n, a, b].

    The state of a parameter is ``momentum_buffer``, in its shape, dtype and sharding. The iteration needs the full matrix: of a
    sharded parameter the update is gathered, one matrix at a time, every rank iterates, and keeps its own rows. A parameter in 16
    bits also has ``compensation``, as in `CompensatedAdamW`. As in torch's fused AdamW, a loss scaler may set the attribute
    ``found_inf`` (a 0-d tensor); where it is 1, parameters and state stay unchanged.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        scale: str = "adamw",
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"momentum": momentum, "nesterov": nesterov, "steps": steps, "scale": scale}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | settings)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
            if parameter.dtype != torch.float32:
                state["compensation"] = torch.zeros_like(parameter)
        buffer, p = local(state["momentum_buffer"]), local(parameter)
        average = buffer.lerp(local(grad), 1 - group["momentum"])
        update = local(grad).lerp(average, group["momentum"]) if group["nesterov"] else average
        direction = _rows_of(orthogonalized(_full(update, parameter), group["steps"]), parameter)
        exact = p.float().add_(local(state["compensation"])) if "compensation" in state else p.clone()
        exact.mul_(1 - group["lr"] * group["weight_decay"])
        exact.add_(direction, alpha=-group["lr"] * _factor(parameter, group["scale"]))
        new = {"p": (p, exact.to(p.dtype)), "buffer": (buffer, average)}
        if "compensation" in state:
            new["compensation"] = (local(state["compensation"]), exact - new["p"][1])
        for stored, value in new.values():
            stored.copy_(value if found_inf is None else torch.where(found_inf == 1, stored, value))


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """Return the nearest matrix whose singular values lie around 1, in bf16, by a Newton-Schulz iteration.

    Args:
        matrix: [a, b], or a stack [n, a, b] of which each matrix is iterated by itself.
        steps: Iterations.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c)
        x = multiply_add(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def _factor(parameter: Tensor, scale: str) -> float:
    """Return the factor of the learning rate: with "adamw" the elements of an update are about 0.2 large (arXiv:2502.16982)."""
    rows, columns = parameter.shape[-2:]
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "adamw" else math.sqrt(max(1, rows / columns))


def _full(update: Tensor, parameter: Tensor) -> Tensor:
    """Return the full update of ``parameter`` from the local shards ``update``. This is a collective if it is sharded. It is
    gathered in bf16, in which the iteration computes."""
    if not isinstance(parameter, DTensor):
        return update
    sharded = DTensor.from_local(
        update.bfloat16(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return sharded.full_tensor()


def _rows_of(full: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of ``full`` that this rank holds of ``parameter``; every rank has all of ``full``. An offloaded shard is on
    the host, while ``full`` is on the GPU of the mesh, where the iteration ran."""
    if not isinstance(parameter, DTensor):
        return full
    rows = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return rows.to_local().to(local(parameter).device)
