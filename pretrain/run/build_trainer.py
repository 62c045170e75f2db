"""Build the trainer of a run from its config and its prepared data: the model, the micro-batches that fit beside it, and all
that trains, evaluates and saves it. The parts are those of `build`, `build_evaluation` and `build_saving`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.run import build
from pretrain.run.build_evaluation import build_evaluation
from pretrain.run.build_saving import build_checkpoints, build_exporter
from pretrain.run.prepare import Prepared
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.watchdog import Watchdog
from pretrain.training.micro_batching import MicroBatching
from pretrain.training.trainer import Trainer

if TYPE_CHECKING:
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.schema import RunConfig
    from pretrain.data.batch import Batch
    from pretrain.data.loader import Loader
    from pretrain.distributed.context import DistributedContext
    from pretrain.evaluation.untouched import Untouched
    from pretrain.merging.curve import Curve
    from pretrain.run.plan_process import PlanProcess
    from pretrain.runtime.signals import Interrupt
    from pretrain.strategy.engine import Engine
    from pretrain.telemetry.interval import Interval
    from pretrain.training.hooks import Hooks


def build_trainer(
    config: RunConfig,
    prepared: Prepared,
    store: CheckpointStore,
    world: DistributedContext,
    *,
    resume_from: Path | None = None,
    restarts: int = 0,
    interrupt: Interrupt | None = None,
    watchdog: Watchdog | None = None,
    plan: PlanProcess | None = None,
) -> Trainer:
    """Return the trainer of this rank with all its parts; rank 0 alone has listeners.

    Args:
        resume_from: The checkpoint to resume from.
        restarts: How often the processes have been restarted.
        interrupt: Whether a stop signal has arrived.
        watchdog: Ends the process if the run makes no progress.
        plan: The plan that another process makes, on the main rank.
    """
    folder, steps, watchdog = Path(config.output_dir), prepared.total_steps, watchdog or Watchdog()
    engine, hooks, split, rng = build_trainable(config, prepared, world, resume_from=resume_from, plan=plan)
    loader = build.build_loader(config, prepared, split, world)
    evaluate_every, save_every = build_intervals(config, loader, steps)
    metadata = build.build_facts(config, prepared, engine, split=split, restarts=restarts, plan=plan)
    exporter = build_exporter(config, prepared, engine, loader, facts=metadata, steps=steps)
    listeners, unsaved_records = build.build_listeners(config, prepared, folder) if world.is_main else ([], list)
    saving = {"every": save_every, "resume_from": resume_from, "unsaved_records": unsaved_records}
    evaluation = build_evaluation(config, prepared, engine, split.batch_size, evaluate_every, hooks)
    return Trainer(
        engine,
        loader,
        build.build_schedule(config, steps),
        steps=steps,
        evaluation=evaluation,
        checkpoints=build_checkpoints(config, prepared, store, exporter, watchdog, **saving),
        guard=build.build_guard(config, prepared, engine, loader, folder),
        exporter=exporter,
        layers=build.build_layers(config, engine),
        hooks=hooks,
        stop_when=config.stop_when,
        curve=build_curve(config, prepared, engine, evaluation.untouched, store),
        listeners=listeners,
        interrupt=interrupt,
        watchdog=watchdog,
        rng=rng,
        metadata=metadata,
    )


class Trainable(NamedTuple):
    """What holds the memory of a run, and the micro-batches that fit into it.

    Attributes:
        engine: The model and the optimizer.
        hooks: The hooks, set up.
        split: How the global batch is split into micro-batches.
        rng: This rank's random state before the hooks and the search for a micro-batch, which draw random numbers.
    """

    engine: Engine
    hooks: Hooks
    split: MicroBatching
    rng: dict[str, Any]


def build_trainable(
    config: RunConfig,
    prepared: Prepared,
    world: DistributedContext,
    *,
    resume_from: Path | None = None,
    plan: PlanProcess | None = None,
) -> Trainable:
    """Return the engine and the hooks of this rank, and the micro-batches; see `build_split` for ``resume_from`` and ``plan``."""
    from pretrain.checkpoint.rng import rng_state
    from pretrain.run.prepare_data import lines_before_the_start
    from pretrain.training.hooks import Hooks

    for line in lines_before_the_start(config, prepared) if world.is_main else ():
        notice(line)
    engine = build.build_engine(config, prepared, world)
    rng, hooks = rng_state(), Hooks(config.build_hooks(), world)
    hooks.setup(engine)  # before the search, so that their tensors are in memory in every trial
    split = build_split(config, prepared, engine, resume_from=resume_from, plan=plan)
    if engine.term is not None:
        engine.term.restart()
    return Trainable(engine, hooks, split, rng)


def build_split(
    config: RunConfig, prepared: Prepared, engine: Engine, *, resume_from: Path | None, plan: PlanProcess | None = None
) -> MicroBatching:
    """Return how the global batch is split into micro-batches.

    ``batch_size=auto`` uses the micro-batch that this run has used so far on the same kind of device, otherwise the largest
    one that fits into memory.
    """
    from pretrain.run.folder import recorded_batch_size
    from pretrain.run.metadata import device_name
    from pretrain.training.batch_size import choose, moment_bytes

    requested, world = MicroBatching.from_config(config), engine.world
    if config.batch_size != "auto":
        return requested

    def rows(size: int) -> Batch:
        return build.build_loader(config, prepared, MicroBatching(size, 1), world).batch(0)

    size = world.on_main_rank(lambda: recorded_batch_size(resume_from, device=device_name(world.device)))
    if size is not None and requested.total % size == 0:
        split, why = requested.of(size), "as in this run so far"
    else:
        split, why = choose(
            engine,
            rows,
            total=requested.total,
            sequence_length=config.sequence_length,
            moment_bytes=moment_bytes(config.optimizer, engine.model),
            planned=world.on_main_rank(lambda: planned_size(plan)),
        )
    notice(f"batch_size=auto: batch_size={split.batch_size} gradient_accumulation_steps={split.accumulation} ({why})")
    return split


def planned_size(plan: PlanProcess | None) -> int | None:
    """Return the micro-batch that ``plan`` predicts to be the largest; ``None`` without a plan. This waits for the plan, which
    saves several trials."""
    record = plan.record(wait_seconds=build.PLAN_SECONDS) if plan is not None else None
    return None if record is None else int(record["setup"]["batch_size"])


def build_intervals(config: RunConfig, loader: Loader, steps: int) -> tuple[Interval, Interval]:
    """Return the evaluation and the checkpoint interval of a run of ``steps`` steps; log where they were adjusted."""
    from pretrain.telemetry.interval import Interval
    from pretrain.training.cadence import cadence

    policy, checkpoint = config.evaluation, config.checkpoint
    intervals = cadence(
        steps=steps,
        epoch_steps=max(1, int(loader.epoch_samples // loader.global_batch_size)),
        evaluate_every=config.evaluate_every,
        save_every=config.save_every,
        per_epoch=policy.per_epoch,
        with_evaluation=checkpoint.with_evaluation,
        keep_every=checkpoint.keep_every,
    )
    for line in intervals.notices:
        notice(line)
    return Interval(intervals.evaluate_every), Interval(intervals.save_every)


def build_curve(
    config: RunConfig, prepared: Prepared, engine: Engine, untouched: Untouched, store: CheckpointStore
) -> Curve | None:
    """Return the merge curve of the run, whose checkpoints are in ``store``; ``None`` if it has none.

    Raises ``UserError`` for a model whose base weights can't be read tensor by tensor.
    """
    if not config.merge.curve:
        return None
    from pretrain.merging.choice import Choice
    from pretrain.merging.curve import Curve

    transformed = engine.model.transformed
    if transformed is not None and transformed.before.keys() != transformed.after.keys():
        raise UserError("merge.curve: the transforms of this run add weights, which the base model does not have")
    files = (
        None
        if prepared.base_gone
        else build.build_model_factory(config, prepared.model, prepared.transforms).files(engine.model)
    )
    if files is None:
        raise UserError(
            "merge.curve: needs the weights of a base model in files under their own names; this run starts from random weights, "
            "its base model is gone, or transformers converts its files (task=export writes a folder with converted ones)"
        )
    checkpoints = store if config.merge.along == "checkpoints" else None
    return Curve(tuple(config.merge.curve), Choice.of(config.merge.choose), files, untouched, checkpoints)
