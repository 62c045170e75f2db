"""What every optimizer of the config has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer


class OptimizerFactory(ABC):
    """To add an optimizer: a frozen dataclass of its settings here, and a YAML under ``conf/optimizer``."""

    @abstractmethod
    def __call__(self, named_parameters: Iterable[tuple[str, Parameter]]) -> Optimizer:
        """The optimizer of these parameters, once the strategy has placed them."""
