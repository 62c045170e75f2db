"""Matrix products of forward and backward in 8-bit floating point, by torchao. Weights, gradients and moments stay as they are.

Source: https://github.com/pytorch/ao/tree/main/torchao/float8 and Micikevicius et al. 2022 (arXiv:2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pretrain.models.transforms.base import ModelTransform
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import nn

CAPABILITY = (8, 9)  # the first GPUs with products of 8-bit floating point
MULTIPLE = 16  # of which the sides of a matrix must be multiples


@dataclass(frozen=True)
class Float8(ModelTransform):
    """Convert the linear layers of the blocks whose sides are multiples of 16; the output head and all others stay as they are.

    Only training computes in 8 bits. Evaluation, generation and the probes of the model use the weights as they are exported.

    Attributes:
        recipe: Scales of the 8-bit numbers: tensorwise (one a tensor; the fastest) · rowwise (one a row; the most accurate).
        emulate: true: compute the same numbers without 8-bit products, slowly and on any device; to try it out.
    """

    recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    emulate: bool = False

    @property
    def needs_compile(self) -> bool:
        """Whether the conversions must be fused with other operations: in eager mode they take longer than the products save."""
        return not self.emulate

    def apply(self, model: nn.Module) -> None:
        if find_spec("torchao") is None:
            raise UserError("transform=[float8] needs torchao: pip install 'pretrain[float8]'")
        import torch

        if not self.emulate and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < CAPABILITY):
            raise UserError(
                "transform=[float8] needs a GPU with 8-bit floating point (compute capability 8.9 or later: L4, H100, …); "
                "transform.float8.emulate=true computes the same numbers slowly"
            )
        names = convertible(model)
        if not names:
            raise UserError(
                f"transform=[float8]: {type(model).__name__} has no linear layer in its blocks whose sides are multiples of "
                f"{MULTIPLE}"
            )
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = _with_emulation(Float8LinearConfig.from_recipe_name(self.recipe), self.emulate)
        convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
        for name in names:
            _compute_plainly_in_eval(model.get_submodule(name))


def convertible(model: Any) -> set[str]:
    """Return the names of the linear layers that are converted: not the output head, whose logits must not be rounded."""
    from torch import nn

    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not module.in_features % MULTIPLE
        and not module.out_features % MULTIPLE
    }


def _with_emulation(config: Any, emulate: bool) -> Any:
    from dataclasses import replace

    return replace(config, emulate=True) if emulate else config


def _compute_plainly_in_eval(module: Any) -> None:
    """Make a converted layer a plain linear one outside of training."""
    from torch.nn import functional as F

    kind = type(module)

    def forward(self: Any, inputs: Any) -> Any:
        if self.training:
            return kind.forward(self, inputs)
        return F.linear(inputs, self.weight, self.bias)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
