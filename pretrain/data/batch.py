"""One rank's share of a global batch. It is what the data side hands to the model side; both know only this file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100  # label of a position that is no target (torch's cross_entropy default)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of S tokens with their already shifted labels.

    ``input_ids``    int64 [n, S]
    ``labels``       int64 [n, S]: the token that follows; ``IGNORE`` where there is nothing to predict
    ``position_ids`` int64 [n, S], restarting at 0 with each document, or ``None``: no document mask
    ``num_targets``  labels that are not ``IGNORE``, counted on the CPU when the batch is made (never a device sync)
    ``first_sample`` index of the batch's global first sample in the endless sequence of the run
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_targets: int
    first_sample: int = 0

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of at most ``size`` sequences, in order. ``num_targets`` of the parts is not needed: 0."""
        for start in range(0, len(self.input_ids), size):
            part = slice(start, start + size)
            positions = None if self.position_ids is None else self.position_ids[part]
            yield Batch(self.input_ids[part], self.labels[part], positions, 0, self.first_sample + start)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; the copy does not block when the source is pinned."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        positions = None if self.position_ids is None else change(self.position_ids)
        return replace(self, input_ids=change(self.input_ids), labels=change(self.labels), position_ids=positions)
