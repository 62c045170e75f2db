"""Whether a step is fit to change the weights, worked out on the device: nothing here waits for it.

A spike is told by median and median absolute deviation, which the spikes before it can't move as they would mean and
standard deviation (Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.training.guard.config import GuardConfig

FINE, NONFINITE, SPIKE = range(3)
TO_SIGMA = 1.4826  # median absolute deviation → standard deviation, of a normal distribution
FLOOR = 1e-3  # of the median: losses that hardly differ from each other make no spike of a tiny one


class SpikeDetector:
    """``losses`` fp32 [window] on the device: those of the last good steps, oldest first, NaN where there is none yet.

    ``scaled``: gradients are those of a scaled loss, whose scaler deals with infinite ones; only the loss is judged.
    """

    def __init__(self, policy: GuardConfig, *, device: torch.device, scaled: bool = False) -> None:
        self.policy = policy
        self.scaled = scaled
        self.losses = torch.full((policy.window,), math.nan, device=device)

    def zscore(self, loss: Tensor) -> Tensor:
        """How many robust standard deviations ``loss`` lies above the median; NaN until the window is full."""
        if self.policy.spike == "ignore":
            return torch.full_like(loss, math.nan)
        median = self.losses.median()
        spread = (self.losses - median).abs().median() * TO_SIGMA
        return (loss - median) / torch.maximum(spread, median.abs() * FLOOR)

    def verdict(self, loss: Tensor, zscore: Tensor, norm: Tensor) -> Tensor:
        """FINE, NONFINITE or SPIKE, 0-d int64. What the policy ignores is FINE. ``norm``: of the gradients.

        A spike is called one whatever its gradients are: not every strategy knows their norm where it makes no update.
        """
        watched = self.policy.nonfinite != "ignore"
        finite = torch.isfinite(loss)
        of_norm = torch.where(torch.isfinite(norm), FINE, NONFINITE if watched and not self.scaled else FINE)
        spiked = torch.where(zscore > self.policy.spike_zscore, SPIKE, of_norm)
        return torch.where(finite, spiked, NONFINITE if watched else FINE)

    def accept(self, loss: Tensor, verdict: Tensor) -> None:
        """Take the loss of a good step into the window."""
        if self.policy.spike != "ignore":
            moved = torch.cat([self.losses[1:], loss.reshape(1)])
            self.losses = torch.where((verdict == FINE) & torch.isfinite(loss), moved, self.losses)

    def state(self) -> list[float]:
        """The losses in the window, oldest first."""
        return [loss for loss in self.losses.tolist() if not math.isnan(loss)]

    def load_state(self, losses: list[float]) -> None:
        """The reverse, also of another window's."""
        known = losses[-self.policy.window :]
        padded = [math.nan] * (self.policy.window - len(known)) + known
        self.losses = torch.tensor(padded, device=self.losses.device)
