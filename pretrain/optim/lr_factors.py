"""Learning rates that differ between parameters, for an optimizer of any class: its groups are split by the factor."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from pretrain.runtime.patterns import matching

if TYPE_CHECKING:
    from torch.nn import Parameter
    from torch.optim import Optimizer

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class LrFactors:
    """The factors of the learning rate, which every optimizer may have.

    Attributes:
        lr_multipliers: Factors of the learning rate by regex of parameter names, {embed: 0.1}; the last match counts.
        layer_decay: Factor of the learning rate per block below the head, e.g. 0.9; null: none.
    """

    lr_multipliers: dict[str, Positive] = field(default_factory=dict)
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None

    def of(self, names: Sequence[str]) -> dict[str, float]:
        """Return the factor of each parameter in ``names``, which are all of a model in the order of its modules.

        Raises ``UserError`` for a pattern that matches no name.
        """
        own = dict.fromkeys(names, 1.0)
        for pattern, factor in self.lr_multipliers.items():
            own |= dict.fromkeys(matching(str(pattern), names, key="optimizer.lr_multipliers"), factor)
        if self.layer_decay is None:
            return own
        height = heights(names)
        top = max(height.values(), default=0)
        return {name: own[name] * self.layer_decay ** (top - height[name]) for name in names}


def heights(names: Sequence[str]) -> dict[str, int]:
    """Return how high each parameter is: 0 for an embedding, i + 1 for block i, and one more than the last block for the rest
    (final norm, head). A tied head is an embedding. As in Bao et al. 2021 (BEiT, arXiv:2106.08254)."""
    block = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
    top = max(block.values(), default=-1) + 2
    first = next((i for i, name in enumerate(names) if name in block), len(names))
    return {name: block[name] + 1 if name in block else 0 if i < first else top for i, name in enumerate(names)}


def split_by_factor(
    optimizers: Iterable[Optimizer],
    named_parameters: Iterable[tuple[str, Parameter]],
    factors: Mapping[str, float],
    *,
    undecayed: Container[str] = (),
) -> None:
    """Split the groups of ``optimizers``, in place, so that all parameters of a group have the same factor. It is the group's
    ``lr_factor``, by which `Engine.set_lr` multiplies its learning rate. Those that ``undecayed`` names have no weight decay. The
    other values of the groups stay as they are."""
    values = {id(p): (factors.get(name, 1.0), name not in undecayed) for name, p in named_parameters}
    if all(value == (1.0, True) for value in values.values()):
        return
    for optimizer in optimizers:
        groups = []
        for group in optimizer.param_groups:
            parts: dict[tuple[float, bool], list[Parameter]] = {}
            for parameter in group["params"]:
                parts.setdefault(values.get(id(parameter), (1.0, True)), []).append(parameter)
            for (factor, decays), members in parts.items():
                groups.append({**group, "params": members, "lr_factor": factor})
                if "weight_decay" in group and not decays:
                    groups[-1]["weight_decay"] = 0.0
        optimizer.param_groups[:] = groups
