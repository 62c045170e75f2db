"""Resume a run whose base model no longer exists: the checkpoint holds all that is needed (config, tokenizer, weights)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.config import Verify
from pretrain.checkpoint.schema import read_state, validation_error
from pretrain.checkpoint.store import CheckpointStore
from pretrain.models.hub.files import model_folder
from pretrain.run.leftovers import read_config
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class ModelInCheckpoint:
    """The parts of a base model that a checkpoint of the run still holds.

    Attributes:
        checkpoint: The checkpoint from which the run resumes.
        identity: The identity of the base model, as the run has recorded it.
        name: The ``model_name`` of the command.
    """

    checkpoint: Path
    identity: str
    name: str

    @property
    def notice(self) -> str:
        return f"model_name={self.name} no longer exists: the run continues with the model in {self.checkpoint}"

    def apply_to(self, spec: Any) -> Any:
        """Return ``spec`` with the checkpoint's config, and with its tokenizer where that of ``spec`` no longer exists."""
        own: dict[str, Any] = {"name_or_path": str(self.checkpoint), "revision": None}
        if spec.tokenizer_name is not None and not _is_there(spec.tokenizer_name, "model.tokenizer_name"):
            own["tokenizer_name"] = None
        if hasattr(spec, "overrides"):  # the checkpoint's config includes them
            own["overrides"] = {}
        if hasattr(spec, "train_tokenizer"):
            own["train_tokenizer"] = None
        return replace(spec, **own)


def model_in_checkpoint(config: RunConfig) -> ModelInCheckpoint | None:
    """Return the base model as held by the newest checkpoint of the run that ``config`` resumes.

    It returns ``None`` where there is no readable checkpoint, or where the config names another model than the checkpoint's.
    It raises ``UserError`` where that other model does not exist.
    """
    checkpoint = _checkpoint(config)
    if checkpoint is None:
        return None
    try:
        before, state = read_config(checkpoint), read_state(checkpoint)
    except UserError:
        return None
    if not all(_same_path(before.get("model", {}).get(key), getattr(config.model, key, None)) for key in NAMES):
        name, known = config.model_name, before.get("model_name")
        if name != known and not _is_there(name, "model_name"):
            raise UserError(
                f"model_name={name}: no such folder or model; {checkpoint} was trained with model_name={known}: "
                "with this name the run continues even if that folder no longer exists"
            )
        return None
    return ModelInCheckpoint(checkpoint, state["identity"]["model"], config.model_name)


NAMES = ("name_or_path", "tokenizer_name", "revision")


def _checkpoint(config: RunConfig) -> Path | None:
    """Return the newest checkpoint that can be loaded; `pretrain.run.folder.resume_point` will find the same one."""
    mode = config.resume
    if config.task != "pretraining" or mode == "never":
        return None
    verify: Verify = config.checkpoint.verify
    for run in (Path(config.output_dir), *([Path(mode)] if mode != "auto" else [])):
        store = CheckpointStore(run / "checkpoints")
        for step in reversed(store.steps()):
            if validation_error(store.path(step), verify=verify) is None:
                return store.path(step)
    return Path(mode) if mode != "auto" and validation_error(Path(mode), verify=verify) is None else None


def _same_path(before: Any, now: Any) -> bool:
    return before == now or (isinstance(before, str) and isinstance(now, str) and _absolute(before) == _absolute(now))


def _absolute(name: str) -> str:
    return os.path.abspath(os.path.expanduser(name))


def _is_there(name: str, key: str) -> bool:
    try:
        return model_folder(name, key=key).is_dir()
    except UserError:
        return False
