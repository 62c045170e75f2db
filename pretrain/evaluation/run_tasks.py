"""Run the evaluation tasks of a run, and check the metrics that they return."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from pretrain.checkpoint.rng import rng_state, set_rng_state
from pretrain.evaluation.perplexity import evaluating
from pretrain.evaluation.task import EvaluationInterrupted
from pretrain.runtime.console import notice, shows_progress
from pretrain.runtime.errors import UserError
from pretrain.telemetry.metric import Metric

if TYPE_CHECKING:
    from pretrain.evaluation.task import EvaluationTask
    from pretrain.strategy.engine import InferenceEngine

NAME = re.compile(r"[^/\s]([^/\x00-\x1f\x7f]*[^/\s\x00-\x1f\x7f])?")  # no `/`, which separates domain and name in paths


def run_tasks(
    tasks: Mapping[str, EvaluationTask],
    engine: InferenceEngine,
    *,
    announce: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
    alive: Callable[[], None] = lambda: None,
) -> list[Metric] | None:
    """Run ``tasks`` in order and return the metrics of rank 0, or ``None`` if ``interrupted`` returned true. All ranks must call
    it.

    The model is in eval mode and gradients are disabled; the random state is afterwards as it was before, so that an
    evaluation does not change the training. ``interrupted`` is called before every task on every rank, and by `likelihoods`
    before every batch; ``alive`` after every forward and every task.

    Raises ``UserError``, on every rank, for a task that raises one and for metrics that can't be recorded.
    """
    metrics: list[Metric] = []
    measured_by: dict[tuple[str | None, str], str] = {}
    state = rng_state() if tasks else None
    before = engine.alive, engine.interrupted
    engine.alive, engine.interrupted = alive, interrupted
    try:
        with evaluating(engine.model), torch.no_grad():
            for name, task in tasks.items():
                if interrupted():
                    return None
                if announce and not shows_progress():
                    notice(f"evaluating task {name}")
                metrics += _metrics_of(name, task, engine, measured_by)
                alive()
    except EvaluationInterrupted:
        return None
    finally:
        engine.alive, engine.interrupted = before
        if state is not None:
            set_rng_state(state)
    return metrics


def _metrics_of(
    name: str, task: EvaluationTask, engine: InferenceEngine, measured_by: dict[tuple[str | None, str], str]
) -> list[Metric]:
    def measure() -> list[Metric]:
        found = task.evaluate(engine)  # on every rank, since a forward may be a collective
        return checked(name, found, measured_by) if engine.world.is_main else []

    return engine.world.all_gather_object(measure)[0]


def checked(task: str, found: Any, measured_by: dict[tuple[str | None, str], str]) -> list[Metric]:
    """Return the metrics that ``task`` has returned, with their numbers as Python floats.

    ``measured_by`` maps the domain and the name of each metric of this evaluation to its task, and gets those of ``found``.
    Raises ``UserError`` for anything but a list of valid metrics, each measured once.
    """
    where = _key(task)
    if not isinstance(found, list | tuple) or not all(isinstance(metric, Metric) for metric in found):
        raise UserError(f"{where}: evaluate() returned {_short(found)}, not a list of pretrain.Metric")
    metrics: list[Metric] = []
    for metric in found:
        if not isinstance(metric.name, str) or not NAME.fullmatch(metric.name):
            raise UserError(f"{where}: metric name {metric.name!r}: a name is text in one line without '/'")
        if metric.domain is not None and not (isinstance(metric.domain, str) and metric.domain):
            raise UserError(f"{where}: metric {metric.name}: domain={metric.domain!r}: the name of a domain, or None")
        if metric.better not in ("lower", "higher"):
            raise UserError(f"{where}: metric {metric.name}: better={metric.better!r}: allowed: lower, higher")
        other = measured_by.setdefault((metric.domain, metric.name), task)
        if other != task or any((m.domain, m.name) == (metric.domain, metric.name) for m in metrics):
            domain = "" if metric.domain is None else f" of domain {metric.domain}"
            raise UserError(
                f"{where}: metric {metric.name}{domain} is measured twice, first by {_key(other)}; rename one"
            )
        value = _number(where, metric.name, "value", metric.value)
        stderr = None if metric.stderr is None else _number(where, metric.name, "stderr", metric.stderr)
        metrics.append(replace(metric, value=value, unit=str(metric.unit), stderr=stderr))
    return metrics


def _key(task: str) -> str:
    """Return the config key of a task: its name with dots, or that of one of the user's own ``evaluation.tasks``."""
    return task if "." in task else f"evaluation.tasks.{task}"


def _number(where: str, name: str, field: str, value: Any) -> float:
    """Return ``value`` (a Python, NumPy or 0-d torch number) as a float; an int too large for one is infinite."""
    try:
        if not isinstance(value, str | bytes):
            return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"{where}: metric {name}: {field}={_short(value)}: not a number")


def _short(value: Any) -> str:
    text = repr(value).splitlines()[0] if repr(value) else ""
    return f"{type(value).__name__} {text[:60]}"
