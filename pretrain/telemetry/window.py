"""The steps since the last train record: added to at every step without waiting for the device, read at a log step."""

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

Beside = Literal["evaluation", "checkpoint"]  # what a run does beside training


class Window:
    """Steps, tokens and seconds; evaluation and saving are told apart from training. Losses stay where they are;
    what is kept does not grow with the number of steps."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps = self.tokens = self.samples = 0
        self._losses: Tensor | None = None  # [sum, number] of those that are finite, on their device
        self._times: deque[StepTimes] = deque()  # of steps that the device may not have done yet
        self._parts: dict[str, float] = {}
        self._beside: dict[Beside, float] = {"evaluation": 0.0, "checkpoint": 0.0}
        self._started_at = time.perf_counter()

    def add(self, event: StepDone) -> None:
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

    def exclude(self, seconds: float, what: Beside = "evaluation") -> None:
        self._beside[what] += seconds

    def numbers(self, event: StepDone) -> Record:
        """Everything of the window's steps that lies on the device, read at once: here, and only here, it is waited for.
        ``event``: the last of them."""
        import torch

        assert self._losses is not None
        total, number = self._losses
        scale = math.nan if event.loss_scale is None else event.loss_scale
        last = (event.loss, total / number, event.grad_norm, event.skipped, scale)  # 0/0 where no step had a loss
        together = torch.stack([torch.as_tensor(x, device=total.device).to(total.dtype) for x in last])
        loss, loss_mean, grad_norm, skipped, loss_scale = together.tolist()
        return {
            "loss": loss,
            "loss_mean": loss_mean,
            "grad_norm": grad_norm,
            "skipped_steps": int(skipped),
            "loss_scale": loss_scale,
        }

    def seconds(self) -> float:
        """That were training, since the window began."""
        return time.perf_counter() - self._started_at - sum(self._beside.values())

    def split(self) -> Record:
        """Seconds of the parts of a step, on average, and all that went to something else."""
        while self._times:
            self._fold()
        parts = {f"{part}_seconds": total / self.steps for part, total in self._parts.items()}
        return parts | {f"{what}_seconds": seconds for what, seconds in self._beside.items()}
