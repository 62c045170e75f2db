"""The merge curve: models on the straight line between the base model and the result of a run, scored on all domains.

Source: WiSE-FT, Wortsman et al. 2021 (arXiv:2109.01903). The weights are interpolated in place, each rank its own shards.
Those of the base model are read from its files again for every point; those of the result are meanwhile in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.distributed.sharding import TensorFiles, local, read_part
from pretrain.merging.choice import Change, Choice
from pretrain.runtime.console import notice
from pretrain.strategy.replaced import put_weights
from pretrain.telemetry.events import MergeCurve, MergePoint
from pretrain.telemetry.history import mean

if TYPE_CHECKING:
    from pretrain.checkpoint.train_state import TrainState
    from pretrain.evaluation.untouched import Untouched
    from pretrain.strategy.engine import Engine


@dataclass(frozen=True)
class Curve:
    """Scores points between the base model and the result.

    Attributes:
        points: The share of the result in each point.
        choose: Which point is exported; ``None``: the result.
        base: The weights of the base model, by name.
        untouched: Scores the domains, and has the losses of the base model.
    """

    points: tuple[float, ...]
    choose: Choice | None
    base: TensorFiles
    untouched: Untouched

    def score(self, engine: Engine, state: TrainState, **callbacks: Any) -> MergeCurve | None:
        """Score every point; ``None`` if a stop signal interrupted it. This is a collective. Afterwards the engine has the
        weights of the result again."""
        baseline, found = self.untouched.known(state), []
        notice(f"scoring {len(self.points)} points between the base model and the result")
        for alpha in self.points:
            with self.weights_at(engine, alpha):
                scores = self.untouched.evaluator.run(engine, baseline=baseline, **callbacks)
            if scores is None:
                return None
            found.append(MergePoint(alpha, tuple(scores)))
        return MergeCurve(state.step, tuple(found), self._chosen(found))

    def _chosen(self, points: list[MergePoint]) -> float | None:
        if self.choose is None:
            return None
        best = self.choose.best(change_at(point) for point in points)
        if best is None:
            notice(f"merge.choose: no point of merge.curve has {self.choose.text}; the result itself is exported")
            return None
        notice(f"merge.choose: {best:g} × result + {1 - best:g} × base is exported")
        return best

    def note(self, alpha: float) -> str:
        """Return what the model card of an exported point says about it."""
        return f"\nThe weights are {alpha:g} × the run's result + {1 - alpha:g} × the base model (merge.choose).\n"

    @contextmanager
    def weights_at(self, engine: Engine, alpha: float) -> Iterator[None]:
        """Inside this context the model has the weights of one point. With 0 and 1 they are those of the base model and of the
        result to the last bit."""
        if alpha == 1:
            yield
            return
        own = {name: t for name, t in engine.model.hf_state().items() if t.is_floating_point()}
        kept = {name: local(t.detach()).to("cpu", copy=True) for name, t in own.items()}
        try:
            base = ((name, read_part(tensor, self.base, name)) for name, tensor in own.items())
            put_weights(engine, ((name, self._between(part, kept[name], alpha)) for name, part in base))
            yield
        finally:
            put_weights(engine, kept.items())

    def _between(self, base: Tensor, result: Tensor, alpha: float) -> Tensor:
        base = base.to(result.dtype)  # as the run has begun with it
        return torch.lerp(base.float(), result.float(), alpha) if alpha else base


def change_at(point: MergePoint) -> Change:
    """Return the mean change of a point on the domains of each role."""

    def of(role: str) -> float | None:
        return mean(score.delta_loss for score in point.scores if score.role == role)

    return Change(point.alpha, of("new"), of("base"))
