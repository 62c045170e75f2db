"""What `task=generation` asks the model to continue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class Prompts:
    """``temperature`` 0 is greedy; ``top_p`` in (0, 1]; the seed is the run's ``seed``."""

    prompts: Annotated[list[str], Field(min_length=1)]
    max_new_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    num_samples: PositiveInt = 1
