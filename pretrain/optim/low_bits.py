"""Storage of an optimizer's moments in 16 and 8 bits.

16 bits: bf16, the second moment rounded stochastically. Near its steady state v changes by (1 - beta2) of itself in a step, which
for beta2 = 0.999 is less than half a unit in the last place of bf16: rounded to nearest it could never fall.

8 bits: block-wise dynamic quantization (Dettmers et al. 2021, arXiv:2110.02861). Each block of up to 256 elements of a row has
one fp32 scale, its largest absolute value, and 256 levels between -1 and 1 (the second moment: 0 and 1) whose distance grows
with their size. No block crosses a row, so codes and scales are sharded and saved by rows, as the parameter is. A second moment
that is not zero is never stored as zero: divided by its root, the first moment could become arbitrarily large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise

import torch
from torch import Tensor

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 16
INDEX_BITS, REST = 21, 11  # of the 32 bits of a number
EXPONENTS = 7  # decades of the 8-bit levels


def block_size(columns: int) -> int:
    """Return the number of elements that share a scale in rows of ``columns`` elements: the largest power of two that divides
    it, at most `LARGEST_BLOCK`. 0 if it is less than `SMALLEST_BLOCK`."""
    size = min(LARGEST_BLOCK, columns & -columns)
    return size if size >= SMALLEST_BLOCK else 0


Table = Callable[[bool, torch.device], Tensor]


def _kept(make: Table) -> Table:
    """Return ``make`` with a cache of its tables. A fake one, which has no values (the plan traces an update), is not kept."""
    tables: dict[tuple[bool, torch.device], Tensor] = {}

    @wraps(make)
    def table(signed: bool, device: torch.device) -> Tensor:
        found = tables.get((signed, device))
        if found is None:
            found = make(signed, device)
            if type(found) is Tensor:
                tables[signed, device] = found
        return found

    return table


@_kept
def levels(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 levels in ascending order, fp32 [256]: 0, 1, and in the decade 10^-i (0 ≤ i < 7) the midpoints of equal
    parts of [0.1, 1] × 10^-i, fewer in lower decades; ``signed``: half as many of either sign."""
    values = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        edges = [0.1 + i * (0.9 / parts) for i in range(parts + 1)]
        middles = [(a + b) / 2 * 10.0 ** (exponent - EXPONENTS + 1) for a, b in pairwise(edges)]
        values += [*middles, *(-m for m in middles)] if signed else middles
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@_kept
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """Return the code of the level that is nearest to each fp32 number, by the number's first ``INDEX_BITS`` bits (sign, exponent
    and 12 bits of the fraction): uint8 [2^INDEX_BITS]. A search for each element would take ten times as long."""
    known = levels(signed, torch.device("cpu"))
    first = torch.arange(2**INDEX_BITS, dtype=torch.int64) << REST
    middles = (first | 1 << (REST - 1)).to(torch.int32).view(torch.float32)
    return torch.bucketize(middles, (known[:-1] + known[1:]) / 2).to(torch.uint8).to(device)


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 [n, b], and scales, fp32 [n, 1], of ``values``, fp32 [n, b], of which each row is a block."""
    scales = values.abs().amax(1, keepdim=True)
    bits = (values / scales.clamp(min=torch.finfo(torch.float32).tiny)).view(torch.int32)
    codes = _nearest(signed, values.device)[(bits >> REST) & (2**INDEX_BITS - 1)]
    if not signed:
        codes = torch.maximum(codes, (values > 0).to(torch.uint8))
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the values, fp32 [n, b], of ``codes``, uint8 [n, b], and ``scales``, fp32 [n, 1]."""
    return levels(signed, codes.device)[codes.int()] * scales


def rounded_stochastically(values: Tensor, noise: torch.Generator) -> Tensor:
    """Return fp32 ``values`` in bf16: one of the two neighbours, the nearer one more often, so that the mean is exact. What bf16
    can represent stays as it is."""
    bits = values.contiguous().view(torch.int32)
    random = torch.randint(0, 2**16, values.shape, generator=noise, device=values.device, dtype=torch.int32)
    return ((bits + random) & -(2**16)).view(torch.float32).bfloat16()
