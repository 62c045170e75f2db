"""The configuration of evaluations: the domains, the amount of text, and the prompts to continue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from pretrain.data.sources.base import Source
from pretrain.evaluation.task import EvaluationTask


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation scores and generates.

    Attributes:
        batch_size: Sequences per device and batch; ``auto`` uses the training's.
        max_tokens: Tokens to score of each domain; ``None`` scores all.
        per_epoch: Evaluations per pass over the training documents, instead of the run's ``evaluate_every``.
        samples: Number of held-out documents of each domain whose start the model continues at every evaluation.
        sample_prompt_tokens: Length of such a prompt in tokens.
        sample_tokens: Length of a greedy continuation in tokens.
        sample_prompts: The user's own prompts, which the model continues too.
        domains: Sources of role ``base`` by the name of their YAML key.
        tasks: Further measurements by the name of their YAML key.
    """

    batch_size: Literal["auto"] | PositiveInt
    max_tokens: PositiveInt | None = None
    per_epoch: PositiveInt | None = None
    samples: NonNegativeInt = 1
    sample_prompt_tokens: PositiveInt = 24
    sample_tokens: PositiveInt = 32
    sample_prompts: list[str] = field(default_factory=list)
    domains: dict[str, Source] = field(default_factory=dict)
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
