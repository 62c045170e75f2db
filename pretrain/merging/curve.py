"""The merge curve: models on the straight line between the base model and the result of a run, scored on all domains.

Source: WiSE-FT, Wortsman et al. 2021 (arXiv:2109.01903). The weights are interpolated in place, each rank its own shards.
Those of the base model are read from its files again for every point; those of the result are meanwhile in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint.schema import tensor_files
from pretrain.distributed.sharding import TensorFiles
from pretrain.merging.choice import Change, Choice
from pretrain.runtime.console import notice
from pretrain.telemetry.events import MergeCurve, MergePoint
from pretrain.telemetry.history import mean

if TYPE_CHECKING:
    from pretrain.checkpoint.store import CheckpointStore
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
        checkpoints: Every complete checkpoint that the run keeps stands for the result too, with its own points; ``None``: the
            result alone.
    """

    points: tuple[float, ...]
    choose: Choice | None
    base: TensorFiles
    untouched: Untouched
    checkpoints: CheckpointStore | None = None

    def score(self, engine: Engine, state: TrainState, **callbacks: Any) -> MergeCurve | None:
        """Score every point; ``None`` if a stop signal interrupted it. This is a collective. Afterwards the engine has the
        weights of the result again."""
        baseline, found = self.untouched.known(state), []
        places = [*self._earlier(engine, state.step), *((alpha, None) for alpha in self.points)]
        steps = {step for _, step in places} - {None}
        ends = f"{len(steps)} checkpoints and the result" if steps else "the result"
        notice(f"scoring {len(places)} points between the base model and {ends}")
        for alpha, checkpoint in places:
            with self.weights_at(engine, alpha, checkpoint):
                scores = self.untouched.evaluator.run(engine, baseline=baseline, **callbacks)
            if scores is None:
                return None
            found.append(MergePoint(alpha, tuple(scores), checkpoint))
        return MergeCurve(state.step, tuple(found), self._chosen(found))

    def _earlier(self, engine: Engine, last: int) -> list[tuple[float, int | None]]:
        """Return the points of the checkpoints before step ``last``. Their points at 0 would all be the base model."""
        if self.checkpoints is None:
            return []
        complete: list[int] = engine.world.on_main_rank(self.checkpoints.complete_steps)
        steps = [step for step in complete if step < last]
        if not steps:
            notice("merge.along=checkpoints: the run keeps no earlier checkpoint; save_every and checkpoint.keep_last")
        return [(alpha, step) for step in steps for alpha in self.points if alpha]

    def _chosen(self, points: list[MergePoint]) -> MergePoint | None:
        if self.choose is None:
            return None
        best = self.choose.best(change_at(point) for point in points)
        if best is None:
            notice(f"merge.choose: no point of merge.curve has {self.choose.text}; the result itself is exported")
            return None
        notice(f"merge.choose: {_described(best.alpha, best.checkpoint)} is exported")
        return next(p for p in points if (p.alpha, p.checkpoint) == (best.alpha, best.checkpoint))

    def note(self, point: MergePoint) -> str:
        """Return what the model card of an exported point says about it."""
        what = _described(point.alpha, point.checkpoint, of="the run's result", base="the base model")
        return f"\nThe weights are {what} (merge.choose).\n"

    @contextmanager
    def weights_at(self, engine: Engine, alpha: float, checkpoint: int | None = None) -> Iterator[None]:
        """Inside this context the model has the weights of one point; with ``checkpoint``, that step's stand for the result. With
        0 and 1 they are those of the base model and of the result to the last bit."""
        if checkpoint is None and alpha == 1:
            yield
            return
        files = [self.base]
        if checkpoint is not None:
            assert self.checkpoints is not None
            files.append(tensor_files(self.checkpoints.path(checkpoint), "model"))
        with engine.weights.blended(files, partial(_between, alpha=alpha)):
            yield


def _described(alpha: float, checkpoint: int | None, *, of: str = "result", base: str = "base") -> str:
    end = of if checkpoint is None else f"step {checkpoint}"
    return f"{alpha:g} × {end} + {1 - alpha:g} × {base}"


def _between(result: Tensor, base: Tensor, checkpoint: Tensor | None = None, *, alpha: float) -> Tensor:
    """Return a point of one weight in the dtype of ``result`` or fp32. ``checkpoint`` stands for ``result`` if it is given."""
    base = base.to(result.dtype)  # as the run has begun with it
    end = result if checkpoint is None else checkpoint.to(result.dtype)
    if alpha in (0, 1):
        return end if alpha else base
    return torch.lerp(base.float(), end.float(), alpha)


def change_at(point: MergePoint) -> Change:
    """Return the mean change of a point on the domains of each role."""

    def of(role: str) -> float | None:
        return mean(score.delta_loss for score in point.scores if score.role == role)

    return Change(point.alpha, of("new"), of("base"), point.checkpoint)
