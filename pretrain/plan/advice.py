"""What a plan says in one line, and what to change in a configuration that does not fit. This module does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.runtime.memory import gib

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


def other_settings(config: RunConfig, *, is_gpu: bool, checkpointing: bool = True) -> list[str]:
    """Return the settings of model and precision that need less memory and are not in use yet."""
    settings = []
    recomputed = getattr(config.model, "gradient_checkpointing", True)
    if checkpointing and recomputed is False:
        settings.append("model.gradient_checkpointing=true (or selective, which is faster)")
    elif checkpointing and recomputed is not True:
        settings.append("model.gradient_checkpointing=true")
    if is_gpu and config.precision.compute == "float32":
        settings.append("precision=bf16-mixed")
    if is_gpu and not getattr(config.model, "activation_offload", True):
        settings.append("model.activation_offload=true (slower)")
    return settings


def expectation(plan: dict[str, Any]) -> str:
    """Return what a run expects, from the record of its plan, e.g. ``expects 41.2 GiB of 79.6 GiB``."""
    room = plan["device"]["memory_bytes"]
    of = f" of {gib(room)}" if room and plan["device"]["is_gpu"] else " of tensors"
    return f"expects {gib(plan['peak_bytes'])}{of}"
