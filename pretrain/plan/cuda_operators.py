"""The operations that keep other tensors for the backward on a GPU than on the CPU on which a step is traced.

- Autocast computes more operations in fp32 (torch's list of ``autocast_mode.h`` for CUDA, of which that for the CPU lacks these).
- Attention with dropout uses the same kernels as without; the CPU computes the full matrix of probabilities.
- Dropout saves its mask as bool; the CPU saves it in the dtype of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pretrain.plan.torch_internals import tree_map

FP32 = frozenset(
    """
    __pow__ __rpow__ pow rsqrt reciprocal exp expm1 log log10 log2 log1p softplus layer_norm native_layer_norm group_norm
    cosine_similarity logsumexp softmax log_softmax cumprod cumsum sum norm linalg_vector_norm linalg_matrix_norm acos asin cosh
    sinh tan erfinv dist renorm
    """.split()
)
HALF = (torch.bfloat16, torch.float16)


class CudaOperators(TorchFunctionMode):
    """Inside it operations on the CPU allocate what they would on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_fp32, args), tree_map(_fp32, kwargs)
        elif name == "scaled_dot_product_attention":
            kwargs = kwargs | {"dropout_p": 0.0} if len(args) < 5 else kwargs
            args = (*args[:4], 0.0, *args[5:]) if len(args) >= 5 else args
        elif name == "dropout" and not (args[3:] or kwargs.get("inplace")):
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            p, training = given.get("p", 0.5), given.get("training", given.get("train", True))
            if training and 0 < p < 1:
                return torch.native_dropout(given["input"], p, True)[0]
        return func(*args, **kwargs)


def _fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
