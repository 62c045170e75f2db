"""What to change in a configuration that does not fit. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


def other_settings(config: RunConfig, *, is_gpu: bool, checkpointing: bool = True) -> list[str]:
    """Return the settings of model and precision that need less memory and are not in use yet."""
    settings = []
    if checkpointing and not getattr(config.model, "gradient_checkpointing", True):
        settings.append("model.gradient_checkpointing=true")
    if is_gpu and config.precision.compute == "float32":
        settings.append("precision=bf16-mixed")
    return settings
