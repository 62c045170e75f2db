"""The critical batch size: the largest batch that costs no loss at equal text, measured by branches from one checkpoint.

Merrill, Arora, Groeneveld and Hajishirzi (2025, arXiv:2505.23971) train short branches from one checkpoint with the
batch multiplied by k and the learning rate by √k (for Adam), each over the same tokens, smooth the loss of each step
with an exponential moving average (α = 0.5) and take the largest k whose final smoothed loss is at most 0.01 nats
above that of every smaller k. The rule and its constants were read in published summaries of the paper. The interval
is this project's addition: each final loss has the standard error of its average, from the scatter of the steps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.advise.laws.errors import NotSupported, finite_losses

SMOOTHING = 0.5  # α: weight of the newest step
DRAWS = 400


@dataclass(frozen=True)
class Branch:
    """A short run from the common checkpoint.

    Attributes:
        batch: its batch size, in any unit that all branches share.
        losses: training loss of each optimizer step in order, or one loss evaluated at the end; nats per token.
        tokens: text it read; None where the caller knows that all branches read the same.
    """

    batch: int
    losses: Sequence[float]
    tokens: int | None = None


@dataclass(frozen=True)
class CriticalBatch:
    """The largest batch that costs no loss.

    Attributes:
        batch: that batch, one of those measured.
        low, high: the 80 % interval, also of those measured.
        lr_factor: √(batch / smallest batch), which multiplies the learning rate of the smallest batch (Adam).
        at_edge: whether it is the largest batch measured, so that a larger one may do as well.
        losses: final smoothed loss of each batch, in increasing order of the batch.
    """

    batch: int
    low: int
    high: int
    lr_factor: float
    at_edge: bool
    losses: dict[int, float]


def critical_batch(branches: Sequence[Branch], tolerance: float = 0.01) -> CriticalBatch:
    """Return the largest batch whose final loss is at most `tolerance` nats above that of every smaller batch.

    Args:
        branches: at least two different batches over the same tokens; branches of one batch are averaged.
        tolerance: nats per token.
    Raises:
        NotSupported: fewer than two batches; a batch that is not positive; an empty curve; a loss that is not finite
            or out of range; branches that read different amounts of text; errors above the tolerance, which make
            every answer possible.
    """
    if any(branch.batch <= 0 or not len(branch.losses) for branch in branches):
        raise NotSupported("a branch has no losses, or a batch that is not positive")
    read = {branch.tokens for branch in branches if branch.tokens is not None}
    if read and max(read) > 1.01 * min(read):
        raise NotSupported(f"the branches read different amounts of text: {min(read)} to {max(read)} tokens")
    batches = sorted({branch.batch for branch in branches})
    if len(batches) < 2:
        raise NotSupported(f"{len(batches)} batch sizes were measured, a critical batch size needs 2")
    ends = [np.array(sorted(_end(finite_losses(b.losses)) for b in branches if b.batch == batch)) for batch in batches]
    loss = np.array([end[:, 0].mean() for end in ends])
    error = np.array([np.sqrt((end[:, 1] ** 2).sum()) / len(end) for end in ends])
    noise = np.random.default_rng(0).standard_normal((DRAWS, loss.size))
    noise[0] = 0  # the first draw is the measured losses
    largest = _largest(loss + error * noise, tolerance)
    low, high = np.quantile(largest, [0.1, 0.9], method="nearest")
    if low == 0 and high == len(batches) - 1 and error.max() > tolerance:
        raise NotSupported(
            f"the final losses are known to {error.max():.2g} nats only, the tolerance is {tolerance:g}: any batch may "
            "be the critical one"
        )
    best = int(largest[0])
    return CriticalBatch(
        batches[best],
        batches[min(best, low)],
        batches[max(best, high)],
        math.sqrt(batches[best] / batches[0]),
        best == len(batches) - 1,
        dict(zip(batches, loss.tolist(), strict=True)),
    )


def _largest(losses: np.ndarray, tolerance: float) -> np.ndarray:
    """Index of the largest batch that passes, for each row of `losses` ([draws, batches])."""
    lowest_before = np.minimum.accumulate(losses, axis=1)  # its own loss never decides: it is not above itself
    passes = losses <= lowest_before + tolerance
    return losses.shape[1] - 1 - np.argmax(passes[:, ::-1], axis=1)


def _end(losses: np.ndarray) -> tuple[float, float]:
    """Final loss of the moving average and its standard error, from the differences of neighbouring steps."""
    smooth = float(losses[0])
    for loss in losses[1:].tolist():
        smooth += SMOOTHING * (loss - smooth)
    if losses.size < 3:
        return smooth, 0.0
    variance = float((np.diff(losses) ** 2).mean() / 2)
    return smooth, math.sqrt(variance * SMOOTHING / (2 - SMOOTHING))
