"""The norm of gradients, over the shards of all ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretrain.distributed import sharding as tensors


def norm_of(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of the gradients over all shards of all ranks. This is a collective if there are shards."""
    return total_norm([norm_of_rows(p.grad) for p in parameters if p.grad is not None])


def norm_of_rows(tensor: Tensor) -> Tensor:
    """Return the norm of each row of a matrix, from which `total_norm` is computed.

    On a CPU torch's norm of a whole matrix of 38 M fp32 numbers has a relative error of 3e-3, that of its rows 3e-7.
    """
    return torch.linalg.vector_norm(tensor, dim=-1) if tensor.ndim > 1 else tensor


def total_norm(rows: list[Tensor]) -> Tensor:
    """Return the norm over all ``rows``, of which a rank may hold shards. This is a collective if it does."""
    return tensors.full_tensor(nn.utils.get_total_norm(rows))
