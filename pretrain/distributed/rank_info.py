"""Where a process stands among those of its run, before it has met them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RankInfo:
    """``rank`` of ``size`` processes, ``local_rank`` of ``local_size`` on this machine; ``restarts`` of the group
    so far, which all have the ``run_id`` of one command. ``store``: the file by which they meet, in a private folder
    of their one machine; empty: at MASTER_ADDR and MASTER_PORT. ``one_machine``: whether all are on this one.
    ``prepared``: whether the launcher has prepared the data before it started them, and has shown the notices of that."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    run_id: str = ""
    store: str = ""
    one_machine: bool = True
    prepared: bool = False
