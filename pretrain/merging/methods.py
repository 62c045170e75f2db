"""How one tensor is merged from those of several models. Each function reads one tensor at a time and drops it afterwards.

``reads`` are functions that read the tensor of each model. Sums are computed in fp32, or in fp64 where a model has that. Models
with weight 0 are not read, so that a weight of 1 beside zeros returns a model's own bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Read = Callable[[], Tensor]
NEARLY_PARALLEL = 0.9995  # cosine of an angle whose sine is too small to divide by


def linear(reads: Sequence[Read], weights: Sequence[float]) -> Tensor:
    """Return the sum of weight × tensor. Source: model soups, Wortsman et al. 2022 (arXiv:2203.05482)."""
    used = [(read, weight) for read, weight in zip(reads, weights, strict=True) if weight]
    total = _wide(used[0][0]()).mul_(used[0][1])
    for read, weight in used[1:]:
        total.add_(read().to(total.dtype), alpha=weight)
    return total


def slerp(reads: Sequence[Read], weights: Sequence[float]) -> Tensor:
    """Return the point at the fraction ``weights[1]`` of the arc from the first tensor to the second, each flattened to one
    vector. Tensors of nearly the same direction, or of norm 0, are interpolated linearly.

    Source: Shoemake 1985, Animating rotation with quaternion curves, as applied to weights by mergekit.
    """
    first, second, t = _wide(reads[0]()), _wide(reads[1]()), weights[1]
    size = float(first.double().norm() * second.double().norm())
    cosine = float((first * second).sum(dtype=torch.float64)) / size if size else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return first.mul_(1 - t).add_(second, alpha=t)
    angle = math.acos(cosine)
    own, other = (math.sin(share * angle) / math.sin(angle) for share in (1 - t, t))
    return first.mul_(own).add_(second, alpha=other)


def task_arithmetic(reads: Sequence[Read], weights: Sequence[float], *, base: Read, scale: float) -> Tensor:
    """Return base + scale × the sum of weight × (tensor - base). Source: Ilharco et al. 2022 (arXiv:2212.04089)."""
    start = _wide(base())
    change = torch.zeros_like(start)
    for read, weight in zip(reads, weights, strict=True):
        change.add_(read().to(start.dtype) - start, alpha=weight)
    return start.add_(change, alpha=scale)


def ties(reads: Sequence[Read], weights: Sequence[float], *, base: Read, scale: float, density: float) -> Tensor:
    """Return base + scale × the merged change. Of each model's change from the base only the largest ``density`` of the values
    are kept; where the kept values have different signs, those of the sign with the larger weighted sum are averaged.

    Source: TIES-Merging, Yadav et al. 2023 (arXiv:2306.01708).
    """
    start = _wide(base())
    total = torch.zeros_like(start)
    for read, weight in zip(reads, weights, strict=True):  # the first pass elects the signs
        total.add_(_trimmed(read().to(start.dtype) - start, density), alpha=weight)
    sign = total.sign()
    total.zero_()
    counted = torch.zeros_like(start)
    for read, weight in zip(reads, weights, strict=True):  # the second pass averages the values of that sign
        change = _trimmed(read().to(start.dtype) - start, density)
        agrees = (change.sign() == sign) & (change != 0)
        total.add_(change.mul_(agrees), alpha=weight)
        counted.add_(agrees, alpha=weight)
    return start.add_(total.div_(torch.where(counted == 0, 1, counted)), alpha=scale)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """Set all but the largest ``density`` of the values, by size, to 0, in place. At least one value is kept."""
    flat = change.reshape(-1)
    dropped = flat.numel() - max(1, round(density * flat.numel()))
    if dropped > 0:
        flat[torch.topk(flat.abs(), dropped, largest=False, sorted=False).indices] = 0
    return flat.reshape(change.shape)


def _wide(tensor: Tensor) -> Tensor:
    """Return a copy in which sums are computed."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)
