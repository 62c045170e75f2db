"""Which part of a mixture each sample comes from: a fixed, evenly spread schedule in which the first n samples of a phase contain
share × n samples of each part, to within one sample, for every n.

A random draw would be off by the square root of n. Here the shares are fractions with a common denominator, the period, and
the schedule repeats after it, so that any position is found in constant time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 100_000  # shares of up to five decimals are exact; others are rounded to multiples of 1 / MAX_PERIOD
ROUNDING = 1e-12  # a share that differs from a simple fraction by less is that fraction

Integers = NDArray[np.int64]


class Draw:
    """The schedule of one phase.

    Attributes:
        counts: samples of each part in one period, int64 [parts].
        period: length of the schedule, after which it repeats.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        """``shares`` are not negative, and their sum is positive; they are normalised."""
        self.counts = whole_counts(shares)
        self.period = int(self.counts.sum())

    @cached_property
    def parts(self) -> Integers:
        """The part of each sample of a period."""
        return np.array(schedule(tuple(self.counts.tolist())), np.int64)

    @cached_property
    def _earlier(self) -> Integers:
        """For each sample of a period, the number of samples of the same part before it."""
        order = np.argsort(self.parts, kind="stable")
        first = np.cumsum(self.counts) - self.counts
        found = np.empty(self.period, np.int64)
        found[order] = np.arange(self.period) - np.repeat(first, self.counts)
        return found

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Return the part of each of ``samples`` (numbered within the phase), and how many samples of that part precede it."""
        if len(self.counts) == 1:
            return np.zeros_like(samples), samples
        periods, inside = np.divmod(samples, self.period)
        parts = self.parts[inside]
        return parts, periods * self.counts[parts] + self._earlier[inside]

    def taken(self, samples: int) -> Integers:
        """Return the samples of each part among the first ``samples``, int64 [parts]."""
        periods, inside = divmod(samples, self.period)
        rest = np.bincount(self.parts[:inside], minlength=len(self.counts)) if inside else 0
        return self.counts * periods + rest

    @property
    def shares(self) -> NDArray[np.float64]:
        """The share of each part in the samples, float64 [parts]."""
        return self.counts / self.period


def whole_counts(shares: Sequence[float]) -> Integers:
    """Return the smallest whole numbers in the ratio of ``shares``, int64 [parts].

    Where their sum would exceed ``MAX_PERIOD``, the shares are rounded to multiples of 1 / ``MAX_PERIOD`` by the largest
    remainder; a positive share stays positive.
    """
    given = [Fraction(str(float(share))) for share in shares]
    exact = [share / sum(given) for share in given]
    simple = [share.limit_denominator(MAX_PERIOD) for share in exact]  # a third is 0.333… as a float
    pairs = list(zip(exact, simple, strict=True))
    if sum(simple) == 1 and all(abs(one - other) < ROUNDING * other or one == other for one, other in pairs):
        exact = simple
    period = math.lcm(*(share.denominator for share in exact))
    if period <= MAX_PERIOD:
        return np.array([int(share * period) for share in exact], np.int64)
    scaled = [share * MAX_PERIOD for share in exact]
    found = [max(int(share), int(share > 0)) for share in scaled]
    by_remainder = sorted(range(len(found)), key=lambda part: found[part] - scaled[part])
    for step in range(MAX_PERIOD - sum(found)):
        found[by_remainder[step % len(found)]] += 1
    for _ in range(sum(found) - MAX_PERIOD):  # many shares were raised to one sample
        found[found.index(max(found))] -= 1
    divisor = math.gcd(*found)
    return np.array([count // divisor for count in found], np.int64)


@lru_cache(maxsize=16)  # the longest takes a tenth of a second, and a start needs it several times
def schedule(counts: tuple[int, ...]) -> list[int]:
    """Return the part of each of the D = sum(counts) samples of a period, so that after any n samples each part has had more than
    n · counts / D - 1 and fewer than n · counts / D + 1 of them."""
    # Sample j (from 0) of a part with c samples a period may be taken from position floor(j·D/c) on and must be taken before
    # position ceil((j+1)·D/c); these are the windows that keep the part within one sample of its share. Of the samples that may
    # be taken, the one whose window ends first is taken. Earliest deadline first finds a schedule whenever there is one (Liu
    # and Layland 1973), and there is one, because taking fractions of samples at constant rates is within all windows
    # (Baruah, Cohen, Plaxton, Varvel, "Proportionate progress", 1996; Tijdeman, "The chairman assignment problem", 1980).
    period = sum(counts)
    waiting = [(0, part) for part, count in enumerate(counts) if count]  # (first position, part)
    ready: list[tuple[int, int]] = []  # (end of the window, part)
    taken = [0] * len(counts)
    found = []
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            part = heapq.heappop(waiting)[1]
            heapq.heappush(ready, (-(-(taken[part] + 1) * period // counts[part]), part))
        part = heapq.heappop(ready)[1]
        found.append(part)
        taken[part] += 1
        heapq.heappush(waiting, (taken[part] * period // counts[part], part))
    return found
