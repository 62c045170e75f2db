"""AdamW (Loshchilov & Hutter, arXiv:1711.05101): torch's fused AdamW, or `CompensatedAdamW` for bf16 parameters.

A bf16 number has 8 significant bits, so adding lr 2e-5 to a weight of 0.02 changes nothing. `CompensatedAdamW` stores the
rounding error of each bf16 parameter in a second bf16 tensor and adds it to the next update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from pretrain.optim.base import OptimizerFactory
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class AdamW(OptimizerFactory):
    """Settings of AdamW; calling an instance builds the optimizer.

    Attributes:
        lr: Peak learning rate.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment.
        eps: Added to the square root of the second moment.
        weight_decay: Decoupled weight decay of matrices; biases and norms have none.
        fused: true: torch's fused update; false: the for-each update, which is many times slower on a CPU.
        compensate: true: with bf16-true, keep the rounding errors of the weights; false: plain updates, which stall at
            a small lr.
        moments_dtype: Storage of the moments: float32 · bfloat16 (half the memory) · int8 (a quarter; matrices only).
    """

    lr: PositiveFloat
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    fused: bool = True
    compensate: bool = True
    moments_dtype: Literal["float32", "bfloat16", "int8"] = "float32"

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
        import torch

        groups = decay_groups(named_parameters, self.weight_decay)
        settings: dict[str, Any] = {
            "lr": self.lr,
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "fused": self.fused,
        }
        low = any(p.dtype != torch.float32 for group in groups for p in group["params"])
        if not self.compensate and low and self.moments_dtype != "float32":
            raise UserError(
                f"optimizer.moments_dtype={self.moments_dtype} with optimizer.compensate=false: smaller moments of 16-bit "
                "weights need compensate=true"
            )
        if (self.compensate and low) or self.moments_dtype != "float32":
            from pretrain.optim.compensated import CompensatedAdamW

            return CompensatedAdamW(groups, moments_dtype=self.moments_dtype, **settings)
        return torch.optim.AdamW(groups, **settings)


def decay_groups(named_parameters: Iterable[tuple[str, Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices with ``weight_decay``, and vectors (biases, norms) without. Frozen parameters
    are in neither group, and an empty group is left out.

    Embeddings count as matrices, because a tied embedding is also the head, and weight decay keeps its logits small. The
    biases of a mixture of experts are stacked into matrices and are therefore recognised by their name.
    """
    matrices: list[Parameter] = []
    vectors: list[Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (vectors if parameter.ndim < 2 or name.endswith("bias") else matrices).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
