"""Export of a run's model as a Hugging Face folder, at the end of the run or with every checkpoint too.

A checkpoint holds the same files next to its weights (config, tokenizer, model card), so it can be loaded as a model.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.checkpoint.atomic import write_folder
from pretrain.models.hub import export
from pretrain.models.hub.model_card import TRANSFORMED_USE, USE
from pretrain.models.transforms.apply import plain_model
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import remove_leftovers, write_files
from pretrain.strategy.replaced import replaced_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pretrain.checkpoint.train_state import TrainState
    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.causal_lm import Pretrained
    from pretrain.models.hub.push import Pusher
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.models.transforms.base import ModelTransform
    from pretrain.strategy.engine import Engine


@dataclass(frozen=True)
class Exporter:
    """Writes the model of a run as Hugging Face folders.

    Every rank must call every method, since the weights may be sharded over all of them. A transformed model is written by rank 0
    alone, which then has all full weights in memory: `export` of a transform may combine any of them.

    Attributes:
        engine: holds the weights.
        tokenizer: the tokenizer that is saved with them.
        run: folder of the run.
        when: when the model is exported, see `CheckpointConfig.export`.
        shard_size: maximal size of a weight file, see `CheckpointConfig.export_shard_size`.
        save_dtype: dtype of the exported weights (``None``: the dtype in which they were trained).
        card: returns the text of the model card for a state of the run.
        separator: id of the token that ends documents.
        pusher: uploads the models of rank 0 (``None``: they are not uploaded).
    """

    engine: Engine
    tokenizer: Any
    run: Path
    when: Literal["end", "best", "save", "never"]
    shard_size: str
    save_dtype: str | None
    card: Callable[[TrainState], str]
    separator: int | None = None
    pusher: Pusher | None = None

    def checkpoint_files(self, progress: TrainState) -> dict[str, bytes]:
        """Return the files, by name, that a checkpoint holds in addition to its state, so that it can be loaded as a model."""
        card = self.card(progress)
        if self.engine.model.transformed is not None:
            card = card.replace(USE, TRANSFORMED_USE)
        return self._model_files | {"README.md": card.encode()}

    @cached_property
    def _model_files(self) -> dict[str, bytes]:
        """The config and the tokenizer of the model. Transforms that are applied to it again change the config again, so a
        checkpoint has the config before the transforms."""
        hf, transformed = self.engine.model.hf, self.engine.model.transformed
        if transformed is not None:
            hf = plain_model(hf, transformed.checkpoint_config(hf.config))
        return export.companion_files(hf, self.tokenizer, dtype=None, separator=self.separator)

    def at_save(self, progress: TrainState) -> None:
        """Export the model with a checkpoint if ``when`` is "save". The last model of a run is written by ``at_end``.

        A folder that can't be written is reported and does not end the run, because the checkpoint exists.
        """
        if self.when != "save":
            return
        models = self.run / "models"
        try:
            path = models / f"step-{progress.step:08d}"
            self._write(path, progress)
            if self.pusher is not None and self.engine.world.is_main:
                self.pusher.start(path, f"step {progress.step}")
        except UserError as error:
            notice(f"{error}; the run continues")
        if self.engine.world.is_main:
            self._prune(models, progress.step)

    def at_end(self, progress: TrainState, *, note: str = "") -> Path | None:
        """Export ``model/``, completely or not at all, and return its path; ``None`` if ``when`` is "never". ``note`` is added to
        the model card."""
        if self.when == "never":
            return None
        path = self.run / "model"
        companions: dict[str, dict[str, bytes]] = {}
        self._write(path, progress, note=note, companions=companions)
        self.engine.world.on_main_rank(partial(write_companions, companions, self.run))
        if self.engine.world.is_main:
            self._prune(self.run / "models", progress.step)
        return path

    def average_at_end(self, name: str, weights: Mapping[str, Tensor], progress: TrainState) -> None:
        """Export an average of the weights to ``averages/<name>/``, unless ``when`` is "never"."""
        if self.when != "never":
            with replaced_weights(self.engine, weights):
                self._write(self.run / "averages" / name, progress, note=f"\nThe weights are the average {name}.\n")

    def _write(
        self, path: Path, progress: TrainState, *, note: str = "", companions: dict[str, dict[str, bytes]] | None = None
    ) -> None:
        engine, world = self.engine, self.engine.world
        transformed = engine.model.transformed
        hf = engine.model.hf if transformed is None else plain_model(engine.model.hf)
        sharded = engine.sharded_export and world.size > 1 and transformed is None
        dtypes = export.dtypes_for(hf, self.save_dtype)
        own = export.weights_to_write(
            engine.full_weights(),
            dtypes=dtypes,
            world=world,
            sharded=sharded,
            convert=None if transformed is None else partial(transformed.export, hf, companions=companions),
        )
        plan = world.all_gather_object(lambda: export.split(own, self.shard_size)) if sharded else []
        dtype = export.dtype_of(own)

        def fill(fresh: Path) -> list[Path]:
            written = []
            if sharded:
                written = export.save_shards(own, fresh, plan=plan, rank=world.rank)
            elif world.is_main:
                written = export.save_full(hf, own, fresh, shard_size=self.shard_size)
            if world.is_main:
                files = export.companion_files(hf, self.tokenizer, dtype=dtype, separator=self.separator)
                written += write_files(files | {"README.md": (self.card(progress) + note).encode()}, fresh)
            return written

        write_folder(path, fill, world=world, hint=lambda: "the last checkpoint is valid", marker=False)

    def _prune(self, models: Path, step: int) -> None:
        """Delete earlier models whose checkpoints have been deleted."""
        remove_leftovers(models, "step-*")
        for old in models.glob("step-*[0-9]"):
            if old.name != f"step-{step:08d}" and not (self.run / "checkpoints" / old.name).exists():
                shutil.rmtree(old, ignore_errors=True)


def export_folder(
    model: Pretrained,
    path: Path,
    *,
    shard_size: str,
    prepare: Callable[[Any], tuple[Any, tuple[ModelTransform, ...]]] = lambda tokenizer: (tokenizer, ()),
    has_transformed_weights: bool = False,
) -> Path:
    """Write the weights of a checkpoint or a model folder as the Hugging Face folder ``path``; return ``path``.

    They are written in ``model.save_dtype`` (``None``: their present dtype), on the CPU, in one process. The model card of
    a checkpoint is copied. Weights are read one by one and freed after each file; only weights in a layout that
    transformers has to convert are loaded into a model first, and all weights are read before ``export`` of the transforms
    is called. ``prepare`` returns the tokenizer after the transforms, and the transforms. For ``has_transformed_weights`` see
    `ModelFactory`. Raises ``UserError`` for a model that can't be read and a folder that can't be written.
    """
    from transformers.utils.logging import enable_progress_bar

    from pretrain.distributed.context import DistributedContext
    from pretrain.models.model_factory import ModelFactory

    model.check(1)  # the sequence length does not matter here
    files = model.weights()
    if files is None:
        raise UserError("task=export: model=scratch has no weights to export")
    world, (tokenizer, transforms) = DistributedContext(), prepare(model.tokenizer(None))
    factory = ModelFactory(model, _dtype(files), 0, transforms, has_transformed_weights)
    meta_model = factory.build_on_meta()
    transformed = meta_model.transformed
    hf = meta_model.hf if transformed is None else plain_model(meta_model.hf)
    companions: dict[str, dict[str, bytes]] = {}

    def fill(fresh: Path) -> list[Path]:
        dtypes = export.dtypes_for(hf, model.save_dtype)
        convert = None if transformed is None else partial(transformed.export, hf, companions=companions)
        own = export.weights_to_write(
            _weights(factory, meta_model), dtypes=dtypes, world=world, sharded=False, convert=convert
        )
        extra_files = export.companion_files(hf, tokenizer, dtype=export.dtype_of(own))
        card = model.folder() / "README.md"
        written = export.save_full(hf, own, fresh, shard_size=shard_size)
        if card.exists():
            extra_files |= {card.name: card.read_bytes().replace(TRANSFORMED_USE.encode(), USE.encode())}
        return written + write_files(extra_files, fresh)

    if sys.stderr.isatty():
        enable_progress_bar()  # for writing the weight files
    write_folder(path, fill, world=world, hint=lambda: "the checkpoint is unchanged", marker=False)
    write_companions(companions, path.parent)
    return path


def write_companions(companions: dict[str, dict[str, bytes]], run: Path) -> None:
    """Write the folders that transforms leave beside the exported model, each completely or not at all."""
    from pretrain.distributed.context import DistributedContext

    for name, files in companions.items():
        write_folder(
            run / name,
            partial(write_files, files),
            world=DistributedContext(),
            hint=lambda: "the exported model is complete",
            marker=False,
        )


def _weights(factory: ModelFactory, meta_model: LanguageModel) -> Iterable[tuple[str, Tensor]]:
    """Return the weights by name, read one by one, or those of a model that is built where its files need converting."""
    model_files = factory.files(meta_model)
    if model_files is None:
        import torch

        return factory.build(torch.device("cpu")).hf_state().items()
    return ((name, model_files.read(name)) for name in meta_model.hf_state())


def _dtype(files: TensorFiles) -> torch.dtype:
    """Return the floating-point dtype of most elements."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for name in sorted(files.keys()):
        sizes[files.read(name, 0, 1).dtype] += math.prod(files.shape(name))
    return next((dtype for dtype, _ in sizes.most_common() if dtype.is_floating_point), torch.float32)
