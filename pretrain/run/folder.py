"""The run folder (``output_dir``): lock it, decide whether the run in it is resumed, and refuse to resume another run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from pretrain.checkpoint.schema import read_state
from pretrain.checkpoint.store import CheckpointStore
from pretrain.checkpoint.train_state import TrainState
from pretrain.data.changed_files import differing, load_files, save_files
from pretrain.distributed.rank_info import RankInfo
from pretrain.run.fingerprint import changed_settings, check_finished_run, check_same_run
from pretrain.run.leftovers import (
    FILES,
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
from pretrain.run.peak_lr import chosen_lr, report_lr, report_lr_change
from pretrain.run.recorded_use import record_use
from pretrain.runtime.console import log_to, notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import make_folder, open_file, own_folder, replace_file
from pretrain.runtime.folders import check_links, check_private
from pretrain.runtime.locks import Busy, Lock
from pretrain.telemetry.run_file import read_run_file
from pretrain.telemetry.sinks.jsonl import tail

OWN_NAMES = (".lock", RUN_ID, ".hydra", "logs", "logs/*", "tensorboard", "wandb", "samples.jsonl")
PATIENCE_SECONDS = 1.0  # wait for the lock: the workers of a killed command need a moment to exit

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig
    from pretrain.run.prepare import Prepared


@dataclass(frozen=True)
class RunFolder:
    """An ``output_dir`` that this process has locked until it exits."""

    path: Path
    lock: Lock

    def write_config(self, config: RunConfig, overrides: list[str]) -> str:
        """Write config.yaml and .hydra/overrides.yaml, and return the text of config.yaml.

        Raises ``UserError`` where a file can't be written, for example on a full disk.
        """
        text = OmegaConf.to_yaml(OmegaConf.create(config.plain))
        with _write_errors_reported(self.path):
            if not (self.path / RUN_ID).exists():  # tasks without workers have no id, but the folder is marked as ours
                replace_file(self.path / RUN_ID, "")
            replace_file(self.path / "config.yaml", text)
            hydra = own_folder(self.path / ".hydra")
            replace_file(hydra / "config.yaml", text)
            replace_file(hydra / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
        return text


@dataclass(frozen=True)
class Start:
    """How a run starts: the checkpoint that it resumes from, the text of its config.yaml, and the peak learning rate."""

    resume_from: Path | None
    config_yaml: str
    lr: float


def begin(
    config: RunConfig,
    overrides: list[str],
    prepared: Prepared,
    *,
    place: RankInfo,
    store: CheckpointStore,
    claims: ExitStack,
) -> Start | None:
    """Lock output_dir until ``claims`` is closed, and decide from which checkpoint the run in it resumes.

    After a restart of the workers, ``resume=never`` and a named checkpoint are no longer applied: the run resumes from its
    own newest checkpoint.

    Args:
        config: The config of the run.
        overrides: The words of the command line, written to .hydra/overrides.yaml.
        prepared: The model and the data of the run.
        place: This process among all ranks.
        store: The checkpoints of the folder.
        claims: Receives the release of the lock.

    Returns:
        How the run starts; ``None`` where the folder holds this same run and it is finished.

    Raises:
        UserError: The folder can't be used, or it holds a run that can't be resumed with this config.
    """
    is_restart = place.restarts > 0 and claimed_by(Path(config.output_dir)) == place.run_id
    folder = claim(config.output_dir, start_over=config.resume == "never" and not is_restart)
    claims.callback(folder.lock.release)
    check_task(folder.path, "pretraining")
    mode = "auto" if is_restart and config.resume == "never" else config.resume
    continues = mode in ("auto", "never") or _continues(folder, mode)
    resume_from = resume_point(folder, store, mode)
    lr = chosen_lr(config, resume_from, prepared.model.num_parameters)
    requested_lr, config = config.lr, config.with_lr(lr)
    if not _has_work(folder.path, resume_from, config, prepared):
        return None
    folder = _without_other_branches(folder, resume_from, config, store, continues=continues, claims=claims)
    if resume_from is not None:
        report_lr_change(resume_from, config, prepared.total_steps)
    report_lr(requested_lr, float(config.lr), continued=resume_from is not None)
    with _write_errors_reported(folder.path):
        replace_file(folder.path / RUN_ID, place.run_id)
        save_files(folder.path / FILES, prepared.train.files)
        record_use(folder.path, prepared)
    return Start(resume_from, folder.write_config(config, overrides), float(config.lr))


def _has_work(folder: Path, resume_from: Path | None, config: RunConfig, prepared: Prepared) -> bool:
    """Return whether the run is not finished yet. Raises ``UserError`` if it can't be resumed with this config."""
    steps = prepared.total_steps
    if resume_from is None:
        return _may_start(folder, config, steps)
    files = differing(load_files(folder / FILES), prepared.train.files)
    check_same_run(resume_from, prepared.identity, config, model_config=prepared.model.config(), files=files)
    check_not_beyond(resume_from, config, steps)
    return not finished(folder, resume_from, config, steps)


def _without_other_branches(
    folder: RunFolder,
    resume_from: Path | None,
    config: RunConfig,
    store: CheckpointStore,
    *,
    continues: bool,
    claims: ExitStack,
) -> RunFolder:
    """Return the folder after the run of another branch in it was moved aside, or the checkpoints after the one of
    ``resume_from`` were archived."""
    aside = not continues and not _is_inside(resume_from, folder.path) and bool(found_in(folder.path))
    if aside or (resume_from is None and must_move_aside(folder.path, config)):
        folder = start_over(folder)
        claims.callback(folder.lock.release)
    elif resume_from is not None:
        own = resume_from.resolve().parent == store.folder.resolve()
        # After a resume from another folder, every checkpoint in this one belongs to another branch of the run.
        store.archive_after(step_of(resume_from) if own else -1)
    return folder


def check_task(folder: Path, task: str) -> None:
    """Raise ``UserError`` for a folder that holds the results of another task than ``task``."""
    found = task_of(folder) or (task if not found_in(folder, ("checkpoints", "model", "models")) else "pretraining")
    if found != task:
        kind = "an evaluation" if found == "evaluation" else f"a {found} run"
        raise UserError(f"output_dir={folder} holds {kind}; choose another output_dir for the {task}")


def finished(folder: Path, resume_from: Path, config: RunConfig, steps: int) -> bool:
    """Return whether the run in ``folder`` is finished, and report it if so.

    Raises ``UserError`` when it is finished but was made with other settings.
    """
    facts = read_run_file(folder)
    if (
        not _at_the_end(resume_from, config, steps)
        or facts.get("status") != "finished"
        or not _end_is_recorded(folder, config)
    ):
        return False
    check_finished_run(read_config(resume_from), config)  # model and data were compared before, by content
    report_finished(folder, facts)
    return True


def _at_the_end(checkpoint: Path, config: RunConfig, steps: int) -> bool:
    """Return whether a run that has come to ``checkpoint`` trains no further step."""
    progress = TrainState()
    progress.load_state_dict(read_state(checkpoint)["progress"])
    return progress.step >= steps or config.stop_when.reason(progress) is not None


def report_finished(folder: Path, facts: dict[str, Any]) -> None:
    """Report that the run is finished, and how to export it, extend it or start over."""
    model = f"model in {facts['model']}" if facts.get("model") else "no model was exported"
    notice(f"{folder} is finished: {facts.get('steps')} steps; {model}")
    if not facts.get("model"):
        notice(f"to export it: task=export model_name={folder} output_dir={folder}")
    if facts.get("stopped_by"):
        notice(f"it ended before its last step by stop_when: {facts['stopped_by']}")
    notice("to train longer raise max_steps or number_epochs; to start over add resume=never")


def _may_start(folder: Path, config: RunConfig, steps: int) -> bool:
    """Return whether a run may start at step 0 in a folder without a checkpoint to resume from.

    It returns ``False`` where the folder holds this same run, finished. It raises ``UserError`` where the folder holds
    another run that has saved a checkpoint or a model, because a new run would overwrite it.
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
            f"output_dir={folder} holds {describe(folder)} without a checkpoint to resume from, with other settings: "
            f"{'; '.join(changed)}. Choose another output_dir, or resume=never to move it aside and start over"
        )
    if facts.get("status") == "finished":
        report_finished(folder, facts)
        return False
    return True


def must_move_aside(folder: Path, config: RunConfig) -> bool:
    """Return whether the content of a folder without a checkpoint to resume from must be moved aside.

    Only the records of this same run, killed before its first checkpoint, are not moved: the run is about to write them
    again.
    """
    if has_saved(folder):
        return True
    same = (folder / "config.yaml").exists() and not changed_settings(read_config(folder), config.plain)
    return has_trained(folder) and not same


def _is_inside(path: Path | None, folder: Path) -> bool:
    return path is not None and folder.resolve() in path.resolve().parents


def _end_is_recorded(run: Path, config: RunConfig) -> bool:
    """Return whether metrics.jsonl has the run's last record, which a crash or a full disk may have prevented."""
    is_recorded = any(record.get("status") == "finished" for record in tail(run / "metrics.jsonl"))
    return is_recorded or "jsonl" not in config.plain["sink"]


def claimed_by(path: Path) -> str | None:
    """Return the id of the command whose processes locked the folder last; ``None`` where there was none."""
    file = path / RUN_ID
    return file.read_text() if file.exists() else None


def claim(output_dir: str, *, start_over: bool = False, foreign: bool = False) -> RunFolder:
    """Create and lock the run folder.

    Args:
        output_dir: Path of the folder.
        start_over: Move an earlier run in the folder aside. Nothing is deleted.
        foreign: Accept a folder with files that no run has written.

    Raises:
        UserError: The folder can't be written, another process uses it, or it holds files that no run has written.
    """
    path = Path(output_dir)
    try:
        with ExitStack() as undo:
            folder = RunFolder(path, _locked(path))
            undo.callback(folder.lock.release)
            if not foreign:
                check_not_foreign(path)
            if start_over and found_in(path):
                folder = _move_aside_and_lock(folder, "resume=never: ")
            else:
                _open_logs(path)
            undo.pop_all()
    except Busy:
        holder = (path / ".lock").read_text().strip() or "unknown"
        raise UserError(f"output_dir={output_dir}: another run is using it (host and pid: {holder})") from None
    except OSError as error:
        raise UserError(f"output_dir={output_dir}: can't be written: {error.strerror}") from None
    return folder


def start_over(folder: RunFolder) -> RunFolder:
    """Move the content of a locked folder aside, and lock a new, empty folder in its place."""
    with _write_errors_reported(folder.path):
        return _move_aside_and_lock(folder, "")


def _move_aside_and_lock(folder: RunFolder, why: str) -> RunFolder:
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
def _write_errors_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"output_dir={path}: can't be written: {error.strerror}") from error


def _locked(path: Path) -> Lock:
    make_folder(Path(os.path.realpath(path)))  # a link's target may have been moved aside
    check_private(path, "output_dir")
    check_links(path, "output_dir", (*RESULTS, *SETTINGS, *OWN_NAMES))
    return Lock(path / ".lock").acquire(timeout=PATIENCE_SECONDS)


def resume_point(folder: RunFolder, store: CheckpointStore, mode: str) -> Path | None:
    """Return the checkpoint to resume from, by the value of ``resume``.

    ``auto`` is the newest complete checkpoint of the folder and ``never`` is none. A checkpoint's path is that checkpoint,
    and a run's path is that run's newest complete checkpoint. A run that has already resumed from a named checkpoint and was
    stopped later resumes from its own newest checkpoint when the same command is repeated.

    Raises ``UserError`` when the named checkpoint is incomplete, or the named run has no complete one.
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
    reason = store.reason(named)
    if reason is not None:
        raise UserError(f"resume={mode}: not a complete checkpoint: {reason}")
    return named


def _continues(folder: RunFolder, mode: str) -> bool:
    """Return whether the run in ``folder`` was started with this same ``resume=``."""
    config = folder.path / "config.yaml"
    return config.exists() and read_config(folder.path).get("resume") == mode


def step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was saved."""
    return int(read_state(checkpoint)["progress"]["step"])


def recorded_batch_size(checkpoint: Path | None, *, device: str) -> int | None:
    """Return the micro-batch with which the run of ``checkpoint`` ran on the same kind of ``device``, else ``None``.

    The same micro-batch gives the same losses to the last bit.
    """
    facts = read_run_file(run_of(checkpoint)) if checkpoint is not None else {}
    return facts.get("batch_size") if facts.get("device") == device else None


def check_not_beyond(checkpoint: Path, config: RunConfig, steps: int) -> None:
    """Raise ``UserError`` when ``checkpoint`` was saved at a later step than this run's last step, ``steps``."""
    reached = step_of(checkpoint)
    if reached > steps:
        key = "max_steps" if config.max_steps else "number_epochs"
        came = "" if config.max_steps else f" ({steps} steps)"
        raise UserError(
            f"{key}={getattr(config, key)}{came}: {checkpoint} is at step {reached} already. Choose at least {reached} steps, an "
            "earlier checkpoint (resume=<run>/checkpoints/step-…), another output_dir, or resume=never to start over"
        )
