"""What the losses of the untouched model, the baseline of forgetting, were measured on.

A change of loss is one only where both losses are of the same tokens in the same context. So each loss of the baseline is
kept with what it was measured on, and is compared with nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

Measured = dict[str, Any]  # what a loss was measured on: `text`, a digest, and the settings below
SETTINGS = ("sequence_length", "document_mask", "tokenizer", "precision")


@dataclass(frozen=True)
class Known:
    """The untouched model's ``loss`` on a domain (nats per token), or the ``reason`` why it is not known."""

    loss: float | None = None
    reason: str | None = None


def digest(measured: Measured) -> str:
    """One word for ``measured``, equal for equal ones."""
    return xxhash.xxh3_64_hexdigest(repr(sorted(measured.items())).encode())


def known(name: str, measured: Measured, losses: Mapping[str, float], measured_on: Mapping[str, Measured]) -> Known:
    """The baseline of the domain ``name``, which is now measured on ``measured``.

    ``losses``: of the untouched model, by the name that a domain had then; ``measured_on``: what those were measured on.
    Checkpoints of earlier versions do not say it: their losses are taken by name.
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
    """``sequence_length=128, not 64``: the first setting that differs, or the text."""
    for setting in SETTINGS:
        if then.get(setting) != now.get(setting):
            if setting == "tokenizer":
                return "another tokenizer"
            return f"{setting}={_in_yaml(then.get(setting))}, not {_in_yaml(now.get(setting))}"
    return "other text"


def _in_yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
