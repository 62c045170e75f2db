"""The configuration of evaluations: the domains, the amount of text, and the prompts to continue."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from pretrain.data.sources.base import Source
from pretrain.evaluation.lm_eval import LmEval
from pretrain.evaluation.task import EvaluationTask


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation scores and generates.

    Attributes:
        max_tokens: Limit of tokens per domain; null: all held-out documents.
        batch_size: Sequences per forward pass.
        per_epoch: Evaluations per epoch, instead of evaluate_every; null: use evaluate_every.
        kl_tokens: Tokens per domain on which KL(base ‖ now) is measured; 0: none.
        in_context: Whether the gain by context on repeated random tokens is measured.
        samples: Documents per domain that the model continues at every evaluation, with greedy decoding; 0: none.
        sample_prompt_tokens: Tokens at the start of such a document that form the prompt.
        sample_tokens: Tokens per continuation.
        sample_prompts: Additional prompts, continued in the same way.
        questions: Files of your own questions: name → JSONL with question, choices, answer (without choices: cloze).
        lm_eval: Benchmarks of lm-evaluation-harness.
        tasks: Your own measurements: name → {_target_: class, ...}; docs/extending.md.
        domains: Sources of the base domains: name → dataset.
    """

    batch_size: Literal["auto"] | PositiveInt
    max_tokens: PositiveInt | None = None
    per_epoch: PositiveInt | None = None
    kl_tokens: NonNegativeInt = 2048
    in_context: bool = True
    samples: NonNegativeInt = 1
    sample_prompt_tokens: PositiveInt = 24
    sample_tokens: PositiveInt = 32
    sample_prompts: list[str] = field(default_factory=list)
    domains: dict[str, Source] = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)
    lm_eval: LmEval = field(default_factory=LmEval)
    tasks: dict[str, EvaluationTask] = field(default_factory=dict)
