"""The cross entropy of a linear head, worked out in chunks of rows: the logits of all positions never exist at once.

Gradients are made in the forward pass, chunk by chunk, so the head costs the same three matrix products as the plain
way and nothing is computed twice; memory falls from rows × vocabulary to chunk × vocabulary. (The idea is that of
Liger-Kernel, arXiv:2410.10989; torch's own `linear_cross_entropy` sums bf16 in bf16 and leaves compiled graphs.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.batch import IGNORE

# Logits at a time, 128 MiB in fp32: with fewer, adding to the weight's gradient costs more than it saves.
CHUNK_LOGITS = 2**25
ROOM = 64.0  # fp16 can't hold p - one-hot ~ 1/V well; a power of two takes it up and down again without rounding


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Summed cross entropy (nats, fp32 scalar) of ``hidden @ weight.T + bias`` against ``labels``.

    ``hidden`` [n, h] · ``weight`` [v, h] · ``bias`` [v] or None · ``labels`` int64 [n], ``IGNORE`` where there is no
    target. Under autocast the products run in its type; softmax, loss and the sum of the weight's gradient in fp32.
    """
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    with torch.autocast(device_type, enabled=False):
        if not torch.is_grad_enabled():
            return _forward(hidden, weight, bias, labels, dtype, wants=(False, False, False))[0]
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, dtype)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        loss, *grads = _forward(hidden, weight, bias, labels, dtype, wants=ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Not in place: the saved gradients are those of another backward too, should there be one.
        scaled = (None if saved is None else _times(saved, grads[0]) for saved in ctx.saved_tensors)
        return (*scaled, None, None)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    dtype: torch.dtype,
    *,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and its gradients for hidden, weight and bias as far as ``wants`` says."""
    rows, head = hidden.to(dtype), weight.to(dtype)
    room = ROOM if dtype == torch.float16 else 1.0
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hidden_grads: list[Tensor] = []
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None
    size = chunk_rows(len(rows), len(head))
    for row, label in zip(rows.split(size), labels.split(size), strict=True):
        logits = F.linear(row, head).float()
        if bias is not None:
            logits = logits + bias
        one_chunk = _traced_chunk if torch.compiler.is_compiling() else _eager_chunk
        chunk_loss, grad = one_chunk(logits, label)
        loss = loss + chunk_loss
        if bias is not None and wants[2]:
            bias_grad = grad.sum(0) if bias_grad is None else bias_grad + grad.sum(0)
        scaled = (grad * room if room != 1 else grad).to(dtype)
        if wants[0]:
            hidden_grads.append(scaled @ head / room if room != 1 else scaled @ head)
        if wants[1]:
            weight_grad = _add_product(weight_grad, scaled, row, 1 / room)
    return (
        loss,
        torch.cat(hidden_grads).to(hidden.dtype) if hidden_grads else None,
        None if weight_grad is None else weight_grad.to(weight.dtype),
        None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
    )


def _eager_chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss and its gradient for fp32 ``logits`` [rows, v], in whose memory the gradient comes."""
    counts, target = (labels != IGNORE).unsqueeze(1), labels.clamp(min=0).unsqueeze(1)
    top, at_target = logits.amax(1, keepdim=True), logits.gather(1, target)
    p = torch.softmax(logits, 1, out=logits)
    # max p = 1 / sum exp(z - max z): the log-sum-exp is had for one more look at p.
    loss = ((top - p.amax(1, keepdim=True).log() - at_target) * counts).sum()
    p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
    return loss, p.mul_(counts)


def _traced_chunk(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same without writing in place, as the compiler fuses it best: fp32 logits then never exist in memory."""
    counts, target = (labels != IGNORE).unsqueeze(1), labels.clamp(min=0).unsqueeze(1)
    log_sum = torch.logsumexp(logits, 1, keepdim=True)
    loss = ((log_sum - logits.gather(1, target)) * counts).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == target
    return loss, (torch.exp(logits - log_sum) - is_target.float()) * counts


def _times(saved: Tensor, grad: Tensor) -> Tensor:
    """The product in ``saved``'s type; a scaled loss's gradient can be more than fp16 holds."""
    if saved.dtype == torch.float16:
        return (saved.float() * grad).to(saved.dtype)
    return saved * grad.to(saved.dtype)


def _add_product(total: Tensor | None, grad: Tensor, row: Tensor, scale: float) -> Tensor:
    """``total + scale * grad.T @ row`` in fp32, into ``total`` and without a temporary where that can be."""
    if total is not None and grad.dtype == torch.float32:
        return total.addmm_(grad.t(), row, alpha=scale)
    product = grad.t() @ row
    if total is None:
        return product.float() * scale if scale != 1 else product.float()
    return total.add_(product, alpha=scale)


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Rows at a time: near ``CHUNK_LOGITS`` logits, shared evenly between the chunks, a multiple of 8."""
    chunks = max(1, round(rows * vocabulary / CHUNK_LOGITS))
    return max(8, (-(-rows // chunks) + 7) // 8 * 8)
