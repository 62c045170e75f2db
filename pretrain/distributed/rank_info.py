"""The rank of a process in its run, before the process group exists. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The place of a process in its run.

    Attributes:
        rank: rank of this process.
        size: number of processes (the world size).
        local_rank: rank of this process among those on this machine.
        local_size: number of processes on this machine.
        restarts: how often the processes have been restarted.
        run_id: id of the command; restarts keep it.
        store: file through which the processes of one machine find each other, in a private folder; empty: they use
            MASTER_ADDR and MASTER_PORT.
        one_machine: whether all processes are on this machine.
        prepared: whether the launcher has prepared the data and shown its notices before it started the processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    run_id: str = ""
    store: str = ""
    one_machine: bool = True
    prepared: bool = False
