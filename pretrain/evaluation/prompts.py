"""The configuration of `task=generation`: prompts and sampling parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class Prompts:
    """Prompts and sampling parameters. The random seed is the run's ``seed``.

    Attributes:
        prompts: Prompts to continue.
        max_new_tokens: Tokens per sample.
        temperature: Sampling temperature; 0: greedy decoding.
        top_p: Nucleus sampling: sample from the smallest set of tokens with this total probability.
        num_samples: Samples per prompt.
    """

    prompts: Annotated[list[str], Field(min_length=1)]
    max_new_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    num_samples: PositiveInt = 1
