"""The base class of model transforms: freezing, LoRA, block expansion, a larger vocabulary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


class ModelTransform(ABC):
    """A change of the model between its creation and the strategy, and the way back when a model is exported.

    To add a transform, write a frozen dataclass with its settings and a YAML file under ``conf/transform`` that nests it
    under its key. ``transform=[lora,freeze]`` applies two in this order.
    """

    def check(self) -> None:
        """Raise ``UserError`` for settings that contradict each other. It is called before the model is read, and must not
        import torch."""
        return

    def prepare(
        self, tokenizer: Any, folder: Path, texts: Callable[[], Iterator[str]] | None, *, in_checkpoint: bool
    ) -> tuple[Any, ModelTransform]:
        """Return the tokenizer of the changed model, and the transform that is applied to the model. It is called before any
        text is tokenized.

        Args:
            tokenizer: That of the model, or of the transform before.
            folder: Where its files are.
            texts: The training documents; ``None`` for a task without any.
            in_checkpoint: Whether ``folder`` is a checkpoint of a run with this transform, whose tokenizer is the changed one.
        """
        return tokenizer, self

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Change the Hugging Face model in place. Every rank calls it, on the same model.

        A parameter may be frozen, moved or renamed, but stays the same object, because its weights are loaded into it by
        its original name. New parameters hold their initial values when the method returns, on the CPU, even if the others
        are on the meta device; only what `derive` returns has none yet. Random values come from torch's default generator,
        which has the same seed on every rank.
        `thaw_at` and `set_lr_factor` say when and how fast a parameter is trained.
        """

    def export(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that ``from_pretrained`` of the original architecture reads.

        ``state_dict`` holds full tensors on the CPU under the names of the changed model. The default is for transforms
        that neither add nor rename parameters.
        """
        return state_dict

    def companions(self, state_dict: dict[str, Tensor]) -> dict[str, dict[str, bytes]]:
        """Return what is written beside the exported ``model/``, as ``{folder: {file: content}}``. ``state_dict`` is that of
        `export`."""
        return {}


def thaw_at(parameter: nn.Parameter, share: float) -> None:
    """Let ``parameter`` be trained only after this share of the run. Until then its gradient is computed and dropped."""
    parameter.thaw_at = share  # type: ignore[attr-defined]


def set_lr_factor(parameter: nn.Parameter, factor: float) -> None:
    """Multiply the learning rate of ``parameter`` by ``factor``."""
    parameter.lr_factor = factor  # type: ignore[attr-defined]


def train_from_row(parameter: nn.Parameter, row: int, *, until: float | None = None) -> None:
    """Train only the rows of ``parameter`` from ``row`` on; with ``until``, all rows after this share of the run. It has no
    weight decay, which would change the others."""
    parameter.requires_grad_(True)
    parameter.first_row = (row, until)  # type: ignore[attr-defined]


def marks(named_parameters: Iterable[tuple[str, nn.Parameter]], mark: str) -> dict[str, Any]:
    """Return by name the values that one of the functions above has given, as the attribute ``mark``, to parameters that are
    trained."""
    return {name: vars(p)[mark] for name, p in named_parameters if p.requires_grad and mark in vars(p)}
