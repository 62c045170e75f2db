"""Loading only the weights of a checkpoint or a run: the model folder that a name refers to."""

from __future__ import annotations

from pretrain.checkpoint.config import CheckpointConfig, Verify
from pretrain.checkpoint.marker import incomplete_reason
from pretrain.checkpoint.store import CheckpointStore
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import expanded
from pretrain.runtime.folders import MARKER


def weights_folder(name: str, *, key: str, verify: Verify = "size") -> str:
    """Return the model folder that ``name`` refers to. For a run this is its newest complete checkpoint, or its ``model/`` if
    it has none; any other name is returned unchanged.

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
        return str(newest or path / "model")
    return name
