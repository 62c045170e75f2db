"""Configs: flat YAML files, files of --config-dir, command lines. A run that ends as it should, or a line that says what is
wrong; and nothing that a file names is executed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzzing.edits import edit_bytes, edit_yaml
from fuzzing.kind import VALID, Base, Kind, Verdict, other
from fuzzing.sample import documents, write_texts
from fuzzing.sandbox import Result

OWNED = "owned"  # the file that code of somebody else would make
EVIL = f"open({OWNED!r}, 'w').close()\ndef run(*a, **k):\n    open({OWNED!r}, 'w').close()\nclass Evil:\n    pass\n"
# Plain values behind what was edited, which keep a run small and in its folder.
GUARD = [
    "output_dir=run",
    "devices=1",
    "max_steps=1",
    "batch_size=2",
    "sequence_length=16",
    "gradient_accumulation_steps=1",
]
GUARD += [
    "evaluation.max_tokens=100",
    "evaluation.samples=0",
    "dataset.num_workers=1",
    "launch.nodes=1",
    "resume=never",
    "task=pretraining",
]
FLAT: dict[str, Any] = {
    "task": "pretraining",
    "output_dir": "run",
    "model_name": "model",
    "precision": "32-true",
    "number_epochs": 1,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "lr": 1e-4,
    "lr_scheduler": "cosine",
    "warmup_proportion": 0.1,
    "weight_decay": 0.01,
    "beta1": 0.9,
    "beta2": 0.999,
    "grad_clip": 1.0,
    "seed": 3,
    "dataset": {"source": "local", "nameOrPath": "data"},
    "parallelization_strategy": "none",
    "gradient_checkpointing": False,
    "sequence_length": 16,
    "max_steps": 1,
    "logging_config": "none",
    "save_on_end": True,
}
EXPERIMENT = """# @package _global_
defaults:
  - override /optimizer: mine
  - override /dataset: local
  - override /evaluation: new_only
lr: 0.001
model_name: model
max_steps: 1
dataset:
  nameOrPath: data
"""
WORDS = [
    "model_name=model",
    "dataset=local",
    "dataset.nameOrPath=data",
    "evaluation=new_only",
    "lr=1e-3",
    "scheduler=linear",
]
WORDS += ["precision=32-true", "seed=1", "checkpoint.keep_last=1", "guard.spike=ignore", "warmup_proportion=0.1"]
ODD_WORDS = [
    "--lr=1e-3",
    "--resolve",
    "--version",
    "-c",
    "lr",
    "=",
    "lr=",
    "=1",
    "++lr=2",
    "~lr",
    "~dataset",
    "+a.b=1",
    "lr==1",
]
ODD_WORDS += [
    "a b=c",
    "lr=[1,2",
    "lr={a:",
    "lr='x",
    'lr="x',
    "lr=${x}",
    "lr=${oc.env:HOME}",
    "lr=nan",
    "lr=inf",
    "lr=-1",
    "lr=1e400",
]
ODD_WORDS += [
    "seed=18446744073709551616",
    f"max_steps={'9' * 400}",
    "experiment=x",
    "model=x",
    "dataset=[local,sample]",
    "sink=[x]",
]
ODD_WORDS += [
    "dataset@x=local",
    "dataset@dataset.x=local",
    "hydra.run.dir=x",
    "hydra.verbose=true",
    "hydra/job_logging=x",
    "name=..",
]
ODD_WORDS += [
    "optimizer._target_=evil.run",
    "+optimizer._args_=[1]",
    "allow_targets=[evil.Evil]",
    "scheduler._target_=os.system",
]
ODD_WORDS += [
    "+hydra.callbacks.x._target_=evil.run",
    "hydra.searchpath=[file://.]",
    "+hydra.job.env_set.A=b",
    "nameOrPath=data",
]
ODD_WORDS += [
    "dataset.name=книги",
    "name=lang=de",
    "name={x}",
    "dataset.pattern=*",
    "dataset.pattern=../*",
    "model.overrides={a:1}",
]
TARGETS = [
    "evil.run",
    "evil.Evil",
    "os.system",
    "builtins.eval",
    "pandas.read_pickle",
    "pretrain.config.trust.locate",
    "torch.load",
]
TARGETS += [
    "pretrain.sweep.command.sweep",
    "pretrain.data.tokenization.workers.subprocess.Popen",
    "pretrain.cli.main.main",
    "pretrain.optim.adamw",
]


class Configs(Kind):
    name = "configs"
    variants = ("flat", "flat shown", "folder", "folder shown", "words", "words shown")

    def make(self, variant: str, place: Path) -> Base:
        form, _, shown = variant.partition(" ")
        write_texts(place / "data", documents(24))
        shutil.copytree(self.model, place / "model")
        (place / "evil.py").write_text(EVIL)
        (place / "run.yaml").write_text(yaml.safe_dump(FLAT, sort_keys=False))
        for group, name, text in (("experiment", "theirs", EXPERIMENT), ("optimizer", "mine", optimizer_yaml())):
            (place / "theirs" / group).mkdir(parents=True)
            (place / "theirs" / group / f"{name}.yaml").write_text(text)
        first = {
            "flat": ["--config", "run.yaml", "evaluation=new_only"],
            "folder": ["--config-dir", "theirs", "experiment=theirs"],
            "words": WORDS,
        }
        last = ["--cfg", "job"] if shown else GUARD
        return Base(place, [*first[form], *last], notes={"form": form, "shown": bool(shown), "last": last})

    def editable(self, base: Base, place: Path) -> list[Path]:
        form = base.notes["form"]
        return [place / "run.yaml"] if form == "flat" else sorted((place / "theirs").rglob("*.yaml"))

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        if base.notes["form"] == "words":
            return "words"  # by `arguments`
        file = draw.choice(self.editable(base, place))
        raw = file.read_bytes()
        if draw.random() < 0.2:
            target = draw.choice(TARGETS)
            partial = draw.choice(
                [b"", b"_partial_: true\n", b"target: evil.run\ntrusted: [evil.run]\n", b"_args_: [1]\n"]
            )
            head = raw if draw.random() < 0.5 else b""
            where = draw.choice(
                [b"", b"optimizer:\n  ", b"checkpoint:\n  ", b"sink:\n  x:\n    ", b"dataset:\n  x:\n    "]
            )
            file.write_bytes(head + b"\n" + where + f"_target_: {target}\n".encode() + (partial if not where else b""))
            return f"{file.name}: {target} under {where!r}"
        changed = edit_yaml(draw, raw, self.values) if draw.random() < 0.7 else None
        file.write_bytes(edit_bytes(draw, raw) if changed is None else changed)
        return f"{file.name}: {file.read_bytes()[:200]!r}"

    def arguments(self, draw: Random, base: Base, place: Path) -> list[str]:
        if base.notes["form"] != "words":
            return base.arguments
        words = list(WORDS)
        for _ in range(draw.choice([1, 1, 2, 3])):
            at = draw.randrange(len(words))
            kind = draw.choice(["odd", "odd", "value", "key", "gone", "twice", "letters"])
            key, _, value = words[at].partition("=")
            if kind == "odd":
                words.insert(at, draw.choice(ODD_WORDS))
            elif kind == "value":
                new = self.values.near(draw, value)
                words[at] = f"{key}={new if isinstance(new, str) else json.dumps(new)}"
            elif kind == "key":
                words[at] = (
                    f"{draw.choice([key[:-1], key + 'x', key.upper(), '+' + key, key.replace('.', '/')])}={value}"
                )
            elif kind == "letters":
                words[at] = edit_bytes(draw, words[at].encode()).decode("utf-8", "surrogateescape")[:1000]
            else:
                words[at : at + 1] = [] if kind == "gone" else [words[at]] * 2
        return [word.replace("\0", "") for word in words if word != "-m"] + base.notes["last"]

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        if base.notes["shown"]:
            return result.out
        from pretrain.telemetry.run_file import read_run_file

        return read_run_file(place / "run").get("status")

    def judge(self, base: Base, place: Path, result: Result, changed: list[str]) -> Verdict:
        if any(place.rglob(OWNED)):
            return other("code of somebody else has run", result.err[-3000:])
        return super().judge(base, place, result, [])

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        """Of another config that is valid: what is shown is YAML, a run has finished and its records hold numbers."""
        if re.fullmatch(r"pretrain \S+\n", result.out):  # --version among the words
            return Verdict(VALID)
        if base.notes["shown"]:
            try:
                shown = yaml.safe_load(result.out)
            except yaml.YAMLError as error:
                return other("what --cfg shows is no YAML", f"{error}\n{result.out[:2000]}")
            is_text = "--help" in result.out or not isinstance(shown, dict)
            return other("what --cfg shows is no config", result.out[:2000]) if is_text else Verdict(VALID)
        return other("a run that ended with 0 has not finished", f"run.json says {outcome!r}\n{result.err[-2000:]}")


def optimizer_yaml() -> str:
    """The shipped optimizer under another name."""
    return (Path(__file__).resolve().parents[2] / "conf/optimizer/adamw.yaml").read_text()
