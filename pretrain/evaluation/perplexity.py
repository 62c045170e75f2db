"""Score the held-out documents of each domain by perplexity and bits per byte, to measure learning and forgetting.

Bits per byte is comparable between models with different tokenizers; perplexity is per token of this model's own tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from pretrain.evaluation.base_states import BaseStates
from pretrain.evaluation.baseline import Known, digest
from pretrain.evaluation.positions import Buckets
from pretrain.evaluation.shared_batches import turns
from pretrain.evaluation.task import EvaluationInterrupted
from pretrain.runtime.console import notice, progress_bar, shows_progress
from pretrain.telemetry.events import DomainScore

if TYPE_CHECKING:
    from pretrain.data.evaluation import EvaluationBatches
    from pretrain.evaluation.baseline import Measured
    from pretrain.evaluation.in_context import InContextProbe
    from pretrain.strategy.engine import InferenceEngine


@dataclass(frozen=True)
class Domain:
    """A named set of held-out batches.

    Attributes:
        name: Name of the domain.
        role: ``new`` (the run trains on it) or ``base`` (the run may forget it).
        batches: Batches of held-out documents.
        prompts: The first tokens of some documents.
        settings: Settings that affect the loss besides the tokens.
    """

    name: str
    role: str
    batches: EvaluationBatches
    prompts: Sequence[list[int]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def measured_on(self) -> Measured:
        """Return what the domain's loss is measured on. This reads all of its tokens."""
        return {"text": self.batches.digest(), **self.settings}


@dataclass(frozen=True)
class Evaluator:
    """An evaluator that scores ``domains`` in order; the ranks share the batches of a domain. It draws no random numbers, so
    that evaluations do not change the training.

    Attributes:
        domains: the domains.
        probe: measures the gain by context of the model (``None``: it is not measured).
        base: hidden states of the base model, for KL(base ‖ now).
    """

    domains: list[Domain]
    probe: InContextProbe | None = None
    base: BaseStates = field(default_factory=BaseStates)

    def select(self, names: Container[str]) -> Evaluator:
        """Return an evaluator of only the domains in ``names``."""
        return Evaluator([domain for domain in self.domains if domain.name in names])

    def run(
        self,
        engine: InferenceEngine,
        *,
        baseline: Mapping[str, Known] | None = None,
        is_base: bool = False,
        announce: bool = False,
        interrupted: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
    ) -> list[DomainScore] | None:
        """Score all domains and return the scores, or ``None`` if ``interrupted`` returned true. All ranks must call this.

        ``baseline`` has each domain's loss before this run, for ``delta_loss``; with ``None`` these scores are the baseline.
        ``is_base`` says that the engine has the weights of the base model, whose states are then kept for KL(base ‖ now).
        ``announce`` prints a notice before each domain unless a progress bar is shown. ``interrupted`` is called before every
        batch on every rank, ``alive`` after every batch.
        """
        scores: list[DomainScore] = []
        captures = is_base and self.base.measures(engine)
        with evaluating(engine.model):
            for domain in self.domains:
                if announce and not shows_progress():
                    notice(f"evaluating {domain.name} ({domain.role}): {domain.batches.num_tokens:,} tokens")
                try:
                    scores.append(self._score(engine, domain, baseline, interrupted, alive, captures=captures))
                except EvaluationInterrupted:
                    return None
            gain = self.probe.gain(engine) if self.probe is not None and scores else None
        return [replace(score, in_context_gain=gain) for score in scores]

    def capture_base(self, engine: InferenceEngine, **callbacks: Callable[[], Any]) -> None:
        """Compute what KL(base ‖ now) needs of the initial weights, which ``engine`` must have. This is a collective. For
        ``callbacks`` see `run`."""
        with evaluating(engine.model):
            self.base.capture(engine, self.domains, **callbacks)

    def _score(
        self,
        engine: InferenceEngine,
        domain: Domain,
        baseline: Mapping[str, Known] | None,
        interrupted: Callable[[], bool],
        alive: Callable[[], None],
        *,
        captures: bool,
    ) -> DomainScore:
        """Return the score of a domain. Raises ``EvaluationInterrupted`` if ``interrupted`` returned true."""
        world, batches, buckets = engine.world, domain.batches, Buckets.of(domain.batches.sequence_length)
        summed = torch.zeros(3, dtype=torch.float64, device=world.device)  # nats, nats of KL, targets of KL
        by_position = torch.zeros(2, buckets.count, dtype=torch.float64, device=world.device)
        tokens = 0
        with progress_bar(f"evaluating {domain.name}", total=len(batches)) as advance:
            for index, counts in turns(len(batches), world, interrupted):
                batch = batches[index]
                keeps = captures and index < self.base.num_batches(domain)
                key = (domain.name, index) if counts else None
                on_device = batch.to(world.device)
                found, token_nats = self.base.evaluate(engine, on_device, key, keep=keeps)
                if counts:
                    summed += found
                    by_position += buckets.sums(token_nats, on_device)
                    tokens += batch.num_targets
                alive()
                advance(world.data_size)
        (nats, kl, compared), tokens = world.data_all_reduce_sum(summed).tolist(), world.data_sum(tokens)
        loss = nats / tokens
        before = Known(loss) if baseline is None else baseline[domain.name]
        num_bytes = batches.num_bytes
        return DomainScore(
            domain=domain.name,
            role=domain.role,
            loss=loss,
            perplexity=math.exp(loss) if loss < 700 else math.inf,
            bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
            tokens=tokens,
            delta_loss=None if before.loss is None else loss - before.loss,
            delta_reason=before.reason,
            digest=digest(domain.measured_on),
            kl_to_base=kl / compared if compared else None,
            positions=buckets.losses(world.data_all_reduce_sum(by_position)),
        )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode in the body of the ``with`` statement and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
