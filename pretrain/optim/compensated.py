"""AdamW for bf16 parameters: 12 bytes a parameter with its gradient, against 16 for fp32 master weights.

Neither torch-optimi 0.3.3 nor torchao serves: the first keeps the second moment in bf16, where beta2 = 0.999 can never
lower it, and its step count outside of the parameters' state; the second's stochastic rounding compiles its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

CHUNK = {"cpu": 2**20}  # elements at a time, for fp32 copies that stay in a core's cache
CHUNK_ELSEWHERE = 2**26


class CompensatedAdamW(Optimizer):
    """State per parameter: ``step`` (fp32 scalar), ``exp_avg`` and ``compensation`` (the parameter's type),
    ``exp_avg_sq`` (fp32).

    The update is torch's own AdamW in fp32, of parameter + compensation; what the parameter's type can't hold goes back
    into the compensation (Kahan summation; for bf16 AdamW see arXiv:2010.06192, section 3). Deterministic: a resumed
    run continues bit for bit. fp32 parameters have no compensation. Like torch's fused AdamW it leaves all as it is where
    its attribute ``found_inf``, a 0-d tensor that a loss scaler may have set, is 1.
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
        loss = closure() if closure is not None else None
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, found_inf)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], found_inf: Tensor | None) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if parameter.dtype != torch.float32:
                state["compensation"] = torch.zeros_like(parameter)
        slots = [state[key] for key in ("exp_avg", "exp_avg_sq", "compensation") if key in state]
        for p, g, m, v, *compensation in _chunks(parameter, gradient, *slots):
            step = state["step"].clone()  # torch counts on with every chunk
            if not compensation:
                _adamw(p, g, m, v, step, group, found_inf)
                continue
            lost = compensation[0]
            exact, exp_avg = p.float().add_(lost), m.float()
            _adamw(exact, g.float(), exp_avg, v, step, group, found_inf)
            rounded = exact.to(p.dtype)
            still_lost = exact.sub_(rounded)
            if found_inf is not None:  # a sum that lies between two numbers must not be rounded anew
                rounded, still_lost = (torch.where(found_inf == 1, a, b) for a, b in ((p, rounded), (lost, still_lost)))
            m.copy_(exp_avg)
            p.copy_(rounded)
            lost.copy_(still_lost)
        state["step"] += 1 if found_inf is None else 1 - found_inf


def _adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, group: dict[str, Any], found_inf: Tensor | None
) -> None:
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
    """The same pieces of each tensor, flat. Of a sharded tensor this rank's part: the update knows no neighbours."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    if not all(t.is_contiguous() for t in local):
        yield tuple(local)
        return
    size = CHUNK.get(local[0].device.type, CHUNK_ELSEWHERE)
    yield from zip(*(t.view(-1).split(size) for t in local), strict=True)
