"""AdamW for bf16 parameters: 12 bytes a parameter with its gradient, against 16 for fp32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class CompensatedAdamW(Optimizer):
    """State per parameter: ``step`` (fp32 scalar on the CPU), ``exp_avg`` and ``compensation`` (the parameter's type),
    ``exp_avg_sq`` (fp32).

    The update is worked out in fp32 from parameter + compensation; what the parameter's type can't hold goes back into
    the compensation (Kahan summation; for bf16 AdamW see arXiv:2010.06192, section 3). Deterministic: a resumed run
    continues bit for bit.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["compensation"] = torch.zeros_like(parameter)
        state["step"] += 1
        step, lr, (beta1, beta2) = float(state["step"]), group["lr"], group["betas"]

        gradient = gradient.float()
        exp_avg = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])

        exact = parameter.float().add_(state["compensation"].float())
        exact.mul_(1 - lr * group["weight_decay"]).addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
        parameter.copy_(exact)
        state["compensation"].copy_(exact.sub_(parameter.float()))
