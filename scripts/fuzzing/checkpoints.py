"""Checkpoints: every file of a run's newest ones. They have checksums: the run that continues ends with the weights and moments
of the undisturbed one, from the edited checkpoint or the one before, or says what is wrong; no other file is lost."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.kind import BEFORE, Base, Kind, Verdict, ask, edit_place
from fuzzing.sample import SMALL, documents, write_texts
from fuzzing.sandbox import Result, command

STEPS, SAVED = 6, (2, 4)  # of the run; of its checkpoints that are there when it continues
RUN = [
    "dataset=local",
    "dataset.nameOrPath=data",
    "dataset.held_out=0.25",
    *SMALL,
    f"max_steps={STEPS}",
    "save_every=2",
]
RUN += [
    "evaluate_every=4",
    "log_every=1",
    "sink=[jsonl]",
    "checkpoint.keep_last=null",
    "checkpoint.async=false",
    "output_dir=run",
]
PAIR = ["strategy=fsdp", "devices=2", "batch_size=1"]


def newest(run: Path) -> Path:
    return run / f"checkpoints/step-{SAVED[-1]:08d}"


def interrupted(place: Path, model: Path, *, ranks: int = 1) -> list[str]:
    """A copy in ``place`` of a run that was interrupted after its last step in ``SAVED``; its command. It is made once, beside
    the model, by so many ``ranks``."""
    made = model.with_name(f"interrupted-{ranks}")
    if not made.exists():
        made.mkdir()
        make_run(made, model, ranks=ranks)
    shutil.copytree(made, place, symlinks=True, dirs_exist_ok=True)
    return ["model_name=model", *RUN]


def make_run(place: Path, model: Path, *, ranks: int) -> None:
    write_texts(place / "data", documents(24))
    shutil.copytree(model, place / "model")
    arguments = ["model_name=model", *RUN]
    given = [
        *(word for word in arguments if ranks == 1 or not word.startswith("batch_size=")),
        *(PAIR if ranks == 2 else []),
    ]
    done = command(given, place, real=ranks > 1)
    if done.code:
        raise RuntimeError(f"the run to be interrupted ends with {done.code}:\n{done.err}")
    for step in range(SAVED[-1] + 1, STEPS + 1):
        shutil.rmtree(place / f"run/checkpoints/step-{step:08d}", ignore_errors=True)
    shutil.rmtree(place / "run/model", ignore_errors=True)
    status = place / "run/run.json"
    status.write_text(
        json.dumps(json.loads(status.read_text()) | {"status": "running", "steps": SAVED[-1], "model": None})
    )
    for name in (".out", ".err"):
        (place / name).unlink(missing_ok=True)


def digests(folder: Path) -> dict[str, str]:
    """Name → hash of every file below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def last_state(run: Path) -> dict[str, str]:
    """Hashes of weights and moments after the last step, and of the exported model."""
    last = run / f"checkpoints/step-{STEPS:08d}"
    found = {name: digest for name, digest in digests(last).items() if name.endswith(".safetensors")}
    return found | {f"model/{n}": d for n, d in digests(run / "model").items() if n.endswith(".safetensors")}


def continued_from(run: Path) -> int | None:
    """The step at which the last start of the run began."""
    from pretrain.telemetry.sinks.jsonl import read_records

    steps = [record["step"] for record in read_records(run / "metrics.jsonl") if record["event"] == "run_started"]
    return steps[-1] if steps else None


class Checkpoints(Kind):
    name = "checkpoints"
    variants = ("resumed", "resumed full", "of two ranks", "named", "evaluated", "both")
    names = ("resume=", "checkpoints/", "model_name=", "output_dir=")

    def make(self, variant: str, place: Path) -> Base:
        arguments = interrupted(place, self.model, ranks=2 if variant == "of two ranks" else 1)
        arguments.append(f"checkpoint.verify={'full' if variant != 'resumed' else 'size'}")
        path = newest(Path("run"))
        if variant == "named":
            arguments += ["output_dir=other", f"resume={path}"]
        if variant == "evaluated":
            arguments += ["output_dir=other", "task=evaluation", f"model_name={path}"]
        return Base(place, arguments, notes={"variant": variant, "files": digests(place / "run/checkpoints")})

    def editable(self, base: Base, place: Path) -> list[Path]:
        folders = [newest(place / "run")]
        if base.notes["variant"] == "both":
            folders = sorted((place / "run/checkpoints").glob("step-*"))
        return [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file() or file.is_symlink()]

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        """Half of the edits are of what says what a checkpoint is: the marker and state.json; some of the folder itself."""
        chosen = draw.random()
        folder = newest(place / "run")
        if chosen < 0.03:
            return f"{folder.name}: {edit_place(draw, folder, sorted(folder.parent.iterdir()))}"
        file = folder / draw.choice(["COMPLETE.json", "state.json"])
        if chosen < 0.5 and file.is_file():
            return self.edit_one(draw, file, place)
        return super().edit(draw, base, place)

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        if base.notes["variant"] == "evaluated":
            from fuzzing.models import first_loss

            return first_loss(place / "other/metrics.jsonl")
        return last_state(place / ("other" if base.notes["variant"] == "named" else "run"))

    def judge(self, base: Base, place: Path, result: Result, changed: list[str]) -> Verdict:
        verdict = super().judge(base, place, result, changed)
        if verdict.what != "same" or base.notes["variant"] in ("named", "evaluated"):
            return verdict
        step = ask(place, lambda: continued_from(place / "run"))
        return Verdict(BEFORE) if step != SAVED[-1] else verdict

    def differs(self, base: Base, place: Path, result: Result, outcome: Any) -> Verdict:
        """Steps that two ranks had trained and one trains again end in other last bits: as without the edited checkpoint."""
        if base.notes["variant"] != "of two ranks":
            return super().differs(base, place, result, outcome)
        if "before" not in base.notes:
            trial = self.folder / "before.trial"
            shutil.copytree(base.folder, trial, symlinks=True)
            shutil.rmtree(newest(trial / "run"))
            base.notes["before"] = self.outcome(base, trial, command(base.arguments, trial))
            shutil.rmtree(trial)
        step = ask(place, lambda: continued_from(place / "run"))
        is_before = step == SAVED[0] and outcome == base.notes["before"]
        return Verdict(BEFORE) if is_before else super().differs(base, place, result, outcome)

    def lost(self, base: Base, place: Path, changed: list[str]) -> str:
        """A file of a checkpoint that was not edited, and is not there any more as it was."""
        now = set(digests(place / "run").values())
        for name, digest in base.notes["files"].items():
            if digest not in now and Path(name).name not in changed and Path(name).parts[0] not in changed:
                return Path(name).name
        return ""


class Runs(Kind):
    """What else lies in output_dir, of a run that was interrupted or has finished, and the token cache. Records and texts for
    people may be lost where the file was edited; the weights are the undisturbed run's, or the command says what is wrong."""

    name = "runs"
    variants = ("interrupted", "finished", "stray", "cache")
    names = ("output_dir", "run/", "cache/", "token cache", "dataset")

    def make(self, variant: str, place: Path) -> Base:
        arguments = [word for word in interrupted(place, self.model) if not word.startswith("sink=")]
        arguments.append("sink=[jsonl,csv,report,console]")
        if variant == "finished":
            done = command(arguments, place)
            if done.code:
                raise RuntimeError(f"the run to be finished ends with {done.code}:\n{done.err}")
        if variant != "cache":
            shutil.rmtree(place / "cache", ignore_errors=True)
        (place / "outside").write_text("nothing here is the run's")
        return Base(place, arguments, notes={"variant": variant})

    def editable(self, base: Base, place: Path) -> list[Path]:
        top = place / ("cache" if base.notes["variant"] == "cache" else "run")
        every = sorted(
            p for p in top.rglob("*") if "checkpoints" not in p.parts and "model" not in p.relative_to(place).parts
        )
        return [path for path in every if path.is_file() or path.is_symlink()]

    def edit(self, draw: Random, base: Base, place: Path) -> str:
        if base.notes["variant"] == "stray" and draw.random() < 0.7:
            return stray(draw, place / "run")
        if base.notes["variant"] == "cache":
            return self.edit_cache(draw, base, place)
        if draw.random() < 0.15:
            path = draw.choice(self.editable(base, place))
            path.unlink()
            path.symlink_to("../outside" if path.parent.name == "run" else "../../outside")
            return f"{path.relative_to(place)}: a link out of the folder"
        return super().edit(draw, base, place)

    def edit_cache(self, draw: Random, base: Base, place: Path) -> str:
        """Any edit of its JSON; of tokens, which have no checksum of their own, what a disk does that lost its last writes."""
        file = draw.choice(self.editable(base, place))
        raw = file.read_bytes() if file.is_file() else b""
        if file.suffix != ".tokens" or len(raw) < 2:  # or an earlier edit has emptied it
            return self.edit_one(draw, file, place)
        kind = draw.choice(["cut", "gone", "empty", "zeros at the end", "longer", "footer"])
        changed = {"cut": raw[: draw.randrange(len(raw))], "empty": b"", "longer": raw + b"\x00" * 64}
        at = len(raw) - draw.randrange(1, min(len(raw), 180))  # of the footer, which is JSON
        changed["footer"] = raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(7)]) + raw[at + 1 :]
        changed["zeros at the end"] = raw[: -min(len(raw), 200)] + bytes(200)
        file.unlink() if kind == "gone" else file.write_bytes(changed[kind])
        return f"{file.relative_to(place)}: {kind}"

    def outcome(self, base: Base, place: Path, result: Result) -> Any:
        return last_state(place / "run")

    def judge(self, base: Base, place: Path, result: Result, changed: list[str]) -> Verdict:
        verdict = super().judge(base, place, result, changed)
        if verdict.fine and (place / "outside").read_text() != "nothing here is the run's":
            return Verdict("other", "wrote through a link out of the run folder", "\n".join(changed))
        return verdict

    def lost(self, base: Base, place: Path, changed: list[str]) -> str:
        kept, now = digests(base.folder / "run/checkpoints"), set(digests(place / "run").values())
        kept |= digests(base.folder / "run/model")
        return next((name for name, digest in kept.items() if digest not in now), "")


def stray(draw: Random, run: Path) -> str:
    """A file or folder in the run folder that the run did not make."""
    names = [
        "checkpoints/step-00000009",
        "checkpoints/step-x",
        "checkpoints/step-00000004.partial",
        "checkpoints/notes.txt",
    ]
    names += [
        "checkpoints/step-00000004.replaced",
        "checkpoints/step-99999999999999999999",
        "checkpoints/step-00000002.removed",
    ]
    names += [
        "checkpoints/step-٣",
        "checkpoints/step-4",
        "model",
        "models",
        "run.json.bak",
        "logs/rank-0.log.1",
        "samples",
        ".x",
    ]
    path = run / draw.choice(names)
    content: Any = draw.choice([None, b"", b"{}", b"\xff" * 10, json.dumps({"format": 3, "files": {}}).encode()])
    if path.exists() or path.is_symlink():
        return f"{path.name}: there already"
    if draw.random() < 0.6 or content is None:
        path.mkdir(parents=True)
        if content is not None:
            (path / draw.choice(["COMPLETE.json", "state.json", "config.json"])).write_bytes(content)
    else:
        path.write_bytes(content)
    return f"{path.name}: new, {content!r}"
