"""What the blocks of a compiled model keep and allocate, without compiling them.

A block's forward and backward become the two graphs that torch.compile would make of them: torch's own partitioner chooses what
is kept between them. The graphs then run operation by operation on fake tensors. Inductor fuses neighbouring elementwise
operations and reductions: a result that only such operations read is never stored, so it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, fx, nn

from pretrain.plan.compiler_internals import is_fusible, is_view, partitioned, tree_flatten, tree_unflatten, with_state
from pretrain.plan.storages import uncounted

Graphs = dict[Any, Callable[..., Any]]


def partition_blocks(blocks: Sequence[Any]) -> None:
    """Replace the forward of each block by its two graphs, which blocks of one kind share; those of a block that recomputes its
    activations keep its inputs alone. A block that can't be traced keeps its forward."""
    graphs: Graphs = {}
    for block in blocks:
        block.forward = _forward(block, block.forward, graphs)


def _forward(block: Any, eager: Callable[..., Any], graphs: Graphs) -> Callable[..., Any]:
    def run(state: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        recomputes = getattr(block, "gradient_checkpointing", False)
        try:
            if recomputes:
                block.gradient_checkpointing = False
            with with_state(block, state):  # without the hooks of the block, which run outside of the compiled code
                return eager(*args, **kwargs)
        finally:
            if recomputes:
                block.gradient_checkpointing = recomputes

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return eager(*args, **kwargs)
        state = dict(block.named_parameters()) | dict(block.named_buffers())
        recompute = bool(getattr(block, "gradient_checkpointing", False))
        options: dict[str, Any] = {"parameters": len(state), "recompute": recompute}
        return _through_graphs(run, (state, args, kwargs), graphs, kind=_kind(block), **options)

    return forward


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` as a graph; this stands for `compilation.compiled`."""
    graphs: Graphs = {}

    @wraps(function)
    def call(*args: Any) -> Any:
        return _through_graphs(function, args, graphs)

    return call


def _through_graphs(
    run: Callable[..., Any],
    arguments: Any,
    graphs: Graphs,
    *,
    kind: str = "",
    parameters: int = 0,
    recompute: bool = False,
) -> Any:
    """Return ``run(*arguments)``, computed by its graphs, which are made for each ``kind`` and each set of shapes. The first
    ``parameters`` tensors are weights. With ``recompute`` the backward keeps the inputs alone."""
    leaves, structure = tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    plain = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]  # the graphs must not keep the tensors

    def of_tensors(*given: Tensor) -> Any:
        values = iter(given)
        return run(*tree_unflatten([next(values) if leaf is None else leaf[0] for leaf in plain], structure))

    modes = torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    key = (kind, *modes, str(structure), *map(_described, leaves))
    if key not in graphs:
        made = partitioned(of_tensors, Stored, parameters=parameters, recompute=recompute)
        try:
            with uncounted():
                made(*tensors)  # the graphs are made by the first call
        except Exception:  # of any type, from any operation
            made = of_tensors
        graphs[key] = made
    return graphs[key](*tensors)


def _kind(block: nn.Module) -> str:
    """Return what distinguishes blocks of a class: the plain attributes of their modules, such as a window of attention."""
    plain = [
        {k: v for k, v in vars(m).items() if isinstance(v, bool | int | float | str) and k != "layer_idx"}
        for m in block.modules()
    ]
    return f"{type(block)} {plain}"


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf)


class Stored(fx.Interpreter):
    """Runs a graph in which only the results count that a compiled one would store."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._fused: set[fx.Node] = set()
        for node in reversed(graph.graph.nodes):
            if is_fusible(node) and all(is_fusible(user) and self._reads(user) for user in node.users):
                self._fused.add(node)

    def _reads(self, user: fx.Node) -> bool:
        """Return whether a fusible ``user`` reads its input in the kernel that makes it; a view of it does if its users do."""
        return not is_view(user) or user in self._fused

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._fused:
            return super().run_node(n)
        with uncounted():
            return super().run_node(n)
