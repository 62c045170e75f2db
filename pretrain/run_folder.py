"""One run, one folder: claim it, decide whether to continue what is in it, and refuse to continue something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pretrain.checkpoint.atomic import missing_or_torn
from pretrain.checkpoint.store import Store, read_state
from pretrain.console import log_to, notice
from pretrain.data.fingerprint import Files, differing, recall, remember
from pretrain.errors import UserError
from pretrain.folders import say_if_shared
from pretrain.optim.learning_rate import AUTO, change, stable_until, with_lr
from pretrain.place import Place
from pretrain.replace import replace_file
from pretrain.telemetry.jsonl import tail
from pretrain.telemetry.run_file import read_run_file

FIXED = {  # part of a run's identity → the config keys it follows from
    "model": ("model_name", "model"),
    "tokenizer": ("model_name", "model"),
    "data": ("dataset",),
    "sequence_length": ("sequence_length",),
    "global_batch": ("batch_size", "gradient_accumulation_steps", "devices"),
    "seed": ("seed",),
    "weights": ("precision",),
    "optimizer": ("optimizer",),
}
FREE = {  # may differ in a run that is over; of the batch only its product counts, which is compared before
    *("name", "output_dir", "task", "resume", "resume_allow", "allow_targets", "devices", "strategy", "launch"),
    *("sweep", "sweep_dir"),
    *("batch_size", "gradient_accumulation_steps", "log_every", "evaluate_every", "save_every"),
    *("sink", "checkpoint", "evaluation", "generation", "guard", "telemetry"),
}

LATER = ("dataset.bos", "dataset.separator")  # keys that the configs of earlier runs lack
DATA = "data.json"  # the files of the training data, as the run has read them
RUN_ID = ".run_id"  # of the command whose processes have last claimed the folder
PATIENCE_SECONDS = 1.0  # the workers of a killed command need a moment to notice


@dataclass(frozen=True)
class RunFolder:
    """``output_dir``, claimed by this process until it ends."""

    path: Path
    lock: FileLock

    def write_config(self, resolved: dict[str, Any], overrides: list[str]) -> str:
        """Write config.yaml and .hydra/overrides.yaml; return the former's text. Raises ``UserError``: a full disk."""
        text = OmegaConf.to_yaml(OmegaConf.create(resolved))
        with _writing(self.path):
            replace_file(self.path / "config.yaml", text)
            (self.path / ".hydra").mkdir(exist_ok=True)
            (self.path / ".hydra" / "config.yaml").write_text(text)
            (self.path / ".hydra" / "overrides.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(overrides)))
        return text


@dataclass(frozen=True)
class Start:
    """How a run begins: from which checkpoint, its config.yaml, and the peak learning rate."""

    resume_from: Path | None
    config_yaml: str
    lr: float


def begin(
    resolved: dict[str, Any],
    overrides: list[str],
    identity: dict[str, Any],
    steps: int,
    *,
    model_config: dict[str, Any],
    lr_by_size: Callable[[], float],
    files: Files,
    place: Place,
    store: Store,
    claims: ExitStack,
) -> Start | None:
    """Claim output_dir until ``claims`` ends, and decide what to continue in it; ``None``: it holds this very run,
    finished. ``lr_by_size``: the peak learning rate of a new run with ``lr=auto``.

    Raises ``UserError`` when the folder can't be had, or holds a run that this one can't continue. After a restart of
    the workers ``resume=never`` and a named checkpoint have done their work: the run's own newest checkpoint counts.
    """
    again = place.restarts > 0 and claimed_by(Path(resolved["output_dir"])) == place.run_id
    folder = claim(resolved["output_dir"], start_over=resolved["resume"] == "never" and not again)
    claims.callback(folder.lock.release)
    if (folder.path / "model").exists() and not (folder.path / "config.yaml").exists() and not store.steps():
        raise UserError(
            f"output_dir={folder.path}: its folder `model` is no run's and would be replaced; choose another"
        )
    with _writing(folder.path):
        (folder.path / RUN_ID).write_text(place.run_id)
    mode = "auto" if again and resolved["resume"] == "never" else resolved["resume"]
    resume_from = resume_point(folder, store, mode)
    facts = read_run_file(folder.path)
    asked, resolved = resolved["lr"], with_lr(resolved, chosen_lr(resolved, resume_from, lr_by_size))
    if resume_from is not None:
        changed_files = differing(recall(folder.path / DATA), files)
        check_same_run(resume_from, identity, resolved, model_config=model_config, files=changed_files)
        own = resume_from.resolve().parent == store.folder.resolve()
        store.set_aside_after(step_of(resume_from) if own else -1)  # from elsewhere: all here is another branch
        if step_of(resume_from) >= steps and facts.get("status") == "finished" and _end_is_told(folder.path, resolved):
            check_finished_run(resume_from, resolved)
            model = f"model in {facts['model']}" if facts["model"] else "no model was exported"
            notice(f"{folder.path} is finished: {facts['steps']} steps; {model}")
            if not facts["model"]:
                notice(f"to export it: task=export model_name={folder.path} output_dir={folder.path}")
            notice("to train longer raise max_steps or number_epochs; to start over add resume=never")
            return None
        say_lr_change(resume_from, resolved, steps)
    if asked == AUTO:
        why = "by the model's size; docs/runs.md" if resume_from is None else "as this run has had it so far"
        notice(f"lr=auto: {resolved['lr']:g} ({why})")
    with _writing(folder.path):
        remember(folder.path / DATA, files)
    return Start(resume_from, folder.write_config(resolved, overrides), resolved["lr"])


def chosen_lr(resolved: dict[str, Any], resume_from: Path | None, by_size: Callable[[], float]) -> float:
    """The peak that the config gives, else that of the run that is continued, else that of the model's size."""
    if resolved["lr"] != AUTO:
        return float(resolved["lr"])
    earlier = read_config(resume_from).get("lr") if resume_from is not None else None
    return float(earlier) if isinstance(earlier, int | float) and earlier > 0 else by_size()


def say_lr_change(checkpoint: Path, resolved: dict[str, Any], steps: int) -> None:
    """Say where the learning rate leaves its curve because the run has another length, peak or schedule than before."""
    old, run, step = read_config(checkpoint), checkpoint.resolve().parents[1], step_of(checkpoint)
    planned = read_run_file(run).get("total_steps")
    if not isinstance(planned, int) or planned < 1 or step < 1:
        return
    found = change(old, planned, resolved, steps, step=step)
    if found is None:
        return
    better = ""
    if steps > planned and found[1] > found[0]:
        better = (
            f": the schedule was made for {planned} steps and is now for {steps}. Better: a new run that warms up again, "
            f"model_name={run} output_dir=...; or {_before_decay(old, planned, run)} (docs/runs.md)"
        )
    verb = "jumps" if found[1] > found[0] else "drops"
    notice(f"the learning rate {verb} from {found[0]:.3g} to {found[1]:.3g} at step {step + 1}{better}")


def _end_is_told(run: Path, resolved: dict[str, Any]) -> bool:
    """Whether metrics.jsonl has the record of a finished run's end: a crash or a full disk may have kept it out."""
    told = any(record.get("status") == "finished" for record in tail(run / "metrics.jsonl"))
    return told or "jsonl" not in resolved["sink"]


def claimed_by(path: Path) -> str | None:
    """The id of the command whose processes have last claimed the folder."""
    file = path / RUN_ID
    return file.read_text() if file.exists() else None


def claim(output_dir: str, *, start_over: bool) -> RunFolder:
    """Make the folder and lock it; with ``start_over`` an earlier run in it is moved aside, never deleted.

    Raises ``UserError`` when it can't be written or another process runs in it.
    """
    path = Path(output_dir)
    try:
        lock = _locked(path)
        if start_over and (path / "config.yaml").exists():
            notice(f"resume=never: the earlier run is kept as {_move_aside(path)}")
            lock.release()
            lock = _locked(path)
        (path / "logs").mkdir(exist_ok=True)
        log_to(path / "logs" / "rank-0.log")
        (path / ".lock").write_text(f"{os.uname().nodename} {os.getpid()}\n")
        for folder in (path, path / "checkpoints"):
            if folder.exists():
                say_if_shared(folder)
    except Timeout:
        holder = (path / ".lock").read_text().strip() or "unknown"
        raise UserError(f"output_dir={output_dir}: another run is at work in it (host and pid: {holder})") from None
    except OSError as error:
        raise UserError(f"output_dir={output_dir}: can't be written: {error.strerror}") from None
    return RunFolder(path, lock)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir={path}: can't be written: {error.strerror}") from error


def _locked(path: Path) -> FileLock:
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / ".lock")
    lock.acquire(timeout=PATIENCE_SECONDS)
    return lock


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def resume_point(folder: RunFolder, store: Store, mode: str) -> Path | None:
    """The checkpoint to continue from: the newest whole one (``auto``), the one named, the newest whole one of the run
    named, or none (``never``).

    A run that was stopped after it had gone on from a named one goes on from its own newest when the same command comes
    again. Raises ``UserError`` when the named one is no whole checkpoint, the named run has none.
    """
    if mode == "never":
        return None
    if mode == "auto" or _continues(folder, mode):
        newest = store.newest()
        if mode == "auto" or newest is not None:
            return newest
    named = Path(mode)
    if (named / "checkpoints").is_dir():
        newest = replace(store, folder=named / "checkpoints").newest()
        if newest is None:
            raise UserError(f"resume={mode}: a run without a whole checkpoint")
        return newest
    if not (named / "state.json").is_file():
        raise UserError(
            f"resume={mode}: not a checkpoint folder; allowed: auto, never, <run>/checkpoints/step-…, or <run>"
        )
    reason = missing_or_torn(named, verify=store.policy.verify)
    if reason is not None:
        raise UserError(f"resume={mode}: not a whole checkpoint: {reason}")
    return named


def _continues(folder: RunFolder, mode: str) -> bool:
    """Whether the run in ``folder`` is the one that this very ``resume=`` began."""
    config = folder.path / "config.yaml"
    return config.exists() and read_config(folder.path).get("resume") == mode


def read_config(folder: Path) -> dict[Any, Any]:
    """config.yaml of a run or a checkpoint. Raises ``UserError`` when it is no YAML mapping of plain values."""
    file = folder / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{file} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} can't be read: not a mapping of keys to values")
    return config


def step_of(checkpoint: Path) -> int:
    """The step at which a checkpoint was made."""
    return int(read_state(checkpoint)["progress"]["step"])


def recorded_batch_size(checkpoint: Path | None, *, device: str) -> int | None:
    """The micro-batch of the run that ``checkpoint`` is of, where it ran on such a ``device``: the same again gives the
    same last bits."""
    facts = read_run_file(checkpoint.parents[1]) if checkpoint is not None else {}
    return facts.get("batch_size") if facts.get("device") == device else None


def check_same_run(
    checkpoint: Path, identity: dict[str, Any], resolved: dict[str, Any], *, model_config: dict[str, Any], files: str
) -> None:
    """Raises ``UserError`` listing old and new values when ``checkpoint`` is of a run with another model, tokenizer,
    data, sequence length, global batch or seed; such a run can't be continued exactly. ``model_config``: the model's
    config.json of now; ``files``: which ones of the data are others now."""
    before = read_state(checkpoint)["identity"]
    changed = [p for p in FIXED if before.get(p) != identity[p] and p not in resolved["resume_allow"]]
    if not changed:
        return
    earlier = read_config(checkpoint)
    old = with_later_keys(earlier, resolved)
    reasons = []
    for part in changed:
        keys = [d for d in differences(old, resolved) if d.split(".")[0].split(":")[0] in FIXED[part]]
        why = " (the files changed since the run began)" if part in ("model", "tokenizer", "data") else ""
        if part == "data" and files:
            keys.append(f"the data is not what the run began with: {files}")
        if part == "data" and not keys and old != earlier:
            keys.append(
                f"{'; '.join(LATER)}: the run began without BOS before documents; {LATER[0]}=false continues it"
            )
        reasons += keys or [f"{part}: {before.get(part)} → {identity[part]}{why}"]
        if part == "model":
            reasons += other_shape(checkpoint, model_config)
    raise UserError(
        f"{checkpoint} can't be continued with other settings: {'; '.join(dict.fromkeys(reasons))}. "
        "Choose another output_dir, or resume=never to start over"
        f"{_allowing(changed)}"
    )


def other_shape(checkpoint: Path, model_config: dict[str, Any]) -> list[str]:
    """The numbers of the model's config that are others in the checkpoint's, as ``differences`` tells them."""
    try:
        saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    both = [key for key in model_config if key in saved and isinstance(saved[key], int)]
    return differences({key: saved[key] for key in both}, {key: model_config[key] for key in both})


def _allowing(changed: list[str]) -> str:
    if "model" in changed:
        return ""
    return f"; or continue, no longer exactly, with resume_allow=[{','.join(changed)}]"


def check_finished_run(checkpoint: Path, resolved: dict[str, Any]) -> None:
    """Raises ``UserError`` when the finished run whose last ``checkpoint`` it is was made with other settings than these."""
    old = with_later_keys(read_config(checkpoint), resolved)
    changed = [d for d in differences(old, resolved) if d.split(".")[0].split(":")[0] not in FREE]
    if changed:
        raise UserError(
            f"output_dir={resolved['output_dir']} holds a finished run with other settings: {'; '.join(changed)}. "
            "Choose another output_dir, or resume=never to start over"
        )


def _before_decay(old: dict[Any, Any], planned: int, run: Path) -> str:
    """How a run with scheduler=wsd, or the next one, is extended without a jump."""
    first = stable_until(old, planned)
    if first is None:
        return "scheduler=wsd from the start, which can be extended from a checkpoint before its decay"
    return f"resume={run}/checkpoints/step-... of at most step {first}, before its decay"


def with_later_keys(old: dict[Any, Any], new: dict[str, Any]) -> dict[Any, Any]:
    """The config of a run begun before there were ``LATER`` keys, with the values of ``new`` for those that it lacks: what
    they do to the run is in its identity."""
    for path in LATER:
        group, _, key = path.partition(".")
        node = old.get(group)
        if isinstance(node, dict) and key not in node and key in new[group]:
            old = old | {group: node | {key: new[group][key]}}
    return old


def differences(old: dict[Any, Any], new: dict[Any, Any], prefix: str = "") -> list[str]:
    """``["lr: 0.1 → 0.2", …]`` for every leaf that differs, in the order of the new config."""
    found = []
    for key in dict.fromkeys([*new, *old]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} → {after}")
    return found
