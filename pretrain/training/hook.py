"""The base class of hooks: state that lives beside the model, such as a moving average of the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.checkpoint.train_state import TrainState
    from pretrain.strategy.engine import Engine

Purpose = Literal["evaluate", "export"]


class Hook(ABC):
    """State beside the model, which is updated after every step and saved with every checkpoint.

    A hook keeps state and never steers: it may not change the model, the optimizer or the loop. Every rank has one and calls
    its methods at the same points, so they may contain collectives. To add a hook, write a class and a YAML file under
    ``conf/hook`` that nests it under its key; ``hook=[ema]`` selects it.
    """

    @abstractmethod
    def setup(self, engine: Engine) -> None:
        """Create the state anew. The model has its weights, and the strategy has placed it on the devices.

        Afterwards `state_dict` shows the names, shapes, dtypes and sharding of the hook's tensors.
        """

    @abstractmethod
    def after_step(self, state: TrainState, engine: Engine) -> None:
        """Update the state. It is called after each optimizer step; ``state.step`` is the number of steps done."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the state by name: tensors, which may be DTensors, and plain JSON values; no nested mappings."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state. Its tensors have the shapes, dtypes and sharding of those that `state_dict` returns."""

    def averages(self, purpose: Purpose) -> Mapping[str, Mapping[str, Tensor]]:
        """Return further weights by the name under which they are scored or exported: parameter → value, this rank's parts as
        ``engine.weights.trained()`` has them. By default there are none."""
        return {}
