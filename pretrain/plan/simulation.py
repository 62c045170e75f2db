"""What this program uses of torch's private parts to run training steps on fake tensors, as one of any number of ranks (seen in
torch 2.10.0 and 2.13.0). ``tests/plan/test_simulation.py`` fails when one of them has changed.

- ``torch._subclasses.FakeTensorMode``: tensors with shape, dtype and strides, but without memory
- the process group ``fake`` of ``torch.testing._internal.distributed.fake_pg``: collectives return at once
- DDP reads tensors on the host at three places, where fake ones have no values: when it compares the parameters of the ranks,
  when it sends the weights of rank 0, and when it orders the buckets anew in the second step. These are replaced.
- ``torch.UntypedStorage.resize_`` is replaced while storages are tracked: FSDP frees gathered weights with it

A fake tensor of the device ``cuda`` can't be used: autograd needs CUDA's streams, and torch without CUDA aborts the process.
Therefore everything is traced on the CPU, with `cuda_operators` for the operations that allocate something else on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore

from pretrain.distributed.context import DistributedContext, Number
from pretrain.plan.storages import StorageTracker

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


@contextmanager
def simulated_group(rank: int, world_size: int) -> Iterator[None]:
    """Inside this context the process is rank ``rank`` of a process group of ``world_size`` ranks that exists nowhere else."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Inside this context new tensors are fake, and FSDP and DDP work with them."""

    def real_mesh(*args: Any, **options: Any) -> Any:
        with unset_fake_temporarily():
            return make_mesh(*args, **options)

    def nothing(*args: Any, **options: Any) -> None:
        return

    make_mesh = device_mesh.init_device_mesh
    with (
        replaced(device_mesh, "init_device_mesh", real_mesh),
        replaced(ddp, "_verify_param_shape_across_processes", nothing),
        replaced(ddp, "_sync_module_states", nothing),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextmanager
def resizes_tracked(tracker: StorageTracker) -> Iterator[None]:
    """Inside this context ``tracker`` sees when the storage of a tensor is resized."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        done = resize(storage, size)
        tracker.resized(storage)
        return done

    with replaced(torch.UntypedStorage, "resize_", resize_):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside this context the attribute ``name`` of ``owner`` is ``value``."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Reducer:
    """DDP's reducer, without the new order of its buckets in the second step."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


def without_values(module: nn.Module, sent: Callable[[int], None]) -> None:
    """Make a DDP ``module`` work with fake gradients; another module is unchanged. ``sent`` gets the bytes of each bucket."""
    if not isinstance(module, DistributedDataParallel):
        return

    def reduced(bucket: Any) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        sent(buffer.numel() * buffer.element_size())
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    module.register_comm_hook(None, lambda state, bucket: reduced(bucket))
    module.reducer = _Reducer(module.reducer)  # type: ignore[assignment]
