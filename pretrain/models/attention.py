"""``model.attention=auto``: which of torch's kernels attention uses on a GPU.

torch tries its kernels in an order of its own, which differs between releases. Here it is cuDNN, flash, efficient, math, as in
torchtitan, or flash first where FlashAttention 3 or 4 is installed and works. Nothing is chosen by a version or the name of a
GPU: a kernel counts if it computes a small forward and backward. On a CPU nothing changes.
Source: https://docs.pytorch.org/docs/stable/nn.attention.html
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import attention
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from pretrain.models.transformers_internals import attention_name

ORDER = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
FLASH = ("FA4", "FA3")  # FlashAttention, as torch calls its implementations; the first that works is taken
DROPOUTS = ("attention_dropout", "attn_pdrop")
LENGTH = 128  # tokens of a trial

_stack = ExitStack()  # never closed: the order is the process's, because a recomputed block is run in the backward


@dataclass(frozen=True)
class Shape:
    """What decides whether a kernel can be used: size of a head, dtype of queries, probability of dropout."""

    head_dim: int
    dtype: torch.dtype
    dropout: float

    @classmethod
    def of(cls, hf: Any, dtype: torch.dtype) -> Shape:
        config = hf.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 0) or 1
        size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", heads) // heads
        dropout = next((float(p) for name in DROPOUTS if (p := getattr(config, name, None))), 0.0)
        return cls(int(size), dtype, dropout)


@cache
def prefer_fast_kernels(shape: Shape, device: torch.device) -> None:
    """Set the order of kernels for this process, and activate an installed FlashAttention that can compute ``shape``."""
    backends = [SDPBackend.__members__[name] for name in ORDER if name in SDPBackend.__members__]
    if _activate_flash(shape, device) is not None:
        backends.sort(key=lambda backend: backend is not SDPBackend.FLASH_ATTENTION)
    _stack.enter_context(attention.sdpa_kernel(backends, set_priority=True))


def _activate_flash(shape: Shape, device: torch.device) -> str | None:
    """Return the name of the implementation that is active now, or ``None``: torch's own."""
    activate = getattr(attention, "activate_flash_attention_impl", None)  # from torch 2.11 on
    if activate is None or device.type != "cuda":
        return None
    for name in FLASH:
        try:
            activate(name)
        except (ImportError, ValueError, RuntimeError, AttributeError):  # not installed, or unknown to this torch
            continue
        if works(SDPBackend.FLASH_ATTENTION, shape, device):
            return name
        attention.restore_flash_attention_impl()
    return None


def works(backend: SDPBackend, shape: Shape, device: torch.device) -> bool:
    """Return whether ``backend`` computes causal attention of ``shape``, forward and backward."""
    given = (torch.zeros(1, 1, LENGTH, shape.head_dim, dtype=shape.dtype, device=device) for _ in range(3))
    query, key, value = (tensor.requires_grad_() for tensor in given)
    with torch.enable_grad(), attention.sdpa_kernel(backend):
        try:
            scaled_dot_product_attention(query, key, value, dropout_p=shape.dropout, is_causal=True).sum().backward()
        except RuntimeError:
            return False
    return True


def describe(hf: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """Return what attention without a mask uses: the name that transformers has for it, and for sdpa on a GPU the kernel, as in
    ``sdpa (cudnn)``."""
    name = attention_name(hf)
    if name != "sdpa" or device.type != "cuda":
        return name
    shape, active = Shape.of(hf, dtype), getattr(attention, "current_flash_attention_impl", lambda: None)()
    order = sorted(ORDER, key=lambda backend: active is None or backend != "FLASH_ATTENTION")
    taken = next((kernel for kernel in order if works(SDPBackend.__members__[kernel], shape, device)), "MATH")
    if taken == "FLASH_ATTENTION" and active is not None:
        return f"{name} ({active})"
    return f"{name} ({taken.removesuffix('_ATTENTION').lower()})"
