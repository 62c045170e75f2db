"""Freezing: some parameters are not trained, for the whole run or up to a share of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pretrain.models.transforms.base import ModelTransform, thaw_at
from pretrain.runtime.errors import UserError
from pretrain.runtime.patterns import compiled, matching, summary

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Freeze(ModelTransform):
    """Train only some of the parameters. A name is that of the model (`model.layers.0.mlp.up_proj.weight`) after the transforms
    before this one; a weight that is tied to another one has the names of both.

    Attributes:
        frozen: Regex of the names of parameters that are not trained.
        trainable: Instead of frozen: regex of the names of the only parameters that are trained.
        thaw_at: Share of the run after which the frozen parameters are trained too, e.g. 0.3; null: never.
    """

    frozen: str | None = None
    trainable: str | None = None
    thaw_at: Annotated[float, Field(gt=0, lt=1)] | None = None

    def check(self) -> None:
        if (self.frozen is None) == (self.trainable is None):
            raise UserError("transform.freeze: set one of frozen and trainable, a regex of parameter names")
        key, pattern = self._pattern
        compiled(pattern, key=f"transform.freeze.{key}")

    def apply(self, model: nn.Module) -> None:
        key, pattern = self._pattern
        named = list(model.named_parameters(remove_duplicate=False))
        found = matching(pattern, dict.fromkeys(name for name, _ in named), key=f"transform.freeze.{key}")
        matched = {id(parameter) for name, parameter in named if name in found}
        any_trained = False
        for parameter in model.parameters():
            if (id(parameter) in matched) == (key == "trainable"):
                trained = parameter.is_floating_point() and (key == "trainable" or parameter.requires_grad)
                parameter.requires_grad_(trained)
                any_trained |= parameter.requires_grad
            elif self.thaw_at is None:
                parameter.requires_grad_(False)
            else:
                thaw_at(parameter, self.thaw_at)
        if not any_trained:
            raise UserError(
                f"transform.freeze.{key}={pattern!r} leaves nothing to train; there is {summary(n for n, _ in named)}"
            )

    @property
    def _pattern(self) -> tuple[str, str]:
        """The key that is set, and its value."""
        return ("frozen", self.frozen) if self.frozen is not None else ("trainable", str(self.trainable))
