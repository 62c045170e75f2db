"""Optimizers: a class of torch's kind, a factory, and a factory of two optimizers."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import Parameter


class RowWise(torch.optim.Optimizer):
    """Adam without a first moment, whose second moment has one number per row: ``[n, 1]`` for a matrix ``[n, m]``."""

    def __init__(self, params, lr: float, beta2: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                square = p.grad.square()
                square = square.mean(-1, keepdim=True) if p.ndim > 1 else square
                state = self.state[p]
                if not state:
                    state["row"] = torch.zeros_like(square)
                state["row"].lerp_(square, 1 - group["beta2"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(p.grad, state["row"].sqrt() + 1e-8, value=-group["lr"])


def muon_adamw(named_parameters: Iterable[tuple[str, Parameter]], lr: float, matrix_lr: float) -> list:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head and vectors."""
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in trained if not (p.ndim == 2 and "layers" in name)]
    return [torch.optim.Muon(matrices, lr=matrix_lr), torch.optim.AdamW(rest, lr=lr)]


@dataclass(frozen=True)
class Lion:
    """Chen et al., arXiv:2302.06675."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> torch.optim.Optimizer:
        return LionOptimizer([p for _, p in named_parameters if p.requires_grad], **vars(self))


class LionOptimizer(torch.optim.Optimizer):
    def __init__(self, params, **settings: float) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                moment = state.setdefault("moment", torch.zeros_like(p))
                update = moment.lerp(p.grad, 1 - group["beta1"]).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                moment.lerp_(p.grad, 1 - group["beta2"])
