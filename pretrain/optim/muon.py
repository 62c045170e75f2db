"""Muon for the matrices of a model's blocks, AdamW for everything else.

Sources: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (the method), and Liu et al. 2025, arXiv:2502.16982
(weight decay, and the scale with which AdamW's learning rates fit).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pretrain.optim.adamw import AdamW, Beta
from pretrain.optim.base import OptimizerFactory
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

OF_BLOCKS = re.compile(
    r"(^|\.)\d+\."
)  # the name of a parameter in a list of modules, such as `model.layers.3.mlp.up_proj.weight`


@dataclass(frozen=True)
class Muon(OptimizerFactory):
    """Settings of Muon and of the AdamW beside it. AdamW updates embeddings, output head, norms, biases and all other vectors.

    Attributes:
        lr: Peak learning rate of the matrices of the blocks.
        adamw_lr: Peak learning rate of all other weights.
        momentum: Decay rate of the gradients' average.
        nesterov: true: Nesterov momentum.
        newton_schulz_steps: Iterations that orthogonalize an update.
        scale: Size of an update: adamw (as large as AdamW's, so that its learning rates fit) · original.
        beta1: AdamW: decay rate of the first moment.
        beta2: AdamW: decay rate of the second moment.
        eps: AdamW: added to the square root of the second moment.
        weight_decay: Decoupled weight decay of matrices; biases and norms have none.
    """

    lr: PositiveFloat
    adamw_lr: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    newton_schulz_steps: PositiveInt = 5
    scale: Literal["adamw", "original"] = "adamw"
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Sequence[Optimizer]:
        from pretrain.optim.orthogonalized import OrthogonalizedMomentum

        matrices, others = split(named_parameters)
        if not matrices:
            raise UserError("optimizer=muon: no matrix of the model's blocks is trained; use optimizer=adamw")
        muon = OrthogonalizedMomentum(
            [parameter for _, parameter in matrices],
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            steps=self.newton_schulz_steps,
            scale=self.scale,
            weight_decay=self.weight_decay,
        )
        if not others:
            return [muon]
        beside = AdamW(self.adamw_lr, self.beta1, self.beta2, self.eps, self.weight_decay)
        return [muon, beside(others)]

    def check_base(self, name: str) -> None:
        notice(
            f"optimizer=muon: it is not known which optimizer {name} was trained with; a model trained with Adam lost more of "
            "what it knew when all of its weights were trained further by Muon (arXiv:2605.10468); compare with adamw"
        )


def split(
    named_parameters: Iterable[tuple[str, Parameter]],
) -> tuple[list[tuple[str, Parameter]], list[tuple[str, Parameter]]]:
    """Return the trained matrices of the blocks, and all other trained parameters. A stack of matrices, as experts have it,
    counts as matrices; biases that are stacked into one are recognised by their name."""
    trained = [(name, p) for name, p in named_parameters if p.requires_grad]
    inside = {name for name, p in trained if p.ndim in (2, 3) and OF_BLOCKS.search(name) and not name.endswith("bias")}
    return [(n, p) for n, p in trained if n in inside], [(n, p) for n, p in trained if n not in inside]
