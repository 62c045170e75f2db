"""A model that is not built yet. The strategy decides on which device it is built, and whether any process holds all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.causal_lm import Pretrained, Scratch
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.transforms.apply import Transformed
    from pretrain.models.transforms.base import ModelTransform


@dataclass(frozen=True)
class ModelFactory:
    """Build a model, with its transforms applied.

    Attributes:
        spec: config and weights.
        param_dtype: dtype of the weights.
        seed: seed of random weights, and of the new weights of transforms.
        transforms: applied to the model in order.
        has_transformed_weights: whether the files of ``spec`` hold the weights after the transforms, under the names that they
            have then, as a checkpoint of a run with the same transforms does.
    """

    spec: Pretrained | Scratch
    param_dtype: torch.dtype
    seed: int
    transforms: tuple[ModelTransform, ...] = ()
    has_transformed_weights: bool = False

    def build(self, device: torch.device) -> LanguageModel:
        """Return the full model with its weights on ``device``, in training mode."""
        if self.has_transformed_weights:
            return self._build_from_files(device)
        return self.spec.build(param_dtype=self.param_dtype, device=device, seed=self.seed, change=self._transform)

    def build_on_meta(self) -> LanguageModel:
        """Return the model with its parameters on the meta device (shapes without memory) and its buffers on the CPU."""
        return self.spec.build_on_meta(param_dtype=self.param_dtype, change=self._transform)

    def files(self, build_on_meta: LanguageModel) -> TensorFiles | None:
        """Return the weights of ``build_on_meta``. New weights have the values that the transforms gave them; all others are
        read from the weight files under the names that they had before. Return ``None`` when the model has to be built to get
        its weights: random weights, and files whose layout transformers converts."""
        from pretrain.models.transforms.apply import TransformedFiles

        files, transformed = self.spec.weights(), build_on_meta.transformed
        wanted = {name: tuple(getattr(t, "ds_shape", t.shape)) for name, t in build_on_meta.hf_state().items()}
        if transformed is not None and not self.has_transformed_weights:
            wanted = transformed.before
        if files is None or wanted.keys() != files.keys() or any(files.shape(n) != s for n, s in wanted.items()):
            return None
        if transformed is None or self.has_transformed_weights:
            return files
        return TransformedFiles(files, transformed)

    def _transform(self, hf: Any) -> Transformed | None:
        from pretrain.models.transforms.apply import apply_transforms

        return apply_transforms(self.transforms, hf, seed=self.seed)

    def _build_from_files(self, device: torch.device) -> LanguageModel:
        """Return the model with transformed weights. ``from_pretrained`` can't read them, because it has other names for them."""
        from pretrain.models.meta import materialise

        model, files = self.build_on_meta(), self.spec.weights()
        assert files is not None
        materialise(model, device)
        model.load(files)
        model.probe()
        return model
