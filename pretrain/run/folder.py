"""One run, one folder: claim it, decide whether to continue what is in it, and refuse to continue something else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from pretrain.checkpoint.schema import read_state, validation_error
from pretrain.checkpoint.store import CheckpointStore
from pretrain.data.changed_files import Files, differing, load_files, save_files
from pretrain.distributed.rank_info import RankInfo
from pretrain.run.fingerprint import changed_settings, check_finished_run, check_same_run
from pretrain.run.leftovers import (
    RESULTS,
    RUN_ID,
    SETTINGS,
    check_not_foreign,
    describe,
    found_in,
    has_saved,
    has_trained,
    move_aside,
    read_config,
    run_of,
    task_of,
)
from pretrain.run.peak_lr import chosen_lr, say_lr, say_lr_change
from pretrain.runtime.atomic_files import replace_file
from pretrain.runtime.console import log_to, notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.folders import check_links, check_private, make_folder
from pretrain.runtime.locks import Busy, Lock
from pretrain.runtime.safe_files import open_file, own_folder
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import tail

OWN_NAMES = (".lock", RUN_ID, ".hydra", "logs", "logs/*", "tensorboard", "wandb", "samples.jsonl")
DATA = "data.json"  # the files of the training data, as the run has read them
PATIENCE_SECONDS = 1.0  # the workers of a killed command need a moment to notice

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class RunFolder:
    """``output_dir``, claimed by this process until it ends."""

    path: Path
    lock: Lock

    def write_config(self, config: RunConfig, overrides: list[str]) -> str:
        """Write config.yaml and .hydra/overrides.yaml; return the former's text. Raises ``UserError``: a full disk."""
        text = OmegaConf.to_yaml(OmegaConf.create(config.plain))
        with _writing(self.path):
            if not (self.path / RUN_ID).exists():  # of a task without workers, but what follows is ours all the same
                replace_file(self.path / RUN_ID, "")
            replace_file(self.path / "config.yaml", text)
            hydra = own_folder(self.path / ".hydra")
            replace_file(hydra / "config.yaml", text)
            replace_file(hydra / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
        return text


@dataclass(frozen=True)
class Start:
    """How a run begins: from which checkpoint, its config.yaml, and the peak learning rate."""

    resume_from: Path | None
    config_yaml: str
    lr: float


def begin(
    config: RunConfig,
    overrides: list[str],
    identity: dict[str, Any],
    steps: int,
    *,
    model_config: dict[str, Any],
    lr_by_size: Callable[[], float],
    files: Files,
    place: RankInfo,
    store: CheckpointStore,
    claims: ExitStack,
) -> Start | None:
    """Claim output_dir until ``claims`` ends, and decide what to continue in it; ``None``: it holds this very run,
    finished. ``lr_by_size``: the peak learning rate of a new run with ``lr=auto``.

    Raises ``UserError`` when the folder can't be had, or holds a run that this one can't continue. After a restart of
    the workers ``resume=never`` and a named checkpoint have done their work: the run's own newest checkpoint counts.
    """
    again = place.restarts > 0 and claimed_by(Path(config.output_dir)) == place.run_id
    folder = claim(config.output_dir, start_over=config.resume == "never" and not again)
    claims.callback(folder.lock.release)
    check_task(folder.path, "pretraining")
    mode = "auto" if again and config.resume == "never" else config.resume
    continues = mode in ("auto", "never") or _continues(folder, mode)
    resume_from = resume_point(folder, store, mode)
    asked, config = config.lr, config.with_lr(chosen_lr(config, resume_from, lr_by_size))
    if resume_from is not None:
        changed_files = differing(load_files(folder.path / DATA), files)
        check_same_run(resume_from, identity, config, model_config=model_config, files=changed_files)
        check_not_beyond(resume_from, config, steps)
        if finished(folder.path, resume_from, config, steps):
            return None
    elif not _may_begin(folder.path, config, steps):
        return None
    aside = not continues and not _is_inside(resume_from, folder.path) and bool(found_in(folder.path))
    if aside or (resume_from is None and is_left_behind(folder.path, config)):
        folder = start_over(folder)
        claims.callback(folder.lock.release)
    elif resume_from is not None:
        own = resume_from.resolve().parent == store.folder.resolve()
        store.archive_after(step_of(resume_from) if own else -1)  # from elsewhere: all here is another branch
    if resume_from is not None:
        say_lr_change(resume_from, config, steps)
    say_lr(asked, float(config.lr), continued=resume_from is not None)
    with _writing(folder.path):
        replace_file(folder.path / RUN_ID, place.run_id)
        save_files(folder.path / DATA, files)
    return Start(resume_from, folder.write_config(config, overrides), float(config.lr))


def check_task(folder: Path, task: str) -> None:
    """Raises ``UserError`` for a folder with the results of another task than ``task``."""
    found = task_of(folder) or (task if not found_in(folder, ("checkpoints", "model", "models")) else "pretraining")
    if found != task:
        kind = "an evaluation" if found == "evaluation" else f"a {found} run"
        raise UserError(f"output_dir={folder} holds {kind}; choose another output_dir for the {task}")


def finished(folder: Path, resume_from: Path, config: RunConfig, steps: int) -> bool:
    """Whether the run in ``folder`` is over and nothing is left to do; then it is said.

    Raises ``UserError`` when it is, but of other settings.
    """
    facts = read_run_file(folder)
    if step_of(resume_from) < steps or facts.get("status") != "finished" or not _end_is_told(folder, config):
        return False
    check_finished_run(read_config(resume_from), config)  # of the same content, or it would have been refused
    say_finished(folder, facts)
    return True


def say_finished(folder: Path, facts: dict[str, Any]) -> None:
    model = f"model in {facts['model']}" if facts.get("model") else "no model was exported"
    notice(f"{folder} is finished: {facts.get('steps')} steps; {model}")
    if not facts.get("model"):
        notice(f"to export it: task=export model_name={folder} output_dir={folder}")
    notice("to train longer raise max_steps or number_epochs; to start over add resume=never")


def _may_begin(folder: Path, config: RunConfig, steps: int) -> bool:
    """Whether a run may begin at step 0 in a folder without a checkpoint to continue from; False: it holds this very run,
    finished.

    Raises ``UserError`` where it holds another run that has come to a checkpoint: to train over it would lose it.
    """
    if config.resume == "never" or not has_saved(folder):
        return True
    facts = read_run_file(folder)
    changed = (
        changed_settings(read_config(folder), config.plain)
        if (folder / "config.yaml").exists()
        else ["config.yaml is missing"]
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


def is_left_behind(folder: Path, config: RunConfig) -> bool:
    """Whether what lies in a folder without a checkpoint to continue from must be kept aside: all but the records of this
    very run up to a kill before its first checkpoint, which are about to be made again."""
    if has_saved(folder):
        return True
    same = (folder / "config.yaml").exists() and not changed_settings(read_config(folder), config.plain)
    return has_trained(folder) and not same


def _is_inside(path: Path | None, folder: Path) -> bool:
    return path is not None and folder.resolve() in path.resolve().parents


def _end_is_told(run: Path, config: RunConfig) -> bool:
    """Whether metrics.jsonl has the record of a finished run's end: a crash or a full disk may have kept it out."""
    told = any(record.get("status") == "finished" for record in tail(run / "metrics.jsonl"))
    return told or "jsonl" not in config.plain["sink"]


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
        with ExitStack() as refused:
            folder = RunFolder(path, _locked(path))
            refused.callback(folder.lock.release)
            if not foreign:
                check_not_foreign(path)
            if start_over and found_in(path):
                folder = _renewed(folder, "resume=never: ")
            else:
                _open_logs(path)
            refused.pop_all()
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
    log_to(own_folder(path / "logs") / "rank-0.log")
    with os.fdopen(open_file(path / ".lock", os.O_WRONLY, truncate=True), "w") as lock:
        lock.write(f"{os.uname().nodename} {os.getpid()}\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir={path}: can't be written: {error.strerror}") from error


def _locked(path: Path) -> Lock:
    make_folder(Path(os.path.realpath(path)))  # where a link leads to, once that was moved aside
    check_private(path, "output_dir")
    check_links(path, "output_dir", (*RESULTS, *SETTINGS, *OWN_NAMES))
    return Lock(path / ".lock").acquire(timeout=PATIENCE_SECONDS)


def resume_point(folder: RunFolder, store: CheckpointStore, mode: str) -> Path | None:
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
            raise UserError(f"resume={mode}: a run without a complete checkpoint")
        return newest
    if not (named / "state.json").is_file():
        raise UserError(
            f"resume={mode}: not a checkpoint folder; allowed: auto, never, <run>/checkpoints/step-…, or <run>"
        )
    reason = validation_error(named, verify=store.policy.verify)
    if reason is not None:
        raise UserError(f"resume={mode}: not a complete checkpoint: {reason}")
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
    facts = read_run_file(run_of(checkpoint)) if checkpoint is not None else {}
    return facts.get("batch_size") if facts.get("device") == device else None


def check_not_beyond(checkpoint: Path, config: RunConfig, steps: int) -> None:
    """Raises ``UserError`` when ``checkpoint`` was made at a later step than the last one of this run, ``steps``."""
    reached = step_of(checkpoint)
    if reached > steps:
        key = "max_steps" if config.max_steps else "number_epochs"
        came = "" if config.max_steps else f" ({steps} steps)"
        raise UserError(
            f"{key}={getattr(config, key)}{came}: {checkpoint} is at step {reached} already. Choose at least {reached} steps, an "
            "earlier checkpoint (resume=<run>/checkpoints/step-…), another output_dir, or resume=never to start over"
        )
