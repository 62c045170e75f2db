"""The keys of ``telemetry``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class TelemetryConfig:
    """Configuration of the telemetry.

    Attributes:
        peak_flops: Peak FLOP/s of one device in the run's precision, for MFU; null: from the table of vendor datasheets, if the
            device is listed.
        layers_every: Steps between records of the weight, gradient and update norms of every layer; null: none.
    """

    peak_flops: Annotated[PositiveFloat, Field(allow_inf_nan=False)] | None = None
    layers_every: PositiveInt | None = None
