"""Losses beside the fused one of `pretrain.models.loss`: that of an evaluation, which has no gradients and the loss of every
token, and that of models whose logits are their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.models.loss import chunk_logits, chunk_rows, row_losses


class Scores(NamedTuple):
    """What an evaluation computes of one batch.

    Attributes:
        loss: summed loss in nats, an fp32 scalar.
        nats: loss of each token, fp32 [n, S], 0 without a target.
        kl: summed KL(base ‖ now) in nats, an fp32 scalar; ``None`` without states of the base model.
        hidden: last hidden states [n, S, h]; ``None`` where they were not asked for.
    """

    loss: Tensor
    nats: Tensor
    kl: Tensor | None = None
    hidden: Tensor | None = None


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


def cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return the summed cross entropy of ``logits`` [n, S, v] against ``labels`` [n, S], in which ``weights`` [n * S] is the
    factor of each token; ``None``: 1 for all."""
    reduction = "sum" if weights is None else "none"
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction=reduction)
    return loss if weights is None else (loss * weights).sum()
