"""A model that is not built yet. The strategy decides on which device it is built, and whether any process holds all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.causal_lm import Pretrained, Scratch
    from pretrain.models.language_model import LanguageModel


@dataclass(frozen=True)
class ModelFactory:
    """Build a model: ``spec`` gives config and weights, ``param_dtype`` the dtype of the weights, ``seed`` that of random
    weights."""

    spec: Pretrained | Scratch
    param_dtype: torch.dtype
    seed: int

    def build(self, device: torch.device) -> LanguageModel:
        """Return the full model with its weights on ``device``, in training mode."""
        return self.spec.build(param_dtype=self.param_dtype, device=device, seed=self.seed)

    def build_on_meta(self) -> LanguageModel:
        """Return the model with its parameters on the meta device (shapes without memory) and its buffers on the CPU."""
        return self.spec.build_on_meta(param_dtype=self.param_dtype)

    def files(self, build_on_meta: LanguageModel) -> TensorFiles | None:
        """Return the weight files if they hold every weight under the names and shapes of ``build_on_meta``. Return ``None`` when
        the model has to be built to get its weights: random weights, and files whose layout transformers converts."""
        files = self.spec.weights()
        wanted = build_on_meta.hf_state()
        if files is None or wanted.keys() != files.keys():
            return None
        return files if all(files.shape(name) == tuple(t.shape) for name, t in wanted.items()) else None
