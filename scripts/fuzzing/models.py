"""Model folders: config.json, safetensors, their index, generation_config.json. The loss that transformers computes of the
same folder, or a refusal: weights of a model folder have no checksum, so another weight is another model."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import elsewhere
from fuzzing.kind import VALID, Base, Kind, Verdict, ask, other
from fuzzing.sample import SMALL, documents, make_model, write_texts
from fuzzing.sandbox import Result

HELD_OUT = 0.25
TOLERANCE = 2e-3  # of the loss, relative: sums in another order, and weights that make numbers large
EDITED = ("config.json", "generation_config.json", "model*.safetensors", "*.index.json")


class Models(Kind):
    name = "models"
    variants = ("llama", "gpt2", "llama-tied", "llama shards", "llama training", "gpt2 training")
    names = ("model_name", "model/", "model:", "out of memory", "sequence_length")

    def make(self, variant: str, place: Path) -> Base:
        shape, _, how = variant.partition(" ")
        ask(place, lambda: make_model(place / "model", shape, shards=how == "shards"))
        write_texts(place / "data", documents())
        task = ["max_steps=1", "checkpoint.export=end"] if how == "training" else ["task=evaluation"]
        given = ["model_name=model", "dataset=local", "dataset.nameOrPath=data", f"dataset.held_out={HELD_OUT}"]
        return Base(place, [*task, *given, *SMALL, "sink=[jsonl]", "output_dir=run"])

    def editable(self, base: Base, place: Path) -> list[Path]:
        return sorted({file for pattern in EDITED for file in (place / "model").glob(pattern)})

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        """Three of four times config.json, where most of what can be said wrongly is said."""
        config = place / "model/config.json"
        if draw.random() < 0.5 and config.is_file():
            return self.edit_one(draw, config, place)
        return super().edit(draw, base, place)

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        return first_loss(place / "run/metrics.jsonl")

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        def question() -> float:
            tokens = elsewhere.held_out(place / "cache", HELD_OUT, 200)
            return elsewhere.loss_of(place / "model", tokens, 16)

        theirs = ask(place, question)
        if theirs is None:
            return other("took a model that transformers refuses", f"loss {outcome!r}, unedited {base.outcome!r}")
        if not math.isfinite(theirs):
            return Verdict(VALID) if outcome is None else other("a number where there is none", repr(outcome))
        if outcome is not None and abs(outcome - theirs) <= TOLERANCE * max(1.0, abs(theirs)):
            return Verdict(VALID)
        return other(
            "another loss than transformers'", f"{outcome!r}, transformers' {theirs!r}, unedited {base.outcome!r}"
        )


def first_loss(metrics: Path) -> float | None:
    """Of the evaluation before the first step; ``None`` where it was not a number."""
    from pretrain.telemetry.sinks.jsonl import read_records

    return next(r["loss"] for r in read_records(metrics) if r["event"] == "evaluation")
