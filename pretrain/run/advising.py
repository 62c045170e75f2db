"""`task=advise`: the planned run is looked at, short runs are made within a budget, and a recipe is written."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pretrain.advise import rate, share
from pretrain.advise.advice import recipe_of, record
from pretrain.advise.budget import FORWARD, LORA, Allotment, Planned, allot
from pretrain.advise.found import Found
from pretrain.advise.length import Length, predict
from pretrain.advise.page import advice_page
from pretrain.advise.probes import Measured, Probe, ProbeFailed, Probes, ProbeSweep, words_of_probes
from pretrain.advise.recipe import Recipe
from pretrain.config.schema import RunConfig
from pretrain.optim.learning_rate import peak_lr
from pretrain.optim.learning_rate import rate as learning_rate
from pretrain.run.advise_look import look_at
from pretrain.run.advise_means import try_batches, try_means
from pretrain.run.advise_scores import ScoreCache, Scores, ScoringModel
from pretrain.run.advise_share import check_share, choose_share
from pretrain.run.prepare import Prepared, prepare
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import own_folder, replace_file
from pretrain.sweep.job import digest
from pretrain.telemetry.record import json_safe
from pretrain.telemetry.run_file import write_json


@dataclass(frozen=True)
class Weights:
    """The weights of a model in files, and its name in scores.json."""

    name: str
    files: Any


class Advising:
    """One advice, from the config of the planned run to its recipe."""

    def __init__(
        self, config: RunConfig, overrides: Sequence[str], folder: Path, *, devices: int, config_dir: str | None
    ) -> None:
        self.asked, self.config_dir, self.folder = config.advise, config_dir, folder
        self.config = RunConfig.of(config.plain | {"task": "pretraining"})
        if hasattr(config.model, "train_tokenizer"):
            raise UserError(
                "task=advise: model=scratch starts from random weights, which can't forget; it needs a model"
            )
        self.can_add_lora = not config.transforms and find_spec("peft") is not None
        self.prepared: Prepared = prepare(self.config, devices=devices)
        self.devices = devices
        self.words = words_of_probes(overrides)
        self.overrides = list(overrides)
        self.found = Found()
        self.prior = 0.0  # learning rate around which others are tried
        self.rate_runs: list[Measured] = []
        self.domains = {name: role for name, role, _ in self.prepared.domains}
        self._check_domains()
        self.planned = self._planned()
        self.allotment: Allotment = allot(self.planned, self.asked)
        self.probes = self._probes()
        self.cache = ScoreCache(folder / "scores.json", self._identity())
        self.base: dict[str, Scores] = {}
        self.share_of: Callable[..., share.ShareChoice]  # chooses the share again, with other intervals
        self.config = self._scored_config()

    def _check_domains(self) -> None:
        """Raise ``UserError`` where probes would measure no gain."""
        if {"lr", "share"} & set(self.asked.steps) and "new" not in self.domains.values():
            raise UserError(
                f"task=advise: dataset.held_out={self.config.plain['dataset'].get('held_out', 0):g}: no new text is held out, so "
                "no probe can measure a gain; set a dataset.held_out above 0, for example 0.05"
            )

    def _planned(self) -> Planned:
        config, prepared = self.config, self.prepared
        limit = config.evaluation.max_tokens
        held_out = {name: min(view.num_tokens, limit or view.num_tokens) for name, _, view in prepared.domains}
        transforms = set(config.plain.get("transform") or {})
        trained = LORA if "lora" in transforms else 1.0
        return Planned(
            prepared.total_steps,
            prepared.global_batch * config.sequence_length,
            held_out,
            trained,
            "base" in self.domains.values() and "new" in self.domains.values(),
            LORA if self.can_add_lora else trained,
            {name: view.limited(1).num_tokens for name, _, view in prepared.domains},
        )

    def _probes(self) -> Probes:
        words = [word for word in self.overrides if not word.lstrip("+").startswith("advise.predicted=")]
        sweep = ProbeSweep(
            folder=self.folder / "probes" / digest([json.dumps(self._identity(), sort_keys=True)]),
            keys=("lr", "replay.share", "transform", "objective", "gradient_accumulation_steps", "max_steps"),
            metric="new_loss",
            direction="minimize",
            command=tuple(word.removeprefix("++") for word in words),
            began_at=time.time(),
            config_dir=self.config_dir,
        )
        own = self.config.plain["evaluation"]
        without = tuple(f"~evaluation.{kind}.{name}" for kind in ("tasks", "questions") for name in own[kind])
        return Probes(sweep, self.words, self.planned, self.allotment, without=without)

    def _scored_config(self) -> RunConfig:
        """Return the config of scores in this process: the text that the probes score, nothing else."""
        plain = self.config.plain
        evaluation = plain["evaluation"] | {"max_tokens": self.allotment.scored, "kl_tokens": 0, "in_context": False}
        rows = self.config.micro_batch_size if evaluation["batch_size"] == "auto" else evaluation["batch_size"]
        return RunConfig.of(
            plain | {"evaluation": evaluation | {"batch_size": rows, "samples": 0, "sample_prompts": []}}
        )

    def _identity(self) -> dict[str, Any]:
        held_out = {name: [view.num_tokens, view.num_documents] for name, _, view in self.prepared.domains}
        return {
            **{key: self.prepared.identity[key] for key in ("model", "tokenizer", "data", "sequence_length")},
            "held_out": held_out,
            "scored": self.allotment.scored,
            "precision": self.config.precision.name,
        }

    def run(self) -> Found:
        """Do the steps of ``advise.steps`` and return what was found.

        Raises:
            Stopped: A stop signal; the same command continues.
            UserError: A mistake, or a probe that failed.
        """
        steps, found = self.asked.steps, self.found
        self._score_base()
        parameters = int(self.prepared.model.num_parameters())
        found.lr = self.prior = self._prior_lr(parameters)
        if "look" in steps:
            found.look = look_at(
                self.prepared, self.base, parameters=parameters, epochs=self._epochs(), scored=self.allotment.scored
            )
            for line in found.look.warnings:
                notice(f"WARNING: {line}")
        found.replay = self.config.replay.share if self.planned.has_old_text else None
        trains = self._first_probes()
        self.probes.check(trains, self.config_dir)
        if self.allotment.share_probes:
            choose_share(self, trains[-2:])
        elif "share" in steps:
            found.notes.append("There is no old text to replay, so the replay share was not tried.")
        if self.allotment.rates:
            self._choose_rate()
        check_share(self)
        if "length" in steps and (self.rate_runs or found.checks):
            found.length = self._length()
            for line in found.length.warnings:
                notice(f"WARNING: {line}")
                found.notes.append(line)
        if "batch" in steps:
            found.batch = try_batches(self)
        if "means" in steps:
            found.means = try_means(self)
        return found

    def attempt(self, probe: Probe) -> Measured | None:
        """Run a probe; where it fails, note why and return ``None``: an advice without it is worth more than none."""
        try:
            return self.probes.run(probe)
        except ProbeFailed as failed:
            note = f"{failed}"
            if note not in self.found.notes:
                self.found.notes.append(note)
            return None

    def nearest(self) -> Measured | None:
        """Return the full run whose settings are nearest to the chosen ones; ``None`` where there is none."""
        full = [run for run in self.probes.measured.values() if run.probe.kind in ("lr", "check") and not run.diverged]

        def distance(run: Measured) -> tuple[float, float]:
            share = abs((run.probe.share or 0.0) - (self.found.replay or 0.0))
            return share, abs(math.log(run.probe.lr / self.found.lr))

        return min(full, key=distance, default=None)

    def _length(self) -> Length:
        plain = self.config.plain | {"lr": self.found.lr}

        def schedule(steps: int) -> list[float] | None:
            rates = [learning_rate(plain, total_steps=steps, step=step) for step in range(steps)]
            return None if None in rates else [float(value) for value in rates if value is not None]

        return predict(self.rate_runs, schedule, steps=self.planned.steps, roles=self.domains, limit=self.asked.limit)

    def _first_probes(self) -> list[Probe]:
        """Return probes whose settings are known from the start: one learning rate, and the two of the share."""
        found = []
        if self.allotment.rates:
            found.append(self.full(self.found.lr, self.found.replay or None, "lr"))
        if self.allotment.share_probes:
            found += [self._lora(1 - share.PROBED[1]), self._lora(1 - share.PROBED[0])]
        return found

    def full(self, lr: float, replay: float | None, kind: str) -> Probe:
        keeps = lr == self.prior or (kind == "lr" and self._merges())
        return Probe(
            kind, lr, replay, self.allotment.steps, self.planned.trained, tuple(self._repeats()), keeps_model=keeps
        )

    def _lora(self, replay: float) -> Probe:
        more: tuple[str, ...]
        if self.can_add_lora:
            lr, more = share.LORA_LR * self.prior, ("transform=[lora]",)
        else:
            lr, more = self.prior, ()
        return Probe(
            "share", lr, replay, self.allotment.steps, self.planned.probe_trained, (*more, *self._repeats()), True
        )

    def _repeats(self) -> list[str]:
        """Return the words with which a probe repeats the text as often as the planned run does."""
        part = next((part for part in self.prepared.train.parts if not part.replay), None)
        if part is None or self._epochs() <= 1 or len(self.config.dataset.sources()) > 1:
            return []
        ratio = self.config.plain["dataset"]["train_data_ratio"] * self.allotment.steps / self.planned.steps
        return [f"dataset.train_data_ratio={max(ratio, 1e-6):.6g}"]

    def _epochs(self) -> float:
        """Return how often the planned run reads the new text."""
        tokens = sum(part.view.num_tokens for part in self.prepared.train.parts if not part.replay)
        new = self.planned.steps * self.planned.tokens_per_step * (1 - self.config.replay.share)
        return new / max(tokens, 1)

    def _score_base(self) -> None:
        known = self.cache.get("base")
        if known is None:
            scorer = ScoringModel(self.config, self.prepared)
            known = self.cache.put("base", scorer.scores())
            scorer.close()
        self.base = known
        self._spend(known)

    def _spend(self, scores: dict[str, Scores]) -> None:
        """Count the cost of scores, also of those that an earlier command has made."""
        self.probes.spent += FORWARD * sum(one.tokens for one in scores.values())

    def _prior_lr(self, parameters: int) -> float:
        if self.config.lr != "auto":
            return float(self.config.lr)
        return float(getattr(self.config.optimizer, "peak_lr", peak_lr)(parameters))

    def between(self, first: Any, run: Measured, weights: Sequence[float]) -> list[dict[str, Scores]]:
        """Score (1 - weight) × first + weight × the model of ``run``; ``first`` are the weights in files of the same model."""
        names = [f"{first.name} → {run.folder.name}: {weight:g}" for weight in weights]
        known = [self.cache.get(name) for name in names]
        if not all(known):
            scorer, files = self._scorer_of(run), self.model_of(run).weights()
            notice(f"scoring {len(weights)} models between {first.name} and {run.folder.name}")
            for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
                known[i] = self.cache.put(name, scorer.between(first.files, files, weight))
            scorer.close()
        found = [scores for scores in known if scores is not None]
        for scores in found:
            self._spend(scores)
        return found

    def base_is_readable(self, run: Measured) -> bool:
        """Return whether the files of the base model have the names that ``run`` exports; some architectures convert them."""
        return bool(self.prepared.model.weights().keys() >= self.model_of(run).weights().keys())

    def weights_of(self, run: Measured) -> Weights:
        return Weights(run.folder.name, self.model_of(run).weights())

    def base_files(self) -> Weights:
        return Weights("the base model", self.prepared.model.weights())

    def _scorer_of(self, run: Measured) -> ScoringModel:
        """Return a scorer with the model of a probe: that of the command with other weights."""
        config = RunConfig.of(self.config.plain | {"transform": {}})
        return ScoringModel(config, replace(self.prepared, model=self.model_of(run), transforms=()))

    def model_of(self, run: Measured) -> Any:
        return replace(self.prepared.model, name_or_path=str(run.folder / "model"), tokenizer_name=None)

    def errors_of(self, scores: dict[str, Scores]) -> dict[str, float]:
        """Return the standard error of the mean change of each role from the base model."""
        found = {}
        for role in ("new", "base"):
            errors = [one.change_error(self.base[name]) for name, one in scores.items() if one.role == role]
            if errors and None not in errors:
                found[role] = sum(e**2 for e in errors if e is not None) ** 0.5 / len(errors)
        return found

    def _choose_rate(self) -> None:
        rates = rate.rates_around(self.prior, self.allotment.rates)
        replay = self.found.replay
        self.probes.check([self.full(lr, replay, "lr") for lr in rates], self.config_dir)
        tried = [self.attempt(self.full(lr, replay, "lr")) for lr in rates]
        runs = self.rate_runs = [run for run in tried if run is not None]
        if not runs:
            raise UserError(f"task=advise: no probe of a learning rate has finished: {self.found.notes[-1]}")
        errors = self.found.errors
        if not errors:
            kept = next((run for run in runs if run.probe.keeps_model and not run.diverged), None)
            errors = {} if kept is None else self.errors_of(self._scores_of(kept))
            self.found.errors |= errors
        self.found.rate = rate.choose(
            runs,
            max_forgetting=self.asked.max_forgetting,
            gain_error=errors.get("new", 0.0),
            forgetting_error=errors.get("base", 0.0),
        )
        self.found.lr = self.found.rate.lr

    def _scores_of(self, run: Measured) -> dict[str, Scores]:
        known = self.cache.get(run.folder.name)
        if known is None:
            scorer = self._scorer_of(run)
            known = self.cache.put(run.folder.name, scorer.scores())
            scorer.close()
        self._spend(known)
        return known

    def _merges(self) -> bool:
        """Return whether the models of the learning rates may be merged with the base model."""
        return "means" in self.asked.steps and self.asked.max_forgetting is not None


def write(advising: Advising, found: Found) -> tuple[Recipe, list[str]]:
    """Write advice.json, advice.html and experiment/advised.yaml into the folder of an advice. Return the recipe and the
    commands of the run: with its words, and with the experiment."""
    folder = advising.folder
    nearest = advising.nearest()
    if advising.probes.measured:
        advising.probes.sweep.write_table("finished")
    recipe = recipe_of(found, advising.probes, advising.domains, nearest)
    words = [word.removeprefix("++") for word in advising.overrides]
    kept = [word for word in words if word.partition("=")[0].split(".")[0] not in ("task", "output_dir", "advise")]
    config_dir = [] if advising.config_dir is None else ["--config-dir", advising.config_dir]
    command = recipe.command([*config_dir, *kept])
    content = json_safe(record(found, advising.probes, recipe, command))
    write_json(folder / "advice.json", content)
    replace_file(folder / "advice.html", advice_page(content, title=f"Advice: {advising.config.name}"))
    replace_file(own_folder(folder / "experiment") / "advised.yaml", recipe.yaml(command))
    other = recipe.experiment_command([*config_dir, *kept], str(folder))
    return recipe, [command] if other is None else [command, other]
