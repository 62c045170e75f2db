"""The loss scaler of fp16: torch's ``GradScaler``, whose flags of infinite gradients other ranks may set.

Private to torch (seen in 2.10.0 and 2.13.0): ``GradScaler._found_inf_per_device``, the flags by device that `unscale_` sets and
that `step` and `update` read. ``tests/strategy/test_loss_scaler.py`` fails when they are no longer these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


class LossScaler(torch.amp.GradScaler):
    """A ``GradScaler`` whose scale and flags can be read on the device, without waiting for it."""

    def scale_on(self, device: torch.device) -> Tensor | None:
        """Return the scale (fp32, 0-d) on ``device``; ``None`` if the scaler is not enabled."""
        return self.scale(torch.ones((), device=device)) if self.is_enabled() else None

    def found_inf(self, optimizer: Optimizer) -> list[Tensor]:
        """Return the flags (fp32, 0-d, one for each device) of infinite gradients, which `unscale_` has set. A flag that is
        set in place to 1 makes `step` skip the update and `update` reduce the scale."""
        return list(self._found_inf_per_device(optimizer).values())
