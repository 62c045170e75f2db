"""The rank of a process in its run, before the process group exists. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.distributed.topology import Topology


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Which of the run's processes this one is, and how it meets the others.

    Attributes:
        rank: rank of this process.
        local_rank: rank of this process among those on this machine.
        topology: all processes of the run.
        restarts: how often the processes have been restarted.
        run_id: id of the command; restarts keep it.
        store: file through which the processes of one machine find each other, in a private folder; empty: they use
            MASTER_ADDR and MASTER_PORT.
        one_machine: whether all processes are on this machine.
        prepared: whether the launcher has prepared the data and shown its notices before it started the processes.
    """

    rank: int = 0
    local_rank: int = 0
    topology: Topology = Topology()
    restarts: int = 0
    run_id: str = ""
    store: str = ""
    one_machine: bool = True
    prepared: bool = False
