"""The memory of every tensor over time: when its storage is allocated and freed, and what it is for.

A storage counts from the operation that allocates it until nothing refers to it any more, as in torch's allocators. It works
the same on real tensors and on fake ones, which have sizes but no memory. Temporary memory inside of a kernel is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.plan.torch_internals import FakeTensor, TorchDispatchMode, active_fake_mode, storage_id, tree_leaves

COMMUNICATING = (
    "c10d",
    "fsdp",
    "_c10d_functional",
)  # namespaces of operations whose arguments are the strategy's buffers
SENT = {"_allgather_base_": "gathered", "_reduce_scatter_base_": "reduced", "allreduce_": "reduced"}


@dataclass(slots=True)
class Storage:
    """One storage: its size in bytes, and what it is for."""

    size: int
    kind: str


@dataclass(slots=True)
class Usage:
    """The largest memory in one phase of a step.

    Attributes:
        peak: bytes by kind at the moment of the phase's largest total.
        end: bytes by kind at its end.
    """

    peak: dict[str, float] = field(default_factory=dict)
    end: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """The largest total in bytes."""
        return sum(self.peak.values())


_uncounted = 0  # how many `uncounted` contexts are open


@contextmanager
def uncounted() -> Iterator[None]:
    """Inside this context no tracker counts the storages of new tensors."""
    global _uncounted
    _uncounted += 1
    try:
        yield
    finally:
        _uncounted -= 1


class StorageTracker(TorchDispatchMode):
    """Records all storages of the tensors that operations inside it return.

    A storage gets the kind ``kind`` of the time at which it is allocated, until `tag` gives it another one. A kind that is
    given later also counts for the time before.

    Attributes:
        phase: the name of the present phase.
        kind: the kind of storages that are allocated now.
        communicated: bytes of the collectives' arguments since the last `restart`: ``gathered`` and ``reduced``.
    """

    def __init__(self, *, unit: int = 1) -> None:
        """Sizes are rounded up to multiples of ``unit`` bytes, as an allocator does."""
        super().__init__()
        self.phase, self.kind = "setup", "other"
        self.communicated = {"gathered": 0, "reduced": 0}
        self._unit = unit
        self._live: dict[int, Storage] = {}
        self._log: list[tuple[str, Storage, int]] = []  # phase, storage, +size or -size

    def restart(self) -> None:
        """Forget the past; what is allocated stays."""
        self._log = [(self.phase, storage, storage.size) for storage in self._live.values() if storage.size]
        self.communicated = dict.fromkeys(self.communicated, 0)

    def tag(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Set the kind of the storages of ``tensors``. One that was allocated elsewhere counts from now on."""
        every = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        for tensor in every:
            self._note(tensor)
        for storage in filter(None, map(self._storage_of, every)):
            storage.kind = kind

    def usage(self) -> dict[str, Usage]:
        """Return the usage of each phase since the last `restart`, in the order of their first allocation."""
        found: dict[str, Usage] = {}
        now: dict[str, float] = {}
        largest: dict[str, int] = {}
        total = 0
        for i, (phase, storage, change) in enumerate(self._log):
            usage = found.setdefault(phase, Usage())
            now[storage.kind] = now.get(storage.kind, 0) + change
            total += change
            if total > largest.get(phase, 0):
                largest[phase], usage.peak = total, dict(now)
            if i + 1 == len(self._log) or self._log[i + 1][0] != phase:
                usage.end = dict(now)
        return found

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that ``storage`` has another size, which no operation reports."""
        known = self._live.get(storage_id(storage))
        if known is not None:
            size = self._rounded(storage.nbytes())
            self._log.append((self.phase, known, size - known.size))
            known.size = size

    def __enter__(self) -> StorageTracker:
        self._mode = active_fake_mode()
        entered: StorageTracker = super().__enter__()
        return entered

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the operations on its local tensors come here
        result = func(*args, **(kwargs or {}))
        # DTensor finds out the shapes of results on fake tensors of its own, as large as the unsharded ones.
        if _uncounted or func.namespace == "prim" or active_fake_mode() is not self._mode:
            return result
        is_cast = func.name() == "aten::_to_copy" and self.kind == "activations"
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            for leaf in tree_leaves(tensor):
                if isinstance(leaf, Tensor):
                    self._note(leaf, is_cast and self._is_weight(args[0]))
        if func.namespace in COMMUNICATING:
            self._communication(func, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)])
        return result

    def _note(self, tensor: Tensor, is_cast_weight: bool = False) -> None:
        if isinstance(tensor, DTensor):
            return
        storage = tensor.untyped_storage()
        key = storage_id(storage)
        # A fake tensor's storage is on the meta device, and asking for its own device is an operation.
        if key in self._live or (type(tensor) is not FakeTensor and tensor.device.type == "meta"):
            return
        made = Storage(self._rounded(storage.nbytes()), "casts" if is_cast_weight else self.kind)
        self._live[key] = made
        self._log.append((self.phase, made, made.size))
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        storage = self._live.pop(key)
        self._log.append((self.phase, storage, -storage.size))

    def _is_weight(self, tensor: Tensor) -> bool:
        known = self._storage_of(tensor)
        return known is not None and known.kind == "weights"

    def _storage_of(self, tensor: Tensor) -> Storage | None:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return self._live.get(storage_id(local.untyped_storage()))

    def _communication(self, func: Any, arguments: list[Tensor]) -> None:
        for storage in filter(None, map(self._storage_of, arguments)):
            if storage.kind in ("activations", "temporary", "other", "loss"):
                storage.kind = "buffers"
        name = func.name().split("::")[-1].split(".")[0]
        if name in SENT:
            self.communicated[SENT[name]] += max(a.numel() * a.element_size() for a in arguments)

    def _rounded(self, size: int) -> int:
        return -(-size // self._unit) * self._unit
