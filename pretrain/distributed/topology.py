"""The processes of a run and their devices. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """How many processes a run has, on how many machines, and which devices they compute on. It is equal on all ranks.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        workers_per_node: processes on each machine.
        nodes: machines.
        devices_per_worker: devices of each process.
        model_parallel_size: consecutive ranks that share one replica of the model and therefore compute on the same
            batches (tensor or context parallelism). The data is divided over groups of this size.
    """

    device_type: str = "cpu"
    workers_per_node: int = 1
    nodes: int = 1
    devices_per_worker: int = 1
    model_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        """The number of processes on all machines."""
        return self.workers_per_node * self.nodes

    @property
    def devices(self) -> int:
        """The number of devices of all processes."""
        return self.world_size * self.devices_per_worker

    @property
    def data_parallel_size(self) -> int:
        """The number of groups of ranks over which the data is divided."""
        return self.world_size // self.model_parallel_size

    @property
    def data_parallel_devices(self) -> int:
        """The number of micro-batches that are computed at the same time."""
        return self.data_parallel_size * self.devices_per_worker
