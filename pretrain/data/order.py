"""The order of samples is a pure function of (seed, phases, index), so nothing is stored and nothing is replayed on resume.

A Feistel network is a bijection on all integers of a given bit width. Results outside [0, n) are passed through the network
again until they are inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), which yields a
bijection on [0, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pretrain.data.draw import Draw

ROUNDS = 12  # must be even; tiny domains have halves of one bit and need more rounds than the usual 4 to 8


class Permutation:
    """Permutations of [0, n) for every (seed, epoch), computed elementwise in O(1) memory.

    ``n`` and ``seed`` are those of one permutation or of several, which are then applied in one call.
    """

    def __init__(self, n: int | Sequence[int], seed: int | Sequence[int]) -> None:
        sizes = [n] if isinstance(n, int) else list(n)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if any(size < 1 for size in sizes):
            raise ValueError(f"a permutation needs at least one element, not {min(sizes)}")
        bits = [max(2, (size - 1).bit_length()) for size in sizes]
        self.n = np.array(sizes, np.uint64)
        self.seed = np.array([seed & (2**64 - 1) for seed in seeds], np.uint64)
        self.low_bits = np.array([number // 2 for number in bits], np.uint64)
        self.low_mask = np.array([(1 << (number // 2)) - 1 for number in bits], np.uint64)
        self.high_mask = np.array([(1 << (number - number // 2)) - 1 for number in bits], np.uint64)

    def __call__(
        self,
        indices: NDArray[np.integer],
        epoch: int | NDArray[np.integer] = 0,
        which: int | NDArray[np.integer] = 0,
    ) -> NDArray[np.int64]:
        """Return the images of ``indices`` under the permutation ``which`` of ``epoch``.

        ``indices`` may have any shape, ``epoch`` and ``which`` are numbers or have the same shape. Each index is in [0, n).
        """
        values = np.asarray(indices).astype(np.uint64)
        epochs: NDArray[np.uint64]
        epochs, chosen = np.broadcast_arrays(np.asarray(epoch, np.uint64), which)
        rounds = np.arange(ROUNDS, dtype=np.uint64).reshape(ROUNDS, *(1,) * epochs.ndim)
        first_rounds: NDArray[np.uint64] = epochs * np.uint64(ROUNDS)
        keys = mix_bits(self.seed[chosen] ^ mix_bits(rounds + first_rounds))
        values = self._once(values, keys, chosen)
        while (outside := values >= self.n[chosen]).any():
            several = chosen.ndim > 0
            values[outside] = self._once(
                values[outside], keys[:, outside] if several else keys, chosen[outside] if several else chosen
            )
        return values.astype(np.int64)

    def _once(
        self, values: NDArray[np.uint64], keys: NDArray[np.uint64], which: NDArray[np.integer]
    ) -> NDArray[np.uint64]:
        """Pass ``values`` through the Feistel network of ``which`` once."""
        low_bits, low_mask, high_mask = self.low_bits[which], self.low_mask[which], self.high_mask[which]
        low, high = values & low_mask, values >> low_bits
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high = high ^ (mix_bits(low ^ first) & high_mask)
            low = low ^ (mix_bits(high ^ second) & low_mask)
        return (high << low_bits) | low


class SampleOrder:
    """Sample g of a run → a part of the training data and a block of that part: a pure function of (seed, phases, g).

    In each phase a `Draw` says which part a sample comes from. Sample i of a part, counted over all phases, is block
    ``permutation(i % n, epoch=i // n)`` of the part's n blocks, so every part is read epoch by epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        seed: int,
        phases: Sequence[tuple[int, Draw]],
        *,
        before: NDArray[np.int64] | None = None,
    ) -> None:
        """
        Args:
            lengths: Blocks of each part; a part without blocks has no share in any phase.
            seed: Seed of the order of every part, so that a part keeps its order when others join it.
            phases: First sample and draw of each phase, ascending.
            before: Samples of each part before the first phase, where an earlier start of the run had another mixture.
        """
        self.lengths = np.maximum(np.array(lengths, np.int64), 1)
        self.permutation = Permutation(self.lengths.tolist(), [seed] * len(lengths))
        self.phases = list(phases)
        self._starts = np.array([start for start, _ in phases], np.int64)
        self._before = [np.zeros(len(lengths), np.int64) if before is None else np.asarray(before, np.int64)]
        for (start, draw), (end, _) in pairwise(self.phases):
            self._before.append(self._before[-1] + draw.taken(end - start))

    def __call__(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for each of ``samples`` its part and the block of that part."""
        parts, indices = np.empty_like(samples), np.empty_like(samples)
        numbers = np.searchsorted(self._starts, samples, "right") - 1
        for number in np.unique(numbers).tolist():
            here, (start, draw) = numbers == number, self.phases[number]
            parts[here], indices[here] = draw.locate(samples[here] - start)
            indices[here] += self._before[number][parts[here]]
        return parts, self.blocks(parts, indices)

    def blocks(self, parts: int | NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the block of sample ``indices`` of ``parts``, which is one part for all or one for each."""
        epochs, positions = np.divmod(indices, self.lengths[parts])
        return self.permutation(positions, epochs, parts)

    def taken(self, samples: int) -> NDArray[np.int64]:
        """Return the samples of each part among the first ``samples`` of the run, int64 [parts]."""
        number = max(int(np.searchsorted(self._starts, samples, "right")) - 1, 0)
        start, draw = self.phases[number]
        return self._before[number] + draw.taken(samples - start)


def mix_bits(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood 2014), in which every input bit affects every output bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
