"""`hydra/sweeper=optuna`: the jobs are trials of an Optuna study, which chooses each from the results of the earlier ones.

Hydra's own plugin of that name needs Optuna 2 (its successor needs a pre-release of Hydra), can't prune, and loses the study
when the process exits. This sweeper parses the parameters with Hydra's override grammar and runs the trials through Hydra's
launcher. It reads the results from the jobs' folders, so it works with any launcher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from pydantic import NonNegativeInt, PositiveInt

from pretrain.config.check import check_options
from pretrain.runtime.signals import Stopped
from pretrain.sweep.jobs import Sweep
from pretrain.sweep.pruning import pruning
from pretrain.sweep.space import parse_space
from pretrain.sweep.study import Study, search_lock

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Options:
    """The options of the sweeper.

    Attributes:
        n_trials: Total number of trials, finished or pruned.
        n_jobs: Trials at a time; ``None`` is the launcher's ``n_jobs``, or 1.
        startup_trials: Number of first trials that are drawn at random, before TPE chooses trials and any are pruned.
        prune: Whether to stop a trial whose objective at an evaluation is worse than the median of the others at that step.
        seed: Random seed of the search.
    """

    n_trials: PositiveInt
    n_jobs: PositiveInt | None
    startup_trials: NonNegativeInt
    prune: bool
    seed: NonNegativeInt


class OptunaSweeper(Sweeper):
    """A sweeper that runs a search with Optuna."""

    def __init__(self, *, params: None, **options: Any) -> None:
        """Hydra passes ``params`` too, but they are ignored, because the arguments of `sweep` include them (`Plan.words`)."""
        self.options = Options(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. Raises ``UserError`` for invalid options and for an invalid search space."""
        check_options("hydra.sweeper", self.options)
        self.space = parse_space(list(config.hydra.overrides.task), hydra_context.config_loader)
        self.jobs = cast(Sweep, task_function)
        self.at_once = self.options.n_jobs or config.hydra.launcher.get("n_jobs", 1)
        self.starter = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are ``n_trials`` with a result. A failed trial counts too, but is tried again when the
        command is run again. ``arguments`` are ignored, because `setup` has parsed them."""
        with search_lock(self.jobs.folder):
            study = Study(
                self.jobs.folder,
                space=self.space,
                metric=self.jobs.metric,
                direction=self.jobs.direction,
                startup_trials=self.options.startup_trials,
                seed=self.options.seed,
            )
            for trials in self._batches(study):
                self._run(study, trials)

    def _batches(self, study: Study) -> Iterator[list[Trial]]:
        left = self.options.n_trials - study.resume()
        while left > 0:
            batch = [study.next() for _ in range(min(self.at_once, left))]
            left -= len(batch)
            yield batch

    def _run(self, study: Study, trials: list[Trial]) -> None:
        """Run trials, in parallel if the launcher can, and report the results to the study.

        Raises ``Stopped`` if a trial was stopped. That trial stays open in the study and is resumed later.
        """
        overrides = [self.space.overrides(trial.params) for trial in trials]
        jobs = [self.jobs.job(words) for words in overrides]
        watched = dict(zip(jobs, trials, strict=True)) if self.options.prune else {}
        with pruning(watched, self.jobs.metric):
            returns = self.starter.launch(overrides, initial_job_idx=trials[0].number)
        for returned in returns:
            _ = returned.return_value  # reading the value raises the launcher's error, if there was one
        outcomes = [self.jobs.outcome(job) for job in jobs]
        for trial, outcome in zip(trials, outcomes, strict=True):
            study.tell(trial, outcome)
        for outcome in outcomes:
            if outcome.status not in ("finished", "pruned", "failed"):
                raise Stopped(f"{outcome.job.name} was stopped")
