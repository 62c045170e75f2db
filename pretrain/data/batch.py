"""The type of one rank's share of a global batch. It is the interface between data/ and models/."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100  # label of a position without a target (torch's cross_entropy default)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of S tokens with their already shifted labels.

    Attributes:
        input_ids: int64 [n, S].
        labels: int64 [n, S], the token that follows each position; ``IGNORE`` where there is no target.
        position_ids: int64 [n, S], restarting at 0 with each document; ``None`` without a document mask.
        num_targets: number of labels that are not ``IGNORE``, counted on the CPU when the batch is built, which needs no
            device sync.
        first_sample: index of the first sample of the global batch in the run's endless sequence of samples.
        micro_batch_size: sequences in one forward and backward (0: all of them).
        loss_weights: float32 [n], the factor of each sequence's tokens in the loss; ``None``: 1 for all.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_targets: int
    first_sample: int = 0
    micro_batch_size: int = 0
    loss_weights: Tensor | None = None

    @property
    def sum_of_weights(self) -> float:
        """The sum of the loss weights of all targets. A batch on a device must wait for it."""
        targets = (self.labels != IGNORE).sum(1).double()
        return float(targets.sum() if self.loss_weights is None else targets @ self.loss_weights.double())

    def micro_batches(self) -> list[Batch]:
        """Return the micro-batches of ``micro_batch_size`` sequences, in order."""
        return list(self.split(self.micro_batch_size or len(self.input_ids)))

    def split(self, size: int) -> Iterator[Batch]:
        """Yield micro-batches of at most ``size`` sequences, in order. Their ``num_targets`` is 0, because it is not needed."""
        for start in range(0, len(self.input_ids), size):
            part = slice(start, start + size)
            positions = None if self.position_ids is None else self.position_ids[part]
            weights = None if self.loss_weights is None else self.loss_weights[part]
            yield Batch(
                self.input_ids[part], self.labels[part], positions, 0, self.first_sample + start, loss_weights=weights
            )

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on ``device``. The copy does not block when the source is pinned."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """Return the same batch in pinned (page-locked) memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        positions = None if self.position_ids is None else change(self.position_ids)
        weights = None if self.loss_weights is None else change(self.loss_weights)
        inputs, labels = change(self.input_ids), change(self.labels)
        return replace(self, input_ids=inputs, labels=labels, position_ids=positions, loss_weights=weights)
