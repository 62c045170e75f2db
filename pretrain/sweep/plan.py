"""Before the first job of a sweep starts: list the jobs, and check that each of them can start."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, open_dict

from pretrain.config.check import check
from pretrain.config.compose import resolve
from pretrain.config.hydra_configs import plain_mistakes
from pretrain.config.inherited_keys import drop_inherited_keys
from pretrain.config.schema import RunConfig
from pretrain.config.trust import check_command_line_only, command_line_only_values
from pretrain.data.domains import evaluation_domains
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.sweep.config import TASK_METRIC

MANY = 50  # jobs; checking more than these takes seconds, which a notice announces


class Plan:
    """The plan of a sweep: the overrides of the command line and of the sweeper's ``params``, and the jobs they result in.

    ``jobs`` has the overrides of every job if the sweep lists them, and is ``None`` if the sweeper searches. ``words`` merges
    the params with the command line so that every key occurs once; Hydra would treat ``lr`` of the former and ``++lr`` of the
    latter as two keys.
    """

    def __init__(self, loader: Any, config: DictConfig, config_dir: str | None = None) -> None:
        self._loader = loader
        self._config_dir = config_dir
        self._config = config
        params = config.hydra.sweeper.get("params") or {}
        words = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
        parser = OverridesParser.create(config_loader=loader)
        parsed = parser.parse_overrides(words)
        self._overrides = {o.get_key_element().lstrip("+~"): o for o in parsed}  # the last override of a key counts
        self.words = [str(o.input_line) for o in self._overrides.values()]
        self.keys = tuple(key for key, o in self._overrides.items() if o.is_sweep_override())
        self.jobs: list[list[str]] | None = None
        if "BasicSweeper" in config.hydra.sweeper._target_:
            for o in parsed:
                if o.is_sweep_override() and not o.is_discrete_sweep():
                    raise UserError(
                        f"{str(o.input_line).lstrip('+')}: only a sweeper that searches supports intervals; a list is key=a,b,c"
                    )
            self.jobs = [list(words) for words in itertools.product(*map(_choices, self._overrides.values()))]

    def check(self, cli_values: dict[str, Any]) -> None:
        """Compose and check every job's configuration. For ``cli_values`` see `trust.command_line_only_values`.

        Raises ``UserError`` for the first mistake in any job.
        """
        if "sweep_dir" in self.keys or any(k == "sweep" or k.startswith("sweep.") for k in self.keys):
            raise UserError("sweep_dir and sweep.* apply to the whole sweep; they can't be swept")
        one = self.jobs is not None and len(self.jobs) == 1
        launcher = self._config.hydra.launcher
        here = "slurm" not in launcher._target_.lower() or launcher.get("cluster") == "local"
        jobs = self.jobs if self.jobs is not None else list(self._one_by_one())
        if len(jobs) > MANY:
            notice(f"checking the configurations of {len(jobs)} jobs before the first one starts")
        for words in jobs:
            with plain_mistakes():
                config = self._loader.load_sweep_config(self._config, words)
            drop_inherited_keys(config, self._loader, words)
            with open_dict(config):
                del config["hydra"]
            resolved = resolve(config)
            # words include a file's hydra.sweeper.params too; trust._only_sweeps has checked them, so they set no key that
            # only the command line may set
            check_command_line_only(resolved, cli_values | command_line_only_values(words))
            check_metric(check(resolved, here=here, config_dir=self._config_dir))
        if "output_dir" in self._overrides and "output_dir" not in self.keys and not one:
            raise UserError(
                "output_dir: every job of a sweep has its own folder; sweep_dir=... sets their parent folder"
            )

    def _one_by_one(self) -> Iterator[list[str]]:
        """Yield jobs that have each value of each key once, with the first values of the other keys. A search can choose any of
        these values."""
        choices = {key: _choices(o) for key, o in self._overrides.items()}
        first = {key: values[0] for key, values in choices.items()}
        yield list(first.values())
        for key, values in choices.items():
            for value in values[1:]:
                yield list((first | {key: value}).values())


def check_metric(config: RunConfig) -> None:
    """Raise ``UserError`` if ``sweep.metric`` names a domain that is not evaluated, or a metric where there are no tasks."""
    metric = config.sweep.metric
    if metric.startswith(TASK_METRIC):
        policy = config.evaluation
        if not (policy.tasks or policy.questions or policy.lm_eval.tasks):
            raise UserError(
                f"sweep.metric={metric}: the config has no evaluation.tasks, questions or lm_eval.tasks for it"
            )
        return
    domain = metric.rpartition(".")[0]
    scored = evaluation_domains(config.dataset, config.evaluation.domains, config.replay.source)
    domains = [domain.name for domain in scored]
    if domain and domain not in domains:
        raise UserError(f"sweep.metric={metric}: no such domain is evaluated{did_you_mean(domain, domains)}")


def _choices(override: Override) -> Sequence[str]:
    """Return one override for each value of a swept key; for an interval, one for each end."""
    key = override.get_key_element()
    if override.is_discrete_sweep():
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    if override.is_sweep_override():
        sweep = override.value()
        assert isinstance(sweep, IntervalSweep), sweep
        return [f"{key}={end}" for end in (sweep.start, sweep.end)]
    return [f"{key}={override.get_value_element_as_str()}"]
