"""The order of samples is a pure function of (seed, epoch, index), so nothing is stored and nothing is replayed on resume.

A Feistel network is a bijection on all integers of a given bit width. Results outside [0, n) are passed through the network
again until they are inside (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), which yields a
bijection on [0, n).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 12  # must be even; tiny domains have halves of one bit and need more rounds than the usual 4 to 8


class Permutation:
    """A permutation of [0, n) for every (seed, epoch), computed elementwise in O(1) memory."""

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs at least one element, not {n}")
        self.n = n
        self.seed = seed
        bits = max(2, (n - 1).bit_length())
        self.low_bits = np.uint64(bits // 2)
        self.low_mask = np.uint64((1 << (bits // 2)) - 1)
        self.high_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def __call__(self, indices: NDArray[np.integer], epoch: int = 0) -> NDArray[np.int64]:
        """Return the images of ``indices`` (any shape, each in [0, n)) under the permutation of ``epoch``."""
        keys = mix_bits(
            np.uint64(self.seed & (2**64 - 1))
            ^ mix_bits(np.arange(ROUNDS, dtype=np.uint64) + np.uint64(epoch * ROUNDS))
        )
        values = self._once(np.asarray(indices).astype(np.uint64), keys)
        while (outside := values >= self.n).any():
            values[outside] = self._once(values[outside], keys)
        return values.astype(np.int64)

    def _once(self, values: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Pass ``values`` through the Feistel network once."""
        low, high = values & self.low_mask, values >> self.low_bits
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high = high ^ (mix_bits(low ^ first) & self.high_mask)
            low = low ^ (mix_bits(high ^ second) & self.low_mask)
        return (high << self.low_bits) | low


def mix_bits(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood 2014), in which every input bit affects every output bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
