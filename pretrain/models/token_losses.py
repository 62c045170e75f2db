"""The fused cross entropy of `pretrain.models.loss` for an evaluation: no gradients, and the loss of every token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.loss import chunk_logits, chunk_rows, row_losses


@torch.no_grad()
def linear_token_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `linear_cross_entropy` returns, to the last bit, and the loss of each row, fp32 [n], 0 without a target.

    Shapes and dtypes are those of `linear_cross_entropy`.
    """
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    summed = torch.zeros((), dtype=torch.float32, device=hidden.device)
    every = []
    with torch.autocast(device_type, enabled=False):
        rows, head = hidden.to(dtype), weight.to(dtype)
        size = chunk_rows(len(rows), len(head), largest=chunk_logits(hidden.device))
        for row, label in zip(rows.split(size), labels.split(size), strict=True):
            logits = F.linear(row, head).float()
            nats, _ = row_losses(logits if bias is None else logits + bias, label)
            summed = summed + nats.sum()
            every.append(nats.squeeze(1))
    return summed, torch.cat(every)
