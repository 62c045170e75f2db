"""Limit the size to which the interpolations of a config expand: ``a: ${b}${b}``, ``b: ${c}${c}``, … doubles on each line.

`_resolve_node_interpolation` and `_evaluate_custom_resolver` are private to omegaconf (seen in 2.3.1); every reference is
resolved by one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf.base import Container

from pretrain.runtime.errors import UserError

MAX_TOTAL = 1_000_000  # limit on the characters and values of all references together
REFERENCE_COST = 200  # counted in addition for each reference, because resolving one takes 0.1 ms


@contextmanager
def bounded_interpolation() -> Iterator[None]:
    """Limit the references that OmegaConf resolves inside the block to a total of ``MAX_TOTAL``.

    Raises ``UserError`` beyond the limit, also where OmegaConf has caught or replaced the error.
    """
    spent = 0

    def counted(follow: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Container, *args: Any, **options: Any) -> Any:
            nonlocal spent
            spent += REFERENCE_COST
            if spent > MAX_TOTAL:
                raise OverflowError
            found = follow(self, *args, **options)
            spent += _size(found)
            return found

        return run

    before = {name: getattr(Container, name) for name in ("_resolve_node_interpolation", "_evaluate_custom_resolver")}
    try:
        for name, follow in before.items():
            setattr(Container, name, counted(follow))
        yield
    except Exception:
        if spent <= MAX_TOTAL:
            raise
    finally:
        for name, follow in before.items():
            setattr(Container, name, follow)
    if spent > MAX_TOTAL:
        raise UserError("the references (${…}) in it expand to more than fits into a config")


def _size(node: Any) -> int:
    """Return the number of characters and values in a node, without resolving its references."""
    content = node._content if isinstance(node, Container) else None
    if isinstance(content, dict | list):
        return sum(1 + _size(item) for item in (content.values() if isinstance(content, dict) else content))
    value = node._value() if hasattr(node, "_value") else node
    return len(value) if isinstance(value, str) else 1
