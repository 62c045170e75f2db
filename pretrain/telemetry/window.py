"""The window of steps since the last train record. It grows at every step without synchronising with the device and is read
at a log step."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Literal

from pretrain.telemetry.events import StepDone
from pretrain.telemetry.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.telemetry.step_timer import StepTimes

Pause = Literal["evaluation", "checkpoint"]  # what a run does besides training


class Window:
    """Sums of steps, tokens and seconds, with evaluation and saving kept separate from training. Losses stay on the device,
    and memory use does not depend on the number of steps."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start an empty window now."""
        self.steps = self.tokens = self.samples = 0
        self._losses: Tensor | None = None  # [sum, count] of the finite losses, on the device
        self._times: deque[StepTimes] = deque()  # times of steps that the device may not have finished
        self._parts: dict[str, float] = {}
        self._pauses: dict[Pause, float] = {"evaluation": 0.0, "checkpoint": 0.0}
        self._started_at = time.perf_counter()

    def add(self, event: StepDone) -> None:
        """Add one step."""
        self.steps += 1
        self.tokens += event.step_tokens
        self.samples += event.step_samples
        self._losses = self._add_loss(event.loss)
        self._times.append(event.times)
        while self._times and self._times[0].over():
            self._fold()

    def _add_loss(self, loss: Tensor) -> Tensor:
        import torch

        finite, exact = loss.isfinite(), torch.float32 if loss.device.type == "mps" else torch.float64
        pair = torch.stack([torch.where(finite, loss, 0).to(exact), finite.to(exact)])
        return pair if self._losses is None else self._losses + pair

    def _fold(self) -> None:
        for part, seconds in self._times.popleft().seconds().items():
            self._parts[part] = self._parts.get(part, 0.0) + seconds

    def exclude(self, seconds: float, what: Pause = "evaluation") -> None:
        """Count ``seconds`` as ``what`` and not as training."""
        self._pauses[what] += seconds

    def numbers(self, event: StepDone) -> Record:
        """Return the numbers of the window that are on the device. They are read in one transfer, the only synchronisation.
        ``event`` is the last step of the window."""
        import torch

        assert self._losses is not None
        total, number = self._losses
        scale = math.nan if event.loss_scale is None else event.loss_scale
        last = (
            event.loss,
            total / number,
            event.grad_norm,
            event.skipped,
            scale,
            *event.terms.values(),
        )  # 0/0 = NaN if no step had a finite loss
        together = torch.stack([torch.as_tensor(x, device=total.device).to(total.dtype) for x in last])
        loss, loss_mean, grad_norm, skipped, loss_scale, *terms = together.tolist()
        return {
            "loss": loss,
            "loss_mean": loss_mean,
            "grad_norm": grad_norm,
            "skipped_steps": int(skipped),
            "loss_scale": loss_scale,
            **dict(zip(event.terms, terms, strict=True)),
        }

    def seconds(self) -> float:
        """Return the seconds spent training since the window started."""
        return time.perf_counter() - self._started_at - sum(self._pauses.values())

    def split(self) -> Record:
        """Return the mean seconds per step of each part, and the total seconds of evaluation and checkpoints."""
        while self._times:
            self._fold()
        parts = {f"{part}_seconds": total / self.steps for part, total in self._parts.items()}
        return parts | {f"{what}_seconds": seconds for what, seconds in self._pauses.items()}


class Total:
    """Sums over all windows since this start. The first window includes compilation and set-up, so it is excluded from the
    speed unless it is the only one; ``train_seconds`` includes it."""

    def __init__(self) -> None:
        self.tokens = self.samples = self._windows = 0
        self.seconds = self.train_seconds = 0.0

    def add(self, window: Window, seconds: float) -> None:
        if self._windows == 1:
            self.tokens = self.samples = 0
            self.seconds = 0.0
        self._windows += 1
        self.train_seconds += seconds
        self.tokens += window.tokens
        self.samples += window.samples
        self.seconds += seconds
