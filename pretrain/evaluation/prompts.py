"""The configuration of `task=generation`: prompts and sampling parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class Prompts:
    """Prompts and sampling parameters. The random seed is the run's ``seed``.

    Attributes:
        prompts: Texts that the model continues.
        max_new_tokens: Length of a continuation in tokens at most.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Nucleus sampling: the probability mass that is sampled from, in (0, 1].
        num_samples: Continuations per prompt.
    """

    prompts: Annotated[list[str], Field(min_length=1)]
    max_new_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    num_samples: PositiveInt = 1
