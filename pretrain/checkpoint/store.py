"""Checkpoints of one run: safetensors and JSON only, so that reading one never runs code and needs no tool of ours.

``step-00000020/``: ``model.safetensors`` (Hugging Face names), ``optimizer.safetensors`` (``<parameter>/<moment>``),
``state.json`` (progress, data cursor, RNG, loss scaler), ``config.yaml``, what makes it a model folder by itself (config,
tokenizer, …), and the marker of a whole folder. A sharding strategy writes ``model.rank-0.safetensors``, … instead, each
with its rank's rows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pretrain import tensors
from pretrain.checkpoint.atomic import missing_or_torn, write_folder
from pretrain.console import notice
from pretrain.errors import UserError
from pretrain.tensors import TensorFiles

if TYPE_CHECKING:
    from pretrain.world import World

KINDS = ("model", "optimizer")


@dataclass(frozen=True)
class Store:
    """Checkpoints under ``folder``; the newest ``keep_last`` stay (``None``: all)."""

    folder: Path
    keep_last: int | None = None

    def save(
        self,
        step: int,
        state: dict[str, Any],
        config_yaml: str,
        *,
        world: World,
        files: Mapping[str, bytes] | None = None,
    ) -> Path:
        """Write the checkpoint of ``step``, each rank its own pieces, then prune. ``files``: more of them, of rank 0.

        Raises ``UserError`` naming place and cause (disk full, no permission, …); earlier checkpoints stay good.
        """
        path = self.folder / f"step-{step:08d}"
        rest = {"scaler": state["engine"]["scaler"]} | {k: v for k, v in state.items() if k != "engine"}
        one_file = {kind: world.sum(bool(state["engine"][kind])) == 1 for kind in KINDS}

        def fill(fresh: Path) -> None:
            for kind in KINDS:
                name = kind if one_file[kind] else f"{kind}.rank-{world.rank}"
                tensors.write(fresh / f"{name}.safetensors", state["engine"][kind])
            if world.is_main:
                (fresh / "state.json").write_text(json.dumps(rest))
                (fresh / "config.yaml").write_text(config_yaml)
                for name, content in (files or {}).items():
                    (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                    (fresh / name).write_bytes(content)

        write_folder(path, fill, world=world, hint=self._last_good)
        if world.is_main:
            self._prune(keep=step)
        return path

    def _last_good(self) -> str:
        kept = self.steps()
        return f"the last good one is {self.folder / f'step-{kept[-1]:08d}'}" if kept else "there is none before it"

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
    """A checkpoint: ``{engine: {model, optimizer, scaler}, loader, progress, rng}``; of model and optimizer the
    ``TensorFiles``, from which every rank reads its own rows.

    Raises ``UserError`` when the folder is no whole checkpoint.
    """
    reason = missing_or_torn(path)
    if reason is not None:
        raise UserError(f"resume={path}: not a whole checkpoint: {reason}")
    state = read_state(path)
    try:
        kinds = {kind: TensorFiles(sorted(path.glob(f"{kind}*.safetensors"))) for kind in KINDS}
    except (SafetensorError, ValueError) as error:
        raise UserError(f"resume={path}: its tensors can't be read: {error}") from None
    state["engine"] = kinds | {"scaler": state.pop("scaler")}
    return state


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ``UserError`` when it is something else than JSON."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"resume={path}: state.json can't be read: {error}") from None
    return state
