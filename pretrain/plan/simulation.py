"""One rank of many in a process without the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pretrain.distributed.context import DistributedContext, Number

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SimulatedContext(DistributedContext):
    """A rank whose exchange of numbers and objects on the host behaves as if all ranks had the same."""

    def sum(self, value: Number) -> Number:
        return value * self.size

    def any_rank(self, *flags: bool) -> list[bool]:
        return list(flags)

    def all_gather_object(self, work: Callable[[], T]) -> list[T]:
        return [work()] * self.size

    def on_main_rank(self, work: Callable[[], T]) -> T:
        return work()
