"""Which weights stay in fp32 beside 16-bit ones: routers, decays, correction biases, which a model names or makes so.

`from_pretrained` follows this (transformers 5.20 to 5.23: ``_keep_in_fp32_modules``, ``_keep_in_fp32_modules_strict``, and
parameters that the code creates in fp32); models built or saved in another way are made to.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from transformers.core_model_loading import build_glob_alternation

from pretrain.models.meta import parameters_on_meta


def keep_fp32(hf: Any, dtype: torch.dtype) -> None:
    """Put what ``hf``, just made in ``dtype``, names as fp32 in fp32: parameters and buffers."""
    plan = hf._get_dtype_plan(dtype)
    if not plan:
        return
    named = build_glob_alternation(list(plan))[0]
    for name, tensor in [*hf.named_parameters(), *hf.named_buffers()]:
        if tensor.is_floating_point() and named.search(name):
            tensor.data = tensor.data.float()


def dtypes_in(hf: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type of every weight (parameters and persistent buffers, by name) of a model like ``hf`` in ``dtype``."""
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        twin = type(hf)._from_config(deepcopy(hf.config), dtype=dtype)
    keep_fp32(twin, dtype)
    return {name: tensor.dtype for name, tensor in twin.state_dict().items()}


def kept_fp32(hf: Any, dtype: torch.dtype) -> set[str]:
    """The weights that stay in fp32 where the others are in the 16 bits of ``dtype``."""
    if dtype == torch.float32:
        return set()
    return {name for name, found in dtypes_in(hf, dtype).items() if found == torch.float32}


def cast(hf: Any, dtype: torch.dtype) -> None:
    """Parameters of ``hf`` in ``dtype``, ties kept, but for those that stay in fp32; buffers as they are (RoPE's frequencies
    in 16 bits are wrong positions)."""
    kept = kept_fp32(hf, dtype)
    for name, parameter in hf.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if name in kept else dtype)
