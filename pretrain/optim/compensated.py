"""AdamW for bf16 parameters. It takes 12 bytes per parameter including the gradient; fp32 master weights take 16.

Two existing implementations do not meet the requirements. torch-optimi 0.3.3 stores the second moment in bf16, where
beta2 = 0.999 can never lower it, and keeps its step count outside of the parameters' state. The stochastic rounding of torchao
compiles its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

CHUNK = {"cpu": 2**20}  # elements updated at a time, so that their fp32 copies fit into a core's cache
CHUNK_ELSEWHERE = 2**26


class CompensatedAdamW(Optimizer):
    """AdamW with Kahan summation for parameters in less than 32 bits.

    The state of a parameter is ``step`` (fp32 scalar), ``exp_avg`` and ``compensation`` (in the dtype of the parameter) and
    ``exp_avg_sq`` (fp32). fp32 parameters have no ``compensation``.

    The update is torch's AdamW in fp32, applied to parameter + compensation. The part of the result that the dtype of the
    parameter can't represent becomes the new compensation (Kahan summation; for bf16 AdamW see arXiv:2010.06192, section 3).
    The update is deterministic, so a resumed run continues bit for bit. As in torch's fused AdamW, a loss scaler may set the
    attribute ``found_inf`` (a 0-d tensor); where it is 1, parameters and state stay unchanged.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})

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

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Update one parameter in place.

        For each chunk of a 16-bit parameter p with compensation c:
            x  = fp32(p) + c          the value before the last rounding
            x' = AdamW(x, g, m, v)    torch's own update, entirely in fp32; v is stored in fp32, m is rounded back to 16 bits
            p  = bf16(x')             what the model computes with
            c  = x' - p               the rounding error, which the next step adds again
        An update smaller than half a unit in the last place of p changes only c, and reaches p when enough of them have
        accumulated. Where ``found_inf`` is 1, p, c, m, v and ``step`` keep their values.
        """
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["compensation"] = torch.zeros_like(parameter)
        slots = [state[key] for key in ("exp_avg", "exp_avg_sq", "compensation") if key in state]
        for p, g, m, v, *compensation in _chunks(parameter, gradient, *slots):
            step = state["step"].clone()  # adamw() increments its step, and it is called once per chunk
            if not compensation:
                _adamw(p, g, m, v, step, group, found_inf)
                continue
            error = compensation[0]
            exact, exp_avg = p.float().add_(error), m.float()
            _adamw(exact, g.float(), exp_avg, v, step, group, found_inf)
            rounded = exact.to(p.dtype)
            new_error = exact.sub_(rounded)
            if found_inf is not None:  # rounding p + c again could move p when c is half a unit in the last place
                rounded, new_error = (torch.where(found_inf == 1, a, b) for a, b in ((p, rounded), (error, new_error)))
            m.copy_(exp_avg)
            p.copy_(rounded)
            error.copy_(new_error)
        state["step"] += 1 if found_inf is None else 1 - found_inf


def _adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, group: dict[str, Any], found_inf: Tensor | None
) -> None:
    """Apply torch's functional AdamW to one tensor in place: parameter ``p``, gradient ``g``, moments ``m`` and ``v``."""
    adamw(
        [p],
        [g],
        [m],
        [v],
        [],
        [step],
        foreach=False,
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        found_inf=found_inf,
    )


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield matching flat chunks of all ``tensors``. A sharded tensor contributes its local shard, because the update is
    elementwise. Tensors that are not contiguous are yielded unchunked."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    if not all(t.is_contiguous() for t in local):
        yield tuple(local)
        return
    size = CHUNK.get(local[0].device.type, CHUNK_ELSEWHERE)
    yield from zip(*(t.view(-1).split(size) for t in local), strict=True)
