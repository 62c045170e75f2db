"""Other weights in place of an engine's own, for as long as they are scored or exported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.distributed.sharding import local
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine


def check_replaceable(engine: InferenceEngine, key: str) -> None:
    """Raise ``UserError`` for an engine whose model does not hold the weights that are saved. ``key`` is what needs it."""
    if not engine.weights_in_model:
        raise UserError(
            f"{key}: with strategy=deepspeed and zero_stage=1 to 3 DeepSpeed keeps the weights in its own shards, where they "
            "can't be replaced; use strategy=fsdp, or strategy.zero_stage=0"
        )


@contextmanager
def replaced_weights(engine: InferenceEngine, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside this context the model has ``weights``, each rank its own shards of them; afterwards it has its own bits again.

    ``weights`` are by Hugging Face name, sharded as the model's own are, and may be of another dtype. The model's own are
    meanwhile copied on their device.
    """
    own = engine.model.hf_state()
    kept = {name: local(own[name].detach()).clone() for name in weights}
    try:
        put_weights(engine, weights.items())
        yield
    finally:
        put_weights(engine, kept.items())


@torch.no_grad()
def put_weights(engine: InferenceEngine, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy ``weights`` (names with tensors sharded as the model's, or this rank's shards of them) into the model, each before the
    next one is made."""
    own = engine.model.hf_state()
    for name, value in weights:
        local(own[name].detach()).copy_(local(value))
