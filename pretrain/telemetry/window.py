"""The steps since the last train record: added to at every step without waiting for the device, read at a log step."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Literal

from pretrain.events import StepDone
from pretrain.telemetry.record import Record

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.clock import StepTimes

Beside = Literal["evaluation", "checkpoint"]  # what a run does beside training


class Window:
    """Steps, tokens and seconds; evaluation and saving are told apart from training. Losses stay where they are."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps = self.tokens = self.samples = 0
        self._losses: list[Tensor] = []
        self._times: list[StepTimes] = []
        self._beside: dict[Beside, float] = {"evaluation": 0.0, "checkpoint": 0.0}
        self._started_at = time.perf_counter()

    def add(self, event: StepDone) -> None:
        self.steps += 1
        self.tokens += event.step_tokens
        self.samples += event.step_samples
        self._losses.append(event.loss)
        self._times.append(event.times)

    def exclude(self, seconds: float, what: Beside = "evaluation") -> None:
        self._beside[what] += seconds

    def numbers(self, event: StepDone) -> Record:
        """Everything of the window's steps that lies on the device, read at once: here, and only here, it is waited for.
        ``event``: the last of them."""
        import torch

        losses = torch.stack(self._losses).double()
        mean = torch.where(losses.isfinite(), losses, math.nan).nanmean()  # of the steps that had a loss
        scale = math.nan if event.loss_scale is None else event.loss_scale
        last = (torch.as_tensor(x, device=losses.device).double() for x in (event.grad_norm, event.skipped, scale))
        loss, loss_mean, grad_norm, skipped, loss_scale = torch.stack([losses[-1], mean, *last]).tolist()
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
        totals: dict[str, float] = {}
        for times in self._times:
            for part, seconds in times.seconds().items():
                totals[part] = totals.get(part, 0.0) + seconds
        parts = {f"{part}_seconds": total / self.steps for part, total in totals.items()}
        return parts | {f"{what}_seconds": seconds for what, seconds in self._beside.items()}
