"""Adafactor (Shazeer & Stern 2018, arXiv:1804.04235): a second moment of one number for each row and column, no first moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat

from pretrain.optim import learning_rate
from pretrain.optim.adamw import decay_groups
from pretrain.optim.base import OptimizerFactory

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

RELATIVE = 30.0  # a rate relative to the size of the weights, over Adam's: a matrix whose elements are about 1/30 large


@dataclass(frozen=True)
class Adafactor(OptimizerFactory):
    """Settings of Adafactor; calling an instance builds the optimizer.

    Attributes:
        lr: Peak learning rate, relative to the size of each weight's elements.
        beta2_decay: Power of the step by which the second moment is averaged.
        smallest_scale: Least size of a weight's elements that the learning rate is multiplied by.
        clip: Largest root mean square of an update before the learning rate.
        weight_decay: Decoupled weight decay of matrices, times the size of their elements; biases and norms have none.
    """

    lr: PositiveFloat
    beta2_decay: Annotated[float, Field(lt=0, ge=-1)] = -0.8
    smallest_scale: PositiveFloat = 1e-3
    clip: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.1

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
        from pretrain.optim.factored import FactoredOptimizer

        return FactoredOptimizer(
            decay_groups(named_parameters, self.weight_decay),
            lr=self.lr,
            beta2_decay=self.beta2_decay,
            smallest_scale=self.smallest_scale,
            clip=self.clip,
        )

    def peak_lr(self, parameters: int) -> float:
        return RELATIVE * learning_rate.peak_lr(parameters)
