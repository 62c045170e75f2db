"""A model that is not built yet: a strategy decides where, and whether any process ever holds all of it."""

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
    """``spec``: where config and weights come from · ``param_dtype``: of the weights · ``seed``: of random ones."""

    spec: Pretrained | Scratch
    param_dtype: torch.dtype
    seed: int

    def build(self, device: torch.device) -> LanguageModel:
        """The whole model with its weights on ``device``, in training mode."""
        return self.spec.build(param_dtype=self.param_dtype, device=device, seed=self.seed)

    def build_on_meta(self) -> LanguageModel:
        """The model with its parameters on the meta device (a shape and no memory) and its buffers on the CPU."""
        return self.spec.build_on_meta(param_dtype=self.param_dtype)

    def files(self, build_on_meta: LanguageModel) -> TensorFiles | None:
        """The weights in files, under the names and shapes of ``build_on_meta``; ``None`` where they exist only by building:
        random weights, and files of another layout that transformers converts."""
        files = self.spec.weights()
        wanted = build_on_meta.hf_state()
        if files is None or wanted.keys() != files.keys():
            return None
        return files if all(files.shape(name) == tuple(t.shape) for name, t in wanted.items()) else None
