"""Activations that the backward computes again from others, with which they would only be stored a second time.

Autograd stores the inputs of a product, and the next operation stores its result as well; in bf16-mixed each matrix product also
stores a 16-bit copy of its input. Such a result is not stored here. The backward repeats the multiplication, the activation
function or the cast, with inputs that are stored for the backward of the operation itself, so it gets the same numbers to the
last bit. Casts of one tensor are stored once. Results in 16 bits are stored, because a CPU is slow at such operations. In a block
of Llama this concerns the normalised states and their 16-bit copies: a third of its activations.

A model may change a result in place before it is used, which its backward node does not show. Therefore the operation is repeated
in the forward too, and a result with other bits is stored. A stored tensor that is changed in place between forward and backward
raises autograd's ``RuntimeError``; with hooks, torch does not check that itself. Like torch, this does not find a change of an
input through ``.data``.
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
class _Stored:
    """A tensor that is stored, and torch's count of its changes in place at that time."""

    tensor: Tensor
    version: int

    def unchanged(self) -> Tensor:
        """Return the tensor. Raises ``RuntimeError``, as torch does, if it was changed in place."""
        found = self.tensor._version
        if found != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.type()} {list(self.tensor.shape)}] is at version {found}; expected version {self.version} instead"
            )
        return self.tensor


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
        self._latest.clear()

    def pack(self, tensor: Tensor) -> _Stored | _Made:
        """Return what is stored in the place of ``tensor``."""
        if tensor.grad_fn is None:
            return _Stored(tensor, tensor._version)
        # The tensor itself would keep its node alive, which keeps the tensor.
        made = self._made(tensor) if tensor.numel() >= SMALLEST and tensor.is_floating_point() else tensor.detach()
        return made if isinstance(made, _Made) else _Stored(made, made._version)

    def _made(self, tensor: Tensor) -> Tensor | _Made:
        base = viewed(tensor)
        base = tensor if base is None else base
        node = base.grad_fn
        like = base.shape, base.stride(), base.dtype
        view = tensor.shape, tensor.stride(), int(tensor.storage_offset() - base.storage_offset())
        if _can_repeat(node) and tensor.dtype == torch.float32:
            return self._if_equal(node, node, base, view)
        if node is None or node.name() != CAST:
            return tensor.detach()
        source, output = node.next_functions[0]
        cast = source, output, like
        if _can_repeat(source):
            return self._if_equal(source, cast, base, view)
        first = self._casts.get(cast)
        if first is None or not equal_bits(first, base):
            first = self._casts[cast] = base.detach()
        return _viewed(first, view)

    def _if_equal(self, node: Any, result: Hashable, base: Tensor, view: View) -> Tensor | _Made:
        """Return how ``base`` is computed again, or its view if its values are not the operation's."""
        number = self._numbers.setdefault(result, len(self._numbers))
        made = _Made(node, number, (base.shape, base.stride(), base.dtype), view)
        return made if equal_bits(self._computed(made), base) else _viewed(base.detach(), view)

    def unpack(self, packed: _Stored | _Made) -> Tensor:
        """Return the tensor that `pack` has been called with, or an equal one. Raises ``RuntimeError`` if it was changed."""
        return packed.unchanged() if isinstance(packed, _Stored) else _viewed(self._computed(packed), packed.view)

    def _computed(self, made: _Made) -> Tensor:
        value = self._latest.pop(made.number, None)
        if value is None:
            value = _repeat(made.node, made.like)
        self._latest[made.number] = value
        if len(self._latest) > KEPT:
            del self._latest[next(iter(self._latest))]
        return value


@torch.no_grad()
def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype are equal to the last bit, NaN included."""
    bits = torch.int16 if one.itemsize == 2 else torch.int32
    return torch.equal(one.detach().view(bits), other.detach().view(bits))


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
