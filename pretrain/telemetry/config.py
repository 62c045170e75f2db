"""The keys of ``telemetry``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class TelemetryConfig:
    """Configuration of the telemetry.

    Attributes:
        peak_flops: Peak FLOP/s of one device in the run's precision; MFU is relative to it. ``None`` looks the device up in
            the table of device peaks (`telemetry.peaks`).
        layers_every: Interval, in steps, at which the norms of every layer are recorded. ``None`` records none.
    """

    peak_flops: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = None
    layers_every: PositiveInt | None = None
