"""The KL divergence between the next-token distributions of two linear heads, computed in chunks of rows, so that the logits of
all positions never exist at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.models.loss import chunk_rows


class Head(NamedTuple):
    """The ``weight`` [v, h] and ``bias`` [v] or ``None`` of a linear head."""

    weight: Tensor
    bias: Tensor | None

    def to(self, device: torch.device, *, copy: bool = False) -> Head:
        """Return the head on ``device``, detached; a new one with ``copy``."""
        bias = None if self.bias is None else self.bias.detach().to(device, copy=copy)
        return Head(self.weight.detach().to(device, copy=copy), bias)


@torch.no_grad()
def kl_divergence(base: Tensor, base_head: Head, now: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Return the sum of KL(base ‖ now) in nats, an fp32 scalar, over the rows whose label is not ``IGNORE``.

    ``base`` and ``now`` are the last hidden states [n, h] of both models for the same tokens; ``labels`` is int64 [n]. The
    matmuls run in the autocast dtype, or in that of the weights; softmax and sums run in fp32. Two equal models have 0.
    """
    device_type = now.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else head.weight.dtype
    base_head = base_head.to(now.device)
    size = chunk_rows(2 * len(labels), len(head.weight))  # two sets of logits
    summed = torch.zeros((), dtype=torch.float32, device=now.device)
    with torch.autocast(device_type, enabled=False):
        for base_rows, rows, label in zip(base.split(size), now.split(size), labels.split(size), strict=True):
            log_p = torch.log_softmax(_logits(base_rows, base_head, dtype), dim=1)
            log_q = torch.log_softmax(_logits(rows, head, dtype), dim=1)
            summed += ((log_p.exp() * (log_p - log_q)).sum(1) * (label != IGNORE)).sum()
    return summed


def _logits(rows: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    logits = F.linear(rows.to(dtype), head.weight.to(dtype)).float()
    return logits if head.bias is None else logits + head.bias
