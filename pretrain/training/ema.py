"""A hook: exponential moving averages of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pretrain.runtime.errors import UserError
from pretrain.training.hook import Hook, Purpose

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pretrain.checkpoint.train_state import TrainState
    from pretrain.strategy.engine import Engine

RAMP = 10  # updates after which a decay that is limited by the number of updates has come to one half


@dataclass
class Ema(Hook):
    """Average the trained weights in fp32, once for each decay. Every rank keeps the averages of its own shards.

    After update n an average is decay × average + (1 - decay) × weights. With ``warmup`` the decay is at most
    (1 + n) / (10 + n), so that the first weights do not count for long. Source: Polyak and Juditsky 1992; the warm-up is that of
    TensorFlow's ExponentialMovingAverage.

    Attributes:
        decays: One average for each decay: 0.99 averages over about 100 steps, 0.999 over about 1,000.
        warmup: true: the first updates use a smaller decay.
        evaluate: true: score each average at every evaluation, as metrics ema_<decay>_loss.
        export: true: also write each average at the end, to averages/ema_<decay>/.
    """

    decays: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = field(
        default_factory=lambda: [0.99, 0.999]
    )
    warmup: bool = True
    evaluate: bool = True
    export: bool = True
    _averages: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)  # by name, then by parameter
    _updates: int = field(default=0, init=False)
    _engine: Any = field(default=None, init=False, repr=False)

    def setup(self, engine: Engine) -> None:
        if len({*map(_name, self.decays)}) < len(self.decays):
            raise UserError(f"hook.ema.decays={self.decays}: each decay may be there once")
        self._updates, self._averages = 0, {}  # frees those of an earlier call
        self._engine, trained = engine, engine.weights.trained()
        self._averages = {_name(decay): {n: p.float().clone() for n, p in trained.items()} for decay in self.decays}

    def after_step(self, state: TrainState, engine: Engine) -> None:
        import torch

        from pretrain.distributed.sharding import local

        self._updates += 1
        weights = {name: local(part).float() for name, part in engine.weights.trained().items()}
        for decay, average in zip(self.decays, self._averages.values(), strict=True):
            own = [local(average[name]) for name in weights]
            torch._foreach_lerp_(own, [*weights.values()], 1 - self.decay_at(decay, self._updates))

    def decay_at(self, decay: float, update: int) -> float:
        """Return the decay of an update (1-based)."""
        return min(decay, (1 + update) / (RAMP + update)) if self.warmup else decay

    def state_dict(self) -> dict[str, Any]:
        saved = {name: self._engine.weights.to_save(average) for name, average in self._averages.items()}
        every = {f"{name}/{key}": t for name, average in saved.items() for key, t in average.items()}
        return every | {"updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = state["updates"]
        tensors = {key: t for key, t in state.items() if key != "updates"}
        of_each = {name: _without(f"{name}/", tensors) for name in self._averages}
        self._averages = {name: dict(self._engine.weights.from_saved(saved)) for name, saved in of_each.items()}

    def averages(self, purpose: Purpose) -> dict[str, dict[str, Tensor]]:
        wanted = self.evaluate if purpose == "evaluate" else self.export
        return self._averages if wanted and self._updates else {}


def _without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _name(decay: float) -> str:
    return f"ema_{decay:g}"
