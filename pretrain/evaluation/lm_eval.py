"""Benchmarks of the lm-evaluation-harness as evaluation tasks of a run. Source: https://github.com/EleutherAI/lm-evaluation-harness"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from pretrain.evaluation.task import EvaluationTask, Metric
from pretrain.runtime.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pretrain.strategy.engine import InferenceEngine


@dataclass(frozen=True)
class LmEval:
    """The settings of the harness.

    Attributes:
        tasks: Names of tasks or groups of lm-evaluation-harness, e.g. [hellaswag,arc_easy]; [] for none.
        num_fewshot: Examples in the prompt; null: as each task says.
        limit: Documents of each task; null: all.
        when: ends (before the first and after the last step) · evaluations (at every evaluation).
        include_path: A folder of further tasks as YAML; on the command line only, because such files can run code.
    """

    tasks: list[str] = field(default_factory=list)
    num_fewshot: NonNegativeInt | None = None
    limit: PositiveInt | None = None
    when: Literal["ends", "evaluations"] = "ends"
    include_path: str | None = None

    def task(self, tokenizer: Any, *, bos: int | None, separator: int, batch_size: int) -> HarnessTask | None:
        """Return the evaluation task, or ``None`` without ``tasks``.

        Raises ``UserError`` if the package lm-eval is missing, or for a task that does not exist.
        """
        if not self.tasks:
            return None
        if find_spec("lm_eval") is None:
            raise UserError(
                f"evaluation.lm_eval.tasks=[{','.join(self.tasks)}]: the package lm-eval is missing; pip install "
                "'pretrain[lm-eval]'"
            )
        from pretrain.evaluation.lm_eval_harness import task_manager

        manager = task_manager(self.include_path)
        known = manager.all_tasks
        found: list[str] = []  # names with wildcards are expanded
        for name in self.tasks:
            matches = manager.match_tasks([name])
            found += [match for match in matches if match not in found]
            if not matches:
                raise UserError(
                    f"evaluation.lm_eval.tasks: lm-eval has no task {name!r}{did_you_mean(name, known)}; "
                    "`lm-eval ls tasks` prints all of them"
                )
        return HarnessTask(replace(self, tasks=found), manager, tokenizer, bos, separator, batch_size)


@dataclass(frozen=True)
class HarnessTask(EvaluationTask):
    """The harness with a run's tokenizer. Its metrics have the name of the harness's task as their domain.

    Attributes:
        settings: what is measured.
        manager: the harness's index of tasks.
        tokenizer: the run's tokenizer.
        bos: the token that begins a document, if there is one.
        separator: the token between documents, where generation ends.
        batch_size: sequences per forward.
    """

    settings: LmEval
    manager: Any
    tokenizer: Any
    bos: int | None
    separator: int
    batch_size: int

    @property
    def at_ends_only(self) -> bool:
        return self.settings.when == "ends"

    def evaluate(self, engine: InferenceEngine) -> list[Metric]:
        from pretrain.evaluation.lm_eval_harness import EngineModel, run

        model = EngineModel(engine, self.tokenizer, bos=self.bos, separator=self.separator, batch_size=self.batch_size)
        found = run(model, self.settings, self.manager)
        return metrics_of(found["results"], found.get("higher_is_better", {}))


def metrics_of(results: dict[str, dict[str, Any]], higher_is_better: dict[str, dict[str, bool]]) -> list[Metric]:
    """Return the numbers in the harness's ``results``: task → ``<metric>,<filter>`` and ``<metric>_stderr,<filter>`` → number."""
    metrics = []
    for task, numbers in results.items():
        for key, value in numbers.items():
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = numbers.get(f"{name}_stderr,{kind}")
            better: Literal["lower", "higher"] = "higher" if higher_is_better.get(task, {}).get(name, True) else "lower"
            label = name if kind == "none" else f"{name}, {kind}"
            error = float(stderr) if isinstance(stderr, int | float) else None
            metrics.append(Metric(label, float(value), better=better, domain=task, stderr=error))
    return metrics
