"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): torch's fused one, or for bf16 parameters one whose update arrives.

A bf16 number has 8 significant bits: adding lr 2e-5 to a weight of 0.02 changes nothing. `CompensatedAdamW` keeps what
rounding took from each bf16 parameter in a second bf16 tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveFloat

from pretrain.optim.base import OptimizerFactory

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class AdamW(OptimizerFactory):
    """``weight_decay`` acts on matrices, not on biases and norms. ``fused``: torch's one-kernel update, on CPUs too.
    ``compensate``: the update for bf16 parameters; False: torch's, which stalls at small learning rates."""

    lr: PositiveFloat
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    fused: bool = True
    compensate: bool = True

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
        import torch

        groups = decay_groups(named_parameters, self.weight_decay)
        settings: dict[str, Any] = {
            "lr": self.lr,
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "fused": self.fused,
        }
        if self.compensate and any(p.dtype != torch.float32 for group in groups for p in group["params"]):
            from pretrain.optim.compensated import CompensatedAdamW

            return CompensatedAdamW(groups, **settings)
        return torch.optim.AdamW(groups, **settings)


def decay_groups(named_parameters: Iterable[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices with ``weight_decay``, vectors (biases, norms) without. Frozen parameters are in neither.

    Embeddings are matrices: a tied one is the head as well, whose logits decay keeps small. Biases of a mixture of
    experts are stacked to matrices, and so known by their name.
    """
    matrices: list[Parameter] = []
    vectors: list[Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (vectors if parameter.ndim < 2 or name.endswith("bias") else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
