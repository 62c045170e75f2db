"""The keys of ``telemetry``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class TelemetryConfig:
    """``peak_flops``: the FLOP/s of one device in the run's precision, against which MFU is measured; ``None``: what the
    table of device peaks says, if anything. ``layers_every``: steps between looks at every layer's norms."""

    peak_flops: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = None
    layers_every: PositiveInt | None = None
