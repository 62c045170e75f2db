"""What the models use of torch's private parts (seen in torch 2.11 and 2.13). ``tests/models/test_compilation.py``,
``tests/models/test_recomputed_products.py`` and ``tests/models/test_activation_checkpointing.py`` fail when one of them has
changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The operations that store all of their inputs, by the names of their backward nodes: what each computes again from its node.
REPEATED: dict[str, Callable[[Any], Tensor]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}


def allow_compilations(kinds: int) -> None:
    """Let torch compile one function ``kinds`` times before it stops, and compile blocks whole under DDP, which would cut each of
    them into pieces so that gradients are reduced earlier. Blocks are such pieces already."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, kinds)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, kinds)
    config.optimize_ddp = False


def default_folder_of_compiled_code() -> Path:
    """Return the folder in which torch keeps compiled code unless it is told another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return Path(default_cache_dir())


def try_one_vector_set() -> None:
    """Let torch compile and load a test program for the processor's widest set of vector instructions alone, before it compiles
    anything for a CPU. By itself it does so for each narrower set as well, of which it uses none, and which takes seconds each.
    If the widest set does not work, torch tries all."""
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.vec_isa_ok is not None or not hasattr(cpu_vec_isa, "x86_isa_checker"):
        return
    has = cpu_vec_isa.x86_isa_checker()
    sets = (isa for isa in cpu_vec_isa.supported_vec_isa_list if all(flag in has for flag in str(isa).split()))
    widest = next(sets, None)
    if widest is not None and bool(widest):
        config.cpp.vec_isa_ok = True


def viewed(tensor: Tensor) -> Tensor | None:
    """Return the tensor of which ``tensor`` is a view; ``None`` if it is none."""
    return tensor._base


def keeps_graph() -> bool:
    """Return whether the backward that runs keeps the graph, so that it can run again; ``True`` if this torch does not say."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())
