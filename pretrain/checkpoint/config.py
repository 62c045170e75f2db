"""The config group ``checkpoint``: when and how checkpoints are saved, which are kept, and when the model is exported."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from pretrain.runtime.errors import UserError, did_you_mean

Verify = Literal["size", "full"]  # how a checkpoint's files are checked before loading


@dataclass(frozen=True)
class CheckpointConfig:
    """How a run saves. A complete checkpoint is kept if any of the ``keep_*`` fields selects it.

    ``keep_best`` chooses among the checkpoints that were evaluated at their own step. Losses on different text are not compared:
    if a resumed run evaluates other text, the best of both are kept.

    Attributes:
        async_: true: write in the background while training continues; false: training waits for the disk.
        verify: What is checked before loading: size (of each file) · full (the checksum of each file).
        keep_last: Number of newest checkpoints to keep; null: all.
        keep_every: Also keep checkpoints at multiples of this number of steps; null: none.
        keep_best: Also keep this number of checkpoints with the lowest evaluation loss; null: none.
        best_by: Domain whose loss keep_best and export=best compare; null: the new domain.
        with_evaluation: true: save at every evaluation instead of every save_every steps.
        export: When to export the model as a Hugging Face folder: end (model/) · best (at the end, the checkpoint with
            the lowest evaluation loss; needs keep_best) · save (also models/step-… at every save) · never.
        export_shard_size: Maximum size of a weight file of the export; a larger weight gets a file of its own.
        push_to_hub: Repository of the Hub, owner/name, to which each exported model is uploaded; a new repository is
            private; null: none.
    """

    async_: bool = True
    verify: Verify = "size"
    keep_last: PositiveInt | None = 2
    keep_every: PositiveInt | None = None
    keep_best: PositiveInt | None = None
    best_by: str | None = None
    with_evaluation: bool = False
    export: Literal["end", "best", "save", "never"] = "end"
    export_shard_size: Annotated[str, Field(pattern=r"^[1-9]\d*(KB|MB|GB)$")] = "5GB"
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None

    def check(self, domains: Mapping[str, str]) -> None:
        """Raise ``UserError`` if the domain of ``best_by`` is not evaluated. ``domains`` maps names to roles."""
        if self.push_to_hub is not None and self.export == "never":
            raise UserError(
                f"checkpoint.push_to_hub={self.push_to_hub}: checkpoint.export=never leaves no model to upload"
            )
        if self.export == "best" and self.keep_best is None:
            raise UserError("checkpoint.export=best: needs checkpoint.keep_best=1, which keeps the best checkpoint")
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
        """Return the steps of the checkpoints that are kept.

        ``losses`` maps the step of every complete checkpoint to its losses by domain (empty: not evaluated). ``digests`` maps
        steps to digests of the text on which each loss was measured; only losses with equal digests are compared.
        """
        if self.keep_last is None:
            return set(losses)
        steps = sorted(losses)
        kept = set(steps[-self.keep_last :])
        if self.keep_every is not None:
            kept |= {step for step in steps if step % self.keep_every == 0}
        if self.keep_best is not None:
            kept |= {step for ranked in self.ranked(losses, digests).values() for step in ranked[: self.keep_best]}
        return kept

    def ranked(
        self, losses: Mapping[int, Mapping[str, float]], digests: Mapping[int, Mapping[str, str | None]] | None = None
    ) -> dict[str | None, list[int]]:
        """Return the evaluated steps, that of the lowest loss first, by the digest of the text on which they were measured. For
        the arguments see `kept`; of equal losses the later step comes first."""
        scored: dict[str | None, list[tuple[float, int]]] = defaultdict(list)
        for step in sorted(losses):
            name = next(iter(losses[step]), "") if self.best_by is None else self.best_by
            score = losses[step].get(name)
            if score is not None and math.isfinite(score):
                scored[(digests or {}).get(step, {}).get(name)].append((score, -step))
        return {digest: [-step for _, step in sorted(found)] for digest, found in scored.items()}
