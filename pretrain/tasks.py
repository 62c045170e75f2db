"""What `task=` names. Each task takes the resolved config and returns the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pretrain import build
from pretrain.console import log_error, notice
from pretrain.errors import UserError
from pretrain.interrupt import EXIT_CODE, Interrupt


def pretraining(resolved: dict[str, Any], overrides: list[str], interrupt: Interrupt) -> int:
    """Continue the run in output_dir, or start it."""
    from pretrain.checkpoint.store import Store
    from pretrain.events import RunFinished
    from pretrain.run_folder import check_finished_run, check_same_run, claim, resume_point, step_of
    from pretrain.telemetry.run_file import read_run_file

    prepared = build.prepare(resolved)
    steps = build.total_steps(resolved, prepared)
    folder = claim(resolved["output_dir"], start_over=resolved["resume"] == "never")
    store = Store(folder.store_folder, build.instantiate(resolved["checkpoint"]).keep_last)
    resume_from = resume_point(folder, store, resolved["resume"])
    facts = read_run_file(folder.path)
    if resume_from is not None:
        check_same_run(resume_from, prepared.identity, resolved)
        store.set_aside_after(step_of(resume_from))
    if resume_from is not None and step_of(resume_from) >= steps and facts.get("status") == "finished":
        check_finished_run(folder, resolved)
        notice(f"{folder.path} is finished: {facts['steps']} steps; model in {facts['model']}")
        notice("to train longer raise max_steps or number_epochs; to start over add resume=never")
        return 0
    trainer = build.build_trainer(
        resolved,
        prepared,
        folder,
        store,
        resume_from=resume_from,
        config_yaml=folder.write_config(resolved, overrides),
        interrupt=interrupt,
    )
    interrupt.patient = True
    try:
        progress = trainer.run()
    except BaseException:
        log_error(f"failed at step {trainer.progress.step}")
        trainer.emit(RunFinished(trainer.progress.step, "failed", trainer.progress.tokens))
        raise
    return 0 if progress.step >= trainer.total_steps else EXIT_CODE


def tokenization(resolved: dict[str, Any], overrides: list[str], interrupt: Interrupt) -> int:
    """Fill the token cache and say what is in it."""
    prepared = build.prepare(resolved)
    rows = [("training", prepared.train)] + [
        (f"held out, {name} ({role})", view) for name, role, view in prepared.domains
    ]
    for name, view in rows:
        print(f"{name}: {view.num_tokens:,} tokens, {view.num_documents:,} documents, {view.num_bytes:,} bytes of text")
    print(f"cache: {prepared.train.store.path.parent.parent}")
    return 0


def evaluation(resolved: dict[str, Any], overrides: list[str], interrupt: Interrupt) -> int:
    """Score the model on the held-out documents of every configured domain."""
    from pretrain.events import Evaluated, Event, RunFinished, RunStarted
    from pretrain.facts import run_facts
    from pretrain.run_folder import claim
    from pretrain.telemetry.monitor import Monitor
    from pretrain.telemetry.run_file import RunFile

    prepared = build.prepare(resolved)
    folder = claim(resolved["output_dir"], start_over=False)
    if folder.store_folder.exists():
        raise UserError(
            f"output_dir={folder.path} holds a pretraining run; choose another output_dir for the evaluation"
        )
    folder.write_config(resolved, overrides)
    world = build.build_world(resolved)
    scorer = build.build_scorer(resolved, prepared, world)
    sinks = {name: build.instantiate(node) for name, node in (resolved.get("sink") or {}).items()}
    listeners: list[Callable[[Event], None]] = [Monitor(sinks, run=folder.path, log_every=1), RunFile(folder.path)]
    events: list[Event] = [
        RunStarted(0, 0, resumed=False, facts=run_facts(resolved, world, scorer)),
        Evaluated(0, tuple(build.build_evaluator(resolved, prepared).run(scorer)), 0.0),
        RunFinished(0, "finished", 0),
    ]
    for event in events:
        for listener in listeners:
            listener(event)
    return 0


def generation(resolved: dict[str, Any], overrides: list[str], interrupt: Interrupt) -> int:
    """Print the model's continuation of each prompt; keep them in samples.jsonl."""
    from pretrain.models.generate import generate
    from pretrain.run_folder import claim

    asked = build.instantiate(resolved["generation"])
    folder = claim(resolved["output_dir"], start_over=False).path
    model = build.instantiate(resolved["model"])
    model.check(resolved["sequence_length"])
    world = build.build_world(resolved)
    precision = build.instantiate(resolved["precision"])
    tokenizer = model.tokenizer(None)
    language_model = model.build(param_dtype=precision.param_dtype, device=world.device, seed=resolved["seed"])
    prompts = [prompt for prompt in asked.prompts for _ in range(asked.num_samples)]
    texts = generate(
        language_model,
        tokenizer,
        prompts,
        max_new_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=resolved["seed"],
    )
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for prompt, text in zip(prompts, texts, strict=True):
            file.write(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
            print(f"─── {prompt!r}\n{prompt}{text}")
    return 0


Task = Callable[[dict[str, Any], list[str], Interrupt], int]
TASKS: dict[str, Task] = {
    "pretraining": pretraining,
    "tokenization": tokenization,
    "evaluation": evaluation,
    "generation": generation,
}
