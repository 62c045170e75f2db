"""What this program uses of transformers' private parts (seen in 5.23.0). ``tests/test_internals.py`` fails when one of them
has changed.

- ``PreTrainedModel._get_dtype_plan``: which weights stay in fp32, from ``_keep_in_fp32_modules`` and its strict variant
- ``PreTrainedModel._from_config``: a model of a class that `AutoModelForCausalLM` may not choose for its config
- ``PreTrainedModel._no_split_modules``: the classes of blocks that must not be split over devices
- ``PreTrainedConfig._attn_implementation``: the name of the attention that a model has got
- ``masking_utils.find_packed_sequence_indices`` is replaced: without an attention mask it checks in every forward whether
  positions restart anywhere, which is a synchronisation on a GPU
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.core_model_loading import build_glob_alternation

from pretrain.models.meta import parameters_on_meta

PACKING_CHECK = "find_packed_sequence_indices"
own_packing_check: Callable[[Tensor], Tensor | None] | None = vars(masking_utils).get(PACKING_CHECK)


def set_packing_check(check: Any) -> None:
    """Make ``check`` the function that maps the position ids [n, S] of a batch to the number of each token's document in its
    row, or to ``None`` where each row is one document."""
    setattr(masking_utils, PACKING_CHECK, check)


def attention_name(hf: Any) -> str:
    """Return the name that transformers has for the attention of ``hf``, such as ``sdpa``."""
    return str(getattr(hf.config, "_attn_implementation", None) or "eager")


def is_listed_as_fp32(hf: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return a function of a weight's name: whether the class of ``hf`` lists it as fp32 in a model of ``dtype``."""
    plan = hf._get_dtype_plan(dtype)
    if not plan:
        return lambda name: False
    named = build_glob_alternation(list(plan))[0]
    return lambda name: named.search(name) is not None


def new_on_meta(hf: Any, *, config: Any = None, dtype: torch.dtype) -> Any:
    """Return another model of the class of ``hf``, whose parameters are on the meta device. ``config``: its config; by default
    that of ``hf``. torch's generator is not changed."""
    with torch.random.fork_rng(devices=[]), parameters_on_meta():
        return type(hf)._from_config(deepcopy(hf.config if config is None else config), dtype=dtype)


def unsplit_classes(hf: Any) -> set[str]:
    """Return the names of the classes of ``hf`` that must not be split over devices."""
    return set(hf._no_split_modules or ())


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether functions are called before or after the forward of ``module``. (``nn.Module`` has no public way, as of
    torch 2.13.)"""
    return bool(module._forward_hooks or module._forward_pre_hooks)
