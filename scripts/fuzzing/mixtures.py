"""Mixtures: weights, phases, replay, lists of places, conditions and templates. A run whose shares are those that it says, or one
line."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.edits import edit_bytes
from fuzzing.kind import VALID, Base, Kind, Verdict, other
from fuzzing.sample import SMALL, documents, sentences, write_texts
from fuzzing.sandbox import Result

STEPS, BATCH, LENGTH = 8, 2, 16
LAST = [
    "output_dir=run",
    "devices=1",
    f"max_steps={STEPS}",
    "gradient_accumulation_steps=1",
    "log_every=1",
    "evaluation.samples=0",
]
LAST += [
    "save_every=null",
    "evaluate_every=null",
    "resume=never",
    "sink=[console,jsonl]",
    "dataset.parts.a.num_workers=1",
]
SETTINGS: dict[str, list[Any]] = {
    "dataset.weights.a": [0, 1, 3, 0.1, 1e-9],
    "dataset.weights.b": [0, 1, 3, 0.1, 1e9],
    "dataset.temperature": [1, 3, 0.01, 1e6],
    "dataset.max_epochs.a": [1, 4, 0.5, 1e9],
    "dataset.loss_weights.b": [0, 1, 0.5, 100, 101],
    "dataset.document_mask": [True, False],
    "replay.share": [0, 0.1, 0.5, 0.999, 1],
    "phases": [
        [],
        [{"from": 0.5, "weights": {"a": 1}}],
        [{"from": 0.25, "replay_share": 0.5}, {"from": 0.75, "weights": {"a": 1, "b": 1}, "replay_share": 0}],
        [{"from": 0.9}, {"from": 0.1, "weights": {"c": 1}}],
    ],
    "dataset.parts.a.nameOrPath": [
        ["a", "b"],
        ["a/00.txt", "a"],
        "a/*.txt",
        ["a/00.txt", "a/0?.txt"],
        ["a", "nowhere"],
        [],
    ],
    "dataset.parts.a.packing": ["stream", "best_fit", "tight"],
    "dataset.parts.a.deduplicate": [True, "exact", "near", False],
    "dataset.parts.a.held_out": [0, 0.5, 0.99, 1],
    "dataset.parts.a.max_tokens": [1, 300, 10**9],
    "dataset.parts.a.train_data_ratio": [0.5, 1e-9, 1],
    "dataset.parts.a.where": [
        "len(text) > 5",
        "words(text) < 3",
        "repeated_lines(text) < 0.5 and not contains(text, 'x')",
    ],
    "dataset.parts.b.where": [
        "lang == 'es' and score > 0.5",
        "0.2 < score < 0.9 or lang in ('es', 'pt')",
        "meta.n % 2 == 0",
        "number(lang) > 1",
        "matches(text, r'^[A-Z]')",
        "score is None or score >= 0",
        "column('lang') == lower('ES')",
    ],
    "dataset.parts.b.text_template": ["{title}: {text}", "{text}", "{{{lang}}}\\n{text}", "{meta}", "{nothing}"],
    "dataset.parts.b.text_column": ["text", "title", "score", "none"],
    "dataset.parts.b.fim_rate": [0, 0.5, 2],
}


class Mixtures(Kind):
    name = "mixtures"
    variants = ("mixture", "mixture without replay", "one dataset with replay")

    def make(self, variant: str, place: Path) -> Base:
        write_texts(place / "a", documents(24))
        write_texts(place / "old", [sentences(100 + i, 4) for i in range(24)])
        (place / "b").mkdir()
        rows = [
            {
                "text": sentences(50 + i, 3),
                "title": f"Title {i}",
                "lang": ("es", "pt", "en")[i % 3],
                "score": i / 40,
                "meta": {"n": i},
            }
            for i in range(40)
        ]
        (place / "b/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = [f"model_name={self.model}", *(word for word in SMALL if not word.startswith("evaluation="))]
        words += ["dataset@evaluation.domains.base=local", "evaluation.domains.base.nameOrPath=old"]
        if variant == "one dataset with replay":
            words += ["dataset=local", "dataset.nameOrPath=a", "replay.share=0.25"]
        else:
            words += ["dataset=mixture", "dataset@dataset.parts.a=local", "dataset.parts.a.nameOrPath=a"]
            words += ["dataset@dataset.parts.b=local", "dataset.parts.b.nameOrPath=b", "dataset.weights={a: 3, b: 1}"]
            words += (
                []
                if variant.endswith("without replay")
                else ["replay.share=0.25", "phases=[{from: 0.5, weights: {b: 1}}]"]
            )
        last = [word.replace("parts.a.", "") if "mixture" not in variant else word for word in LAST]
        return Base(place, [*words, *last], notes={"words": words, "last": last, "mixed": "mixture" in variant})

    def editable(self, base: Base, place: Path) -> list[Path]:
        return []

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        """The edits are those of the words; sometimes one of the text, too."""
        if draw.random() < 0.1:
            return self.edit_one(draw, place / draw.choice(["b/rows.jsonl", "a/00.txt"]), place)
        return "words"

    def arguments(self, draw: Random, base: Base, place: Path) -> list[str]:
        added = []
        for _ in range(draw.choice([1, 1, 2, 3, 5])):
            key = draw.choice(sorted(SETTINGS))
            value: Any = draw.choice(SETTINGS[key])
            if draw.random() < 0.3:
                value = self.values.near(draw, value)
                value = value[:1000].encode("utf-8", "ignore").decode() if isinstance(value, str) else value
            text = value if isinstance(value, str) else json.dumps(value)[:2000]
            if draw.random() < 0.15:
                text = edit_bytes(draw, text.encode()).decode("utf-8", "ignore")[:1000]
            if isinstance(value, str):
                text = "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
            key = key if base.notes["mixed"] else key.replace("parts.a.", "").replace("parts.b.", "")
            added.append(f"{key}={text}".replace("\0", ""))
        return [*base.notes["words"], *added, *base.notes["last"]]

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        from pretrain.telemetry.sinks.jsonl import read_records

        records = list(read_records(place / "run/metrics.jsonl"))
        data = [record for record in records if record["event"] == "data"]
        ended = any(record.get("status") == "finished" for record in records)
        return [ended, data[-1]["parts"] if data else None]

    def judge(self, base: Base, place: Path, result: Result, changed: list[str]) -> Verdict:
        return super().judge(base, place, result, [])  # a refusal names a key

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        """Another mixture: all steps are done, and each part has its share but for a sample in each phase."""
        ended, parts = outcome
        if not ended or not parts:
            return other("a run that ended with 0 has no end or no parts", f"{outcome!r}\n{result.err[-2000:]}")
        total = sum(part["tokens"] for part in parts.values())
        if total > STEPS * BATCH * LENGTH:
            return other("more tokens than samples have", repr(outcome))
        if total < STEPS * BATCH * LENGTH or not all(part["wanted"] is not None for part in parts.values()):
            return Verdict(VALID)  # a mask or padding: its targets are known only to the loader
        for name, part in parts.items():
            if abs(part["tokens"] / LENGTH - part["wanted"] * STEPS * BATCH) > 3:
                return other("a share that is not kept", f"{name}: {outcome!r}")
        return Verdict(VALID)
