"""Perplexity and bits per byte of each domain's held-out documents: what was learned, and what was forgotten.

Bits per byte compares models with different tokenizers; perplexity is per token of this model's own tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pretrain.console import progress_bar
from pretrain.events import DomainScore

if TYPE_CHECKING:
    from pretrain.batch import Batch
    from pretrain.engine import Scorer


@dataclass(frozen=True)
class Domain:
    """A named set of held-out batches. ``role``: ``new`` (what the run trains on) or ``base`` (what it may forget).

    ``num_bytes`` is the size of exactly their text (0: unknown); ``prompts`` the first tokens of some of its documents.
    """

    name: str
    role: str
    batches: Sequence[Batch]
    num_bytes: int
    prompts: Sequence[list[int]] = ()


@dataclass(frozen=True)
class Evaluator:
    """Scores ``domains`` in order, each rank every n-th batch; draws no random number, so that evaluating leaves
    training as it was."""

    domains: list[Domain]

    def run(
        self,
        engine: Scorer,
        *,
        baseline: dict[str, float] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
    ) -> list[DomainScore] | None:
        """``baseline``: each domain's loss before this run, for ``delta_loss``; ``None``: these scores are the baseline.

        ``interrupted`` is asked before every batch, on every rank; once it is true there are no scores: ``None``.
        ``alive`` is called after every batch.
        """
        scores = []
        with evaluating(engine.model):
            for domain in self.domains:
                score = self._score(engine, domain, baseline, interrupted, alive)
                if score is None:
                    return None
                scores.append(score)
        return scores

    def _score(
        self,
        engine: Scorer,
        domain: Domain,
        baseline: dict[str, float] | None,
        interrupted: Callable[[], bool],
        alive: Callable[[], None],
    ) -> DomainScore | None:
        world = engine.world
        summed = torch.zeros((), dtype=torch.float64, device=world.device)
        tokens = 0
        with progress_bar(f"evaluating {domain.name}", total=len(domain.batches)) as advance:
            for first in range(0, len(domain.batches), world.size):
                if interrupted():
                    return None
                mine = first + world.rank < len(domain.batches)
                batch = domain.batches[first + world.rank if mine else first]  # a rank too many computes along
                nats_here = engine.evaluate(batch.to(world.device))
                if mine:
                    summed += nats_here
                    tokens += batch.num_targets
                alive()
                advance(world.size)
        nats, tokens = float(world.add_up(summed)), world.sum(tokens)
        loss = nats / tokens
        before = loss if baseline is None else baseline.get(domain.name)  # a domain added on resume has no baseline
        return DomainScore(
            domain=domain.name,
            role=domain.role,
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=nats / math.log(2) / domain.num_bytes if domain.num_bytes else None,
            tokens=tokens,
            delta_loss=None if before is None else loss - before,
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, the former mode outside."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
