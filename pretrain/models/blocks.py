"""The blocks of a transformers model: the repeated layers that are compiled and sharded one by one."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import nn

from pretrain.models.transformers_internals import unsplit_classes


def find_blocks(hf: Any, classes: Set[str] | None = None) -> list[nn.Module]:
    """Return the outermost modules of ``hf`` whose class is in ``classes``, in order. ``None``: the classes that the model itself
    declares as not to be split. Modules that hold a weight of the head are never blocks, because the loss uses that weight
    outside of its module."""
    names = unsplit_classes(hf) if classes is None else classes
    found = [module for module in candidates(hf) if type(module).__name__ in names]
    inner = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in inner]


def candidates(hf: Any) -> list[nn.Module]:
    """Return the modules of ``hf`` that hold no weight of its head."""
    embedding = hf.get_output_embeddings()
    head = set() if embedding is None else {id(p) for p in embedding.parameters()}
    return [m for m in hf.modules() if m is not hf and all(id(p) not in head for p in m.parameters())]
