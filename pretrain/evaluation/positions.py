"""Loss by position: how well a model predicts tokens that have little or much context before them.

A model whose context was extended (``model.overrides.rope_scaling``, a longer ``sequence_length``) uses it only if its loss at
the later positions is not above that of the earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.data.batch import IGNORE
from pretrain.telemetry.events import PositionLosses

if TYPE_CHECKING:
    from pretrain.data.batch import Batch

BUCKETS = 16


@dataclass(frozen=True)
class Buckets:
    """``count`` buckets of ``width`` positions each over a sequence. The position of a token is that of the input that predicts
    it, counted in its document with a document mask."""

    width: int
    count: int

    @classmethod
    def of(cls, sequence_length: int) -> Buckets:
        """Return at most 16 buckets of equal width."""
        width = -(-sequence_length // BUCKETS)
        return cls(width, -(-sequence_length // width))

    def sums(self, nats: Tensor, batch: Batch) -> Tensor:
        """Return the summed loss and the number of targets in each bucket, fp64 [2, ``count``], on the device. ``nats`` [n, S]
        is the loss of each token of ``batch``, 0 where there is no target."""
        positions = batch.position_ids
        if positions is None:
            positions = torch.arange(nats.shape[1], device=nats.device).expand_as(nats)
        bucket = positions.flatten() // self.width
        member = bucket.unsqueeze(1) == torch.arange(self.count, device=nats.device)
        values = torch.stack([nats.flatten().double(), (batch.labels.flatten() != IGNORE).double()])
        return values @ member.double()

    def losses(self, sums: Tensor) -> PositionLosses:
        """Return the mean losses from the summed ``sums``. This waits for the device."""
        nats, tokens = sums.tolist()
        counts = tuple(map(int, tokens))
        means = (total / count if count else None for total, count in zip(nats, counts, strict=True))
        return PositionLosses(self.width, tuple(means), counts)
