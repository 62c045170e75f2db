"""Batches that the ranks share: each rank takes every n-th one, and all run equally many forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pretrain.evaluation.task import EvaluationInterrupted

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext


def turns(count: int, world: DistributedContext, interrupted: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
    """Yield in each round the index of the batch of ``count`` that this rank runs, and whether it counts. All ranks iterate.

    A rank without a batch in the last round runs one of another rank, which does not count, so that the collectives of a forward
    match. ``interrupted``, a collective, is called before every round; raises ``EvaluationInterrupted`` if it returns true.
    """
    for first in range(0, count, world.data_size):
        if interrupted():
            raise EvaluationInterrupted
        index = first + world.data_rank
        yield (index, True) if index < count else (first, False)
