"""One run, one folder: claim it, decide whether to continue what is in it, and refuse to continue something else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pretrain.checkpoint.schema import read_state, validation_error
from pretrain.checkpoint.store import Store
from pretrain.console import log_to, notice
from pretrain.data.fingerprint import Files, differing, recall, remember
from pretrain.errors import UserError
from pretrain.folders import say_if_shared
from pretrain.leftovers import (
    LATER,
    RUN_ID,
    check_not_foreign,
    describe,
    found_in,
    has_saved,
    has_trained,
    move_aside,
    read_config,
    task_of,
    with_later_keys,
)
from pretrain.locks import Busy, Lock
from pretrain.lr_of_run import chosen_lr, say_lr, say_lr_change
from pretrain.optim.learning_rate import with_lr
from pretrain.place import Place
from pretrain.replace import replace_file
from pretrain.strict_json import read_json
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

DATA = "data.json"  # the files of the training data, as the run has read them
PATIENCE_SECONDS = 1.0  # the workers of a killed command need a moment to notice


@dataclass(frozen=True)
class RunFolder:
    """``output_dir``, claimed by this process until it ends."""

    path: Path
    lock: Lock

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
    check_task(folder.path, "pretraining")
    mode = "auto" if again and resolved["resume"] == "never" else resolved["resume"]
    continues = mode in ("auto", "never") or _continues(folder, mode)
    resume_from = resume_point(folder, store, mode)
    asked, resolved = resolved["lr"], with_lr(resolved, chosen_lr(resolved, resume_from, lr_by_size))
    if resume_from is not None:
        changed_files = differing(recall(folder.path / DATA), files)
        check_same_run(resume_from, identity, resolved, model_config=model_config, files=changed_files)
        check_not_beyond(resume_from, resolved, steps)
        if finished(folder.path, resume_from, resolved, steps):
            return None
    elif not _may_begin(folder.path, resolved, steps):
        return None
    aside = not continues and not _is_inside(resume_from, folder.path) and bool(found_in(folder.path))
    if aside or (resume_from is None and is_left_behind(folder.path, resolved)):
        folder = start_over(folder)
        claims.callback(folder.lock.release)
    elif resume_from is not None:
        own = resume_from.resolve().parent == store.folder.resolve()
        store.set_aside_after(step_of(resume_from) if own else -1)  # from elsewhere: all here is another branch
    if resume_from is not None:
        say_lr_change(resume_from, resolved, steps)
    say_lr(asked, resolved["lr"], continued=resume_from is not None)
    with _writing(folder.path):
        (folder.path / RUN_ID).write_text(place.run_id)
        remember(folder.path / DATA, files)
    return Start(resume_from, folder.write_config(resolved, overrides), resolved["lr"])


def check_task(folder: Path, task: str) -> None:
    """Raises ``UserError`` for a folder with the results of another task than ``task``."""
    found = task_of(folder) or (task if not found_in(folder, ("checkpoints", "model", "models")) else "pretraining")
    if found != task:
        kind = "an evaluation" if found == "evaluation" else f"a {found} run"
        raise UserError(f"output_dir={folder} holds {kind}; choose another output_dir for the {task}")


def finished(folder: Path, resume_from: Path, resolved: dict[str, Any], steps: int) -> bool:
    """Whether the run in ``folder`` is over and nothing is left to do; then it is said.

    Raises ``UserError`` when it is, but of other settings.
    """
    facts = read_run_file(folder)
    if step_of(resume_from) < steps or facts.get("status") != "finished" or not _end_is_told(folder, resolved):
        return False
    check_finished_run(read_config(resume_from), resolved)
    say_finished(folder, facts)
    return True


def say_finished(folder: Path, facts: dict[str, Any]) -> None:
    model = f"model in {facts['model']}" if facts.get("model") else "no model was exported"
    notice(f"{folder} is finished: {facts.get('steps')} steps; {model}")
    if not facts.get("model"):
        notice(f"to export it: task=export model_name={folder} output_dir={folder}")
    notice("to train longer raise max_steps or number_epochs; to start over add resume=never")


def _may_begin(folder: Path, resolved: dict[str, Any], steps: int) -> bool:
    """Whether a run may begin at step 0 in a folder without a checkpoint to continue from; False: it holds this very run,
    finished.

    Raises ``UserError`` where it holds another run that has come to a checkpoint: to train over it would lose it.
    """
    if resolved["resume"] == "never" or not has_saved(folder):
        return True
    facts = read_run_file(folder)
    changed = (
        _changed(read_config(folder), resolved) if (folder / "config.yaml").exists() else ["config.yaml is missing"]
    )
    if changed:
        raise UserError(
            f"output_dir={folder} holds {describe(folder)} without a checkpoint that could be continued, with other settings: "
            f"{'; '.join(changed)}. Choose another output_dir, or resume=never to keep it aside and start over"
        )
    if facts.get("status") == "finished":
        say_finished(folder, facts)
        return False
    return True


def is_left_behind(folder: Path, resolved: dict[str, Any]) -> bool:
    """Whether what lies in a folder without a checkpoint to continue from must be kept aside: all but the records of this
    very run up to a kill before its first checkpoint, which are about to be made again."""
    if has_saved(folder):
        return True
    same = (folder / "config.yaml").exists() and not _changed(read_config(folder), resolved)
    return has_trained(folder) and not same


def _is_inside(path: Path | None, folder: Path) -> bool:
    return path is not None and folder.resolve() in path.resolve().parents


def _end_is_told(run: Path, resolved: dict[str, Any]) -> bool:
    """Whether metrics.jsonl has the record of a finished run's end: a crash or a full disk may have kept it out."""
    told = any(record.get("status") == "finished" for record in tail(run / "metrics.jsonl"))
    return told or "jsonl" not in resolved["sink"]


def claimed_by(path: Path) -> str | None:
    """The id of the command whose processes have last claimed the folder."""
    file = path / RUN_ID
    return file.read_text() if file.exists() else None


def claim(output_dir: str, *, start_over: bool = False, foreign: bool = False) -> RunFolder:
    """Make the folder and lock it; with ``start_over`` an earlier run in it is moved aside, never deleted. ``foreign``: what
    lies there may be anybody's.

    Raises ``UserError`` when it can't be written, another process runs in it, or it holds files that are no run's.
    """
    path = Path(output_dir)
    try:
        lock = _locked(path)
        if not foreign:
            check_not_foreign(path)
        folder = RunFolder(path, lock)
        if start_over and found_in(path):
            return _renewed(folder, "resume=never: ")
        _open_logs(path)
    except Busy:
        holder = (path / ".lock").read_text().strip() or "unknown"
        raise UserError(f"output_dir={output_dir}: another run is at work in it (host and pid: {holder})") from None
    except OSError as error:
        raise UserError(f"output_dir={output_dir}: can't be written: {error.strerror}") from None
    return folder


def start_over(folder: RunFolder) -> RunFolder:
    """Keep what lies in a claimed folder aside, and claim a new one in its place."""
    with _writing(folder.path):
        return _renewed(folder, "")


def _renewed(folder: RunFolder, why: str) -> RunFolder:
    aside = move_aside(folder.path)
    folder.lock.moved(aside / ".lock")
    folder.lock.release()
    lock = _locked(folder.path)
    _open_logs(folder.path)
    notice(f"{why}the earlier run is kept as {aside}")
    return RunFolder(folder.path, lock)


def _open_logs(path: Path) -> None:
    (path / "logs").mkdir(exist_ok=True)
    log_to(path / "logs" / "rank-0.log")
    (path / ".lock").write_text(f"{os.uname().nodename} {os.getpid()}\n")
    for folder in (path, path / "checkpoints"):
        if folder.exists():
            say_if_shared(folder)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir={path}: can't be written: {error.strerror}") from error


def _locked(path: Path) -> Lock:
    os.makedirs(os.path.realpath(path), exist_ok=True)  # where a link leads to, once that was moved aside
    return Lock(path / ".lock").acquire(timeout=PATIENCE_SECONDS)


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
    reason = validation_error(named, verify=store.policy.verify)
    if reason is not None:
        raise UserError(f"resume={mode}: not a whole checkpoint: {reason}")
    return named


def _continues(folder: RunFolder, mode: str) -> bool:
    """Whether the run in ``folder`` is the one that this very ``resume=`` began."""
    config = folder.path / "config.yaml"
    return config.exists() and read_config(folder.path).get("resume") == mode


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


def check_not_beyond(checkpoint: Path, resolved: dict[str, Any], steps: int) -> None:
    """Raises ``UserError`` when ``checkpoint`` was made at a later step than the last one of this run, ``steps``."""
    reached = step_of(checkpoint)
    if reached > steps:
        key = "max_steps" if resolved["max_steps"] else "number_epochs"
        came = "" if resolved["max_steps"] else f" ({steps} steps)"
        raise UserError(
            f"{key}={resolved[key]}{came}: {checkpoint} is at step {reached} already. Choose at least {reached} steps, an "
            "earlier checkpoint (resume=<run>/checkpoints/step-…), another output_dir, or resume=never to start over"
        )


def other_shape(checkpoint: Path, model_config: dict[str, Any]) -> list[str]:
    """The numbers of the model's config that are others in the checkpoint's, as ``differences`` tells them."""
    try:
        saved = read_json(checkpoint / "config.json")
    except (OSError, ValueError):
        return []
    if not isinstance(saved, dict):
        return []
    both = [key for key in model_config if key in saved and isinstance(saved[key], int)]
    return differences({key: saved[key] for key in both}, {key: model_config[key] for key in both})


def _allowing(changed: list[str]) -> str:
    if "model" in changed:
        return ""
    return f"; or continue, no longer exactly, with resume_allow=[{','.join(changed)}]"


def check_finished_run(old: dict[Any, Any], resolved: dict[str, Any]) -> None:
    """Raises ``UserError`` when the finished run of the config ``old`` was made with other settings than these."""
    if changed := _changed(old, resolved):
        raise UserError(
            f"output_dir={resolved['output_dir']} holds a finished run with other settings: {'; '.join(changed)}. "
            "Choose another output_dir, or resume=never to start over"
        )


def _changed(old: dict[Any, Any], resolved: dict[str, Any]) -> list[str]:
    """The settings of a run that are others now, but for those that may differ in one that is over."""
    old = with_later_keys(old, resolved)
    return [d for d in differences(old, resolved) if d.split(".")[0].split(":")[0] not in FREE]


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
