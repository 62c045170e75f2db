"""The weights that stay in fp32 when a model is cast to 16 bits: routers, decays, correction biases.

A transformers model lists them (``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``) or creates them in fp32.
`from_pretrained` respects both; this module does the same for models that are built or saved in
another way.
"""

from __future__ import annotations

from typing import Any

import torch

from pretrain.models.transformers_internals import is_listed_as_fp32, new_on_meta


def keep_fp32(hf: Any, dtype: torch.dtype) -> None:
    """Cast to fp32 the parameters and buffers of ``hf`` (just built in ``dtype``) that its class lists as fp32."""
    listed = is_listed_as_fp32(hf, dtype)
    for name, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
        if tensor.is_floating_point() and listed(name):
            tensor.data = tensor.data.float()


def dtypes_in(hf: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of every weight (parameters and persistent buffers, by name) of a model like ``hf`` in ``dtype``."""
    twin = new_on_meta(hf, dtype=dtype)
    keep_fp32(twin, dtype)
    return {name: tensor.dtype for name, tensor in twin.state_dict().items()}


def kept_fp32(hf: Any, dtype: torch.dtype) -> set[str]:
    """Return the names of the weights that stay in fp32 when the others are cast to ``dtype``."""
    if dtype == torch.float32:
        return set()
    return {name for name, found in dtypes_in(hf, dtype).items() if found == torch.float32}


def cast(hf: Any, dtype: torch.dtype) -> None:
    """Cast the parameters of ``hf`` to ``dtype``, except those that stay in fp32. Ties are kept. Buffers are not cast, because
    RoPE's frequencies in 16 bits would give wrong positions."""
    kept = kept_fp32(hf, dtype)
    for name, parameter in hf.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if name in kept else dtype)
