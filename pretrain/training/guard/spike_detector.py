"""Detection of steps that must not change the weights. It is computed on the device, and nothing here waits for it.

A spike is detected by median and median absolute deviation, which earlier spikes affect much less than mean and standard
deviation (Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.training.guard.config import GuardConfig

FINE, NONFINITE, SPIKE = range(3)
TO_SIGMA = 1.4826  # factor from median absolute deviation to standard deviation, for a normal distribution
FLOOR = 1e-3  # minimal deviation relative to the median, so that nearly equal losses do not turn noise into a spike


class SpikeDetector:
    """Judges the loss and the gradient norm of each step.

    ``losses`` (fp32 [window], on the device) holds the losses of the last good steps, oldest first, padded with NaN.
    ``scaled`` means that the loss is scaled and that the loss scaler handles infinite gradients; then only the loss is
    judged.
    """

    def __init__(self, policy: GuardConfig, *, device: torch.device, scaled: bool = False) -> None:
        self.policy = policy
        self.scaled = scaled
        self.losses = torch.full((policy.window,), math.nan, device=device)

    def zscore(self, loss: Tensor) -> Tensor:
        """Return how many robust standard deviations ``loss`` lies above the median; NaN until the window is full."""
        if self.policy.spike == "ignore":
            return torch.full_like(loss, math.nan)
        median = self.losses.median()
        spread = (self.losses - median).abs().median() * TO_SIGMA
        return (loss - median) / torch.maximum(spread, median.abs() * FLOOR)

    def verdict(self, loss: Tensor, zscore: Tensor, norm: Tensor) -> Tensor:
        """Return FINE, NONFINITE or SPIKE (0-d int64), given the gradients' ``norm``. What the policy ignores is FINE.

        A spike is reported as such even if its gradients are not finite, because not every strategy computes their norm
        when it skips the update.
        """
        watched = self.policy.nonfinite != "ignore"
        finite = torch.isfinite(loss)
        of_norm = torch.where(torch.isfinite(norm), FINE, NONFINITE if watched and not self.scaled else FINE)
        spiked = torch.where(zscore > self.policy.spike_zscore, SPIKE, of_norm)
        return torch.where(finite, spiked, NONFINITE if watched else FINE)

    def accept(self, loss: Tensor, verdict: Tensor) -> None:
        """Add the loss of a good step to the window."""
        if self.policy.spike != "ignore":
            moved = torch.cat([self.losses[1:], loss.reshape(1)])
            self.losses = torch.where((verdict == FINE) & torch.isfinite(loss), moved, self.losses)

    def state(self) -> list[float]:
        """Return the losses in the window, oldest first."""
        return [loss for loss in self.losses.tolist() if not math.isnan(loss)]

    def load_state(self, losses: list[float]) -> None:
        """Restore the losses that `state` returned, also those of a window of another size."""
        known = losses[-self.policy.window :]
        padded = [math.nan] * (self.policy.window - len(known)) + known
        self.losses = torch.tensor(padded, device=self.losses.device)
