"""How a model computes its logits from the output of its head: unchanged, scaled, or capped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitsMap:
    """Logits are ``cap`` × tanh(``scale`` × z / ``cap``) of the head's output z; without a ``cap`` they are ``scale`` × z.

    Attributes:
        scale: Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``.
        cap: Gemma 2's ``final_logit_softcapping``.
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_plain(self) -> bool:
        return self == LogitsMap()

    def __call__(self, outputs: Tensor) -> Tensor:
        scaled = outputs if self.scale == 1 else outputs * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of the map where its values are ``logits``."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


def candidates(config: Any) -> Iterator[LogitsMap]:
    """Yield the maps that a config may mean, the plain one first."""
    yield LogitsMap()

    def known(key: str) -> float | None:
        value = getattr(config, key, None)
        return float(value) if isinstance(value, int | float) and value else None

    factors = [known(key) for key in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    divisor = known("logits_scaling")
    scales = [1.0, *(factor for factor in factors if factor), *([1 / divisor] if divisor else [])]
    caps = dict.fromkeys([None, known("final_logit_softcapping")])
    yield from (LogitsMap(scale, cap) for scale, cap in product(scales, caps))
