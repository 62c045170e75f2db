"""Build the objects of a run (engine, loader, evaluator, trainer, …) from its config and its prepared data.

This module alone knows all parts, `build_evaluation` those of the evaluation, and `build_saving` what writes checkpoints and
models; each part receives the others as constructor arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.run.prepare import Prepared
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.schema import RunConfig
    from pretrain.data.batch import Batch
    from pretrain.data.loader import Loader
    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.rank_info import RankInfo
    from pretrain.evaluation.untouched import Untouched
    from pretrain.merging.curve import Curve
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.models.transforms.base import ModelTransform
    from pretrain.run.plan_process import PlanProcess
    from pretrain.runtime.signals import Interrupt
    from pretrain.runtime.watchdog import Watchdog
    from pretrain.strategy.engine import Engine, InferenceEngine
    from pretrain.telemetry.interval import Interval
    from pretrain.telemetry.record import Record
    from pretrain.training.guard.guard import Guard
    from pretrain.training.layer_statistics import LayerStatistics
    from pretrain.training.trainer import Listener, Trainer

PLAN_SECONDS = 30.0  # the longest wait for a plan where it saves trials


def build_world(config: RunConfig, place: RankInfo, *, group: bool) -> DistributedContext:
    """Seed this rank and return its distributed context; ``group``: also join a process group."""
    from pretrain.checkpoint.rng import seed_everything
    from pretrain.distributed.context import enter

    world = enter(place, group=group, timeout_seconds=config.launch.patience)
    seed_everything(config.seed, rank=world.data_rank)
    return world


def build_engine(config: RunConfig, prepared: Prepared, world: DistributedContext) -> Engine:
    """Return this rank's engine: the model and the optimizer as the strategy sets them up."""
    from pretrain.strategy.base import StepConfig

    for transform in config.transforms:
        if getattr(transform, "needs_compile", False) and not getattr(config.model, "compile", True):
            raise UserError(
                f"transform=[{type(transform).__name__.lower()}] with model.compile=false: without compilation it is slower than "
                "training without it; add model.compile=true"
            )
    if prepared.model.weights() is not None and hasattr(config.optimizer, "check_base"):  # not a plain function
        config.optimizer.check_base(config.model_name)
    factory, step = build_model_factory(config, prepared.model, prepared.transforms), StepConfig.of(config)
    if prepared.base_gone and config.objective_identity is not None:
        raise UserError(
            f"objective: it compares with the base model, and model_name={config.model_name} is no longer available"
        )
    engine = config.strategy.setup(factory, optimizer_builder(config), step, world)
    engine.term = config.objective.term(
        engine, partial(config.objective.reference, config.strategy, factory, step, world)
    )
    return engine


def optimizer_builder(config: RunConfig) -> Callable[[LanguageModel], Optimizer]:
    """Return a function that builds the optimizer of a model, and checks that it has every parameter that is trained."""
    from pretrain.optim.combined import check_every_parameter, combined
    from pretrain.optim.lr_factors import split_by_factor

    def optimizer(model: LanguageModel) -> Optimizer:
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(
                f"transform=[{','.join(config.plain.get('transform') or {})}]: no parameter of the model is left to train"
            )
        parts = config.optimizer(model.hf_named_parameters())
        split_by_factor(
            parts if isinstance(parts, Sequence) else [parts],
            model.hf_named_parameters(),
            factors_of(model),
            undecayed=model.transformed.first_rows if model.transformed is not None else (),
        )
        made = combined(parts)
        check_every_parameter(made, model.hf_named_parameters())
        return made

    def factors_of(model: LanguageModel) -> dict[str, float]:
        of_transforms = model.transformed.lr_factors if model.transformed is not None else {}
        factors = config.lr_factors.of([name for name, _ in model.hf_named_parameters()])
        return {name: factor * of_transforms.get(name, 1.0) for name, factor in factors.items()}

    return optimizer


def build_model_factory(config: RunConfig, model: Any, transforms: tuple[ModelTransform, ...]) -> ModelFactory:
    """Return the factory that builds ``model`` with the prepared ``transforms`` and in the precision of the config."""
    from pretrain.models.model_factory import ModelFactory
    from pretrain.run.prepare import is_transformed

    return ModelFactory(model, config.precision.param_dtype, config.seed, transforms, is_transformed(model))


def build_scorer(config: RunConfig, prepared: Prepared, world: DistributedContext) -> InferenceEngine:
    """Return an engine without an optimizer, for evaluation alone."""
    from pretrain.strategy.engine import InferenceEngine

    model = build_model_factory(config, prepared.model, prepared.transforms).build(world.device)
    return InferenceEngine(model, precision=config.precision, world=world)


def build_schedule(config: RunConfig, steps: int) -> Callable[[int], float]:
    """Return the learning-rate schedule of a run of ``steps`` optimizer steps, as a function of the step.

    Raises ``UserError`` for a function that returns no number for the first or the last step.
    """
    from pretrain.optim.learning_rate import AUTO, warmup_steps
    from pretrain.optim.schedule import Schedule

    warmup = warmup_steps(steps, config.warmup_proportion)
    peak_lr = 1.0 if config.lr == AUTO else float(config.lr)
    schedule = Schedule(config.scheduler, total_steps=steps, warmup_steps=warmup, peak_lr=peak_lr)
    schedule(0), schedule(max(0, steps - 1))  # before the run
    return schedule


def build_facts(
    config: RunConfig,
    prepared: Prepared,
    engine: Engine,
    *,
    split: MicroBatching,
    restarts: int,
    plan: PlanProcess | None = None,
) -> dict[str, Any]:
    """Return the metadata for run.json, including the values from which throughput and MFU are computed, and those of
    ``plan``, if it is ready."""
    from pretrain.run.metadata import mixture_facts, run_facts, speed_facts
    from pretrain.run.plan_process import planned_facts

    facts = run_facts(config, engine.world, engine, restarts=restarts) | split.facts()
    speed = speed_facts(config, engine, devices=engine.world.topology.devices, peak=config.telemetry.peak_flops)
    planned = planned_facts(plan, wait_seconds=PLAN_SECONDS if config.plan.at_start is True else 0.0)
    more = {"uniform_loss": prepared.model.uniform_loss()} | mixture_facts(prepared.identity) | planned
    return facts | speed | more


def build_listeners(
    config: RunConfig, prepared: Prepared, folder: Path, *, watch_files: bool = True
) -> tuple[list[Listener], Callable[[], list[Record]]]:
    """Return the listeners that receive the run's events, and a function that returns the records for the next checkpoint.

    ``watch_files``: whether the files of the training data are watched for changes.
    """
    from pretrain.data.changed_files import FilesWatch
    from pretrain.telemetry.baseline import BaselineCheck
    from pretrain.telemetry.monitor import Monitor
    from pretrain.telemetry.run_file import RunFile

    monitor = Monitor(config.build_sinks(), run=folder, log_every=config.log_every)
    files = prepared.train.copied_files if watch_files else {}
    watchers: list[Listener] = [FilesWatch(files), BaselineCheck(prepared.model.uniform_loss())]
    return [monitor, RunFile(folder, monitor.summary), *watchers], monitor.unsaved


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


def build_loader(config: RunConfig, prepared: Prepared, split: MicroBatching, world: DistributedContext) -> Loader:
    """Return the loader of this rank's share of the training data; ``split`` counts the sequences of one device."""
    from pretrain.data.loader import Loader

    return Loader(
        prepared.train,
        sequence_length=config.sequence_length,
        seed=config.seed,
        batch_size=split.batch_size * world.topology.devices_per_worker,
        accumulation=split.accumulation,
        rank=world.data_rank,
        world_size=world.data_size,
        document_mask=config.dataset.document_mask,
        pin_memory=world.device.type == "cuda",
        steps=prepared.total_steps,
    )


def build_guard(config: RunConfig, prepared: Prepared, engine: Engine, loader: Loader, folder: Path) -> Guard:
    """Return the guard that checks every step; rank 0 writes quarantine.jsonl into ``folder``."""
    from pretrain.training.guard.guard import Guard
    from pretrain.training.guard.quarantine import Quarantine

    file = folder / "quarantine.jsonl" if engine.world.is_main else None
    return Guard(
        config.guard,
        device=engine.world.device,
        quarantine=Quarantine(file, loader=loader, tokenizer=prepared.tokenizer),
        scaled=engine.scaler.is_enabled(),
        agree=engine.world.all_reduce_max,
    )


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
        return build_loader(config, prepared, MicroBatching(size, 1), world).batch(0)

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
    record = plan.record(wait_seconds=PLAN_SECONDS) if plan is not None else None
    return None if record is None else int(record["setup"]["batch_size"])


def build_layers(config: RunConfig, engine: Engine) -> LayerStatistics:
    """Return the per-layer statistics, computed every ``telemetry.layers_every`` steps."""
    from pretrain.telemetry.interval import Interval
    from pretrain.training.layer_statistics import LayerStatistics

    return LayerStatistics(engine, Interval(config.telemetry.layers_every))


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
        else build_model_factory(config, prepared.model, prepared.transforms).files(engine.model)
    )
    if files is None:
        raise UserError(
            "merge.curve: needs the weights of a base model in files under their own names; this run starts from random weights, "
            "its base model is gone, or transformers converts its files (task=export writes a folder with converted ones)"
        )
    checkpoints = store if config.merge.along == "checkpoints" else None
    return Curve(tuple(config.merge.curve), Choice.of(config.merge.choose), files, untouched, checkpoints)


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
    from pretrain.checkpoint.rng import rng_state
    from pretrain.run.build_evaluation import build_evaluation
    from pretrain.run.build_saving import build_checkpoints, build_exporter
    from pretrain.run.prepare_data import lines_before_the_start
    from pretrain.runtime.watchdog import Watchdog
    from pretrain.training.hooks import Hooks
    from pretrain.training.trainer import Trainer

    folder, steps, watchdog = Path(config.output_dir), prepared.total_steps, watchdog or Watchdog()
    for line in lines_before_the_start(config, prepared) if world.is_main else ():
        notice(line)
    engine = build_engine(config, prepared, world)
    rng = rng_state()  # captured before the hooks and the search for a micro-batch, which draw random numbers
    hooks = config.build_hooks()
    set_up = Hooks(hooks, world)
    set_up.setup(engine)  # before the search, so that their tensors are in memory in every trial
    split = build_split(config, prepared, engine, resume_from=resume_from, plan=plan)
    if engine.term is not None:
        engine.term.restart()
    loader = build_loader(config, prepared, split, world)
    evaluate_every, save_every = build_intervals(config, loader, steps)
    metadata = build_facts(config, prepared, engine, split=split, restarts=restarts, plan=plan)
    exporter = build_exporter(config, prepared, engine, loader, facts=metadata, steps=steps)
    listeners, unsaved_records = build_listeners(config, prepared, folder) if world.is_main else ([], list)
    saving = {"every": save_every, "resume_from": resume_from, "unsaved_records": unsaved_records}
    evaluation = build_evaluation(config, prepared, engine, split.batch_size, evaluate_every, hooks)
    return Trainer(
        engine,
        loader,
        build_schedule(config, steps),
        steps=steps,
        evaluation=evaluation,
        checkpoints=build_checkpoints(config, prepared, store, exporter, watchdog, **saving),
        guard=build_guard(config, prepared, engine, loader, folder),
        exporter=exporter,
        layers=build_layers(config, engine),
        hooks=set_up,
        stop_when=config.stop_when,
        curve=build_curve(config, prepared, engine, evaluation.untouched, store),
        listeners=listeners,
        interrupt=interrupt,
        watchdog=watchdog,
        rng=rng,
        metadata=metadata,
    )
