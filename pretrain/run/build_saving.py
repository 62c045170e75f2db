"""Build what writes the checkpoints and the model folders of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.run.prepare import Prepared

if TYPE_CHECKING:
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.schema import RunConfig
    from pretrain.data.loader import Loader
    from pretrain.runtime.watchdog import Watchdog
    from pretrain.strategy.engine import Engine
    from pretrain.training.checkpoints import Checkpoints
    from pretrain.training.exporter import Exporter


def build_exporter(
    config: RunConfig, prepared: Prepared, engine: Engine, loader: Loader, *, facts: dict[str, Any], steps: int
) -> Exporter:
    """Return the exporter that writes the weights of ``engine`` as Hugging Face folders below the run's folder.

    Raises ``UserError`` for transforms whose export does not return the weights of the plain architecture.
    """
    from pretrain.data.statistics import DataStatistics
    from pretrain.models.hub.model_card import model_card
    from pretrain.models.hub.push import Pusher
    from pretrain.training.exporter import Exporter

    policy, train = config.checkpoint, prepared.train
    data = {"documents": train.num_documents, "tokens": train.num_tokens, "bytes": train.num_bytes}
    data |= {"global_batch": prepared.global_batch}
    parts = DataStatistics(loader).parts
    if policy.export != "never" and engine.model.transformed is not None:
        engine.model.transformed.check_export(engine.model.hf)
    return Exporter(
        engine,
        prepared.tokenizer,
        Path(config.output_dir),
        when=policy.export,
        shard_size=policy.export_shard_size,
        save_dtype=prepared.model.save_dtype,
        card=partial(model_card, config.plain, data=data, parts=parts, facts=facts, total_steps=steps),
        separator=prepared.boundaries.separator,
        pusher=None if policy.push_to_hub is None else Pusher(policy.push_to_hub),
    )


def build_checkpoints(
    config: RunConfig,
    prepared: Prepared,
    store: CheckpointStore,
    exporter: Exporter,
    watchdog: Watchdog,
    **options: Any,
) -> Checkpoints:
    """Return what saves and loads checkpoints, in a background thread where the config says so. For ``options`` see
    `Checkpoints`."""
    from pretrain.checkpoint.writer import AsyncCheckpointWriter
    from pretrain.training.checkpoints import Checkpoints

    writer = AsyncCheckpointWriter(
        store,
        world=exporter.engine.world,
        background=store.policy.async_,
        timeout_seconds=config.launch.timeout,
        alive=watchdog.heartbeat,
    )
    return Checkpoints(writer, prepared.identity, files=exporter.checkpoint_files, **options)
