"""When checkpoints are made, how, and which of them stay; when the model is exported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pretrain.errors import UserError, did_you_mean

Verify = Literal["size", "full"]  # what is looked at before loading


@dataclass(frozen=True)
class Policy:
    """``async_`` (``async`` in YAML): write while training goes on. ``verify`` before loading: the files' sizes, or all
    of their bytes. ``with_evaluation``: save whenever the run evaluates, instead of every ``save_every`` steps.

    Of the whole checkpoints stay the newest ``keep_last`` (``None``: all), those at every multiple of ``keep_every``
    steps, and the ``keep_best`` with the lowest loss of the domain ``best_by`` (``None``: the new one), among those that
    were evaluated at their very step.

    ``export``: the model as a Hugging Face folder at the end, at every save too, or never. ``export_shard_size``: of its
    weight files at most, such as 500MB or 5GB.
    """

    async_: bool = True
    verify: Verify = "size"
    keep_last: PositiveInt | None = 2
    keep_every: PositiveInt | None = None
    keep_best: PositiveInt | None = None
    best_by: str | None = None
    with_evaluation: bool = False
    export: Literal["end", "save", "never"] = "end"
    export_shard_size: Annotated[str, Field(pattern=r"^[1-9]\d*(KB|MB|GB)$")] = "5GB"

    def check(self, domains: Sequence[str]) -> None:
        """Raises ``UserError`` when the best are to be found by a domain that is not among the evaluated ``domains``."""
        if self.keep_best is None and self.best_by is not None:
            raise UserError(f"checkpoint.best_by={self.best_by}: has no effect without checkpoint.keep_best")
        if self.keep_best is not None and (not domains or self.best_by not in (None, *domains)):
            raise UserError(
                f"checkpoint.best_by={self.best_by}: no such domain is evaluated{did_you_mean('', domains)}"
            )

    def kept(self, losses: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Of the steps of whole checkpoints, each with its losses by domain (empty: not evaluated), those that stay."""
        if self.keep_last is None:
            return set(losses)
        steps = sorted(losses)
        kept = set(steps[-self.keep_last :])
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.keep_best is not None:
            scores = {step: self._score(losses[step]) for step in steps}
            scored = sorted(
                (score, -step) for step, score in scores.items() if score is not None and math.isfinite(score)
            )
            kept |= {-step for _, step in scored[: self.keep_best]}
        return kept

    def _score(self, losses: Mapping[str, float]) -> float | None:
        name = next(iter(losses), None) if self.best_by is None else self.best_by
        return None if name is None else losses.get(name)
