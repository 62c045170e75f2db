"""What this program uses of torch's private parts to make the graphs that torch.compile makes (seen in torch 2.13.0).
``tests/plan/test_compiled_blocks.py`` fails when one of them has changed.

- ``aot_function``, inductor's partitioner and its decompositions, and the partitioner's list of operations that are fused
- ``stateless._reparametrize_module``: a module with other parameters, called without its hooks
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from torch import fx, nn
from torch.nn.utils import stateless
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["tree_flatten", "tree_unflatten"]


def with_state(module: nn.Module, state: dict[str, Any]) -> AbstractContextManager[Any]:
    """Inside this context ``module`` has the parameters and buffers of ``state``."""
    return stateless._reparametrize_module(module, state)


def partitioned(
    function: Callable[..., Any], interpreter: type[fx.Interpreter], *, parameters: int, recompute: bool = False
) -> Callable[..., Any]:
    """Return ``function`` of tensors as the graphs of forward and backward that torch.compile makes of it. ``interpreter`` runs
    them. They are made for the shapes of the first call. The first ``parameters`` arguments are weights, which exist anyway: what
    can be computed from them is not kept instead. With ``recompute`` only the inputs are kept."""
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        runner = interpreter(graph)

        def run(arguments: list[Any]) -> Any:
            return runner.boxed_run(arguments)

        run._boxed_call = True  # type: ignore[attr-defined]  # so that the arguments can be freed while it runs
        return run

    def partition(*given: Any, **options: Any) -> Any:
        options |= {"static_lifetime_input_indices": [*range(parameters)]}
        with config.patch(activation_memory_budget=0.0 if recompute else config.activation_memory_budget):
            return min_cut_rematerialization_partition(*given, **options)

    options: dict[str, Any] = {"decompositions": select_decomp_table()}
    return aot_function(function, compiler, compiler, partition_fn=partition, **options)


@cache
def _operations() -> Any:
    from torch._functorch.partitioners import get_default_op_list

    return get_default_op_list()


def is_view(node: fx.Node) -> bool:
    """Return whether the result of an operation shares the memory of its input."""
    return bool(node.op == "call_function" and _operations().is_view(node))


def is_fusible(node: fx.Node) -> bool:
    """Return whether the partitioner counts an operation as one that is fused with its neighbours, or as a view."""
    known = _operations().fusible_ops
    return node.op == "call_function" and (
        is_view(node) or getattr(node.target, "overloadpacket", node.target) in known
    )
