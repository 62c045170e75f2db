"""Build single objects of a run (engine, loader, guard, …) from its config and its prepared data.

`build_evaluation` builds those of the evaluation, `build_saving` what writes checkpoints and models, and `build_trainer` puts
them together; each part receives the others as constructor arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.run.prepare import Prepared
from pretrain.runtime.errors import UserError
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from pretrain.config.schema import RunConfig
    from pretrain.data.loader import Loader
    from pretrain.distributed.context import DistributedContext
    from pretrain.distributed.rank_info import RankInfo
    from pretrain.models.language_model import LanguageModel
    from pretrain.models.model_factory import ModelFactory
    from pretrain.models.transforms.base import ModelTransform
    from pretrain.run.plan_process import PlanProcess
    from pretrain.strategy.engine import Engine, InferenceEngine
    from pretrain.telemetry.record import Record
    from pretrain.training.guard.guard import Guard
    from pretrain.training.layer_statistics import LayerStatistics
    from pretrain.training.trainer import Listener

PLAN_SECONDS = 30.0  # the longest wait for a plan where it saves trials
WHOLE_PLAN_SECONDS = 600.0  # the same with plan.at_start=true


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
    planned = planned_facts(plan, wait_seconds=WHOLE_PLAN_SECONDS if config.plan.at_start is True else 0.0)
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


def build_layers(config: RunConfig, engine: Engine) -> LayerStatistics:
    """Return the per-layer statistics, computed every ``telemetry.layers_every`` steps."""
    from pretrain.telemetry.interval import Interval
    from pretrain.training.layer_statistics import LayerStatistics

    return LayerStatistics(engine, Interval(config.telemetry.layers_every))
