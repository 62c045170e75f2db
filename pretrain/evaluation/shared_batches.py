"""Batches that the ranks share: each rank takes every n-th one, and all run equally many forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pretrain.evaluation.task import EvaluationInterrupted

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext


class Turn(NamedTuple):
    """The batch of this rank in one round.

    Attributes:
        index: Index of the batch.
        counts: Whether it is this rank's own. A rank without a batch in the last round runs one of another rank, so that the
            collectives of a forward match.
    """

    index: int
    counts: bool


def turns(count: int, world: DistributedContext, interrupted: Callable[[], bool]) -> Iterator[Turn]:
    """Yield this rank's turns in ``count`` batches. All ranks must iterate. ``interrupted``, a collective, is called before every
    turn; raises ``EvaluationInterrupted`` if it returns true."""
    for first in range(0, count, world.data_size):
        if interrupted():
            raise EvaluationInterrupted
        index = first + world.data_rank
        yield Turn(index, True) if index < count else Turn(first, False)
