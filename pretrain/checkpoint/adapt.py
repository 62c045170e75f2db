"""Adapt the state of a checkpoint to a run that differs from it in what ``resume_allow`` permits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.distributed.sharding import TensorFiles
from pretrain.runtime.console import notice


def adapted(state: dict[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` (of `pretrain.checkpoint.store.load`) as the run with ``fingerprint`` continues from it.

    - Moments of another optimizer, or of another dtype of weights, are dropped.
    - With another sequence length the run continues at the same place in the text.
    - With other data, or another order of it, the batches that caused a rollback are others, so none is blocklisted.
    """
    before = state["identity"]
    changed = {part for part in fingerprint if before.get(part) != fingerprint[part]}
    if changed & {"weights", "optimizer"}:
        state["engine"] |= {"optimizer": TensorFiles([]), "optimizer_values": None}
        notice("the optimizer state starts empty: the saved moments belong to another optimizer or dtype of weights")
    samples = state["progress"]["samples"] * before["sequence_length"] // fingerprint["sequence_length"]
    state["progress"]["samples"] = state["loader"]["samples"] = samples
    state.setdefault("guard", {})
    if changed & {"data", "sequence_length", "global_batch", "seed"}:
        state["guard"]["passed_over"] = []
    return state
