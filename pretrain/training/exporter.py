"""When a run's model becomes a Hugging Face folder: at its end, or with every checkpoint too. What lies beside the weights
there lies in every checkpoint as well, which so is a model by itself."""

from __future__ import annotations

import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pretrain.checkpoint.atomic import write_folder
from pretrain.models.hub import export
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pretrain.checkpoint.train_state import TrainState
    from pretrain.distributed.sharding import TensorFiles
    from pretrain.models.causal_lm import Pretrained
    from pretrain.strategy.engine import Engine


@dataclass(frozen=True)
class Exporter:
    """``run``: the run's folder · ``when``, ``shard_size``: see ``checkpoint.policy`` · ``save_dtype``: type of the exported
    weights (``None``: as they were trained) · ``card``: the model card of a moment · ``separator``: the token that ends
    documents.

    Every rank calls every method: weights may lie on all of them.
    """

    engine: Engine
    tokenizer: Any
    run: Path
    when: Literal["end", "save", "never"]
    shard_size: str
    save_dtype: str | None
    card: Callable[[TrainState], str]
    separator: int | None = None

    def checkpoint_files(self, progress: TrainState) -> dict[str, bytes]:
        """What a checkpoint holds beside its state, by name, so that it is a model by itself."""
        return self._beside | self._card(progress)

    @cached_property
    def _beside(self) -> dict[str, bytes]:
        return export.companion_files(self.engine.model.hf, self.tokenizer, dtype=None, separator=self.separator)

    def _card(self, progress: TrainState) -> dict[str, bytes]:
        return {"README.md": self.card(progress).encode()}

    def at_save(self, progress: TrainState) -> None:
        """Export beside a checkpoint, where asked to; the last model of a run comes from ``at_end``.

        A folder that can't be written costs a line and not the run: the checkpoint is there.
        """
        if self.when != "save":
            return
        models = self.run / "models"
        try:
            self._write(models / f"step-{progress.step:08d}", progress)
        except UserError as error:
            notice(f"{error}; the run goes on")
        if self.engine.world.is_main:
            self._prune(models, progress.step)

    def at_end(self, progress: TrainState) -> Path | None:
        """Export ``model/``, whole or not at all, and return it; ``None`` when the run was told to export never."""
        if self.when == "never":
            return None
        path = self.run / "model"
        self._write(path, progress)
        if self.engine.world.is_main:
            self._prune(self.run / "models", progress.step)
        return path

    def _write(self, path: Path, progress: TrainState) -> None:
        engine, world = self.engine, self.engine.world
        sharded = engine.sharded_export and world.size > 1
        dtypes = export.dtypes_for(engine.model.hf, self.save_dtype)
        own = export.weights_to_write(engine.whole_weights(), dtypes=dtypes, world=world, sharded=sharded)
        plan = world.all_gather_object(lambda: export.split(own, self.shard_size)) if sharded else []
        dtype = export.dtype_of(own)

        def fill(fresh: Path) -> list[Path]:
            written = []
            if sharded:
                written = export.save_shards(own, fresh, plan=plan, rank=world.rank)
            elif world.is_main:
                written = export.save_full(engine.model.hf, own, fresh, shard_size=self.shard_size)
            if world.is_main:
                files = export.companion_files(engine.model.hf, self.tokenizer, dtype=dtype, separator=self.separator)
                written += export.write_companion_files(files | self._card(progress), fresh)
            return written

        write_folder(path, fill, world=world, hint=lambda: "the last checkpoint is good", marker=False)

    def _prune(self, models: Path, step: int) -> None:
        """An earlier model goes when its checkpoint has gone."""
        for left in (*models.glob("step-*.partial"), *models.glob("step-*.replaced")):  # of a kill
            shutil.rmtree(left, ignore_errors=True)
        for old in models.glob("step-*[0-9]"):
            if old.name != f"step-{step:08d}" and not (self.run / "checkpoints" / old.name).exists():
                shutil.rmtree(old, ignore_errors=True)


def export_folder(model: Pretrained, path: Path, *, shard_size: str) -> Path:
    """Write the weights of a checkpoint or a model folder as the Hugging Face folder ``path``, in ``model.save_dtype``
    (``None``: as they are there), on the CPU, in one process; return ``path``. A checkpoint's card comes along.

    Weights are read one by one and let go file by file; only those in a layout that transformers has to convert are
    built as a model first. Raises ``UserError`` for a model that can't be read and a place that can't be written.
    """
    import torch
    from transformers.utils.logging import enable_progress_bar

    from pretrain.distributed.context import DistributedContext
    from pretrain.models.model_factory import ModelFactory

    model.check(1)  # any sequence will do
    files = model.weights()
    if files is None:
        raise UserError("task=export: model=scratch has no weights to export")
    alone, tokenizer = DistributedContext(0, 1, torch.device("cpu")), model.tokenizer(None)
    factory = ModelFactory(model, _dtype(files), seed=0)
    outline = factory.build_on_meta()

    def weights() -> Iterable[tuple[str, Tensor]]:
        fitting = factory.files(outline)
        if fitting is None:
            return factory.build(alone.device).hf_state().items()
        return ((name, fitting.read(name)) for name in outline.hf_state())

    def fill(fresh: Path) -> list[Path]:
        dtypes = export.dtypes_for(outline.hf, model.save_dtype)
        own = export.weights_to_write(weights(), dtypes=dtypes, world=alone, sharded=False)
        companions = export.companion_files(outline.hf, tokenizer, dtype=export.dtype_of(own))
        card = model.folder() / "README.md"
        written = export.save_full(outline.hf, own, fresh, shard_size=shard_size)
        return written + export.write_companion_files(
            companions | ({card.name: card.read_bytes()} if card.exists() else {}), fresh
        )

    if sys.stderr.isatty():
        enable_progress_bar()  # of the files written
    write_folder(path, fill, world=alone, hint=lambda: "the checkpoint is as it was", marker=False)
    return path


def _dtype(files: TensorFiles) -> torch.dtype:
    """The type of most numbers that are no counts."""
    import torch

    sizes: Counter[torch.dtype] = Counter()
    for name in sorted(files.keys()):
        sizes[files.read(name, 0, 1).dtype] += math.prod(files.shape(name))
    return next((dtype for dtype, _ in sizes.most_common() if dtype.is_floating_point), torch.float32)
