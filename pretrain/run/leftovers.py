"""Inspect what an earlier command has left in a folder, so that the next command overwrites nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.config.defaults import defaults_for, own_default
from pretrain.config.trust import with_moved_targets
from pretrain.config.yaml_file import read_yaml
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import move
from pretrain.telemetry.run_file import read_run_file

RUN_ID = ".run_id"  # file with the id of the command whose processes locked the folder last
RESULTS = (  # files and folders that took time to compute
    *("checkpoints", "model", "models", "averages", "metrics.jsonl", "run.json", "report.html", "quarantine.jsonl"),
    *("train.csv", "evaluation.csv", "metric.csv", "layers.csv", "data.csv", "parts.csv"),
)
FILES = "data.json"  # lists the files of the training data, as the run has read them
TOKENS = "tokens.json"  # names the datasets of the token cache that the run uses
SETTINGS = ("config.yaml", FILES, TOKENS, ".hydra/config.yaml", ".hydra/overrides.yaml")
MAX_NAMED = 4
LATER_KEYS = ("dataset.bos", "dataset.separator")  # keys that the configs of earlier runs lack


def found_in(folder: Path, names: tuple[str, ...] = RESULTS) -> list[str]:
    """Return those of ``names`` that exist in ``folder`` and are not empty."""
    return [name for name in names if _is_nonempty(folder / name)]


def _is_nonempty(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.is_symlink() or (path.exists() and path.stat().st_size > 0)


def is_run(folder: Path) -> bool:
    """Return whether a command of this program has used the folder.

    File names alone don't show it, because many programs write a config.yaml.
    """
    own = (folder / RUN_ID).exists() or "status" in read_run_file(folder)
    return own or any((folder / "checkpoints").glob("step-*/COMPLETE.json"))


def run_of(checkpoint: Path) -> Path:
    """Return the run folder that contains ``checkpoint``; the path may be relative or contain links."""
    return checkpoint.resolve().parent.parent


def check_not_foreign(folder: Path) -> None:
    """Raise ``UserError`` for a folder in which another program has files under the names that a run writes."""
    found = found_in(folder, (*RESULTS, *SETTINGS))
    if found and not is_run(folder):
        verb = "was" if len(found) == 1 else "were"
        raise UserError(
            f"output_dir={folder}: {_listed(found)} in it {verb} not written by a run and would be replaced; choose another"
        )


def task_of(folder: Path) -> str | None:
    """Return the task whose results the folder holds; ``None`` where there are none or the task is unknown."""
    if not found_in(folder) or not (folder / "config.yaml").exists():
        return None
    return str(read_config(folder).get("task", "pretraining"))


def has_saved(folder: Path) -> bool:
    """Return whether the run in the folder has saved a checkpoint or a model, even if these were deleted since."""
    made = [p for name in ("checkpoints", "models") for p in (folder / name).glob("*step-*") if not p.suffix]
    if made or found_in(folder, ("model",)) or read_run_file(folder).get("status") == "finished":
        return True  # names with a suffix were not counted: they were being written or removed
    return any(b'"event": "checkpoint"' in line for line in _lines(folder / "metrics.jsonl"))


def has_trained(folder: Path) -> bool:
    """Return whether metrics.jsonl has the record of a training step."""
    return any(b'"event": "train"' in line for line in _lines(folder / "metrics.jsonl"))


def _lines(file: Path) -> Iterator[bytes]:
    if file.is_file():
        with file.open("rb") as lines:
            yield from lines


def describe(folder: Path) -> str:
    """Return a description such as ``a run of 20 steps (finished; metrics.jsonl, model)``."""
    facts = read_run_file(folder)
    steps = f" of {facts['steps']} steps" if isinstance(facts.get("steps"), int) else ""
    status = f"{facts['status']}; " if isinstance(facts.get("status"), str) else ""
    return f"a run{steps} ({status}{_listed(found_in(folder))})"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def move_aside(path: Path) -> Path:
    """Rename the folder, or the target of a link, to ``<name>.old-<number>`` and return the new path.

    Raises ``UserError`` where it can't be renamed.
    """
    real = Path(os.path.realpath(path))
    if real in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"output_dir={path}: the earlier run in it can't be moved aside, you are in it; choose another")
    number = 1
    while os.path.lexists(aside := real.with_name(f"{real.name}.old-{number}")):
        number += 1
    try:
        move(real, aside)
    except OSError as error:  # a mount point, a folder above that can't be written
        raise UserError(
            f"output_dir={path}: the earlier run in it can't be moved aside: {error.strerror}; choose another"
        ) from None
    return aside


def keep_aside(file: Path) -> Path | None:
    """Rename a file to ``<name>.old-<number><suffix>`` and return the new path; ``None`` where there is no such file."""
    if not os.path.lexists(file):
        return None
    number = 1
    while os.path.lexists(aside := file.with_name(f"{file.stem}.old-{number}{file.suffix}")):
        number += 1
    move(file, aside)
    return aside


def read_config(folder: Path) -> dict[Any, Any]:
    """Return config.yaml of a run or a checkpoint.

    Raises ``UserError`` when the file is not a YAML mapping of plain values.
    """
    file = folder / "config.yaml"
    config = read_yaml(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} can't be read: not a mapping of keys to values")
    moved: dict[Any, Any] = with_moved_targets(config)
    return moved


def with_later_keys(old: dict[Any, Any], new: dict[str, Any]) -> dict[Any, Any]:
    """Return the config of an earlier run, with the values of ``new`` for keys that it lacks because its version had none.

    These are the keys that have their default value in ``new``, and the ``LATER_KEYS``, whose effect on a run is compared
    through the run's identity.
    """
    root = {key: value for key, value in new.items() if key not in old}
    defaults = defaults_for(new) if root else {}
    old = _with_defaults(old, new) | {key: value for key, value in root.items() if defaults.get(key) == value}
    for path in LATER_KEYS:
        group, _, key = path.partition(".")
        node = old.get(group)
        if isinstance(node, dict) and key not in node and key in new[group]:
            old = old | {group: node | {key: new[group][key]}}
    return old


def _with_defaults(old: dict[Any, Any], new: dict[Any, Any]) -> dict[Any, Any]:
    """Return ``old`` with each key that a part in it lacks and that has the default of the part's class in ``new``."""
    found = dict(old)
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            found[key] = _with_defaults(old[key], value)
        elif key not in old and old.get("_target_") == new.get("_target_") and own_default(new, key) == value:
            found[key] = value
    return found
