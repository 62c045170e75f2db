"""Several datasets as one, with a weight for each: `dataset=mixture`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from pretrain.data.sources.base import Dataset, Source
from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.runtime.places import joined

Share = Annotated[NonNegativeFloat, Field(allow_inf_nan=False)]
PART_NAME = re.compile(r"[\w-][\w.-]*")
REPLAY = "replay"  # the name of the part that is old text
LossWeight = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]  # its gradients must fit into fp16
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
    loss_weights: dict[str, LossWeight] = field(default_factory=dict)

    def default_name(self) -> str:
        return joined(list(self.parts)) or "mixture"

    def check_for_training(self, path: str) -> None:
        if not self.parts:
            raise UserError(f"{path}.parts: a mixture needs a part: dataset@{path}.parts.NAME=local")
        for name, part in self.parts.items():
            if not PART_NAME.fullmatch(name) or name == REPLAY:
                reason = (
                    "is the name of the replayed text" if name == REPLAY else "is not a name (letters, digits, _ . -)"
                )
                raise UserError(f"{path}.parts: {name!r} {reason}; give the part another one")
            if part.document_mask and not self.document_mask:
                raise UserError(
                    f"{path}.parts.{name}.document_mask=true: applies to all parts of a mixture: dataset.document_mask=true"
                )
            part.check_for_training(f"{path}.parts.{name}")
        if self.weights:
            check_weights(f"{path}.weights", self.weights, self.parts)
        if missing := [name for name in self.parts if self.weights and name not in self.weights]:
            raise UserError(
                f"{path}.weights: no weight for {missing[0]!r}; give every part a weight (0 leaves it out), or none to any"
            )
        check_names(f"{path}.max_epochs", self.max_epochs, self.parts)
        check_names(f"{path}.loss_weights", self.loss_weights, self.parts)
        if all(self.loss_weights.get(name, 1) == 0 for name in self.parts):
            raise UserError(f"{path}.loss_weights: all are 0, so that nothing would be learned")

    def sources(self) -> dict[str, Source]:
        return {name: source for key, part in self.parts.items() for name, source in part.under(key).items()}

    def under(self, name: str) -> dict[str, Source]:
        return {f"{name}/{key}": source for key, source in self.sources().items()}


def by_source(
    dataset: Dataset, key: Literal["max_epochs", "loss_weights"], combined: Callable[[float, float], float]
) -> dict[str, float]:
    """Return the values that the mixtures of ``dataset`` give by part, by the names of the sources; where a mixture in a mixture
    has a value too, the two are ``combined``."""
    found: dict[str, float] = {}
    for part_name, part in dataset.parts.items() if isinstance(dataset, Mixture) else ():
        inner, own = by_source(part, key, combined), getattr(dataset, key).get(part_name)
        for inside, name in zip(part.sources(), part.under(part_name), strict=True):
            given = [value for value in (own, inner.get(inside)) if value is not None]
            if given:
                found[name] = reduce(combined, given)
    return found


def check_weights(path: str, weights: Mapping[str, float], parts: Collection[str]) -> None:
    """Raise ``UserError`` for the weight of a part that does not exist, and where no part has a weight above 0."""
    check_names(path, weights, parts)
    if not any(weights.values()):
        raise UserError(f"{path}: all are 0; at least one part needs a weight above 0")


def check_names(path: str, values: Collection[str], parts: Collection[str]) -> None:
    """Raise ``UserError`` where ``values`` has the name of a part that does not exist."""
    for name in values:
        if name not in parts:
            raise UserError(f"{path}.{name}: the mixture has no such part{did_you_mean(name, parts)}")
