"""What KL(base ‖ now) needs of the base model (before training): its last hidden states on held-out text.

KL(base ‖ now) on text of a domain predicts how much of the domain is forgotten, without any score of old data (arXiv:2509.04259).
The base model's logits of a domain would need tokens × vocabulary numbers and a second model its full memory; the last hidden
states need tokens × hidden size. They come from the evaluation before step 1, or are computed in set-up, while the engine has the
initial weights, and stay on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.data.batch import Batch
from pretrain.evaluation.shared_batches import turns
from pretrain.evaluation.task import EvaluationInterrupted
from pretrain.runtime.console import notice

if TYPE_CHECKING:
    from pretrain.evaluation.perplexity import Domain
    from pretrain.strategy.engine import InferenceEngine


@dataclass
class BaseStates:
    """The base model's last hidden states of the first batches of each domain, about ``tokens`` tokens of each (0: none). Every
    rank has those of the batches that it scores."""

    tokens: int = 0
    _hidden: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # by domain and batch, on the host

    def capture(
        self,
        engine: InferenceEngine,
        domains: Sequence[Domain],
        *,
        interrupted: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute the states of ``domains`` with the initial weights, which ``engine`` must have, in eval mode. All ranks must
        call this. For ``interrupted`` and ``alive`` see `Evaluator.run`. A model without a `LogitsMap` has no states; a
        notice says so."""
        if not domains or not self.measures(engine):
            return
        world = engine.world
        with suppress(EvaluationInterrupted):
            for domain in domains:
                for index, counts in turns(self.num_batches(domain), world, interrupted):
                    states = engine.hidden_states(domain.batches[index].to(world.device))
                    if counts:
                        self._hidden[domain.name, index] = states.to("cpu", copy=True)
                    alive()

    def measures(self, engine: InferenceEngine) -> bool:
        """Return whether KL(base ‖ now) is measured; a notice says why it can't be."""
        known = engine.model.logits_map is not None
        if self.tokens and not known:
            name = type(engine.model.hf).__name__
            notice(
                f"evaluation.kl_tokens={self.tokens}: the head of {name} is not a matrix alone; KL to the base is not measured"
            )
        return bool(self.tokens) and known

    def num_batches(self, domain: Domain) -> int:
        """Return for how many batches of ``domain`` there are states: at least one."""
        batches = domain.batches
        return min(len(batches), max(1, self.tokens // (batches.batch_size * batches.sequence_length)))

    def evaluate(
        self, engine: InferenceEngine, batch: Batch, key: tuple[str, int] | None, *, keep: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss, the summed KL(base ‖ now) and the number of targets of the latter, fp64 [3], of a ``batch`` on
        the device, and the loss of each token, fp32 [n, S].

        ``key`` names its domain and index (``None``: there are no states of it). ``keep`` says that this is the base model, whose
        states are kept.
        """
        states = None if key is None or keep else self._hidden.get(key)
        base = None if states is None else states.to(batch.input_ids.device, non_blocking=True)
        scores = engine.evaluate_tokens(batch, base, with_hidden=keep)
        if keep and key is not None and scores.hidden is not None:
            self._hidden[key] = scores.hidden.to("cpu", copy=True)
        loss = scores.loss.double()
        kl = torch.zeros_like(loss) if scores.kl is None else scores.kl.double()
        compared = batch.num_targets if key is not None and (keep or states is not None) else 0
        return torch.stack([loss, kl, torch.full_like(loss, compared)]), scores.nats
