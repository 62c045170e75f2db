"""The baseline of forgetting: the losses of the untouched model (the base model before training) and what they were measured
on.

Two losses are comparable only if they are of the same tokens in the same context. Each loss of the baseline is therefore
stored with what it was measured on, and is compared only with losses that were measured on the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

Measured = dict[str, Any]  # what a loss was measured on: `text` (a digest) and the settings below
SETTINGS = ("sequence_length", "document_mask", "tokenizer", "precision")


@dataclass(frozen=True)
class Known:
    """The untouched model's ``loss`` on a domain in nats per token, or the ``reason`` why it is unknown."""

    loss: float | None = None
    reason: str | None = None


def digest(measured: Measured) -> str:
    """Return a hash of ``measured``."""
    return xxhash.xxh3_64_hexdigest(repr(sorted(measured.items())).encode())


def known(name: str, measured: Measured, losses: Mapping[str, float], measured_on: Mapping[str, Measured]) -> Known:
    """Return the baseline of the domain ``name``, which is now measured on ``measured``.

    ``losses`` are those of the untouched model by the name that the domain had then; ``measured_on`` has what they were
    measured on. Checkpoints of earlier versions lack the latter, so their losses are matched by name.
    """
    if name in losses and measured_on.get(name, measured) == measured:
        return Known(losses[name])
    for other, then in measured_on.items():  # the domain had another name
        if then == measured and other in losses:
            return Known(losses[other])
    if name not in losses:
        return Known(reason="not scored at step 0")
    return Known(reason=f"step 0 was scored with {_difference(measured_on[name], measured)}")


def _difference(then: Measured, now: Measured) -> str:
    """Return the first setting that differs, such as ``sequence_length=128, not 64``, or that the text differs."""
    for setting in SETTINGS:
        if then.get(setting) != now.get(setting):
            if setting == "tokenizer":
                return "another tokenizer"
            return f"{setting}={_in_yaml(then.get(setting))}, not {_in_yaml(now.get(setting))}"
    return "other text"


def _in_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
