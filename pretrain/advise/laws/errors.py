"""The refusal of a fit and the checks of its points."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

LARGEST_LOSS = 100.0  # nats per token; a uniform guess over a vocabulary of 10^43 tokens


class NotSupported(Exception):
    """The points do not support the law. The caller falls back to the measured points.

    Attributes:
        reason: one sentence for the user, without a full stop.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def finite(name: str, values: Sequence[float]) -> "np.ndarray":
    """Return `values` as a one-dimensional array of float64. Raise `NotSupported` if one is NaN or infinite."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise NotSupported(f"one of the {name} is not a finite number")
    return array


def finite_losses(values: Sequence[float]) -> "np.ndarray":
    """Return losses in nats per token as an array. Raise `NotSupported` if one is not finite, not positive or above 100."""
    losses = finite("losses", values)
    if losses.size and (losses.min() <= 0 or losses.max() > LARGEST_LOSS):
        raise NotSupported(f"a loss lies outside 0 to {LARGEST_LOSS:g} nats per token")
    return losses
