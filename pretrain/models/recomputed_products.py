"""Activations that the backward computes again from others, with which they would only be stored a second time.

Autograd stores the inputs of a product, and the next operation stores its result as well; in bf16-mixed each matrix product also
stores a 16-bit copy of its input. Such a result is not stored here. The backward repeats the multiplication, the activation
function or the cast, with inputs that are stored for the backward of the operation itself, so it gets the same numbers to the
last bit. Casts of one tensor are stored once. Results in 16 bits are stored, because a CPU is slow at such operations. In a block
of Llama this concerns the normalised states and their 16-bit copies: a third of its activations.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pretrain.models.torch_internals import REPEATED, viewed

CAST = "ToCopyBackward0"
KEPT = 4  # of the latest results, because several matrix products have one input
Like = tuple[torch.Size, tuple[int, ...], torch.dtype]
View = tuple[torch.Size, tuple[int, ...], int]
SMALLEST = 2**18  # values of an activation that is worth the work


@contextmanager
def recomputed_products() -> Iterator[None]:
    """In this context, which is for one forward, products are not stored for the backward. It is not for compiled code."""
    products = _Products()
    with saved_tensors_hooks(products.pack, products.unpack):
        try:
            yield
        finally:
            products.end_forward()


@dataclass(frozen=True, slots=True)
class _Made:
    """How a tensor is computed again.

    Attributes:
        node: the backward node of the operation; of a cast, that of the value which is cast.
        number: of the result among those of this forward. Casts of one value are one result.
        like: shape, strides and dtype of the result.
        view: shape, strides and offset of the tensor in the result.
    """

    node: Any
    number: int
    like: Like
    view: View


class _Products:
    """The hooks of one forward. They keep no node beyond it, because nodes keep the hooks."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._casts: dict[Hashable, Tensor] = {}
        self._latest: dict[int, Tensor] = {}

    def end_forward(self) -> None:
        """Forget the nodes of the forward."""
        self._numbers.clear()
        self._casts.clear()

    def pack(self, tensor: Tensor) -> Tensor | _Made:
        """Return what is stored in the place of ``tensor``."""
        if tensor.grad_fn is None:
            return tensor
        if tensor.numel() < SMALLEST or not tensor.is_floating_point():
            return tensor.detach()  # the tensor itself would keep its node alive, which keeps the tensor
        base = viewed(tensor)
        base = tensor if base is None else base
        node = base.grad_fn
        like = base.shape, base.stride(), base.dtype
        view = tensor.shape, tensor.stride(), int(tensor.storage_offset() - base.storage_offset())
        if _can_repeat(node) and tensor.dtype == torch.float32:
            return self._made(node, node, like, view)
        if node is None or node.name() != CAST:
            return tensor.detach()
        source, output = node.next_functions[0]
        cast = source, output, like
        if _can_repeat(source):
            return self._made(source, cast, like, view)
        return _viewed(self._casts.setdefault(cast, base.detach()), view)

    def _made(self, node: Any, result: Hashable, like: Like, view: View) -> _Made:
        return _Made(node, self._numbers.setdefault(result, len(self._numbers)), like, view)

    def unpack(self, packed: Tensor | _Made) -> Tensor:
        """Return the tensor that `pack` has been called with, or an equal one."""
        if isinstance(packed, Tensor):
            return packed
        value = self._latest.pop(packed.number, None)
        if value is None:
            value = _repeat(packed.node, packed.like)
        self._latest[packed.number] = value
        if len(self._latest) > KEPT:
            del self._latest[next(iter(self._latest))]
        return _viewed(value, packed.view)


def _viewed(tensor: Tensor, view: View) -> Tensor:
    size, stride, offset = view
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def _can_repeat(node: Any) -> bool:
    """Return whether the result of ``node``'s operation can be computed from what the node stores. A product stores each factor
    if the other one has a gradient."""
    if node is None or node.name() not in REPEATED:
        return False
    return all(source is not None for source, _ in node.next_functions)


@torch.no_grad()
def _repeat(node: Any, like: Like) -> Tensor:
    """Return the result of ``node``'s operation, with the strides and dtype of ``like``."""
    size, stride, dtype = like
    with torch.autocast("cpu", enabled=False):
        value = REPEATED[node.name()](node)
    if (value.stride(), value.dtype) == (stride, dtype):
        return value
    return torch.empty_strided(size, stride, dtype=dtype, device=value.device).copy_(value)
