"""The settings of a plan. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

COMPARED = ("L40S", "A100-80GB", "H100", "H200")


@dataclass(frozen=True)
class PlanConfig:
    """What is planned by ``task=plan``, and by a run at its start.

    Attributes:
        device: GPU to plan for, e.g. H100 (docs/memory.md lists them), or cpu; null: the first GPU of this machine, or the
            CPU.
        devices: GPUs whose largest micro-batch is listed next to it.
        require: true: exit with 2 if the configuration does not fit on the device.
        mfu: Share of the peak FLOP/s to assume for tokens/s and hours, e.g. 0.4; null: only what a run in output_dir has
            measured.
        at_start: Whether a run plans its memory in a process of its own at its start: auto (on a GPU, and nothing waits for
            it) · true (the run waits for it) · false.
    """

    device: Annotated[str, Field(min_length=1)] | None = None
    devices: list[str] = field(default_factory=lambda: list(COMPARED))
    require: bool = False
    mfu: Annotated[float, Field(gt=0, le=1)] | None = None
    at_start: bool | Literal["auto"] = "auto"
