"""The base class of the optimizer factories that a config names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pretrain.optim import learning_rate

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer


class OptimizerFactory(ABC):
    """A callable that builds an optimizer from named parameters.

    To add an optimizer, write a frozen dataclass with its settings in this folder and a YAML file under ``conf/optimizer``.
    `pretrain.optim.lr_factors` splits the groups of any optimizer.
    """

    @abstractmethod
    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer | Sequence[Optimizer]:
        """Return an optimizer of ``named_parameters``, or several that share them out. It is called after the strategy has
        placed (wrapped, sharded) them.

        A parameter group has its own ``lr``, and may have the key ``schedule``, see `Engine.set_lr`.
        """

    def check_base(self, name: str) -> None:
        """Print a notice if this optimizer may not suit the pretrained model ``name``."""
        return

    def peak_lr(self, parameters: int) -> float:
        """Return the rate that ``lr=auto`` stands for in a model with this number of parameters. By default it is a rate for
        Adam."""
        return learning_rate.peak_lr(parameters)
