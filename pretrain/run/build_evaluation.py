"""Build the evaluation of a run from its config and its prepared data: the domains, the samples, and when they are due."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.run.prepare import Prepared
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.data.store.token_store import TokenView
    from pretrain.evaluation.evaluation import Evaluation
    from pretrain.evaluation.in_context import InContextProbe
    from pretrain.evaluation.perplexity import Domain, Evaluator
    from pretrain.evaluation.samples import Sampler
    from pretrain.evaluation.task import EvaluationTask
    from pretrain.strategy.engine import Engine, InferenceEngine
    from pretrain.telemetry.interval import Interval
    from pretrain.training.hooks import Hooks


def build_evaluator(config: RunConfig, prepared: Prepared, *, batch_size: int | None = None) -> Evaluator:
    """Return the evaluator of all configured domains.

    Args:
        batch_size: The training micro-batch, used for ``evaluation.batch_size=auto``; ``None`` outside a training run.

    Raises:
        UserError: ``evaluation.batch_size`` is auto and there is no training run.
    """
    from pretrain.data.evaluation import evaluation_batches, first_tokens
    from pretrain.evaluation.base_states import BaseStates
    from pretrain.evaluation.perplexity import Domain, Evaluator

    for line in prepared.notices:
        notice(line)
    policy = config.evaluation
    rows_scored = rows_per_batch(config, batch_size)
    settings = {
        "sequence_length": config.sequence_length,
        "document_mask": config.dataset.document_mask,
        "tokenizer": prepared.identity["tokenizer"],
        "precision": config.precision.name,
    }

    def domain(name: str, role: str, held_out: TokenView) -> Domain:
        batches = evaluation_batches(
            held_out,
            sequence_length=config.sequence_length,
            batch_size=rows_scored,
            document_mask=config.dataset.document_mask,
            max_tokens=policy.max_tokens,
        )
        prompts = first_tokens(batches.view, policy.samples, policy.sample_prompt_tokens)
        return Domain(name, role, batches, prompts, settings)

    probe = build_probe(config, prepared, rows_scored) if policy.in_context else None
    return Evaluator([domain(*d) for d in prepared.domains], probe, BaseStates(policy.kl_tokens))


def build_probe(config: RunConfig, prepared: Prepared, batch_size: int) -> InContextProbe | None:
    """Return the probe of in-context learning; ``None`` if sequences or vocabulary are too short for it."""
    from pretrain.evaluation.in_context import in_context_probe

    tokenizer = prepared.tokenizer
    return in_context_probe(
        vocabulary=len(tokenizer),
        excluded=tokenizer.all_special_ids,
        start=prepared.boundaries.first,
        sequence_length=config.sequence_length,
        batch_size=batch_size,
    )


def build_sampler(config: RunConfig, prepared: Prepared, scorer: InferenceEngine, evaluator: Evaluator) -> Sampler:
    """Return the sampler that generates continuations of the first tokens of held-out documents and of the user's prompts.

    Raises ``UserError`` for a prompt longer than the model's number of positions.
    """
    from pretrain.evaluation.samples import Sampler, prompts_of

    policy, tokenizer = config.evaluation, prepared.tokenizer
    boundary_tokens, positions = prepared.boundaries, scorer.model.num_positions
    prompts = prompts_of(evaluator.domains, policy, tokenizer, first=boundary_tokens.first, num_positions=positions)
    return Sampler(prompts, tokenizer, policy.sample_tokens, separator=boundary_tokens.separator)


def build_evaluation(
    config: RunConfig,
    prepared: Prepared,
    engine: Engine,
    batch_size: int,
    every: Interval,
    hooks: Hooks,
) -> Evaluation:
    """Return what the run evaluates. ``batch_size`` is the training micro-batch, used for ``evaluation.batch_size=auto``. The
    averages of ``hooks`` are scored beside the weights.

    The scores of the untouched model (the model before training) depend on the model, and on the seed where the initial
    weights are random.
    """
    from pretrain.evaluation.evaluation import Evaluation
    from pretrain.evaluation.untouched import Untouched
    from pretrain.training.averages import ScoreAverages

    random_weights = prepared.model.weights() is None or bool(config.transforms)
    weights_follow_from = ("model", "seed") if random_weights else ("model",)
    evaluator = build_evaluator(config, prepared, batch_size=batch_size)
    untouched = Untouched(evaluator, weights_follow_from, is_there=not prepared.base_gone)
    sampler = build_sampler(config, prepared, engine, evaluator)
    tasks = build_tasks(config, prepared, batch_size)
    for name, hook in hooks.items():
        if hasattr(hook, "averages"):
            tasks[f"hook.{name}"] = ScoreAverages(partial(hook.averages, "evaluate"), evaluator)
    return Evaluation(untouched, sampler, every, tasks)


def build_tasks(config: RunConfig, prepared: Prepared, batch_size: int | None = None) -> dict[str, EvaluationTask]:
    """Return the evaluation tasks: files of questions and the harness by their keys, and those of the user by name. For
    ``batch_size`` see `build_evaluator`.

    Raises ``UserError`` for questions that can't be read, and for the harness without its package or with a task that it lacks.
    """
    from pretrain.evaluation.questions import Questions, read_questions

    policy, tokens = config.evaluation, prepared.boundaries
    rows = rows_per_batch(config, batch_size)
    found: dict[str, EvaluationTask] = {}
    for name, file in policy.questions.items():
        found[f"evaluation.questions.{name}"] = Questions(
            name, read_questions(name, Path(file)), prepared.tokenizer, tokens.first, rows
        )
    harness = policy.lm_eval.task(prepared.tokenizer, bos=tokens.bos, separator=tokens.separator, batch_size=rows)
    if harness is not None:
        found["evaluation.lm_eval"] = harness
    return found | policy.tasks


def rows_per_batch(config: RunConfig, batch_size: int | None) -> int:
    """Return the sequences in a forward of an evaluation. ``batch_size`` is the training micro-batch, ``None`` outside a training
    run.

    Raises ``UserError`` if ``evaluation.batch_size`` is auto and there is no training run.
    """
    rows = batch_size if config.evaluation.batch_size == "auto" else config.evaluation.batch_size
    if rows is None:
        raise UserError("evaluation.batch_size=auto is the batch_size of a training run; this task needs a number")
    return rows
