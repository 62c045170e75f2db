"""Checkpoints of one run: safetensors and JSON only, so that reading one never runs code and needs no tool of ours.

``step-00000020/``: ``model.safetensors`` (Hugging Face names), ``optimizer.safetensors`` (``<parameter>/<moment>``),
``state.json`` (progress, data cursor, RNG, loss scaler), ``config.yaml``, and the marker of a whole folder.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pretrain.checkpoint.atomic import missing_or_torn, whole_folder
from pretrain.console import notice
from pretrain.errors import UserError


class SaveError(UserError):
    """A checkpoint could not be written. What was saved before is untouched."""


@dataclass(frozen=True)
class Store:
    """Checkpoints under ``folder``; the newest ``keep_last`` stay (``None``: all)."""

    folder: Path
    keep_last: int | None = None

    def save(self, step: int, state: dict[str, Any], config_yaml: str) -> Path:
        """Write the checkpoint of ``step``, then prune.

        Raises ``SaveError`` naming place and cause (disk full, no permission, …); earlier checkpoints stay good.
        """
        path = self.folder / f"step-{step:08d}"
        try:
            with whole_folder(path) as fresh:
                save_file(_contiguous(state["engine"]["model"]), fresh / "model.safetensors", metadata={"format": "pt"})
                save_file(_contiguous(state["engine"]["optimizer"]), fresh / "optimizer.safetensors")
                rest = {"scaler": state["engine"]["scaler"]} | {k: v for k, v in state.items() if k != "engine"}
                (fresh / "state.json").write_text(json.dumps(rest))
                (fresh / "config.yaml").write_text(config_yaml)
        except (OSError, SafetensorError) as error:
            kept = self.steps()
            last = f"the last good one is {self.folder / f'step-{kept[-1]:08d}'}" if kept else "there is none before it"
            raise SaveError(f"checkpoint {path} could not be written: {error}; {last}") from error
        self._prune(keep=step)
        return path

    def steps(self) -> list[int]:
        """Steps of the folders that look like checkpoints, ascending; whole or not."""
        names = (re.fullmatch(r"step-(\d+)", p.name) for p in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def newest(self) -> Path | None:
        """The newest whole checkpoint; says which newer ones were passed over and why. Deletes nothing."""
        for step in reversed(self.steps()):
            path = self.folder / f"step-{step:08d}"
            reason = missing_or_torn(path)
            if reason is None:
                return path
            notice(f"checkpoint {path} passed over: {reason}")
        return None

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints beyond ``step``, so that a run that goes back to it never picks up the other branch."""
        for later in [s for s in self.steps() if s > step]:
            path = self.folder / f"step-{later:08d}"
            aside = self.folder / f"set-aside-{path.name}-{path.stat().st_mtime_ns}"
            path.rename(aside)
            notice(f"{path} is of the branch that was left: kept as {aside.name}")

    def _prune(self, *, keep: int) -> None:
        if self.keep_last is None:
            return
        whole = [s for s in self.steps() if missing_or_torn(self.folder / f"step-{s:08d}") is None]
        for step in [s for s in whole[: -self.keep_last] if s != keep]:
            shutil.rmtree(self.folder / f"step-{step:08d}", ignore_errors=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint: ``{engine: {model, optimizer, scaler}, loader, progress, rng}``, tensors on the CPU.

    Raises ``UserError`` when the folder is no whole checkpoint.
    """
    reason = missing_or_torn(path)
    if reason is not None:
        raise UserError(f"resume={path}: not a whole checkpoint: {reason}")
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    state["engine"] = {
        "model": load_file(path / "model.safetensors"),
        "optimizer": load_file(path / "optimizer.safetensors"),
        "scaler": state.pop("scaler"),
    }
    return state


def _contiguous(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
