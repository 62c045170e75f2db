"""The fused cross entropy of a linear head. It is computed in chunks of rows, so the logits of all positions never exist at
once.

The gradients are computed in the forward pass, chunk by chunk. The head therefore costs the same three matmuls as the unfused
computation, nothing is recomputed, and memory falls from rows × vocabulary to chunk × vocabulary. The idea is that of
Liger-Kernel (arXiv:2410.10989). torch's own `linear_cross_entropy` is not used: it sums bf16 in bf16 and breaks compiled
graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.data.batch import IGNORE
from pretrain.models import compilation
from pretrain.models.torch_internals import keeps_graph

# Logits per chunk, 128 MiB in fp32. With smaller chunks, accumulating the weight's gradient costs more than the memory saves.
CHUNK_LOGITS = 2**25
# Logits that a CPU turns into gradients at a time: 4 MiB in fp32, which stay in its cache through all passes over them. Rows do
# not depend on each other, so this changes no bit.
BLOCK_LOGITS = 2**20
DEVICE_SHARE = 128  # of a GPU's memory for the fp32 logits of a chunk: 640 MiB of 80 GiB
# Factor by which logit gradients are scaled up before they are cast to fp16, where p - one_hot ~ 1/V would lose bits. It is a
# power of two, so that scaling up and down again does not round.
FP16_GRAD_SCALE = 64.0


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None = None,
    *,
    compiled: bool = False,
) -> Tensor:
    """Return the summed cross entropy (nats, fp32 scalar) of ``hidden @ weight.T + bias`` against ``labels``.

    ``hidden`` is [n, h], ``weight`` [v, h], ``bias`` [v] or None, and ``labels`` int64 [n] with ``IGNORE`` where there is no
    target. ``row_weights``, fp32 [n], is the factor of each row in the sum; ``None``: 1 for all.

    Under autocast the matmuls run in the autocast dtype; softmax, loss and the accumulation of the weight's gradient always
    run in fp32.
    """
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
    with torch.autocast(device_type, enabled=False):
        if not torch.is_grad_enabled():
            needs_grad = (False, False, False)
            return _forward(hidden, weight, bias, labels, row_weights, dtype, needs_grad=needs_grad, compiled=compiled)[
                0
            ]
        loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, labels, row_weights, dtype, compiled)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The autograd function of the loss: ``forward`` computes loss and gradients, ``backward`` scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        row_weights: Tensor | None,
        dtype: torch.dtype,
        compiled: bool,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[:3]
        given = hidden, weight, bias, labels, row_weights, dtype
        loss, *grads = _forward(*given, needs_grad=needs_grad, compiled=compiled)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Else backward may be called again on the same graph. The compiler decides by itself what it overwrites.
        in_place = not (torch.compiler.is_compiling() or keeps_graph())
        scaled = (None if saved is None else times(saved, grads[0], in_place=in_place) for saved in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    dtype: torch.dtype,
    *,
    needs_grad: tuple[bool, bool, bool],
    compiled: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss and its gradients with respect to hidden, weight and bias; ``None`` where ``needs_grad`` is False."""
    # For each chunk of rows x [c, h] with labels y, head W [v, h] and bias b [v]:
    #   z       = x W^T + b                 logits [c, v]: the matmul runs in dtype, the result is cast to fp32
    #   loss   += sum(logsumexp(z) - z[y])  in fp32, over the rows that have a target, each times its weight
    #   g       = softmax(z) - one_hot(y)   d loss / d z, 0 in rows without a target, each times its weight
    #   dx      = g W                       [c, h]: the gradient of this chunk's rows is final
    #   dW     += g^T x                     [v, h]: the matmul runs in dtype, accumulated in fp32
    #   db     += sum over rows of g        [v], in fp32
    # z and g exist for one chunk at a time. backward() multiplies dx, dW and db by the incoming scalar gradient.
    rows, head = hidden.to(dtype), weight.to(dtype)
    grad_scale = FP16_GRAD_SCALE if dtype == torch.float16 else 1.0
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    hidden_grads: list[Tensor] = []
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None
    size = chunk_rows(len(rows), len(head), even=compiled, largest=chunk_logits(hidden.device))
    sums = bias is not None and needs_grad[2]
    weights = [None] * -(-len(labels) // size) if row_weights is None else row_weights.split(size)
    one_chunk = compilation.compiled(_chunk) if compiled else _chunk
    # One block of memory for the logits of all chunks. A CPU's kernel would fill that of each chunk with zeros first.
    space = None if compiled or torch.compiler.is_compiling() else head.new_empty(min(size, len(rows)), len(head))
    for row, label, row_weight in zip(rows.split(size), labels.split(size), weights, strict=True):
        chunk_loss, scaled, grad_sum = one_chunk(row, head, bias, label, row_weight, grad_scale, sums, space)
        loss = loss + chunk_loss
        if grad_sum is not None:
            bias_grad = grad_sum if bias_grad is None else bias_grad + grad_sum
        if needs_grad[0]:
            hidden_grads.append(scaled @ head / grad_scale if grad_scale != 1 else scaled @ head)
        if needs_grad[1]:
            weight_grad = accumulate_weight_grad(weight_grad, scaled, row, 1 / grad_scale)
    return (
        loss,
        torch.cat(hidden_grads).to(hidden.dtype) if hidden_grads else None,
        None if weight_grad is None else weight_grad.to(weight.dtype),
        None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
    )


def _chunk(
    row: Tensor,
    head: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_weights: Tensor | None,
    grad_scale: float,
    sum_grad: bool,
    space: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the loss of a chunk, the gradient of its logits × ``grad_scale`` in the dtype of ``head``, and with ``sum_grad``
    the unscaled gradient summed over rows, in fp32. The logits are written to ``space``, if there is any."""
    logits = F.linear(row, head) if space is None else torch.mm(row, head.t(), out=space[: len(row)])
    one_chunk = _traced_chunk if torch.compiler.is_compiling() else _eager_chunk
    return one_chunk(logits, labels, row_weights, bias, grad_scale, sum_grad=sum_grad)


def _row_factors(labels: Tensor, row_weights: Tensor | None) -> Tensor:
    """Return the factor of each row in the sum, [rows, 1]: 0 without a target, elsewhere its weight."""
    counts = labels != IGNORE
    return (counts if row_weights is None else counts * row_weights).unsqueeze(1)


def _eager_chunk(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None = None,
    bias: Tensor | None = None,
    grad_scale: float = 1.0,
    *,
    sum_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the same as `_chunk` for the products ``logits`` [rows, v], which the gradient overwrites in memory."""
    counts, target = _row_factors(labels, row_weights), labels.clamp(min=0).unsqueeze(1)
    rows = block_rows(logits) if not sum_grad else len(logits)  # one sum over all rows, in one order
    weights = [None] * -(-len(labels) // rows) if row_weights is None else row_weights.split(rows)
    blocks = logits.split(rows), labels.split(rows), weights, target.split(rows), counts.split(rows)
    losses, p = [], logits
    for block, label, weight, at, count in zip(*blocks, strict=True):
        z = block.float() if bias is None else block.float() + bias
        nats, p = row_losses(z, label, weight)
        losses.append(nats)
        p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype)).mul_(count)
        if p is not block:
            block.copy_(p.mul(grad_scale) if grad_scale != 1 else p)
    return torch.cat(losses).sum(), logits, p.sum(0) if sum_grad else None


def row_losses(logits: Tensor, labels: Tensor, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss of each row of fp32 ``logits`` [rows, v], [rows, 1], and the softmax, which overwrites the logits in
    memory."""
    counts, target = _row_factors(labels, row_weights), labels.clamp(min=0).unsqueeze(1)
    top, at_target = logits.amax(1, keepdim=True), logits.gather(1, target)
    p = torch.softmax(logits, 1, out=logits)
    # max p = 1 / sum exp(z - max z), so logsumexp(z) = max z - log(max p): no second pass of exponentials is needed.
    return (top - p.amax(1, keepdim=True).log() - at_target) * counts, p


def block_rows(logits: Tensor) -> int:
    """Return the number of rows of ``logits`` [rows, v] that become gradients at a time: on a GPU all of them."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(BLOCK_LOGITS // logits.shape[1], torch.get_num_threads())


def _traced_chunk(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor | None = None,
    bias: Tensor | None = None,
    grad_scale: float = 1.0,
    *,
    sum_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the same as `_eager_chunk` without in-place operations, which the compiler fuses best: the fp32 logits then never
    exist in memory."""
    counts, target = _row_factors(labels, row_weights), labels.clamp(min=0).unsqueeze(1)
    z = logits.float() if bias is None else logits.float() + bias
    log_sum = torch.logsumexp(z, 1, keepdim=True)
    loss = ((log_sum - z.gather(1, target)) * counts).sum()
    is_target = torch.arange(z.shape[1], device=z.device) == target
    grad = (torch.exp(z - log_sum) - is_target.float()) * counts
    scaled = (grad * grad_scale if grad_scale != 1 else grad).to(logits.dtype)
    return loss, scaled, grad.sum(0) if sum_grad else None


def times(saved: Tensor, grad: Tensor, *, in_place: bool = False) -> Tensor:
    """Return ``saved * grad`` in the dtype of ``saved``, with ``in_place`` in its memory. The gradient of a scaled loss can
    exceed the range of fp16, so fp16 is multiplied in fp32."""
    if saved.dtype == torch.float16:
        return (saved.float() * grad).to(saved.dtype)
    grad = grad.to(saved.dtype)
    return saved.mul_(grad) if in_place else saved * grad


def accumulate_weight_grad(total: Tensor | None, grad: Tensor, row: Tensor, scale: float) -> Tensor:
    """Return ``total + scale * grad.T @ row`` in fp32. An existing ``total`` is updated in place, and with
    fp32 gradients without a temporary tensor."""
    if total is not None and grad.dtype == torch.float32:
        return total.addmm_(grad.t(), row, alpha=scale)
    product = grad.t() @ row
    if total is None:
        return product.float() * scale if scale != 1 else product.float()
    return total.add_(product, alpha=scale)


def chunk_logits(device: torch.device) -> int:
    """Return the number of logits per chunk on ``device``. On a GPU they are 1/128 of its memory in fp32, if that is more than
    ``CHUNK_LOGITS``: few large matmuls, and few additions to the weight's gradient. Of the device's memory and not of what is
    free, so that a resumed run sums in the same order."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return CHUNK_LOGITS
    return max(CHUNK_LOGITS, torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE // 4)


def chunk_rows(rows: int, vocabulary: int, *, even: bool = False, largest: int | None = None) -> int:
    """Return the number of rows per chunk: about ``largest`` (``CHUNK_LOGITS``) logits, chunks of equal size, a multiple of 8.
    With ``even``, the last chunk has as many rows as the others where ``rows`` can be divided so, because each shape is
    compiled."""
    chunks = max(1, round(rows * vocabulary / (largest or CHUNK_LOGITS)))
    if even:
        chunks = next((n for n in range(chunks, 2 * chunks) if rows % n == 0), chunks)
        if rows % chunks == 0:
            return rows // chunks
    return max(8, (-(-rows // chunks) + 7) // 8 * 8)
