"""The processes that train together: this rank, its device, and the few collectives that the loop needs.

Counts, stop signals and errors are on the host and are exchanged by gloo, so that exchanging them never waits for a GPU.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed.rank_info import RankInfo
from pretrain.distributed.sockets import (
    hides_address,
    keep_to_interface_towards,
    keep_to_loopback,
    listening,
    restore_environment,
)
from pretrain.distributed.topology import Topology
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

T = TypeVar("T")
Number = TypeVar("Number", int, float)
group_entered = False  # whether this process has ever been in a process group


@dataclass(frozen=True, slots=True)
class DistributedContext:
    """This process in its process group, with the collectives of that group.

    Attributes:
        rank: rank of this process.
        topology: all processes of the run.
        device: the device on which this process computes.
        local_rank: rank of this process among those on this machine.
        group: the process group for values on the host (``None``: the default group).
    """

    rank: int = 0
    topology: Topology = Topology()
    device: torch.device = torch.device("cpu")
    local_rank: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """The number of processes (the world size)."""
        return self.topology.world_size

    @property
    def data_rank(self) -> int:
        """The index of this rank's share of the data, from 0 to ``data_size`` - 1."""
        return self.rank // self.topology.model_parallel_size

    @property
    def data_size(self) -> int:
        """The number of shares into which the data is divided."""
        return self.topology.data_parallel_size

    @property
    def is_data_leader(self) -> bool:
        """Whether this rank is the first of those that compute on the same data, so that its numbers are counted."""
        return self.rank % self.topology.model_parallel_size == 0

    def with_own_group(self, *, timeout_seconds: float) -> DistributedContext:
        """Return the same ranks with a new process group, for a thread that uses collectives at the same time as the loop.
        This is a collective."""
        if self.size == 1:
            return self
        return replace(self, group=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: Number) -> Number:
        """Return the sum of a host integer, or of a float in fp64, over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        dist.all_reduce(total, group=self.group)
        found: Any = total.item()
        return found

    def data_sum(self, value: Number) -> Number:
        """Return the sum of a host number over the shares of the data, see `sum`."""
        return self.sum(value if self.is_data_leader else value * 0)

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each of ``flags`` whether it is true on any rank."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(raised, group=self.group)
        return [bool(count) for count in raised.tolist()]

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a device tensor over all ranks, in place. The host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def data_all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a device tensor over the shares of the data, in place. The host does not wait for it."""
        return self.all_reduce_sum(tensor if self.is_data_leader else tensor.zero_())

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Take the maximum of a device tensor over all ranks, in place. The host does not wait for it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def all_gather_object(self, work: Callable[[], T]) -> list[T]:
        """Call ``work`` on every rank and return the results of all ranks, ordered by rank.

        Raises ``UserError`` on every rank if it is raised on one, so that no rank waits for another that has exited.
        """
        if self.size == 1:
            return [work()]
        done: tuple[Any, UserError | None]
        try:
            done = (work(), None)
        except UserError as error:
            done = (None, type(error)(*error.args))
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, done, group=self.group)
        for _, user_error in every:
            if user_error is not None:
                raise user_error
        return [value for value, _ in every]

    def gather_object(self, work: Callable[[], T]) -> list[T]:
        """Call ``work``, which must not fail, on every rank; return the results of all ranks on rank 0, and nothing elsewhere."""
        if self.size == 1:
            return [work()]
        every: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(work(), every, dst=0, group=self.group)
        return every or []

    def on_main_rank(self, work: Callable[[], T]) -> T:
        """Call ``work`` on rank 0 only; return its result, or raise its ``UserError``, on every rank."""
        return self.all_gather_object(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]


def enter(place: RankInfo, *, group: bool, timeout_seconds: float = 1800) -> DistributedContext:
    """Join the process group and return this process's context. Call ``leave`` at the end.

    With ``group`` a process group is created even for a single process. It uses nccl for tensors on GPUs and gloo for those
    on the host, on the network interfaces that `pretrain.distributed.sockets` selects.
    """
    device = torch.device("cuda", place.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if group or place.topology.world_size > 1:
        if place.one_machine:
            keep_to_loopback()
        else:
            keep_to_interface_towards(os.environ["MASTER_ADDR"])
        timeout = timedelta(seconds=timeout_seconds)
        meeting: dict[str, Any] = {"rank": place.rank, "world_size": place.topology.world_size}
        if (store := _store(place, timeout)) is not None:
            store.set_timeout(timeout)
            meeting["store"] = store
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        global group_entered
        group_entered = True
        dist.init_process_group(backends, timeout=timeout, **meeting)
    return DistributedContext(place.rank, place.topology, device, place.local_rank)


def _store(place: RankInfo, timeout: timedelta) -> dist.Store | None:
    """Return the store through which the ranks find each other. ``None`` means the store of torchrun, if it has started these
    processes and provides one."""
    size = place.topology.world_size
    if size == 1:
        return dist.HashStore()
    if place.store:
        return dist.FileStore(place.store, size)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    options: dict[str, Any] = {"world_size": size, "several_machines": not place.one_machine}
    return tcp_store(host, port, is_host=place.rank == 0, timeout=timeout, **options)


def tcp_store(
    host: str,
    port: int,
    *,
    is_host: bool,
    timeout: timedelta,
    world_size: int | None = None,
    several_machines: bool = False,
) -> dist.TCPStore:
    """Return torch's store at ``host``:``port``.

    The process with ``is_host`` listens at that address only, if it is an address of this machine. With
    ``several_machines``, a name that resolves to the loopback here does not count as one, since no other machine could
    connect. Otherwise it listens on all interfaces.

    Raises ``UserError`` if the host can't listen, and ``DistNetworkError`` if no host answers.
    """
    options: dict[str, Any] = {"timeout": timeout, "world_size": world_size, "multi_tenant": True}
    if is_host:
        try:
            found = listening(host, port)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise UserError(f"can't listen at {host}:{port}: {error.strerror}") from error
            found = None
        if found is not None and several_machines and hides_address(host, str(found.getsockname()[0])):
            found.close()
            found = None
        if found is not None:
            options["master_listen_fd"] = found.detach()
        else:
            notice(
                f"{host} is not an address of this machine, so the run listens on all its interfaces, at port {port}"
            )
    return dist.TCPStore(host, port, is_master=is_host, **options)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    restore_environment()
