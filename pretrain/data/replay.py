"""The config groups of replay and phases: how much old text is mixed into the training data, and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from pretrain.data.sources.base import Source


@dataclass(frozen=True)
class ReplayConfig:
    """How much of the training tokens is old text, which the model should not forget.

    Attributes:
        share: Share of the training tokens that is old text, from 0 to below 1.
        source: The old text: dataset@replay.source=local replay.source.nameOrPath=...; null: the training documents of
            evaluation.domains.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    source: Source | None = None


@dataclass(frozen=True)
class Phase:
    """Another mixture from a share of the run on.

    Attributes:
        start: share of the run's steps at which the phase begins; ``from`` in the config.
        weights: share of the target tokens by part, as in ``dataset.weights``; empty: as before the phase.
        replay_share: share of replayed tokens; ``None``: as before the phase.
    """

    start: float
    weights: Mapping[str, float] = field(default_factory=dict)
    replay_share: float | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Phase:
        """Return the phase that a checked item of the key ``phases`` describes."""
        return cls(given["from"], dict(given.get("weights") or {}), given.get("replay_share"))
