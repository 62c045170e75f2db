"""Optimizer classes that know nothing of names: those of torch.optim and of most other packages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pretrain.optim.adamw import decay_groups
from pretrain.optim.base import OptimizerFactory

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer


@dataclass(frozen=True)
class PlainOptimizer(OptimizerFactory):
    """Builds an optimizer of a class whose first argument is ``params``.

    Frozen parameters are left out. Where a ``weight_decay`` is given, it applies to matrices only, as with AdamW.

    Attributes:
        create: The class, bound to its settings.
    """

    create: partial[Optimizer]

    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
        if "weight_decay" in self.create.keywords:
            return self.create(decay_groups(named_parameters, self.create.keywords["weight_decay"]))
        return self.create([parameter for _, parameter in named_parameters if parameter.requires_grad])
