"""The config group ``merge``: models that are merged into one, and points between the base model and the result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from pretrain.merging.choice import Choice
from pretrain.runtime.errors import UserError

Method = Literal["linear", "slerp", "task_arithmetic", "ties", "wsm"]
NEEDS_BASE = ("task_arithmetic", "ties")
Number = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class MergeConfig:
    """What ``task=merge`` merges, and how.

    Attributes:
        models: Models to merge: runs, checkpoints, model folders, Hub ids.
        method: linear · slerp · task_arithmetic · ties · wsm (the last checkpoints of a run, averaged like a decay).
        weights: Weight of each model; null: equal weights. For linear and slerp they are divided by their sum.
        base: Base model of task_arithmetic and ties.
        scale: Factor of what task_arithmetic and ties add to the base.
        density: Share of the largest changes of each tensor that ties keeps.
        last: Number of checkpoints of each run that wsm merges; null: all that are there.
        decay: Decay of the learning rate that wsm stands for: sqrt (1 - sqrt) · linear (all weights equal) · cosine.
        curve: Points between the base model (0) and the result (1) of a run that are scored at its end, such as
            [0,0.25,0.5,0.75,1]; null: none.
        along: What stands for the result: result (the last step) · checkpoints (also every earlier checkpoint that the run
            keeps, each with its own points).
        choose: Which of them is exported: forgetting<=X (of those, the one with the largest gain) · gain>=X (the one with
            the least forgetting), in nats per token; null: the result.
    """

    models: list[str] = field(default_factory=list)
    method: Method = "linear"
    weights: list[Number] | None = None
    base: str | None = None
    scale: Number = 1.0
    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    last: Annotated[int, Field(ge=2)] | None = None
    decay: Literal["sqrt", "linear", "cosine"] = "sqrt"
    curve: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    along: Literal["result", "checkpoints"] = "result"
    choose: str | None = None

    def check_curve(self) -> None:
        """Raise ``UserError`` for a curve or a choice of one of its points that is impossible."""
        if self.choose is not None and not self.curve:
            raise UserError(f"merge.choose={self.choose}: chooses a point of merge.curve, which is not given")
        if self.along == "checkpoints" and not self.curve:
            raise UserError("merge.along=checkpoints: needs merge.curve, such as merge.curve=[0.5,1]")
        least = 1 if self.along == "checkpoints" else 2
        if self.curve is not None and len(set(self.curve)) < max(least, len(self.curve)):
            number = "one number" if least == 1 else "two different numbers"
            raise UserError(f"merge.curve={self.curve}: needs at least {number}, each once")
        Choice.of(self.choose)

    def check(self) -> None:
        """Raise ``UserError`` for what ``task=merge`` can't merge, before any model is read."""
        given, method = len(self.models), self.method
        if not self.models:
            raise UserError("merge.models=[]: task=merge needs the models to merge, merge.models=[A,B]")
        if method == "slerp" and given != 2:
            raise UserError(f"merge.method=slerp: needs two models, merge.models has {given}")
        if method == "linear" and given < 2:
            raise UserError(f"merge.method=linear: needs at least two models, merge.models has {given}")
        if method in NEEDS_BASE and self.base is None:
            raise UserError(f"merge.base=null: {method} adds changes to a base model, merge.base=MODEL")
        if method not in NEEDS_BASE and self.base is not None:
            raise UserError(f"merge.base={self.base}: {method} has no base; it is for {' and '.join(NEEDS_BASE)}")
        if method == "wsm" and self.weights is not None:
            raise UserError("merge.weights: wsm takes its weights from merge.decay; for weights of your own use linear")
        if self.weights is not None and len(self.weights) != given:
            raise UserError(f"merge.weights has {len(self.weights)} numbers, merge.models has {given} models")
        if self.weights is not None and method in ("linear", "slerp") and not sum(self.weights) > 0:
            raise UserError(f"merge.weights={self.weights}: their sum must be above 0")
        if method in ("slerp", "ties") and self.weights is not None and min(self.weights) < 0:
            raise UserError(f"merge.weights={self.weights}: {method} takes weights of at least 0")

    @property
    def shares(self) -> list[float]:
        """The weight of each model as `methods` needs it: ``linear`` and ``slerp`` add up to 1."""
        weights = self.weights or [1 / len(self.models)] * len(self.models)
        total = sum(weights) if self.method in ("linear", "slerp") else 1.0
        return [weight / total for weight in weights]

    @property
    def numbers(self) -> dict[str, float | int | str]:
        """The settings that the method uses besides the weights, by key."""
        by_method: dict[str, dict[str, float | int | str]] = {
            "task_arithmetic": {"scale": self.scale},
            "ties": {"scale": self.scale, "density": self.density},
            "wsm": {"decay": self.decay},
        }
        return by_method.get(self.method, {})
