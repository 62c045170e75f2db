"""When checkpoints are made and which of them stay; when the model is exported, and in files of which size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveInt


@dataclass(frozen=True)
class Policy:
    """``keep_last``: the newest whole checkpoints to keep; ``None``: all. ``with_evaluation``: save
    whenever the run evaluates, instead of every ``save_every`` steps.

    ``export``: the model as a Hugging Face folder at the end, at every save too, or never. ``export_shard_size``: of its
    weight files at most, such as 500MB or 5GB.
    """

    keep_last: PositiveInt | None = 2
    with_evaluation: bool = False
    export: Literal["end", "save", "never"] = "end"
    export_shard_size: Annotated[str, Field(pattern=r"^[1-9]\d*(KB|MB|GB)$")] = "5GB"
