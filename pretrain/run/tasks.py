"""The tasks that `task=` names. Each one takes the config of the run and returns the exit code."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pretrain.checkpoint.store import CheckpointStore
from pretrain.distributed.context import leave
from pretrain.distributed.rank_info import RankInfo
from pretrain.run import build
from pretrain.run.folder import begin, check_task, claim, start_over
from pretrain.run.leftovers import found_in, keep_aside
from pretrain.run.memory_advice import explained
from pretrain.run.plan_process import PlanProcess, planned_at_start
from pretrain.run.prepare import Prepared, is_transformed, model_spec, prepare, prepare_transforms
from pretrain.runtime import garbage_collector as collector
from pretrain.runtime.console import log_error, log_to, mute, notice, quietly
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import open_new, replace_file
from pretrain.runtime.out_of_memory import OutOfMemory, watched
from pretrain.runtime.signals import EXIT_CODE, Interrupt
from pretrain.runtime.watchdog import Watchdog
from pretrain.strategy.base import StepConfig
from pretrain.telemetry.events import RunFinished
from pretrain.telemetry.run_file import mark_failed
from pretrain.training.micro_batching import MicroBatching

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.distributed.context import DistributedContext
    from pretrain.training.trainer import Trainer


def pretraining(
    config: RunConfig,
    overrides: list[str],
    interrupt: Interrupt,
    place: RankInfo,
    on_hang: Callable[[str, str], None] | None = None,
) -> int:
    """Train as one of the run's processes: resume the run in output_dir, or start it.

    Args:
        config: The config of the run.
        overrides: The words of the command line.
        interrupt: Receives the stop signals.
        place: This process among all ranks, with the topology of the run.
        on_hang: Called as ``on_hang(place, how_long)`` before a stalled process ends itself; by default a message is
            printed on stderr.

    Returns:
        0 when the run is finished, 75 when a signal stopped it.
    """
    prepared, world = prepare_and_join(config, interrupt, place)
    folder = Path(config.output_dir)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint).checked_by(world, resume=config.resume)
    check_domains(config, prepared)
    with ExitStack() as claims:
        start = world.on_main_rank(lambda: begin(config, overrides, prepared, place=place, store=store, claims=claims))
        if start is None:
            leave()
            return 0
        config = config.with_lr(start.lr)
        watchdog = start_watchdog(config, folder / "logs" / f"rank-{place.rank}.log", on_hang, claims)
        store = replace(store, checked={}, files={"config.yaml": start.config_yaml.encode()})
        parts = {"resume_from": start.resume_from, "restarts": place.restarts, "watchdog": watchdog}
        trainer = train(config, prepared, store, world, interrupt, claims, **parts)
    leave()
    if place.rank == 0:  # after the other ranks have left
        finish_upload(trainer, folder / "model")
    return 0 if trainer.complete else EXIT_CODE


def train(
    config: RunConfig,
    prepared: Prepared,
    store: CheckpointStore,
    world: DistributedContext,
    interrupt: Interrupt,
    claims: ExitStack,
    **parts: Any,
) -> Trainer:
    """Build the trainer, run it and return it. For ``parts`` see `build_trainer`; what this starts ends with ``claims``."""
    from pretrain.run.build_trainer import build_trainer

    planned = planned_at_start(config, world, claims)
    with out_of_memory_explained(config, world, plan=planned):
        trainer = build_trainer(config, prepared, store, world, interrupt=interrupt, plan=planned, **parts)
    interrupt.defer_signals = True
    collector.restore_thresholds()
    with out_of_memory_explained(config, world, trainer, plan=planned):
        run_logged(trainer)
    return trainer


def check_domains(config: RunConfig, prepared: Prepared) -> None:
    """Raise ``UserError`` where a setting names a domain that the run does not evaluate."""
    domains = {name: role for name, role, _ in prepared.domains}
    config.checkpoint.check(domains)
    config.stop_when.check(domains)


def finish_upload(trainer: Trainer, model: Path) -> None:
    """Upload the final ``model`` of a complete run, if its models are uploaded."""
    pusher = None if trainer.exporter is None else trainer.exporter.pusher
    if trainer.complete and pusher is not None:
        pusher.finish(model, f"step {trainer.state.step}")


def prepare_and_join(config: RunConfig, interrupt: Interrupt, place: RankInfo) -> tuple[Prepared, DistributedContext]:
    """Prepare the data without the other ranks, then join them and check that all ranks agree.

    Returns the prepared data and the distributed context.
    """
    if place.rank > 0:
        mute()
    with quietly() if place.prepared else nullcontext():
        prepared = prepare(config, devices=place.topology.data_parallel_devices)
    interrupt.defer_signals = (
        place.topology.world_size > 1
    )  # from here on the other ranks would wait for a process that exits
    world = build.build_world(config, place, group=config.strategy.needs_group)
    check_ranks_agree(world, {"configuration": config.plain, "steps": prepared.total_steps} | prepared.identity)
    return prepared, world


def start_watchdog(
    config: RunConfig, log: Path, on_hang: Callable[[str, str], None] | None, claims: ExitStack
) -> Watchdog:
    """Start a watchdog that runs until ``claims`` is closed; it and all later messages are written to ``log``."""
    log_to(log)
    watchdog, policy = Watchdog(), config.launch
    tell = on_hang or partial(report_hang, log)
    claims.enter_context(watchdog.guarding(policy.timeout, policy.patience, log=log, report=tell))
    return watchdog


def report_hang(log: Path, place: str, how_long: str) -> None:
    """Report that this process is stalled, and record the failure in run.json.

    Neither of the two may block: the cause may be the disk, or a thread that holds a lock of the logging module. So the
    message bypasses logging, and a daemon thread writes run.json.
    """
    sys.stderr.write(
        f"{log.stem} is stalled at {place}: {how_long}, so it ends; all stacks are in {log}; the same command resumes "
        "from the last checkpoint\n"
    )
    threading.Thread(target=mark_failed, args=(log.parent.parent,), daemon=True).start()


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())


def check_ranks_agree(world: DistributedContext, facts: dict[str, Any]) -> None:
    """Raise ``UserError`` where a rank, for example on another machine, has another config or other data than rank 0."""
    own = {name: _digest(value) for name, value in facts.items()}  # what all ranks send to all is small
    every = world.all_gather_object(lambda: own)
    for rank, theirs in enumerate(every):
        differing = [name for name, value in every[0].items() if theirs[name] != value]
        if differing:
            raise UserError(
                f"rank {rank} differs from rank 0 in its {', '.join(differing)}: all ranks need the same command, model and text"
            )


@contextmanager
def out_of_memory_explained(
    config: RunConfig, world: DistributedContext, trainer: Trainer | None = None, *, plan: PlanProcess | None = None
) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a ``UserError`` that names settings with a lower memory use, and what
    ``plan`` has predicted. ``trainer`` is given as soon as it exists."""
    is_training = config.task == "pretraining"
    overrides = config.strategy.memory_saving_overrides(StepConfig.of(config), world.topology) if is_training else []
    try:
        with watched("setup" if trainer is None else "run"):
            yield
    except OutOfMemory as failure:
        raise explained(
            failure,
            config,
            split=MicroBatching.from_config(config) if trainer is None else MicroBatching.from_record(trainer.metadata),
            memory_saving_overrides=overrides,
            device=world.device,
            step=0 if trainer is None else trainer.state.step,
            plan=plan.record(wait_seconds=build.PLAN_SECONDS) if plan is not None else None,
        ) from failure


def run_logged(trainer: Trainer) -> None:
    """Run the trainer; on a failure, log the traceback and record the status in run.json."""
    try:
        trainer.run()
    except BaseException:
        log_error(f"failed at step {trainer.state.step}")
        trainer.flush()
        trainer.emit(RunFinished(trainer.state.step, "failed", trainer.state.tokens))
        raise
    finally:
        trainer.checkpoints.close()


def tokenization(config: RunConfig, overrides: list[str], interrupt: Interrupt) -> int:
    """Fill the token cache and print its counts."""
    prepared = prepare(config)
    parts = prepared.train.parts
    rows = [("training" if len(parts) == 1 else f"training, {part.name}", part.view) for part in parts]
    rows += [(f"held out, {name} ({role})", view) for name, role, view in prepared.domains]
    for name, view in rows:
        text = "tokens read in place" if view.num_bytes is None else f"{view.num_bytes:,} bytes of text"
        print(f"{name}: {view.num_tokens:,} tokens, {view.num_documents:,} documents, {text}")
    print(f"cache: {parts[0].view.store.path.parent.parent}")
    return 0


def evaluation(config: RunConfig, overrides: list[str], interrupt: Interrupt) -> int:
    """Score the model on the held-out documents of every configured domain."""
    from pretrain.evaluation.run_tasks import run_tasks
    from pretrain.run.build_evaluation import build_evaluator, build_sampler, build_tasks
    from pretrain.run.metadata import run_facts
    from pretrain.telemetry.events import Evaluated, Event, MetricsEvent, RunStarted, Sampled

    prepared = prepare(config)
    folder = claim(config.output_dir)
    check_task(folder.path, "evaluation")
    if found_in(folder.path):
        folder = start_over(folder)
    folder.write_config(config, overrides)
    world = build.build_world(config, RankInfo(), group=False)
    with out_of_memory_explained(config, world):
        scorer = build.build_scorer(config, prepared, world)
    uniform = prepared.model.uniform_loss()
    listeners, _ = build.build_listeners(config, prepared, folder.path, watch_files=False)
    with out_of_memory_explained(config, world), watched("evaluation"):
        evaluator = build_evaluator(config, prepared)
        sampler = build_sampler(config, prepared, scorer, evaluator)
        scores = evaluator.run(scorer, announce=True) or ()
        metrics = run_tasks(build_tasks(config, prepared), scorer, announce=True) or ()
        samples = sampler.run(scorer) or ()
    events: list[Event] = [
        RunStarted(0, 0, resumed=False, facts=run_facts(config, world, scorer) | {"uniform_loss": uniform}),
        Evaluated(0, tuple(scores), 0.0),
        MetricsEvent(0, tuple(metrics), 0.0),
        Sampled(0, tuple(samples), 0.0),
        RunFinished(0, "finished", 0),
    ]
    for event in events:
        for listener in listeners:
            listener(event)
    return 0


def generation(config: RunConfig, overrides: list[str], interrupt: Interrupt) -> int:
    """Print the model's continuation of each prompt, and write all of them to samples.jsonl."""
    from pretrain.models.generate import generate
    from pretrain.models.tokenizer import boundaries

    asked = config.generation
    folder = claim(config.output_dir, foreign=True).path
    model = model_spec(config)
    model.check(config.sequence_length)
    world = build.build_world(config, RankInfo(), group=False)
    tokenizer, transforms = prepare_transforms(config, model, model.tokenizer(None))
    language_model = build.build_model_factory(config, model, transforms).build(world.device)
    prompts, data = (
        [prompt for prompt in asked.prompts for _ in range(asked.num_samples)],
        config.dataset,
    )
    texts = generate(
        language_model,
        tokenizer,
        prompts,
        boundaries=boundaries(tokenizer, bos=data.bos, separator=data.separator),
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=config.seed,
    )
    if (aside := keep_aside(folder / "samples.jsonl")) is not None:
        notice(f"the earlier samples are kept as {aside}")
    with open_new(folder / "samples.jsonl", mode="w", encoding="utf-8") as file:
        for prompt, text in zip(prompts, texts, strict=True):
            file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
            print(f"─── {prompt!r}\n{prompt}{text}")
    return 0


def export(config: RunConfig, overrides: list[str], interrupt: Interrupt) -> int:
    """Write a checkpoint, or any other model, as a Hugging Face folder: output_dir/model."""
    from pretrain.training.exporter import export_folder

    folder = claim(config.output_dir, foreign=True).path
    if found_in(folder, ("model",)):
        raise UserError(f"output_dir={folder} holds a model already; choose another output_dir for the export")
    shard_size = config.checkpoint.export_shard_size
    model = model_spec(config)
    path = export_folder(
        model,
        folder / "model",
        shard_size=shard_size,
        prepare=partial(prepare_transforms, config, model),
        has_transformed_weights=is_transformed(model),
    )
    files = [f.stat().st_size for f in path.glob("*.safetensors")]
    print(f"model    {path} ({len(files)} weight file{'s' * (len(files) > 1)}, {sum(files):,} bytes)")
    return 0


def plan(config: RunConfig, overrides: list[str], interrupt: Interrupt) -> int:
    """Print the memory, the micro-batches and the time of a run that is not started, and write them to plan.json."""
    from pretrain.plan.plan import check_fits
    from pretrain.plan.table import show
    from pretrain.run.planning import plan_of
    from pretrain.telemetry.run_file import write_json

    folder = claim(config.output_dir, foreign=True).path
    found = plan_of(config)
    write_json(folder / "plan.json", found.record())
    show(found)
    print(f"{'plan':<12}{folder / 'plan.json'}")
    if config.plan.require:
        check_fits(found)
    return 0


def merge(config: RunConfig, overrides: list[str], interrupt: Interrupt) -> int:
    """Merge models into output_dir/model, and write the YAML of the same merge for mergekit beside it."""
    from pretrain.merging.merge import mergekit_config, open_merge, write_merged
    from pretrain.models.causal_lm import Pretrained

    folder = claim(config.output_dir, foreign=True).path
    if found_in(folder, ("model",)):
        raise UserError(f"output_dir={folder} holds a model already; choose another output_dir for the merged one")
    dtype, code = config.model.save_dtype, config.model.trust_remote_code
    opened = open_merge(config.merge, Pretrained(name_or_path=config.model_name, trust_remote_code=code))
    path = write_merged(opened, folder / "model", shard_size=config.checkpoint.export_shard_size, save_dtype=dtype)
    replace_file(folder / "mergekit_config.yml", mergekit_config(opened, save_dtype=dtype))
    for one, weight in zip(opened.inputs, opened.weights, strict=True):
        print(f"{weight:8.4g} × {one.name}")
    print(f"model    {path}")
    return 0


def advise(
    config: RunConfig, overrides: list[str], interrupt: Interrupt, *, devices: int = 1, config_dir: str | None = None
) -> int:
    """Make short runs within a budget and write the recipe that they support to output_dir.

    Args:
        config: The config of the planned run.
        overrides: The words of the command line.
        interrupt: Receives the stop signals.
        devices: Devices of the planned run.
        config_dir: The value of ``--config-dir``.
    """
    from pretrain.run.advising import Advising, write

    claimed = claim(config.output_dir, foreign=True)
    folder = claimed.path
    advising = Advising(config, overrides, folder, devices=devices, config_dir=config_dir)
    recipe, commands = write(advising, advising.run())
    print(recipe.sentence())
    for label, command in zip(("run it", "or"), commands, strict=False):
        print(f"{label:<12}{command}")
    print(f"{'advice':<12}{folder / 'advice.html'}")
    claimed.lock.release()  # held until here: two commands would make the same probes
    return 0


# The tasks of one process. Pretraining may have several: the launcher starts it.
TASKS: dict[str, Callable[[RunConfig, list[str], Interrupt], int]] = {
    "tokenization": tokenization,
    "evaluation": evaluation,
    "generation": generation,
    "export": export,
    "plan": plan,
    "merge": merge,
}
