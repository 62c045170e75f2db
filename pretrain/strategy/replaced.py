"""The weights of an engine as tensors that can be averaged, compared, and replaced for as long as others are scored or exported.

`EngineWeights` is for engines whose model has the weights that the optimizer updates. ZeRO's stages 1 to 3 have their own
(`pretrain.strategy.zero_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.distributed.sharding import TensorFiles, local, read_part
from pretrain.strategy.gradient_norm import norm_of_rows, total_norm

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine


class EngineWeights:
    """The weights of ``engine``. A *part* is what this rank has of a weight: a shard or, where every rank has all, a copy."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    def trained(self) -> dict[str, Tensor]:
        """Return the part of every weight that the optimizer updates, by Hugging Face name, sharing its memory."""
        return {name: p.detach() for name, p in self._engine.model.hf_named_parameters() if p.requires_grad}

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the gradients of the parts of `trained`, sharing their memory, after the last backward of a step. A weight
        without a gradient has ``None``."""
        return {name: p.grad for name, p in self._engine.model.hf_named_parameters() if p.requires_grad}

    @property
    def gradient_scale(self) -> float:
        """The factor of `gradients`."""
        return 1.0

    def gradient_changed(self, name: str, gradient: Tensor) -> None:
        """Note that ``gradient``, one of `gradients`, was changed in place."""
        return

    def distance(self, differences: Iterable[Tensor]) -> Tensor:
        """Return the norm of all ``differences`` (one for each part of `trained`, each made after the last one is read), a
        scalar. This is a collective if there are shards."""
        from torch.distributed.tensor import DTensor

        rows = [norm_of_rows(difference) for difference in differences]
        sharded: list[Tensor] = [t for t in rows if isinstance(t, DTensor)]
        full = [t for t in rows if not isinstance(t, DTensor)]
        return torch.linalg.vector_norm(torch.stack([total_norm(kind) for kind in (sharded, full) if kind]))

    def to_save(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return ``parts`` as tensors that any strategy and number of ranks can restore: full ones, or DTensors by rows. This
        is a collective."""
        return parts

    def from_saved(self, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the parts of what `to_save` has made. This is a collective."""
        return saved

    @contextmanager
    def replaced(self, parts: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside this context the model has ``parts``, which may be of another dtype; afterwards it has its own bits again.
        Its own parts are meanwhile copied on their device."""
        own = self._engine.model.hf_state()
        kept = {name: local(own[name].detach()).clone() for name in parts}
        try:
            self._put(parts.items())
            yield
        finally:
            self._put(kept.items())

    @contextmanager
    def blended(self, files: Sequence[TensorFiles], blend: Callable[..., Tensor]) -> Iterator[None]:
        """Inside this context each floating-point weight is ``blend(own, *others)``: ``own`` is its present part, ``others`` are
        the same parts in ``files``, read for one weight at a time. The present ones are meanwhile in host memory, and come
        back to the last bit. All ranks must enter it."""
        own = {name: t for name, t in self._engine.model.hf_state().items() if t.is_floating_point()}
        kept = {name: local(t.detach()).to("cpu", copy=True) for name, t in own.items()}
        try:
            read = ((name, [read_part(t, file, name) for file in files]) for name, t in own.items())
            self._put((name, blend(kept[name], *others)) for name, others in read)
            yield
        finally:
            self._put(kept.items())

    @torch.no_grad()
    def _put(self, parts: Iterable[tuple[str, Tensor]]) -> None:
        """Copy ``parts`` into the model, each before the next one is made."""
        own = self._engine.model.hf_state()
        for name, value in parts:
            local(own[name].detach()).copy_(local(value))


def replaced_weights(engine: InferenceEngine, parts: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Return `EngineWeights.replaced` of ``engine``."""
    return engine.weights.replaced(parts)
