"""What KL(base ‖ now) needs of the base model (before training): its last hidden states on held-out text.

KL(base ‖ now) on text of a domain predicts how much of the domain is forgotten, without any score of old data (arXiv:2509.04259).
The base model's logits of a domain would need tokens × vocabulary numbers and a second model its full memory; the last hidden
states need tokens × hidden size. They come from the evaluation before step 1, or are computed in set-up, while the engine has the
initial weights, and stay on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.data.batch import Batch
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
        call this. For ``interrupted`` and ``alive`` see `Evaluator.run`. A model whose logits are not a linear function of
        its last hidden states has no states; a notice says so."""
        if not domains or not self.measures(engine):
            return
        world = engine.world
        for domain in domains:
            for first in range(0, self.num_batches(domain), world.data_size):
                if interrupted():
                    return
                index = first + world.data_rank
                has_batch = index < self.num_batches(domain)
                states = engine.hidden_states(domain.batches[index if has_batch else first].to(world.device))
                if has_batch:
                    self._hidden[domain.name, index] = states.to("cpu", copy=True)
                alive()

    def measures(self, engine: InferenceEngine) -> bool:
        """Return whether KL(base ‖ now) is measured; a notice says why it can't be."""
        if self.tokens and not engine.model.fused_loss:
            name = type(engine.model.hf).__name__
            notice(
                f"evaluation.kl_tokens={self.tokens}: {name} caps or scales its logits; KL to the base is not measured"
            )
        return bool(self.tokens) and engine.model.fused_loss

    def evaluate_base(self, engine: InferenceEngine, batch: Batch, key: tuple[str, int] | None) -> Tensor:
        """Return what `evaluate` does for the base model itself, and keep its states. For ``key`` see there."""
        if key is None:
            return self.evaluate(engine, batch, None)
        nats, states = engine.evaluate_with_hidden_states(batch)
        self._hidden[key] = states.to("cpu", copy=True)
        return torch.stack(
            [nats.double(), torch.zeros_like(nats, dtype=torch.float64), nats.new_tensor(batch.num_targets).double()]
        )

    def num_batches(self, domain: Domain) -> int:
        """Return for how many batches of ``domain`` there are states: at least one."""
        batches = domain.batches
        return min(len(batches), max(1, self.tokens // (batches.batch_size * batches.sequence_length)))

    def evaluate(self, engine: InferenceEngine, batch: Batch, key: tuple[str, int] | None) -> Tensor:
        """Return the summed loss, the summed KL(base ‖ now) and the number of targets of the latter, fp64 [3], of a ``batch`` on
        the device. ``key`` names its domain and index (``None``: there are no states of it)."""
        states = None if key is None else self._hidden.get(key)
        if states is None:
            nats = engine.evaluate(batch).double()
            return torch.stack([nats, torch.zeros_like(nats), torch.zeros_like(nats)])
        found = engine.evaluate_against_base(batch, states.to(batch.input_ids.device, non_blocking=True)).double()
        return torch.cat([found, found.new_tensor([batch.num_targets])])
