"""The KL divergence between the next-token distributions of two linear heads, computed in chunks of rows, so that the logits of
all positions never exist at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.models.logits_map import LogitsMap
from pretrain.models.loss import FP16_GRAD_SCALE, accumulate_weight_grad, chunk_rows, times


class Head(NamedTuple):
    """The ``weight`` [v, h] and ``bias`` [v] or ``None`` of a linear head."""

    weight: Tensor
    bias: Tensor | None

    def to(self, device: torch.device, *, copy: bool = False) -> Head:
        """Return the head on ``device``, detached; a new one with ``copy``."""
        bias = None if self.bias is None else self.bias.detach().to(device, copy=copy)
        return Head(self.weight.detach().to(device, copy=copy), bias)


def kl_divergence(
    base: Tensor,
    base_head: Head,
    now: Tensor,
    head: Head,
    labels: Tensor,
    row_weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
    logits_map: LogitsMap | None = None,
) -> Tensor:
    """Return the sum of KL(base ‖ now) in nats, an fp32 scalar, over the rows whose label is not ``IGNORE``.

    ``base`` and ``now`` are the last hidden states [n, h] of both models for the same tokens; ``labels`` is int64 [n], and
    ``row_weights``, fp32 [n], the factor of each row in the sum (``None``: 1). Logits are ``logits_map`` of the heads' outputs
    (``None``: these), divided by ``temperature``. The base model gets no gradient. The matmuls run in the autocast dtype, or in
    that of the weights; all else runs in fp32. Two equal models have 0.
    """
    device_type = now.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else head.weight.dtype
    base_head = base_head.to(now.device)
    factors = (labels != IGNORE).float() if row_weights is None else (labels != IGNORE) * row_weights
    with torch.autocast(device_type, enabled=False):
        found: Tensor = _KlDivergence.apply(
            now, *head, base.detach(), base_head, factors, dtype, temperature, logits_map or LogitsMap()
        )
    return found


class _KlDivergence(torch.autograd.Function):
    """The divergence, with its gradients computed in the forward, as `pretrain.models.loss` does for the cross entropy."""

    # For each chunk of rows x [c, h] of the model and b [c, h] of the base model, at temperature T:
    #   p = softmax(f(b W_b^T) / T), q = softmax(f(x W^T) / T)    [c, v], in fp32; f scales or caps logits
    #   kl += sum over rows of factor * sum(p * (log p - log q))
    #   g   = factor * (q - p) / T * f'                           d kl / d (x W^T)
    #   dx, dW, db as for the cross entropy

    @staticmethod
    def forward(
        ctx: Any,
        now: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base: Tensor,
        base_head: Head,
        factors: Tensor,
        dtype: torch.dtype,
        temperature: float,
        logits_map: LogitsMap,
    ) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        scale = FP16_GRAD_SCALE if dtype == torch.float16 else 1.0
        summed = torch.zeros((), dtype=torch.float32, device=now.device)
        rows, matrix = now.to(dtype), weight.to(dtype)
        hidden_grads: list[Tensor] = []
        weight_grad: Tensor | None = None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        size = chunk_rows(2 * len(factors), len(weight))  # two sets of logits
        for b, x, factor in zip(base.split(size), rows.split(size), factors.unsqueeze(1).split(size), strict=True):
            log_p = torch.log_softmax(logits_map(_outputs(b, base_head, dtype)) / temperature, dim=1)
            logits = logits_map(_outputs(x, Head(matrix, bias), dtype))
            log_q = torch.log_softmax(logits / temperature, dim=1)
            p = log_p.exp()
            summed += ((p * (log_p - log_q)).sum(1, keepdim=True) * factor).sum()
            if not any(needs):
                continue
            grad = (log_q.exp() - p) * (factor / temperature)
            if not logits_map.is_plain:
                grad *= logits_map.slope(logits)
            if bias_grad is not None:
                bias_grad += grad.sum(0)
            scaled = (grad * scale).to(dtype)
            if needs[0]:
                hidden_grads.append(scaled @ matrix / scale)
            if needs[1]:
                weight_grad = accumulate_weight_grad(weight_grad, scaled, x, 1 / scale)
        ctx.save_for_backward(
            torch.cat(hidden_grads).to(now.dtype) if hidden_grads else None,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
        )
        return summed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if saved is None else times(saved, grads[0]) for saved in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None)


def _outputs(rows: Tensor, head: Head, dtype: torch.dtype) -> Tensor:
    outputs = F.linear(rows.to(dtype), head.weight.to(dtype)).float()
    return outputs if head.bias is None else outputs + head.bias
