"""A resolved config → the objects of a run. The only place that calls Hydra's `instantiate`, and where parts meet.

`prepare` comes first and once: it checks the model folder and fills the token cache, before any training process exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from hydra.utils import instantiate as hydra_instantiate

from pretrain.errors import UserError
from pretrain.split import Split

if TYPE_CHECKING:
    from pretrain.batch import Batch
    from pretrain.checkpoint.saver import Saver
    from pretrain.checkpoint.store import Store
    from pretrain.data.fingerprint import Files
    from pretrain.data.loader import Loader
    from pretrain.data.sources.base import Source
    from pretrain.data.store import TokenStore, TokenView
    from pretrain.engine import Engine, Scorer
    from pretrain.evaluation.perplexity import Domain, Evaluator
    from pretrain.evaluation.samples import Sampler
    from pretrain.exporter import Exporter
    from pretrain.guard.guard import Guard
    from pretrain.interrupt import Interrupt
    from pretrain.models.blueprint import Blueprint
    from pretrain.place import Place
    from pretrain.strategy.base import Setting
    from pretrain.telemetry.record import Record
    from pretrain.trainer import Listener, Schedule, Trainer
    from pretrain.watchdog import Watchdog
    from pretrain.world import World


def instantiate(node: dict[str, Any]) -> Any:
    """The object that ``node`` stands for. A key that is a word of Python (``async``) gets the underscore it has there."""
    return hydra_instantiate({f"{k}_" if iskeyword(k) else k: v for k, v in node.items()}, _convert_="all")


def model_spec(resolved: dict[str, Any]) -> Any:
    """The model that the config names; a run's or a checkpoint's weights where it names one of these.

    Raises ``UserError`` for a checkpoint that is not whole.
    """
    from pretrain.checkpoint.weights import weights_folder

    spec = instantiate(resolved["model"])
    folder = weights_folder(spec.name_or_path, key="model_name")
    tokenizer = spec.tokenizer_name and weights_folder(spec.tokenizer_name, key="model.tokenizer_name")
    return replace(spec, name_or_path=folder, tokenizer_name=tokenizer)


@dataclass(frozen=True)
class Prepared:
    """What exists before the first process trains. ``domains``: name, role and held-out documents of each domain.
    ``global_batch``: sequences of all devices and micro-batches in one step."""

    model: Any
    tokenizer: Any
    train: TokenView
    domains: list[tuple[str, str, TokenView]]
    identity: dict[str, Any]
    global_batch: int


def prepare(resolved: dict[str, Any], *, devices: int = 1) -> Prepared:
    """Check the model's folder, get its tokenizer, and tokenize whatever the cache does not hold yet. ``devices``: of
    all processes, each with ``batch_size`` sequences at a time.

    Raises ``UserError`` for a model or data that can't be used.
    """
    from pretrain.data.tokenize import prepare as tokenize
    from pretrain.data.tokenize import training_texts

    model = model_spec(resolved)
    model.check(resolved["sequence_length"])
    source = instantiate(resolved["dataset"])
    tokenizer = model.tokenizer(partial(training_texts, source))
    if tokenizer.eos_token_id is None:
        raise UserError(f"model_name={resolved['model_name']}: its tokenizer has no end-of-text token (eos_token)")
    tokenizer_json = tokenizer.backend_tokenizer.to_str()
    encode = partial(tokenize, tokenizer_json=tokenizer_json, eot=tokenizer.eos_token_id)

    store = encode(source)
    train, held_out = views(store, source)
    domains = [(source.domain, "new", held_out)] if held_out.num_tokens > 1 else []
    for base in instantiate(resolved["evaluation"]).domains.values():
        if base.domain != source.domain:
            domains.append((base.domain, "base", views(encode(base), base)[1]))
    global_batch = Split.asked(resolved).total * devices
    identity = {
        "model": model.identity(),
        "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer_json.encode()),
        "data": xxhash.xxh3_64_hexdigest(
            repr([[part.path.name for part in store.parts], view_options(source), source.document_mask]).encode()
        ),
        "sequence_length": resolved["sequence_length"],
        "global_batch": global_batch,
        "seed": resolved["seed"],
        "weights": instantiate(resolved["precision"]).weights,
        "optimizer": [resolved["optimizer"].get(key) for key in ("_target_", "compensate")],
    }
    return Prepared(model, tokenizer, train, domains, identity, global_batch)


def view_options(source: Source) -> dict[str, Any]:
    return {
        "held_out": source.held_out,
        "train_data_ratio": source.train_data_ratio,
        "deduplicate": source.deduplicate,
    }


def views(store: TokenStore, source: Source) -> tuple[TokenView, TokenView]:
    """The training and the held-out documents."""
    return store.views(**view_options(source))


def build_world(resolved: dict[str, Any], place: Place, *, group: bool) -> World:
    from pretrain.checkpoint.rng import seed_everything
    from pretrain.world import enter

    world = enter(place, group=group, timeout_seconds=instantiate(resolved["launch"]).timeout)
    seed_everything(resolved["seed"], rank=place.rank)
    return world


def build_engine(resolved: dict[str, Any], prepared: Prepared, setting: Setting, world: World) -> Engine:
    """Model and optimizer on this rank, by the strategy."""
    optimizer = instantiate(resolved["optimizer"])
    engine: Engine = instantiate(resolved["strategy"]).setup(
        blueprint(resolved, prepared.model),
        lambda model: optimizer(model.hf_named_parameters()),
        setting=setting,
        world=world,
    )
    return engine


def blueprint(resolved: dict[str, Any], model: Any) -> Blueprint:
    from pretrain.models.blueprint import Blueprint

    return Blueprint(model, instantiate(resolved["precision"]).param_dtype, resolved["seed"])


def build_scorer(resolved: dict[str, Any], prepared: Prepared, world: World) -> Scorer:
    """The model alone, for evaluation and generation."""
    from pretrain.engine import Scorer

    model = blueprint(resolved, prepared.model).build(world.device)
    return Scorer(model, precision=instantiate(resolved["precision"]), world=world)


def build_evaluator(resolved: dict[str, Any], prepared: Prepared, *, batch_size: int | None = None) -> Evaluator:
    """``batch_size``: the training's, for ``evaluation.batch_size=auto``; ``None``: there is no training.

    Raises ``UserError`` for auto without one.
    """
    from pretrain.data.evaluation import evaluation_batches, first_tokens
    from pretrain.evaluation.perplexity import Domain, Evaluator

    policy = instantiate(resolved["evaluation"])
    scored = batch_size if policy.batch_size == "auto" else policy.batch_size
    if scored is None:
        raise UserError("evaluation.batch_size=auto is that of a training; here it needs a number")

    def domain(name: str, role: str, held_out: TokenView) -> Domain:
        batches = evaluation_batches(
            held_out,
            sequence_length=resolved["sequence_length"],
            batch_size=scored,
            document_mask=resolved["dataset"].get("document_mask", False),
            max_tokens=policy.max_tokens,
        )
        prompts = first_tokens(batches.view, policy.samples, policy.sample_prompt_tokens)
        return Domain(name, role, batches, batches.num_bytes, prompts)

    return Evaluator([domain(*d) for d in prepared.domains])


def build_sampler(resolved: dict[str, Any], prepared: Prepared, scorer: Scorer, evaluator: Evaluator) -> Sampler:
    """What continues the first tokens of the evaluated documents, and the user's own prompts.

    Raises ``UserError`` for a prompt longer than the model has positions.
    """
    from pretrain.evaluation.samples import Sampler, prompts_of

    policy, tokenizer = instantiate(resolved["evaluation"]), prepared.tokenizer
    prompts = prompts_of(evaluator.domains, policy, tokenizer, num_positions=scorer.model.num_positions)
    return Sampler(prompts, tokenizer, policy.sample_tokens)


def total_steps(resolved: dict[str, Any], prepared: Prepared) -> int:
    """``max_steps``, or as many whole global batches as ``number_epochs`` passes over the training tokens hold.

    Raises ``UserError`` when the text does not fill one global batch.
    """
    from pretrain.data.loader import check_enough

    sequences = (prepared.train.num_tokens - 1) // resolved["sequence_length"]
    check_enough(prepared.train, sequence_length=resolved["sequence_length"], global_batch=prepared.global_batch)
    return resolved["max_steps"] or max(1, int(sequences * resolved["number_epochs"] / prepared.global_batch))


def build_exporter(
    resolved: dict[str, Any], prepared: Prepared, engine: Engine, folder: Path, *, facts: dict[str, Any], steps: int
) -> Exporter:
    """What turns the weights of ``engine`` into Hugging Face folders of the run in ``folder``."""
    from pretrain.exporter import Exporter
    from pretrain.models.card import model_card

    policy, train = instantiate(resolved["checkpoint"]), prepared.train
    data = {"documents": train.num_documents, "tokens": train.num_tokens, "bytes": train.num_bytes}
    data |= {"global_batch": prepared.global_batch}
    return Exporter(
        engine,
        prepared.tokenizer,
        folder,
        when=policy.export,
        shard_size=policy.export_shard_size,
        save_dtype=prepared.model.save_dtype,
        card=partial(model_card, resolved, data=data, facts=facts, total_steps=steps),
    )


def build_schedule(resolved: dict[str, Any], steps: int) -> Schedule:
    warmup_steps = round(steps * resolved["warmup_proportion"])
    return partial(instantiate(resolved["scheduler"]), total_steps=steps, warmup_steps=warmup_steps)


def build_facts(
    resolved: dict[str, Any], engine: Engine, *, split: Split, setting: Setting, place: Place
) -> dict[str, Any]:
    """What stands in run.json and what rates are worked out from."""
    from pretrain.facts import run_facts, speed_facts

    peak = instantiate(resolved["telemetry"]).peak_flops
    facts = run_facts(resolved, engine.world, engine, restarts=place.restarts) | split.facts()
    return facts | speed_facts(resolved, engine, devices=setting.devices, peak=peak)


def build_listeners(
    resolved: dict[str, Any], folder: Path, files: Files
) -> tuple[list[Listener], Callable[[], list[Record]]]:
    """Who hears of the run's events, and what tells the records that belong into the next checkpoint. ``files``: of the
    training data, to be watched."""
    from pretrain.data.fingerprint import FilesWatch
    from pretrain.telemetry.monitor import Monitor
    from pretrain.telemetry.run_file import RunFile

    sinks = {name: instantiate(node) for name, node in (resolved.get("sink") or {}).items()}
    monitor = Monitor(sinks, run=folder, log_every=resolved["log_every"])
    return [monitor, RunFile(folder, monitor.summary), FilesWatch(files)], monitor.unsaved


def cadences(resolved: dict[str, Any], prepared: Prepared) -> tuple[int | None, int | None]:
    """After how many steps the run evaluates, and saves."""
    policy, kept = instantiate(resolved["evaluation"]), instantiate(resolved["checkpoint"])
    evaluate_every = resolved["evaluate_every"]
    if policy.per_epoch:
        sequences = (prepared.train.num_tokens - 1) // resolved["sequence_length"]
        evaluate_every = max(1, max(1, sequences // prepared.global_batch) // policy.per_epoch)
    return evaluate_every, evaluate_every if kept.with_evaluation else resolved["save_every"]


def build_loader(resolved: dict[str, Any], prepared: Prepared, split: Split, world: World) -> Loader:
    """This rank's share of the training documents; ``split``: of all its devices."""
    from pretrain.data.loader import Loader

    return Loader(
        prepared.train,
        sequence_length=resolved["sequence_length"],
        seed=resolved["seed"],
        batch_size=split.batch_size,
        accumulation=split.accumulation,
        rank=world.rank,
        world_size=world.size,
        document_mask=resolved["dataset"].get("document_mask", False),
        pin_memory=world.device.type == "cuda",
    )


def build_guard(resolved: dict[str, Any], prepared: Prepared, engine: Engine, loader: Loader, folder: Path) -> Guard:
    """The judge of every step; rank 0 writes quarantine.jsonl into ``folder``."""
    from pretrain.guard.guard import Guard
    from pretrain.guard.quarantine import Quarantine

    file = folder / "quarantine.jsonl" if engine.world.is_main else None
    return Guard(
        instantiate(resolved["guard"]),
        device=engine.world.device,
        quarantine=Quarantine(file, loader=loader, tokenizer=prepared.tokenizer),
        scaled=engine.scaler.is_enabled(),
    )


def build_split(
    resolved: dict[str, Any], prepared: Prepared, engine: Engine, *, setting: Setting, resume_from: Path | None
) -> Split:
    """What the config says, or for ``batch_size=auto`` what the run has done so far on such a device, or what fits."""
    import numpy as np

    from pretrain.auto_batch import choose, moment_bytes
    from pretrain.console import notice
    from pretrain.data.blocks import Blocks
    from pretrain.facts import device_name
    from pretrain.run_folder import recorded_batch_size

    asked, world = Split.asked(resolved), engine.world
    if resolved["batch_size"] != "auto":
        return asked
    blocks, length = Blocks(prepared.train, resolved["sequence_length"]), resolved["sequence_length"]

    def rows(size: int) -> Batch:
        indices = np.arange(size * setting.devices_per_worker)
        return blocks.batch(indices, document_mask=resolved["dataset"].get("document_mask", False))

    size = world.on_main(lambda: recorded_batch_size(resume_from, device=device_name(world.device)))
    if size is not None and asked.total % size == 0:
        split, why = asked.of(size), "as this run has had it so far"
    else:
        moments = moment_bytes(instantiate(resolved["optimizer"]), engine.model)
        split, why = choose(engine, rows, total=asked.total, sequence_length=length, moment_bytes=moments)
    notice(f"batch_size=auto: batch_size={split.batch_size} gradient_accumulation_steps={split.accumulation} ({why})")
    return split


def build_saver(resolved: dict[str, Any], store: Store, world: World, watchdog: Watchdog) -> Saver:
    from pretrain.checkpoint.saver import Saver

    timeout = instantiate(resolved["launch"]).timeout
    return Saver(store, world=world, background=store.policy.async_, timeout_seconds=timeout, alive=watchdog.pat)


def build_trainer(
    resolved: dict[str, Any],
    prepared: Prepared,
    folder: Path,
    store: Store,
    *,
    resume_from: Path | None,
    interrupt: Interrupt,
    setting: Setting,
    place: Place,
    world: World,
    watchdog: Watchdog,
) -> Trainer:
    from pretrain.checkpoint.rng import rng_state
    from pretrain.clock import StepClock
    from pretrain.data.census import Census
    from pretrain.layers import LayerWatch
    from pretrain.progress import Every
    from pretrain.trainer import Trainer

    steps = total_steps(resolved, prepared)
    engine = build_engine(resolved, prepared, setting, world)
    rng = rng_state()  # before anything is tried
    split = build_split(resolved, prepared, engine, setting=setting, resume_from=resume_from)
    micro_batch = split.batch_size * setting.devices_per_worker
    loader = build_loader(resolved, prepared, Split(micro_batch, split.accumulation), world)
    evaluate_every, save_every = cadences(resolved, prepared)
    evaluator = build_evaluator(resolved, prepared, batch_size=split.batch_size)
    facts = build_facts(resolved, engine, split=split, setting=setting, place=place)
    listeners, unsaved_records = (
        build_listeners(resolved, folder, prepared.train.store.files) if world.is_main else ([], list)
    )
    return Trainer(
        world=world,
        engine=engine,
        loader=loader,
        guard=build_guard(resolved, prepared, engine, loader, folder),
        schedule=build_schedule(resolved, steps),
        evaluator=evaluator,
        sampler=build_sampler(resolved, prepared, engine, evaluator),
        saver=build_saver(resolved, store, world, watchdog),
        interrupt=interrupt,
        identity=prepared.identity,
        rng=rng,
        total_steps=steps,
        micro_batch=micro_batch,
        grad_clip=resolved["grad_clip"],
        evaluate_every=Every(evaluate_every),
        save_every=Every(save_every),
        exporter=build_exporter(resolved, prepared, engine, folder, facts=facts, steps=steps),
        layers=LayerWatch(engine, Every(instantiate(resolved["telemetry"]).layers_every)),
        census=Census(loader),
        clock=StepClock(on_device=world.device.type == "cuda"),
        resume_from=resume_from,
        facts=facts,
        listeners=listeners,
        unsaved_records=unsaved_records,
        watchdog=watchdog,
    )
