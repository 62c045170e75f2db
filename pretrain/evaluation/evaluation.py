"""The evaluations of a run: all domains are scored, the tasks are run and the prompts are continued, every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pretrain.evaluation.run_tasks import run_tasks
from pretrain.telemetry.events import DomainScore, Evaluated, Event, MetricsEvent, Sampled
from pretrain.telemetry.interval import Interval
from pretrain.telemetry.record import fields_of

if TYPE_CHECKING:
    from pretrain.checkpoint.train_state import TrainState
    from pretrain.evaluation.samples import Sampler
    from pretrain.evaluation.task import EvaluationTask
    from pretrain.evaluation.untouched import Untouched
    from pretrain.strategy.engine import InferenceEngine


@dataclass
class Evaluation:
    """What a run evaluates, and when.

    Attributes:
        untouched: scores the domains, and keeps the losses of the base model (before training) as the baseline of
            forgetting.
        sampler: continues the prompts (``None``: there are none).
        every: the interval of evaluations in steps. The first and the last step are always evaluated.
        tasks: further measurements, by name.
    """

    untouched: Untouched
    sampler: Sampler | None = None
    every: Interval = field(default_factory=lambda: Interval(None))
    tasks: Mapping[str, EvaluationTask] = field(default_factory=dict)
    _announced: bool = False  # whether this start has announced what an evaluation scores

    def run(
        self,
        engine: InferenceEngine,
        state: TrainState,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
        last: Callable[[TrainState], bool] = lambda state: False,
    ) -> list[Event] | None:
        """Evaluate, note the scores in ``state`` and return the events; ``None`` if ``interrupted`` returned true, after which
        ``state`` has a pending evaluation. This is a collective. A run's first scores are the baseline of its forgetting.
        ``last`` returns whether the run ends with the state after this evaluation; it is given a copy.
        """
        callbacks: dict[str, Any] = {"interrupted": interrupted, "alive": alive}
        started_at = time.perf_counter()
        is_baseline = state.step == 0
        baseline = None if is_baseline else self.untouched.known(state)
        announce, self._announced = not self._announced, True
        state.pending_evaluation = True
        is_base = is_baseline and self.untouched.is_there
        scores = self.untouched.evaluator.run(
            engine, baseline=baseline, is_base=is_base, announce=announce, **callbacks
        )
        if scores is None:
            return None
        scored_at = time.perf_counter()
        at_end = is_baseline or last(self._noted(state, scores))
        due = {name: t for name, t in self.tasks.items() if at_end or not getattr(t, "at_ends_only", False)}
        metrics = run_tasks(due, engine, announce=announce, **callbacks)
        if metrics is None:
            return None
        measured_at = time.perf_counter()
        samples = [] if self.sampler is None else self.sampler.run(engine, **callbacks)
        if samples is None:
            return None
        noted = self._noted(state, scores)
        state.evaluated_at, state.scores, state.pending_evaluation = noted.evaluated_at, noted.scores, False
        if is_baseline:
            self.untouched.keep(state, scores)
        measured = MetricsEvent(state.step, tuple(metrics), measured_at - scored_at)
        return [
            Evaluated(state.step, tuple(scores), scored_at - started_at),
            *([measured] if due else []),
            Sampled(state.step, tuple(samples), time.perf_counter() - measured_at),
        ]

    def _noted(self, state: TrainState, scores: list[DomainScore]) -> TrainState:
        """Return a copy of ``state`` after the evaluation with ``scores``."""
        noted = [fields_of(s) for s in scores]
        return replace(state, evaluated_at=state.step, scores=noted, pending_evaluation=False)

    def capture_base(self, engine: InferenceEngine, **callbacks: Any) -> None:
        """Compute what later evaluations need of the base model, if ``engine`` was built with the initial weights and has them
        still. This is a collective. For ``callbacks`` see `run`."""
        if self.untouched.is_there:
            self.untouched.evaluator.capture_base(engine, **callbacks)

    def score_baseline_again(
        self, engine: InferenceEngine, saved: Mapping[str, Any], fingerprint: Mapping[str, Any], **callbacks: Any
    ) -> None:
        """Score the initial weights in ``engine``, before those of the checkpoint with the state ``saved`` replace them, if its
        baseline was measured on other text than this run evaluates. For ``callbacks`` see `run`."""
        self.untouched.score_again(engine, saved, fingerprint, **callbacks)

    def restore(self, state: TrainState) -> None:
        """Add what was scored again to ``state``, which was just loaded from a checkpoint."""
        self.untouched.restore(state)
