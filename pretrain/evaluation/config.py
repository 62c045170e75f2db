"""What is scored, on how much text, and what the model is asked to continue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from pretrain.data.sources.base import Source


@dataclass(frozen=True)
class EvaluationConfig:
    """``batch_size``: auto is that of the training. ``domains``: sources of role ``base`` by name of the YAML key;
    ``max_tokens``: of each domain (``None``: all); ``per_epoch``: evaluations per pass over the training documents,
    instead of the run's ``evaluate_every``.

    At every evaluation the model also continues, greedily by ``sample_tokens``, the first ``sample_prompt_tokens`` of
    ``samples`` held-out documents of each domain, and each of ``sample_prompts``."""

    batch_size: Literal["auto"] | PositiveInt
    max_tokens: PositiveInt | None = None
    per_epoch: PositiveInt | None = None
    samples: NonNegativeInt = 1
    sample_prompt_tokens: PositiveInt = 24
    sample_tokens: PositiveInt = 32
    sample_prompts: list[str] = field(default_factory=list)
    domains: dict[str, Source] = field(default_factory=dict)
