"""Less memory for the activations of a model's blocks: recomputation in the backward, and copies in host memory.

Both keep the names of modules and weights, and both are applied before a model is compiled and sharded. Recomputation repeats
the operations of the forward with the same random numbers, so losses and gradients are equal to the last bit.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from pretrain.models.torch_internals import viewed
from pretrain.runtime.errors import UserError

Checkpointing = bool | Literal["selective"] | int
SELECTIVE = (  # operations of aten whose outputs are kept: products of matrices, and attention, which never stores its scores
    "mm.default",
    "addmm.default",
    "_scaled_mm.default",
    "_grouped_mm.default",
    "_scaled_dot_product_flash_attention.default",
    "_scaled_dot_product_flash_attention_for_cpu.default",
    "_scaled_dot_product_efficient_attention.default",
    "_scaled_dot_product_cudnn_attention.default",
)
OF_WEIGHTS = {
    f"{name}Backward0" for name in ("ToCopy", "T", "Transpose", "Permute", "View", "UnsafeView", "Expand", "Alias")
}
SMALLEST_COPY = 2**16  # bytes of the smallest tensor that is worth a copy to the host


def checkpoint_activations(hf: Any, choice: Checkpointing) -> None:
    """Make the blocks of ``hf``, a model of transformers, recompute their activations in the backward.

    Args:
        hf: The model.
        choice: ``False``: nothing is recomputed. ``True``: every block stores its input alone. ``"selective"``: every block
            also stores the outputs of its matrix products and of its attention (Korthikanti et al. 2022, arXiv:2205.05198,
            recompute the attention instead; the policy is torch's selective activation checkpointing). An integer n: the
            blocks 0, n, 2n, … store their input alone, the others everything.

    Raises:
        UserError: The architecture can't recompute activations, or not in the way of ``choice``.
    """
    if choice is False:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if choice == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _kept_operations())
    try:
        hf.activation_checkpointing_enable(options)
    except ValueError:  # that of an architecture without support
        raise UserError(f"{_key(choice)}: {type(hf).__name__} can't recompute activations; use false") from None
    if choice is True or choice == "selective":
        return
    layers = blocks(hf)
    if not layers:
        raise UserError(f"{_key(choice)}: the blocks of {type(hf).__name__} can't be switched one by one; use true")
    for i, block in enumerate(layers):
        block.gradient_checkpointing = i % choice == 0


def blocks(hf: nn.Module) -> list[Any]:
    """Return the blocks of ``hf`` that can recompute their activations, in order."""
    return [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]


def _key(choice: Checkpointing) -> str:
    return f"model.gradient_checkpointing={str(choice).lower()}"


def _kept_operations() -> list[Any]:
    """Return the operations of ``SELECTIVE`` that this version of torch has."""
    found = []
    for name in SELECTIVE:
        packet, _, overload = name.partition(".")
        if hasattr(torch.ops.aten, packet):
            found.append(getattr(getattr(torch.ops.aten, packet), overload))
    return found


class HostActivations:
    """Keeps the tensors that a forward saves for its backward in host memory, and copies each back when the backward needs it.

    Only tensors on a GPU are copied; weights, and tensors of less than ``SMALLEST_COPY`` bytes, stay where they are. The copies
    are ordered by the GPU's stream, into pinned memory, so that the host waits for none of them.
    """

    def __init__(self) -> None:
        self._open = threading.local()  # the contexts of this thread; nn.DataParallel runs each replica in a thread

    def attach(self, module: nn.Module) -> None:
        """Do so in every forward of ``module``."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, inputs: Any) -> None:
        context: AbstractContextManager[object] = saved_tensors_hooks(self.pack, self.unpack)
        context.__enter__()
        self._contexts().append(context)

    @torch.compiler.disable
    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._contexts().pop().__exit__(None, None, None)

    def _contexts(self) -> list[AbstractContextManager[object]]:
        if not hasattr(self._open, "contexts"):
            self._open.contexts = []
        contexts: list[AbstractContextManager[object]] = self._open.contexts
        return contexts

    def is_copied(self, tensor: Tensor) -> bool:
        """Return whether ``tensor`` is copied to the host."""
        return tensor.device.type == "cuda" and tensor.nbytes >= SMALLEST_COPY and not is_weight(tensor)

    def pack(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        """Return the device of ``tensor``, and the tensor or its copy on the host."""
        if not self.is_copied(tensor):
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(self, packed: tuple[torch.device, Tensor]) -> Tensor:
        """Return the tensor that `pack` has been called with, or a copy of it, on its device."""
        device, tensor = packed
        return tensor.to(device, non_blocking=True)


def is_weight(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a parameter, a view of one, such as the transposed weight of a matrix product, or a view
    of the copy in another dtype that autocast makes of a trained one and keeps for later forwards. Torch 2.10 saves such a
    copy without its graph: there it is taken for an activation, which costs a copy to the host and changes no number."""
    if isinstance(tensor, nn.Parameter) or isinstance(viewed(tensor), nn.Parameter):
        return True
    node: Any = tensor.grad_fn
    while node is not None and node.name() in OF_WEIGHTS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def offload_activations(hf: Any) -> None:
    """Keep the activations of the backbone of ``hf`` in host memory between forward and backward. With recomputation these are
    the inputs of its blocks, and what `checkpoint_activations` keeps of the blocks that are not recomputed."""
    HostActivations().attach(hf.base_model)
