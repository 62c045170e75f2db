"""The losses of the untouched model (the base model before training). They are stored with the progress of a run and measured
again if the evaluation text or its settings have changed.

A resumed run may score other text than step 0 did, or the same text in another context. During set-up the engine has the
initial weights of the run until the weights of the checkpoint are loaded. In between, the untouched model can be scored again
under the same strategy. This draws no random numbers and allocates no second model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pretrain.evaluation.baseline import Known, Measured, known
from pretrain.runtime.console import notice

if TYPE_CHECKING:
    from pretrain.checkpoint.train_state import TrainState
    from pretrain.evaluation.perplexity import Evaluator
    from pretrain.strategy.engine import InferenceEngine
    from pretrain.telemetry.events import DomainScore


@dataclass
class Untouched:
    """The untouched model of a run and its losses.

    ``weights_follow_from`` are the parts of a run's fingerprint that determine its initial weights. ``is_there`` is whether the
    engine was built with the initial weights; if they are no longer available, it is built with a checkpoint's weights."""

    evaluator: Evaluator
    weights_follow_from: tuple[str, ...] = ("model", "seed")
    is_there: bool = True
    _rescored: dict[str, tuple[float, Measured]] = field(default_factory=dict)  # by domain, scored in this start

    def known(self, progress: TrainState) -> dict[str, Known]:
        """Return the baseline of every domain, as far as it was measured on what is scored now."""
        return self._known(progress.baseline, progress.measured_on)

    def keep(self, progress: TrainState, scores: Iterable[DomainScore]) -> None:
        """Store the ``scores`` of step 0 as the baseline of the run."""
        progress.baseline = {score.domain: score.loss for score in scores}
        progress.measured_on = {domain.name: domain.measured_on for domain in self.evaluator.domains}

    def score_again(
        self,
        engine: InferenceEngine,
        state: Mapping[str, Any],
        identity: Mapping[str, Any],
        *,
        interrupted: Callable[[], bool] = lambda: False,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Score the domains whose baseline is missing in the checkpoint ``state``, before it is loaded into ``engine``. This is
        a collective. ``identity`` is the fingerprint of this run. For ``interrupted`` and ``alive`` see `Evaluator.run`."""
        progress = state["progress"]
        if not self.is_there:
            return
        if progress["step"] == 0 or any(state["identity"][p] != identity[p] for p in self.weights_follow_from):
            return
        found = self._known(progress.get("baseline", {}), progress.get("measured_on", {}))
        missing: dict[str, str] = engine.world.on_main_rank(lambda: {n: k.reason for n, k in found.items() if k.reason})
        if not missing:
            return
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        notice(f"the model before this run is scored again: {reasons}")
        scores = self.evaluator.select(missing).run(engine, announce=True, interrupted=interrupted, alive=alive)
        domains = {domain.name: domain for domain in self.evaluator.domains}
        self._rescored = {score.domain: (score.loss, domains[score.domain].measured_on) for score in scores or ()}

    def restore(self, progress: TrainState) -> None:
        """Copy the losses that were scored again into ``progress``, which was just loaded from a checkpoint."""
        progress.baseline |= {name: loss for name, (loss, _) in self._rescored.items()}
        progress.measured_on |= {name: measured for name, (_, measured) in self._rescored.items()}

    def _known(self, losses: Mapping[str, float], measured_on: Mapping[str, Measured]) -> dict[str, Known]:
        return {d.name: known(d.name, d.measured_on, losses, measured_on) for d in self.evaluator.domains}
