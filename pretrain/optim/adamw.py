"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): torch's fused one, or for bf16 parameters one whose update arrives.

A bf16 number has 8 significant bits: adding lr 2e-5 to a weight of 0.02 changes nothing. Here each bf16 parameter keeps
what rounding took from it in a second bf16 tensor (Kahan summation), and the second moment stays in fp32, because with
beta2 0.999 a bf16 one could never fall. That is why no library serves: those at hand keep both moments in bf16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class AdamW:
    """``weight_decay`` acts on matrices (embeddings too), not on biases and norms. ``fused``: torch's one-kernel update."""

    lr: PositiveFloat
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    fused: bool = True

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
        import torch

        from pretrain.optim.compensated import CompensatedAdamW

        groups = decay_groups(named_parameters, self.weight_decay)
        betas = (self.beta1, self.beta2)
        if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
            return CompensatedAdamW(groups, lr=self.lr, betas=betas, eps=self.eps)
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=self.fused)


def decay_groups(named_parameters: Iterable[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with ``weight_decay``, vectors (biases, norms) without. Frozen parameters are in neither."""
    matrices, vectors = [], []
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
