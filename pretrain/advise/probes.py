"""The probes of ``task=advise``: ordinary runs, each a job of a sweep in ``probes/``, so that the same command does not repeat
those that are finished. Another model, tokenizer or text has another sweep."""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.advise.budget import Allotment, Planned, run_cost
from pretrain.config.compose import run_config
from pretrain.config.yaml_file import read_yaml
from pretrain.optim.learning_rate import rate
from pretrain.runtime.errors import UserError
from pretrain.sweep.job import SweepJob
from pretrain.sweep.jobs import Sweep, run_job
from pretrain.sweep.measure import measures_of, records_of
from pretrain.telemetry.history import mean

KEYS = (
    "lr",
    "replay.share",
    "transform",
    "objective",
    "gradient_accumulation_steps",
    "max_steps",
)  # name a probe's folder
NOT_OF_A_PROBE = (  # keys of the command that do not reach the probes, or that a probe sets itself
    *("task", "output_dir", "name", "resume", "resume_allow", "sweep_dir", "max_steps", "number_epochs", "lr"),
    *("evaluate_every", "log_every", "sink", "hydra.mode"),
)
GROUPS_NOT_OF_A_PROBE = ("advise", "sweep", "generation", "merge", "stop_when", "sink")
NUMBER = "{:.4g}"


class ProbeFailed(UserError):
    """A probe started and did not finish."""


@dataclass(frozen=True)
class Probe:
    """A short run.

    Attributes:
        kind: lr · share · check · means · batch.
        lr: Peak learning rate.
        share: Replay share; ``None`` without replay.
        steps: Optimizer steps.
        trained: Cost of a trained token, 1 for full fine-tuning.
        more: Further words of its command.
        keeps_model: Whether its final model is read.
    """

    kind: str
    lr: float
    share: float | None
    steps: int
    trained: float = 1.0
    more: tuple[str, ...] = ()
    keeps_model: bool = False

    @property
    def name(self) -> str:
        """Return what people read: its learning rate and its share of old text."""
        share = "" if self.share is None else f", replay {self.share:.0%}"
        return f"lr {NUMBER.format(self.lr)}{share}" + "".join(f", {word}" for word in self.more)


@dataclass(frozen=True)
class Measured:
    """What a probe has measured.

    Attributes:
        probe: The probe.
        folder: Its run folder.
        losses: For each domain, steps and losses of its evaluations, step 0 included.
        roles: The role of each domain.
        lrs: The learning rate of every step; empty where the schedule is not one of this package.
        cost: Its cost in trained tokens, with its evaluations.
        seconds: Its run time.
    """

    probe: Probe
    folder: Path
    losses: dict[str, tuple[list[int], list[float]]]
    roles: dict[str, str]
    lrs: list[float]
    cost: float
    seconds: float

    def change(self, role: str) -> float | None:
        """Return the mean change of the loss on the domains of a role; ``None`` where there is none."""
        changes = [ys[-1] - ys[0] for name, (_, ys) in self.losses.items() if self.roles[name] == role]
        return mean(changes) if changes else None

    @property
    def gain(self) -> float:
        return -(self.change("new") or 0.0)

    @property
    def forgetting(self) -> float:
        """Return the increase of the loss on the base domains; 0 where there are none."""
        return self.change("base") or 0.0

    @property
    def diverged(self) -> bool:
        return not self.losses

    def row(self, planned: Planned) -> dict[str, Any]:
        """Return the probe for advice.json."""
        return {
            "kind": self.probe.kind,
            "name": self.probe.name,
            "lr": self.probe.lr,
            "replay_share": self.probe.share,
            "steps": self.probe.steps,
            "words": list(self.probe.more),
            "gain": None if self.diverged else self.gain,
            "forgetting": None if self.diverged else self.change("base"),
            "losses": {name: {"steps": xs, "losses": ys} for name, (xs, ys) in self.losses.items()},
            "cost": self.cost / planned.cost,
            "seconds": self.seconds,
            "link": f"probes/{self.folder.parent.name}/{self.folder.name}/report.html",
        }


@dataclass(frozen=True)
class ProbeSweep(Sweep):
    """The sweep of the probes. It is resumed by the command of ``task=advise``."""

    @property
    def command_line(self) -> str:
        return shlex.join(["python", "-m", "pretrain", *self.command])


def words_of_probes(overrides: Sequence[str]) -> list[str]:
    """Return the words of the command that every probe shares."""
    found = []
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~")
        if key in NOT_OF_A_PROBE or key.split(".")[0] in GROUPS_NOT_OF_A_PROBE:
            continue
        found.append(word.removeprefix("++"))
    return found


@dataclass
class Probes:
    """Runs probes within a budget.

    Attributes:
        sweep: The folder and the command.
        words: The words that all probes share.
        planned: The planned run.
        allotment: How the budget is divided.
        spent: Cost of what was run and scored so far.
        measured: The finished probes by their words, in order.
        without: Words that take away what the planned run has and a probe has not.
    """

    sweep: ProbeSweep
    words: list[str]
    planned: Planned
    allotment: Allotment
    spent: float = 0.0
    measured: dict[tuple[str, ...], Measured] = field(default_factory=dict)
    without: tuple[str, ...] = ()

    def overrides(self, probe: Probe) -> list[str]:
        """Return the words of the command of a probe."""
        every = math.ceil(probe.steps / self.allotment.evaluations)
        own = {
            "task": "pretraining",
            "max_steps": probe.steps,
            "lr": NUMBER.format(probe.lr),
            "evaluate_every": every,
            "log_every": max(1, probe.steps // 20),
            "evaluation.max_tokens": self.allotment.scored,
            "evaluation.per_epoch": "null",
            "evaluation.samples": 0,
            "evaluation.in_context": "false",
            "evaluation.kl_tokens": 0,
            "checkpoint.export": "end" if probe.keeps_model else "never",
            "checkpoint.keep_best": "null",
            "checkpoint.push_to_hub": "null",
            "sink": "[jsonl,report]",
            "evaluation.lm_eval.tasks": "[]",
            "guard.nonfinite": "skip",  # a rate that diverges is a result, not a failure
            "guard.max_skips_in_a_row": probe.steps,
            "guard.spike": "ignore",
        }
        if probe.keeps_model:
            own["model.save_dtype"] = "float32"  # small changes would be lost in 16 bits
        if probe.share is not None:
            own["replay.share"] = NUMBER.format(probe.share)
        mine = {*own, *(word.partition("=")[0] for word in probe.more)}
        shared = [word for word in self.words if word.partition("=")[0] not in mine]
        return [*shared, *(f"{key}={value}" for key, value in own.items()), *self.without, *probe.more]

    def cost(self, probe: Probe) -> float:
        """Return the cost of a probe, with its evaluations, before it is run."""
        return run_cost(self.planned, self.allotment, steps=probe.steps, trained=probe.trained)

    def fits(self, probe: Probe) -> bool:
        """Return whether the budget has room for a probe."""
        if tuple(self.overrides(probe)) in self.measured:
            return True
        return self.spent + self.cost(probe) <= self.allotment.budget * (1 + 1e-9)

    def check(self, probes: Iterable[Probe], config_dir: str | None) -> None:
        """Raise ``UserError`` where a probe could not start."""
        for probe in probes:
            try:
                run_config(self.overrides(probe), config_dir)
            except UserError as error:
                raise UserError(f"the probe with {probe.name}: {error}") from None

    def run(self, probe: Probe) -> Measured:
        """Run a probe, or read it if it is finished.

        Raises:
            Stopped: A stop signal; the probe has saved.
            ProbeFailed: The probe failed.
            UserError: The budget has no room for it.
        """
        words = self.overrides(probe)
        if known := self.measured.get(tuple(words)):
            return known
        if not self.fits(probe):
            raise UserError(f"the probe with {probe.name} does not fit in advise.budget any more")
        outcome = run_job(self.sweep, words)
        state = outcome.job.read()
        cost = self.cost(probe)
        self.spent += cost
        if outcome.status == "failed":
            raise ProbeFailed(f"The probe with {probe.name} failed: {state.get('error')}")
        found = measured(outcome.job, probe, cost, state.get("seconds") or 0.0)
        self.measured[tuple(words)] = found
        shutil.rmtree(outcome.job.folder / "checkpoints", ignore_errors=True)  # they are as large as the run's own
        return found


def measured(job: SweepJob, probe: Probe, cost: float, seconds: float) -> Measured:
    """Read what a finished probe has measured. It is nothing if a loss is not finite or half of the steps were not trained."""
    losses: dict[str, tuple[list[int], list[float]]] = {}
    roles = {}
    finite = 2 * _skipped_steps(job.folder) < probe.steps
    for record in records_of(job.folder / "metrics.jsonl", "evaluation"):
        steps, values = losses.setdefault(record["domain"], ([], []))
        roles[record["domain"]] = record["role"]
        if record["loss"] is None:
            finite = False
            continue
        steps.append(record["step"])
        values.append(record["loss"])
    config = read_yaml(job.folder / "config.yaml")
    rates = [rate(config, total_steps=probe.steps, step=step) for step in range(probe.steps)]
    known = [value for value in rates if value is not None]
    done = measures_of(job.folder)["train_loss"] is not None
    return Measured(
        probe,
        job.folder,
        losses if finite and done and all(len(ys) > 1 for _, ys in losses.values()) else {},
        roles,
        known if len(known) == len(rates) else [],
        cost,
        seconds,
    )


def _skipped_steps(folder: Path) -> int:
    """Return the number of steps of a run whose gradients were not finite, so that they were not trained."""
    file = folder / "quarantine.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0
