"""``batch_size=auto``: the largest micro-batch that fits, found by forwards and backwards before step 1.

Trials leave the run as it was: no weight and no moment is touched, nothing is exchanged with another rank (which might
have run out of memory), and whoever calls puts the random state back. Nothing is timed: a choice by the clock would be
another one tomorrow, and so would the last bits of every loss.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from pretrain.runtime import memory
from pretrain.runtime.out_of_memory import OutOfMemory, is_out_of_memory, numbers
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.data.batch import Batch
    from pretrain.strategy.engine import Engine

ROOM = 0.05  # of the memory stays free: for what a trial can't know, such as buffers of the communication
CPU_TOKENS = 8192  # at a time: on a CPU more are no faster (docs/memory.md)
PROBE_SIDE = 64  # of the matrix that is updated to see what an optimizer keeps


def choose(
    engine: Engine, rows: Callable[[int], Batch], *, total: int, sequence_length: int, moment_bytes: int
) -> tuple[MicroBatching, str]:
    """``total`` sequences of a device in the largest micro-batches that fit on every rank, and why these. A collective.

    ``rows(n)``: a micro-batch of n sequences for one device · ``moment_bytes``: what the optimizer will add.
    Raises ``OutOfMemory`` where not even one sequence fits.
    """
    world, whole = engine.world, MicroBatching(1, total)
    sizes = whole.sizes()
    if world.device.type == "cpu":
        sizes = [size for size in sizes if size * sequence_length <= max(CPU_TOKENS, sequence_length)]
    if len(sizes) == 1:
        return whole.of(sizes[0]), "nothing to choose"
    Trials(engine, rows, moment_bytes=moment_bytes).fit(1)  # what libraries take once is no part of any size
    left = world.all_gather_object(memory.available_bytes)[
        world.rank
    ]  # when all have done that and none has tried more yet
    trials = Trials(engine, rows, moment_bytes=moment_bytes, room=left and left // world.local_size)
    found = world.all_gather_object(lambda: (largest(sizes, trials.fit), trials.failure))
    size, failure = min(found)
    if size == 0:
        raise OutOfMemory("step", failure)
    if size < sizes[-1]:
        return whole.of(size), f"more does not fit: {failure}"
    return whole.of(size), "all at once" if size == total else "more are no faster on a CPU"


def largest(sizes: Sequence[int], fit: Callable[[int], bool]) -> int:
    """The largest of the ascending ``sizes`` that fits, 0 where none does.

    It grows until one is too large, never to more than the next size from twice what has fitted, and then halves the
    gap: on a CPU a trial that is far too large is not refused but ends with the kernel killing the process.
    """
    good, bad = -1, len(sizes)
    while bad - good > 1:
        if bad < len(sizes):
            tried = (good + bad) // 2
        else:
            doubled = 2 * sizes[good] if good >= 0 else 0
            tried = next((i for i in range(good + 1, bad) if sizes[i] >= doubled), bad - 1)
        if fit(sizes[tried]):
            good = tried
        else:
            bad = tried
    return sizes[good] if good >= 0 else 0


class Trials:
    """Micro-batches tried on this rank alone, beside gradients and as much memory as the moments will take.

    ``room``: bytes of the host this rank may take (``None``: unknown) · ``failure``: the numbers of the last that did
    not fit.
    """

    def __init__(
        self, engine: Engine, rows: Callable[[int], Batch], *, moment_bytes: int, room: int | None = None
    ) -> None:
        self.engine, self.rows = engine, rows
        self.device = engine.world.device
        self.moment_bytes, self.room = moment_bytes, room
        self.resident = memory.resident_bytes()  # once: what a trial has freed may stay with the process
        gradients = sum(p.numel() * p.element_size() for p in engine.model.parameters() if p.requires_grad)
        self.seen: tuple[int, float] = (0, gradients)  # the trial before: sequences, and bytes of the host they took
        self.row_bytes = 0.0  # by which one more sequence raised them
        self.failure = ""

    def fit(self, size: int) -> bool:
        """Whether micro-batches of ``size`` sequences fit."""
        before, taken = self.seen
        problem = self._too_much_for_host(taken + self.row_bytes * (size - before))
        if not problem:
            try:
                problem = self._run(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = numbers(error)
            if problem:
                gc.collect()  # what a traceback held is in cycles; otherwise there are none, and it takes its time
            self._clear()
        self.failure = problem or self.failure
        return not problem

    def _run(self, size: int) -> str:
        """What is wrong with this size, if it ran. Twice, because from the second micro-batch of a step on there are
        gradients beside the activations."""
        memory.reset_peak()
        batch = self.rows(size).to(self.device)
        moments = torch.empty(self.moment_bytes, dtype=torch.uint8, device=self.device)
        for _ in range(2):
            self.engine.backward(batch, tokens=max(1, batch.num_targets), last=False)
        del moments
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            # What has been freed counts as taken until it is cleared.
            free, total = torch.cuda.mem_get_info(self.device)
            return "" if free >= ROOM * total else f"{memory.gib(free)} of {memory.gib(total)} would be left"
        peak = memory.peak_bytes()
        if peak is None or self.resident is None:
            return ""
        before, taken = self.seen
        self.seen = size, peak - self.resident
        self.row_bytes = max(0.0, (self.seen[1] - taken) / (size - before))
        return self._too_much_for_host(self.seen[1])

    def _too_much_for_host(self, needed: float) -> str:
        """Asked before as well: a CPU's allocator refuses nothing, the kernel kills."""
        if self.device.type != "cpu" or self.room is None or needed + self.moment_bytes <= (1 - ROOM) * self.room:
            return ""
        return f"needs {memory.gib(needed + self.moment_bytes)} of {memory.gib(self.room)} available"

    def _clear(self) -> None:
        self.engine.model.zero_grad(set_to_none=True)
        if self.engine.model.is_compiled:
            torch.compiler.reset()  # one graph a size; torch stops compiling after eight
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def moment_bytes(make: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer], model: nn.Module) -> int:
    """What an optimizer will keep of ``model``'s parameters from its first update on, seen on a small matrix of each
    type."""
    each: dict[torch.dtype, float] = {}
    needed = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.dtype not in each:
                each[parameter.dtype] = _kept_for_each(make, parameter.dtype)
            needed += each[parameter.dtype] * parameter.numel()
    return math.ceil(needed)


def _kept_for_each(make: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer], dtype: torch.dtype) -> float:
    """Bytes for each number of a parameter of ``dtype``."""
    matrix = nn.Parameter(torch.zeros(PROBE_SIDE, PROBE_SIDE, dtype=dtype))
    matrix.grad = torch.zeros_like(matrix)
    optimizer = make([("probe", matrix)])
    optimizer.step()
    kept = (value for value in optimizer.state[matrix].values() if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in kept) / matrix.numel()
