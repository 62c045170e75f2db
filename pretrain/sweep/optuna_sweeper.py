"""`hydra/sweeper=optuna`: jobs are trials of a study of Optuna's, each chosen by what the earlier ones came to.

Hydra's own plugin of that name needs Optuna 2 (its successor: a pre-release of Hydra), can't prune, and forgets the study
at the end of the process. This one is as thin: parameters from the override grammar, trials through Hydra's launcher. What
a job came to is read from its folder, so any launcher will do.
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
from pretrain.sweep.study import Study, search_alone

if TYPE_CHECKING:
    from optuna.trial import Trial


@dataclass(frozen=True)
class Options:
    """The keys of conf/hydra/sweeper/optuna.yaml, which says what each is for."""

    n_trials: PositiveInt
    n_jobs: PositiveInt | None
    startup_trials: NonNegativeInt
    prune: bool
    seed: NonNegativeInt


class OptunaSweeper(Sweeper):
    def __init__(self, *, params: None, **options: Any) -> None:
        """``params``: Hydra gives them too, but they are among the arguments of `sweep` by then (`Plan.words`)."""
        self.options = Options(**options)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. Raises ``UserError`` for options that can't work and for a space that is none."""
        check_options("hydra.sweeper", self.options)
        self.space = parse_space(list(config.hydra.overrides.task), hydra_context.config_loader)
        self.jobs = cast(Sweep, task_function)
        self.at_once = self.options.n_jobs or config.hydra.launcher.get("n_jobs", 1)
        self.starter = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are ``n_trials`` with a result; one that fails counts, until the command is run again.
        ``arguments`` are those that `setup` has read."""
        with search_alone(self.jobs.folder):
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
        """Run trials side by side, as far as the launcher can, and tell the study what came of them.

        Raises ``Stopped`` when one was stopped: it stays open in the study, to be resumed.
        """
        overrides = [self.space.overrides(trial.params) for trial in trials]
        jobs = [self.jobs.job(words) for words in overrides]
        watched = dict(zip(jobs, trials, strict=True)) if self.options.prune else {}
        with pruning(watched, self.jobs.metric):
            returns = self.starter.launch(overrides, initial_job_idx=trials[0].number)
        for returned in returns:
            _ = returned.return_value  # raises what the launcher could not do
        outcomes = [self.jobs.outcome(job) for job in jobs]
        for trial, outcome in zip(trials, outcomes, strict=True):
            study.tell(trial, outcome)
        for outcome in outcomes:
            if outcome.status not in ("finished", "pruned", "failed"):
                raise Stopped(f"{outcome.job.name} was stopped")
