"""When checkpoints are made, how, and which of them stay; when the model is exported."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pretrain.runtime.errors import UserError, did_you_mean

Verify = Literal["size", "full"]  # what is looked at before loading


@dataclass(frozen=True)
class CheckpointConfig:
    """``async_`` (``async`` in YAML): write while training goes on. ``verify`` before loading: the files' sizes, or all
    of their bytes. ``with_evaluation``: save whenever the run evaluates, instead of every ``save_every`` steps.

    Of the whole checkpoints stay the newest ``keep_last`` (``None``: all), those at every multiple of ``keep_every``
    steps, and the ``keep_best`` with the lowest loss of the domain ``best_by`` (``None``: the new one), among those that
    were evaluated at their very step. Losses of other text can't be compared: where a resumed run evaluates something
    else, the best of both stay.

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

    def check(self, domains: Mapping[str, str]) -> None:
        """Raises ``UserError`` when the best are to be found by a domain that is not evaluated. ``domains``: name → role."""
        if self.keep_best is None and self.best_by is not None:
            raise UserError(f"checkpoint.best_by={self.best_by}: has no effect without checkpoint.keep_best")
        if self.keep_best is None:
            return
        if self.best_by is None and "new" not in domains.values():
            raise UserError(
                f"checkpoint.keep_best={self.keep_best}: the new domain is not evaluated; name another with checkpoint.best_by"
                f"{did_you_mean('', domains)}"
            )
        if self.best_by not in (None, *domains):
            raise UserError(
                f"checkpoint.best_by={self.best_by}: no such domain is evaluated{did_you_mean('', domains)}"
            )

    def kept(
        self, losses: Mapping[int, Mapping[str, float]], digests: Mapping[int, Mapping[str, str | None]] | None = None
    ) -> set[int]:
        """Of the steps of whole checkpoints, each with its losses by domain (empty: not evaluated), those that stay.

        ``digests``: of what each loss was measured on; only equal ones are ranked with each other.
        """
        if self.keep_last is None:
            return set(losses)
        steps = sorted(losses)
        kept = set(steps[-self.keep_last :])
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.keep_best is not None:
            ranked: dict[str | None, list[tuple[float, int]]] = defaultdict(list)
            for step in steps:
                name = next(iter(losses[step]), "") if self.best_by is None else self.best_by
                score = losses[step].get(name)
                if score is not None and math.isfinite(score):
                    ranked[(digests or {}).get(step, {}).get(name)].append((score, -step))
            kept |= {-step for scores in ranked.values() for _, step in sorted(scores)[: self.keep_best]}
        return kept
