"""New parameters whose initial values are computed from those of the model, row by row: copies of a block, a larger embedding.

Where the model's own parameters are on the meta device, their values are in files. A derived parameter is then on the meta
device too, and a rank computes only those of its rows that it needs, when it reads the rows that they are computed from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[Tensor, int, int], Tensor]  # rows start … stop - 1 of a parameter or buffer that the model had before
Rows = Callable[[Read, int, int], Tensor]  # the values of rows start … stop - 1 of a new parameter


def derive(like: Tensor, rows: Rows, shape: tuple[int, ...] | None = None) -> nn.Parameter:
    """Return a new parameter of ``shape``, or that of ``like``, with the dtype of ``like``, whose rows ``rows`` computes.

    ``rows`` may read any parameter that the model has now. If ``like`` is on the meta device, it is called when weights are
    read from files, otherwise at once.
    """
    shape = tuple(like.shape) if shape is None else shape
    if not like.is_meta:
        return nn.Parameter(rows(_now, 0, shape[0]).to(like.dtype).contiguous())
    parameter = nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"))
    parameter.rows = rows  # type: ignore[attr-defined]
    return parameter


def is_derived(tensor: Tensor) -> bool:
    return hasattr(tensor, "rows")


def rows_of(tensor: Any, read: Read, start: int, stop: int) -> Tensor:
    """Return rows of a derived parameter, whose origins ``read`` reads."""
    rows: Tensor = tensor.rows(read, start, stop)
    return rows.to(tensor.dtype)


def _now(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor.detach()[start:stop].clone()
