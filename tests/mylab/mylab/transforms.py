"""Changes of the model: freezing, and low-rank adapters."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain import ModelTransform


@dataclass(frozen=True)
class Freeze(ModelTransform):
    """Train only parameters whose name does not match ``pattern``."""

    pattern: str

    def apply(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if re.search(self.pattern, name):
                parameter.requires_grad_(False)


class LoraLinear(nn.Module):
    """``base(x) + scale · x Aᵀ Bᵀ``; only A [rank, in] and B [out, rank] are trained (Hu et al., arXiv:2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        like = {"dtype": base.weight.dtype, "device": "cpu"}
        self.A = nn.Parameter(torch.randn(rank, base.in_features, **like) / rank)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T * self.scale


@dataclass(frozen=True)
class Lora(ModelTransform):
    """Adapters for the linear layers whose name matches ``pattern``; the export adds them to the weights."""

    pattern: str
    rank: int = 4
    scale: float = 1.0

    def apply(self, model: nn.Module) -> None:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and re.search(self.pattern, name):
                model.set_submodule(name, LoraLinear(layer, self.rank, self.scale))

    def export(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {name: tensor for name, tensor in state_dict.items() if not name.endswith((".A", ".B"))}
        for name in (name.removesuffix(".A") for name in state_dict if name.endswith(".A")):
            update = state_dict[f"{name}.B"] @ state_dict[f"{name}.A"] * self.scale
            plain[f"{name}.weight"] = plain.pop(f"{name}.base.weight") + update
        return plain
