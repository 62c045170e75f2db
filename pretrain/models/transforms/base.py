"""The base class of model transforms: freezing, LoRA, block expansion, a larger vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class ModelTransform(ABC):
    """A change of the model between its creation and the strategy, and the way back when a model is exported.

    To add a transform, write a frozen dataclass with its settings and a YAML file under ``conf/transform`` that nests it
    under its key. ``transform=[lora,freeze]`` applies two in this order.
    """

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change the Hugging Face model in place. Every rank calls it, on the same model.

        A parameter may be frozen, moved or renamed, but stays the same object, because its weights are loaded into it by
        its original name. New parameters hold their initial values when the method returns, on the CPU, even if the others
        are on the meta device. Random values come from torch's default generator, which has the same seed on every rank.
        """

    def export(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that ``from_pretrained`` of the original architecture reads.

        ``state_dict`` holds full tensors on the CPU under the names of the changed model. The default is for transforms
        that neither add nor rename parameters.
        """
        return state_dict
