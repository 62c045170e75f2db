"""What this program uses of torch's private parts to run steps on fake tensors, as one of any number of ranks (seen in torch
2.13.0). ``tests/plan/test_trace.py`` fails when one of them has changed.

- ``FakeTensorMode``, ``active_fake_mode``: tensors without memory; DTensor finds out the shapes of results with them
- the process group ``fake`` of ``torch.testing._internal.distributed.fake_pg``: collectives return at once
- DDP compares and sends parameters at its start, and orders its buckets anew in the second step: fake ones have no values
- ``UntypedStorage._cdata`` and a replaced ``resize_``, with which FSDP frees gathered weights
- fake tensors on ``cuda`` need CUDA's streams (torch without CUDA aborts), so all is traced on the CPU, see `cuda_operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily as real_tensors
from torch.distributed import device_mesh
from torch.distributed.tensor import _sharding_prop
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from pretrain.plan.storages import StorageTracker

__all__ = ["FakeTensor", "TorchDispatchMode", "active_fake_mode", "real_tensors", "tree_leaves", "tree_map"]


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return the address of the storage, which views share."""
    return storage._cdata


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
        with real_tensors():
            return make_mesh(*args, **options)

    nothing: Callable[..., None] = lambda *args, **options: None  # noqa: E731
    make_mesh = device_mesh.init_device_mesh
    with (
        replaced(device_mesh, init_device_mesh=real_mesh),
        replaced(_sharding_prop, detect_fake_mode=nothing),  # so that it uses another mode than that of the trace
        replaced(ddp, _verify_param_shape_across_processes=nothing, _sync_module_states=nothing),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextmanager
def resizes_tracked(tracker: StorageTracker) -> Iterator[None]:
    """Inside this context ``tracker`` sees when the storage of a tensor is resized."""
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        tracker.resized(storage)

    with replaced(torch.UntypedStorage, resize_=resize_):
        yield


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Inside this context attributes of ``owner`` have other values."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


class _Reducer:
    """DDP's reducer, which does not order its buckets anew."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return (lambda: False) if name == "_rebuild_buckets" else getattr(self._reducer, name)


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
