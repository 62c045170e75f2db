"""Several datasets as one, with a weight for each: `dataset=mixture`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from pretrain.data.sources.base import Dataset, Source

Share = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Mixture(Dataset):
    """Sequences of several datasets in one run. A part of a mixture may be a mixture itself; its parts are then named
    ``part/inner part``, and their weights are shares of the outer part.

    The key of a part names it in weights, metrics and messages.

    Attributes:
        parts: The datasets, by name: dataset@dataset.parts.NAME=local dataset.parts.NAME.nameOrPath=...
        weights: Share of the target tokens by part, normalised to 1; left out: in proportion to the size of the parts.
        temperature: Flattens weights that follow from the sizes: in proportion to size ** (1 / temperature).
        max_epochs: The most passes over a part, by part; a run that needs more is an error.
        loss_weights: Factor of a part's tokens in the loss, by part; 1 where left out.
    """

    source: Literal["mixture"] = "mixture"
    parts: dict[str, Dataset] = field(default_factory=dict)
    weights: dict[str, Share] = field(default_factory=dict)
    temperature: Positive = 1.0
    max_epochs: dict[str, Positive] = field(default_factory=dict)
    loss_weights: dict[str, Share] = field(default_factory=dict)

    def default_name(self) -> str:
        return "-".join(self.parts) or "mixture"

    def sources(self) -> dict[str, Source]:
        found: dict[str, Source] = {}
        for name, part in self.parts.items():
            inner = part.sources()
            found |= (
                {f"{name}/{key}": inner[key] for key in inner}
                if isinstance(part, Mixture)
                else {name: inner.popitem()[1]}
            )
        return found

    def by_source(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return values that are given by part, such as ``max_epochs``, by the name of each source of the part."""
        return {
            name: values[part]
            for name in self.sources()
            for part in self.parts
            if part in values and _is_in(name, part)
        }


def _is_in(name: str, part: str) -> bool:
    """Return whether the source ``name`` belongs to ``part``."""
    return name == part or name.startswith(f"{part}/")
