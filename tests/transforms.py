"""Model transforms as a user would write them."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn import functional as F


class LoraLinear(nn.Module):
    """``base`` plus a trained product of two small matrices."""

    def __init__(self, base: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b) * self.scale


class Lora:
    """Low-rank adaptation (Hu et al., arXiv:2106.09685) of the linear layers whose name matches ``targets``."""

    def __init__(self, rank: int = 4, alpha: float = 8.0, targets: str = r"[qv]_proj$") -> None:
        self.rank, self.scale, self.targets = rank, alpha / rank, re.compile(targets)

    def apply(self, model: nn.Module) -> None:
        model.requires_grad_(False)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and self.targets.search(name):
                owner, _, child = name.rpartition(".")
                setattr(model.get_submodule(owner), child, LoraLinear(module, self.rank, self.scale))

    def export(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        merged = {}
        for name, tensor in state_dict.items():
            if name.endswith(".base.weight"):
                layer = name.removesuffix(".base.weight")
                tensor = tensor + self.scale * (state_dict[f"{layer}.b"] @ state_dict[f"{layer}.a"])
            if not name.endswith((".a", ".b")):
                merged[name.replace(".base.", ".")] = tensor
        return merged


class NotExported(Lora):
    """LoRA that forgets the way back."""

    def export(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state_dict


class Freeze:
    """No parameter whose name matches ``frozen`` is trained."""

    def __init__(self, frozen: str) -> None:
        self.frozen = re.compile(frozen)

    def apply(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if self.frozen.search(name):
                parameter.requires_grad_(False)

    def export(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state_dict
