"""``batch_size=auto``: find the largest micro-batch that fits in memory by trial forward and backward passes before step 1.

The trials do not change the run: they touch no weight and no moment and use no collective (another rank might have run
out of memory), and the caller restores the random state. Nothing is timed: a choice based on timings could differ from
run to run, and with it the last bits of every loss.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from pretrain.optim.combined import combined, state_tensors
from pretrain.runtime import memory
from pretrain.runtime.out_of_memory import OutOfMemory, is_out_of_memory, numbers
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from pretrain.data.batch import Batch
    from pretrain.models.language_model import LanguageModel
    from pretrain.optim.base import OptimizerFactory
    from pretrain.strategy.engine import Engine

ROOM = 0.05  # share of the memory that stays free for what a trial can't measure, such as communication buffers
CPU_TOKENS = 8192  # tokens per micro-batch: on a CPU larger ones are no faster (docs/memory.md)
PROBE_ROWS, PROBE_COLUMNS = 16, 512  # largest sides of the parameters that are updated to measure an optimizer's state


def choose(
    engine: Engine,
    rows: Callable[[int], Batch],
    *,
    total: int,
    sequence_length: int,
    moment_bytes: int,
    planned: int | None = None,
) -> tuple[MicroBatching, str]:
    """Divide ``total`` sequences per device into the largest micro-batches that fit on every rank. This is a collective.

    ``rows(n)`` returns a micro-batch of n sequences for one device; ``moment_bytes`` is the size of the optimizer state
    that the first update will allocate. ``planned`` is the size that a plan predicts to be the largest, with which the search
    starts on a GPU. Returns the division and the reason for it.
    Raises ``OutOfMemory`` if not even one sequence fits.
    """
    world, undivided = engine.world, MicroBatching(1, total)
    sizes = undivided.sizes()
    if world.device.type == "cpu":
        sizes = [size for size in sizes if size * sequence_length <= max(CPU_TOKENS, sequence_length)]
    if len(sizes) == 1:
        return undivided.of(sizes[0]), "nothing to choose"
    # Libraries allocate some memory at their first use. It must not be counted as part of any size.
    Trials(engine, rows, moment_bytes=moment_bytes).fit(1)
    # Measured when every rank has run this first trial and none has started a larger one.
    available = world.all_gather_object(memory.available_bytes)[world.rank]
    trials = Trials(
        engine, rows, moment_bytes=moment_bytes, room=available and available // world.topology.workers_per_node
    )
    first = planned if world.device.type == "cuda" else None
    found = world.all_gather_object(lambda: (largest(sizes, trials.fit, first=first), trials.failure))
    size, failure = min(found)
    if size == 0:
        raise OutOfMemory("step", failure)
    if size < sizes[-1]:
        return undivided.of(size), f"larger ones do not fit: {failure}"
    return undivided.of(size), "all in one micro-batch" if size == total else "larger ones are no faster on a CPU"


def largest(sizes: Sequence[int], fit: Callable[[int], bool], *, first: int | None = None) -> int:
    """Return the largest of the ascending ``sizes`` that fits, or 0 if none does.

    ``first`` is a guess of the result, which is tried before the others, and after it the next larger size: two trials are
    then enough if the guess is right.

    The size is at most doubled (rounded up to the next of ``sizes``) until one does not fit; then the gap is bisected.
    Larger jumps are unsafe on a CPU: no allocation fails there, the kernel kills the process instead.
    """
    good, bad = -1, len(sizes)
    guesses = [] if first not in sizes else [sizes.index(first) + 1, sizes.index(first)]
    while bad - good > 1:
        if guesses and good < guesses[-1] < bad:
            tried = guesses.pop()
        elif bad < len(sizes):
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
    """Trial micro-batches on this rank alone, with memory allocated for the gradients and the optimizer state.

    ``room`` is the number of bytes of host memory that this rank may use (``None``: unknown). ``failure`` describes the
    last trial that did not fit.
    """

    def __init__(
        self, engine: Engine, rows: Callable[[int], Batch], *, moment_bytes: int, room: int | None = None
    ) -> None:
        self.engine, self.rows = engine, rows
        self.device = engine.world.device
        self.moment_bytes, self.room = moment_bytes, room
        self.resident = memory.resident_bytes()  # measured once: memory that a trial frees may stay with the process
        gradients = sum(p.numel() * p.element_size() for p in engine.model.parameters() if p.requires_grad)
        self.seen: tuple[int, float] = (0, gradients)  # the previous trial: its sequences and its bytes of host memory
        self.bytes_per_row = 0.0  # additional bytes per sequence, as measured between the last two trials
        self.failure = ""

    def fit(self, size: int) -> bool:
        """Return whether micro-batches of ``size`` sequences fit."""
        before, taken = self.seen
        problem = self._host_memory_problem(taken + self.bytes_per_row * (size - before))
        if not problem:
            try:
                problem = self._run(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                problem = numbers(error)
            if problem:
                gc.collect()  # the traceback holds tensors in reference cycles; a trial that fits leaves none
            self._clear()
        self.failure = problem or self.failure
        return not problem

    def _run(self, size: int) -> str:
        """Run one trial and return why the size does not fit, or "". It runs two micro-batches, because from the second
        one of a step on the gradients exist in addition to the activations."""
        memory.reset_peak()
        batch = self.rows(size).to(self.device)
        moments = torch.empty(self.moment_bytes, dtype=torch.uint8, device=self.device)
        for _ in range(2):
            self.engine.backward(batch, tokens=max(1, batch.num_targets), last=False)
        del moments
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            # torch's allocator counts freed memory as used until its cache is emptied.
            free, total = torch.cuda.mem_get_info(self.device)
            return "" if free >= ROOM * total else f"{memory.gib(free)} of {memory.gib(total)} would be left"
        peak = memory.peak_bytes()
        if peak is None or self.resident is None:
            return ""
        before, taken = self.seen
        self.seen = size, peak - self.resident
        self.bytes_per_row = max(0.0, (self.seen[1] - taken) / (size - before))
        return self._host_memory_problem(self.seen[1])

    def _host_memory_problem(self, needed: float) -> str:
        """Return why ``needed`` bytes do not fit into host memory, or "". This is also checked before a trial runs: on a
        CPU no allocation fails, the kernel kills the process instead."""
        if self.device.type != "cpu" or self.room is None or needed + self.moment_bytes <= (1 - ROOM) * self.room:
            return ""
        return f"needs {memory.gib(needed + self.moment_bytes)} of {memory.gib(self.room)} available"

    def _clear(self) -> None:
        self.engine.model.zero_grad(set_to_none=True)
        if self.engine.model.is_compiled:
            torch.compiler.reset()  # every size compiles its own graph, and torch stops compiling after eight
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def moment_bytes(make: OptimizerFactory, model: LanguageModel) -> int:
    """Return the size in bytes of an optimizer's state for the parameters of ``model``. It is measured on small parameters with
    the same names, dtypes and numbers of dimensions."""
    trained = {name: p for name, p in model.hf_named_parameters() if p.requires_grad}
    small = {name: _shrunk(parameter) for name, parameter in trained.items()}
    optimizer = combined(make(small.items()))
    optimizer.step()
    needed = 0.0
    for name, parameter in small.items():
        for value in state_tensors(optimizer.state.get(parameter, {})):
            growth = _growth(value.shape, parameter.shape, trained[name].shape)
            needed += value.numel() * value.element_size() * growth
    return math.ceil(needed)


def _growth(state: Sequence[int], small: Sequence[int], full: Sequence[int]) -> float:
    """Return how many times larger a tensor of shape ``state`` is for a parameter of shape ``full`` than it is for one of shape
    ``small``. A side of 1, and a dimension that the tensor does not have, do not grow; a shape unlike the parameter's grows
    as its number of elements."""
    sides = [large / least for least, large in zip(small, full, strict=True)]
    if not state:
        return 1
    if len(state) == len(small) and all(own <= side for own, side in zip(state, small, strict=True)):
        return math.prod(side for own, side in zip(state, sides, strict=True) if own > 1)
    for missing in range(len(small)):
        if [*state] == [*small[:missing], *small[missing + 1 :]]:
            return math.prod(sides[:missing] + sides[missing + 1 :])
    return math.prod(sides)


def _shrunk(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter of at most ``PROBE_ROWS`` elements in each dimension and ``PROBE_COLUMNS`` in the last, with a
    gradient."""
    *rows, columns = parameter.shape or (1,)
    shape = [*(min(size, PROBE_ROWS) for size in rows), _shrunk_row(columns)][: parameter.ndim]
    small = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype))
    small.grad = torch.zeros_like(small)
    return small


def _shrunk_row(columns: int) -> int:
    """Return at most ``PROBE_COLUMNS``, divisible by as large a power of two as ``columns`` is (or 256): 8-bit moments are in
    blocks of a power of two that divides a row."""
    power = min(columns & -columns, PROBE_COLUMNS // 2)
    most = PROBE_COLUMNS // power
    return min(columns, power * (most if power == PROBE_COLUMNS // 2 else most - 1))
