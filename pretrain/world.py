"""The group of processes that train together: this rank, its device, and the few collectives the loop needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class World:
    """``rank`` of ``size`` processes; ``device`` is where this rank computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: int) -> int:
        """The sum of a host integer over all ranks."""
        assert self.size == 1, "several ranks need a process group"
        return value

    def any(self, flag: bool) -> bool:
        """True on every rank as soon as it is true on one."""
        return bool(self.sum(int(flag)))


def one_process() -> World:
    """The world of a single process: the first visible GPU, else the CPU."""
    return World(0, 1, torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
