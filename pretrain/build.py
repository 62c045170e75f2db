"""A resolved config → the objects of a run. The only place that calls Hydra's `instantiate`, and where parts meet.

`prepare` comes first and once: it checks the model folder and fills the token cache, before any training process exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from hydra.utils import instantiate as hydra_instantiate

from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.checkpoint.store import Store
    from pretrain.data.sources.base import Source
    from pretrain.data.store import TokenStore, TokenView
    from pretrain.engine import Engine, Scorer
    from pretrain.evaluation.perplexity import Domain, Evaluator
    from pretrain.interrupt import Interrupt
    from pretrain.run_folder import RunFolder
    from pretrain.trainer import Trainer
    from pretrain.world import World


def instantiate(node: dict[str, Any]) -> Any:
    return hydra_instantiate(node, _convert_="all")


@dataclass(frozen=True)
class Prepared:
    """What exists before the first process trains. ``domains``: name, role and held-out documents of each domain."""

    model: Any
    tokenizer: Any
    train: TokenView
    domains: list[tuple[str, str, TokenView]]
    identity: dict[str, Any]


def prepare(resolved: dict[str, Any]) -> Prepared:
    """Check the model's folder, get its tokenizer, and tokenize whatever the cache does not hold yet.

    Raises ``UserError`` for a model or data that can't be used.
    """
    from pretrain.data.tokenize import prepare as tokenize
    from pretrain.data.tokenize import training_texts

    model = instantiate(resolved["model"])
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
    identity = {
        "model": model.identity(),
        "tokenizer": xxhash.xxh3_64_hexdigest(tokenizer_json.encode()),
        "data": xxhash.xxh3_64_hexdigest(
            repr([[part.path.name for part in store.parts], view_options(source), source.document_mask]).encode()
        ),
        "sequence_length": resolved["sequence_length"],
        "global_batch": resolved["batch_size"] * resolved["gradient_accumulation_steps"],
        "seed": resolved["seed"],
        "weights": instantiate(resolved["precision"]).weights,
        "optimizer": [resolved["optimizer"].get(key) for key in ("_target_", "compensate")],
    }
    return Prepared(model, tokenizer, train, domains, identity)


def view_options(source: Source) -> dict[str, Any]:
    return {
        "held_out": source.held_out,
        "train_data_ratio": source.train_data_ratio,
        "deduplicate": source.deduplicate,
    }


def views(store: TokenStore, source: Source) -> tuple[TokenView, TokenView]:
    """The training and the held-out documents."""
    return store.views(**view_options(source))


def build_world(resolved: dict[str, Any]) -> World:
    from pretrain.checkpoint.rng import seed_everything
    from pretrain.world import one_process

    world = one_process()
    seed_everything(resolved["seed"])
    return world


def build_engine(resolved: dict[str, Any], prepared: Prepared, world: World) -> Engine:
    """Model and optimizer on this rank, by the strategy."""
    precision = instantiate(resolved["precision"])
    optimizer = instantiate(resolved["optimizer"])
    engine: Engine = instantiate(resolved["strategy"]).setup(
        partial(build_model, resolved, prepared, world),
        lambda model: optimizer(model.hf_named_parameters()),
        precision=precision,
        world=world,
    )
    return engine


def build_model(resolved: dict[str, Any], prepared: Prepared, world: World) -> Any:
    precision = instantiate(resolved["precision"])
    return prepared.model.build(param_dtype=precision.param_dtype, device=world.device, seed=resolved["seed"])


def build_scorer(resolved: dict[str, Any], prepared: Prepared, world: World) -> Scorer:
    """The model alone, for evaluation and generation."""
    from pretrain.engine import Scorer

    model = build_model(resolved, prepared, world)
    return Scorer(model, precision=instantiate(resolved["precision"]), world=world)


def build_evaluator(resolved: dict[str, Any], prepared: Prepared) -> Evaluator:
    from pretrain.data.loader import evaluation_batches
    from pretrain.evaluation.perplexity import Domain, Evaluator

    policy = instantiate(resolved["evaluation"])

    def domain(name: str, role: str, held_out: TokenView) -> Domain:
        scored = evaluation_batches(
            held_out,
            sequence_length=resolved["sequence_length"],
            batch_size=policy.batch_size,
            document_mask=resolved["dataset"].get("document_mask", False),
            max_tokens=policy.max_tokens,
        )
        return Domain(name, role, lambda: scored, scored.num_bytes, len(scored))

    return Evaluator([domain(*d) for d in prepared.domains])


def total_steps(resolved: dict[str, Any], prepared: Prepared) -> int:
    """``max_steps``, or as many whole global batches as ``number_epochs`` passes over the training tokens hold.

    Raises ``UserError`` when the text does not fill one global batch.
    """
    from pretrain.data.loader import check_enough

    sequences = (prepared.train.num_tokens - 1) // resolved["sequence_length"]
    global_batch = prepared.identity["global_batch"]
    check_enough(prepared.train, sequence_length=resolved["sequence_length"], global_batch=global_batch)
    return resolved["max_steps"] or max(1, int(sequences * resolved["number_epochs"] / global_batch))


def export(prepared: Prepared, engine: Engine, path: Path) -> Path:
    """Write the model as a Hugging Face folder, whole or not at all."""
    from pretrain.checkpoint.atomic import whole_folder

    try:
        with whole_folder(path, marker=False) as fresh:
            prepared.model.save(engine.model, prepared.tokenizer, fresh)
    except OSError as error:
        raise UserError(f"{path} could not be written: {error}; the last checkpoint is good") from error
    return path


def build_trainer(
    resolved: dict[str, Any],
    prepared: Prepared,
    folder: RunFolder,
    store: Store,
    *,
    resume_from: Path | None,
    config_yaml: str,
    interrupt: Interrupt,
) -> Trainer:
    from pretrain.checkpoint.rng import rng_state
    from pretrain.data.loader import Loader
    from pretrain.facts import run_facts
    from pretrain.progress import Every
    from pretrain.telemetry.monitor import Monitor
    from pretrain.telemetry.run_file import RunFile
    from pretrain.trainer import Trainer

    steps = total_steps(resolved, prepared)
    world = build_world(resolved)
    engine = build_engine(resolved, prepared, world)
    loader = Loader(
        prepared.train,
        sequence_length=resolved["sequence_length"],
        seed=resolved["seed"],
        batch_size=resolved["batch_size"],
        accumulation=resolved["gradient_accumulation_steps"],
        rank=world.rank,
        world_size=world.size,
        document_mask=resolved["dataset"].get("document_mask", False),
        pin_memory=world.device.type == "cuda",
    )
    sequences = (prepared.train.num_tokens - 1) // resolved["sequence_length"]
    per_epoch = max(1, sequences // prepared.identity["global_batch"])
    policy, kept = instantiate(resolved["evaluation"]), instantiate(resolved["checkpoint"])
    evaluate_every = resolved["evaluate_every"]
    if policy.per_epoch:
        evaluate_every = max(1, per_epoch // policy.per_epoch)
    sinks = {name: instantiate(node) for name, node in (resolved.get("sink") or {}).items()}
    return Trainer(
        world=world,
        engine=engine,
        loader=loader,
        schedule=partial(
            instantiate(resolved["scheduler"]),
            total_steps=steps,
            warmup_steps=round(steps * resolved["warmup_proportion"]),
        ),
        evaluator=build_evaluator(resolved, prepared),
        store=store,
        interrupt=interrupt,
        config_yaml=config_yaml,
        identity=prepared.identity,
        rng=rng_state(),
        total_steps=steps,
        batch_size=resolved["batch_size"],
        grad_clip=resolved["grad_clip"],
        evaluate_every=Every(evaluate_every),
        save_every=Every(evaluate_every if kept.with_evaluation else resolved["save_every"]),
        export=partial(export, prepared, engine, folder.path / "model"),
        resume_from=resume_from,
        facts=run_facts(resolved, world, engine),
        listeners=[Monitor(sinks, run=folder.path, log_every=resolved["log_every"]), RunFile(folder.path)],
    )
