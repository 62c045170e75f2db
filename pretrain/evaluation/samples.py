"""Continue a few prompts at every evaluation, to show a change of the model in text and not only in perplexity.

This is a greedy loop over the engine's own forward without a KV cache, and does not use transformers' ``generate``. Under FSDP
and ZeRO a forward is a collective, so all ranks run the same prompts for the same number of steps, even after a continuation
has ended. It takes a few dozen short forwards; use `task=generation` for longer texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pretrain.evaluation.perplexity import evaluating
from pretrain.runtime.errors import UserError
from pretrain.telemetry.events import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.evaluation.config import EvaluationConfig
    from pretrain.evaluation.perplexity import Domain
    from pretrain.strategy.engine import InferenceEngine

PROMPTS_PER_BATCH = 8  # prompts per batch; their logits are one row each


@dataclass(frozen=True)
class Prompt:
    """A prompt. ``tokens`` start with the token that precedes a document in training: BOS, or an end-of-text token."""

    domain: str
    role: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Sampler:
    """A sampler that continues ``prompts`` by up to ``num_tokens`` tokens, until the token ``separator``. It draws no random
    numbers and does not change the model, so that a run with samples equals a run without them bit for bit."""

    prompts: Sequence[Prompt]
    tokenizer: Any
    num_tokens: int
    separator: int

    def run(
        self,
        engine: InferenceEngine,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
    ) -> list[Sample] | None:
        """Return one sample per prompt, in order, or ``None`` if ``interrupted`` returned true. ``interrupted`` and ``alive``
        are called as in ``Evaluator.run``, but for every token."""
        samples = []
        with evaluating(engine.model):
            for start in range(0, len(self.prompts), PROMPTS_PER_BATCH):
                prompts = self.prompts[start : start + PROMPTS_PER_BATCH]
                rows = self._continue(engine, prompts, interrupted, alive)
                if rows is None:
                    return None
                samples += [self._sample(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        return samples

    def _continue(
        self,
        engine: InferenceEngine,
        prompts: Sequence[Prompt],
        interrupted: Callable[[], bool],
        alive: Callable[[], None],
    ) -> list[list[int]] | None:
        """Return the tokens that follow each prompt. The host synchronises with the device once, at the end."""
        device = engine.world.device
        lengths = torch.tensor([len(p.tokens) for p in prompts], device=device)
        longest = max(len(p.tokens) for p in prompts)
        steps = min(self.num_tokens, engine.model.num_positions - longest)
        ids = torch.full((len(prompts), longest + steps), self.separator, device=device)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.tokens)] = torch.tensor(prompt.tokens, device=device)
        rows = torch.arange(len(prompts), device=device)
        for n in range(steps):
            if interrupted():
                return None
            ids[rows, lengths + n] = engine.next_tokens(ids[:, : longest + n], lengths + n - 1)
            alive()
        return [self._until_end(row, start, steps) for row, start in zip(ids, lengths.tolist(), strict=True)]

    def _until_end(self, row: Tensor, start: int, steps: int) -> list[int]:
        found = row[start : start + steps].tolist()
        return found[: found.index(self.separator)] if self.separator in found else found

    def _sample(self, prompt: Prompt, continuation: list[int]) -> Sample:
        before = self._text(prompt.tokens)
        full_text = self._text(
            (*prompt.tokens, *continuation)
        )  # decoded with its prompt, because some tokenizers drop a leading space
        text = full_text.removeprefix(before) if full_text.startswith(before) else self._text(continuation)
        return Sample(prompt.domain, prompt.role, before, text)

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def prompts_of(
    domains: Sequence[Domain], policy: EvaluationConfig, tokenizer: Any, *, first: int, num_positions: int
) -> list[Prompt]:
    """Return the prompts of each domain, then the user's own, each after the token ``first``. Prompts from documents are
    truncated to half of the model's positions.

    Raises ``UserError`` if a prompt of the user leaves no position for a continuation.
    """
    found = [Prompt(d.name, d.role, (first, *tokens[: num_positions // 2])) for d in domains for tokens in d.prompts]
    for text in policy.sample_prompts:
        tokens = (first, *tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(tokens) >= num_positions:
            raise UserError(
                f"evaluation.sample_prompts: one of {len(tokens)} tokens leaves no room: the model has {num_positions} "
                "positions"
            )
        found.append(Prompt("prompts", "user", tokens))
    return found
