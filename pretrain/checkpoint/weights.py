"""Loading only the weights of a checkpoint or a run: the model folder that a name refers to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint.config import CheckpointConfig, Verify
from pretrain.checkpoint.marker import incomplete_reason
from pretrain.checkpoint.store import CheckpointStore
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import expanded
from pretrain.runtime.folders import MARKER
from pretrain.runtime.strict_json import read_json
from pretrain.telemetry.run_file import read_run_file

Node = dict[str, Any]  # a part as the config describes it


def weights_folder(name: str, *, key: str, verify: Verify = "size", transforms: Sequence[Node] = ()) -> str:
    """Return the model folder that ``name`` refers to. For a run this is its newest complete checkpoint, or its ``model/`` if
    it has none; any other name is returned unchanged.

    The checkpoints of a run with transforms hold transformed weights, which only a command with the same ``transforms`` can
    load. For other commands such a run stands for its ``model/``, if it has finished.

    Raises ``UserError`` for an incomplete checkpoint and for a run that has neither.
    """
    path = expanded(name)
    if not path.is_dir():
        return name
    if any((path / file).exists() for file in (MARKER, "state.json")) or path.parent.name == "checkpoints":
        reason = incomplete_reason(path, verify=verify)
        if reason is not None:
            raise UserError(f"{key}={name}: not a complete checkpoint: {reason}")
    elif not (path / "config.json").exists() and any((path / f).exists() for f in ("run.json", "checkpoints")):
        newest = CheckpointStore(path / "checkpoints", CheckpointConfig(verify=verify)).newest()
        if newest is None and not (path / "model").is_dir():
            raise UserError(f"{key}={name}: a run with neither a complete checkpoint nor a model/")
        exported = path / "model"
        if newest is not None and exported.is_dir() and saved_transforms(newest) not in ([], [*transforms]):
            return str(exported if read_run_file(path).get("status") == "finished" else newest)
        return str(newest or exported)
    return name


def saved_transforms(folder: Path) -> list[Node]:
    """Return the transforms whose weights a checkpoint holds, as the config of its run describes them. The list is empty for
    plain weights and for a folder that is no checkpoint."""
    try:
        state = read_json(folder / "state.json")
        found = state["identity"]["transforms"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return found if isinstance(found, list) and all(isinstance(node, dict) for node in found) else []


def check_transforms(folder: Path, transforms: Sequence[Node], *, name: str) -> bool:
    """Return whether ``folder`` holds weights after ``transforms``, those of the command, and not plain ones.

    Raises ``UserError`` for weights after other transforms. Nothing that the checkpoint names is run.
    """
    saved = saved_transforms(folder)
    if not saved:
        return False
    if saved == [*transforms]:
        return True
    needed = ", ".join(_described(node) for node in saved)
    given = ", ".join(_described(node) for node in transforms) or "none"
    raise UserError(
        f"model_name={name}: the weights of this checkpoint are transformed by {needed}; this command has {given}. Give the same "
        "transform=, or use the exported model: model/ of its run, or that of task=export with the same transform="
    )


def _described(node: Node) -> str:
    values = ", ".join(f"{key}={value}" for key, value in node.items() if key != "_target_")
    return f"{str(node.get('_target_')).rpartition('.')[2]}({values})"
