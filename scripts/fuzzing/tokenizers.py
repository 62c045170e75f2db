"""Tokenizers: tokenizer.json, tokenizer_config.json, special tokens. The tokens that the file tokenizer.json alone makes of
the same documents, or a refusal."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

from fuzzing import elsewhere
from fuzzing.kind import VALID, Base, Kind, Verdict, ask, other
from fuzzing.sample import SMALL, documents, write_texts
from fuzzing.sandbox import Result

SPECIAL = '{"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}'


class Tokenizers(Kind):
    name = "tokenizers"
    variants = ("plain", "special", "training")
    names = ("model_name", "model/", "model:", "tokenizer")

    def make(self, variant: str, place: Path) -> Base:
        shutil.copytree(self.model, place / "model")
        write_texts(place / "data", documents())
        if variant == "special":
            (place / "model/special_tokens_map.json").write_text(SPECIAL)
            (place / "model/added_tokens.json").write_text('{"<|endoftext|>": 0}')
        task = ["max_steps=1"] if variant == "training" else ["task=tokenization"]
        given = [
            "model_name=model",
            "dataset=local",
            "dataset.nameOrPath=data",
            "dataset.held_out=0.25",
            "sink=[jsonl]",
        ]
        return Base(place, [*task, *given, *SMALL, "output_dir=run"])

    def editable(self, base: Base, place: Path) -> list[Path]:
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        return [place / "model" / name for name in names if (base.folder / "model" / name).exists()]

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        file = place / "model/tokenizer.json"
        return self.edit_part(draw, file) if draw.random() < 0.3 and file.is_file() else super().edit(draw, base, place)

    def edit_part(self, draw: Random, file: Path) -> str:
        """One value of what is no vocabulary: the vocabulary has nearly all values of the file."""
        import json

        from fuzzing.edits import edit_value, json_text

        try:
            whole = json.loads(file.read_bytes())
            part = {key: value for key, value in whole.items() if key != "model"}
            part["model"] = {key: value for key, value in whole["model"].items() if key not in ("vocab", "merges")}
            changed = edit_value(draw, part, self.values)
            changed["model"] |= {key: whole["model"][key] for key in ("vocab", "merges")}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return "left as it is"
        file.write_bytes(json_text(changed))
        return f"tokenizer.json: { ({k: v for k, v in changed.items() if k != 'model'})!r:.300}"

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        return ask(place, lambda: elsewhere.tokenized(place / "cache", place / "model"))

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        file = place / "model/tokenizer.json"
        theirs = ask(place, lambda: elsewhere.encoded(documents(), file))
        if theirs is None:
            return other("took a tokenizer.json that tokenizers refuses")
        if theirs == outcome:
            return Verdict(VALID)
        return other("other tokens than tokenizer.json's", f"{outcome!r:.1000}\ntokenizer.json: {theirs!r:.1000}")
