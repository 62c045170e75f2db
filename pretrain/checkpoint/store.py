"""Checkpoints of one run: safetensors and JSON only, so that reading one never runs code and needs no tool of ours.

``step-00000020/``: ``model.safetensors`` (Hugging Face names), ``optimizer.safetensors`` (``<parameter>/<moment>``),
``state.json`` (progress, data cursor, RNG, loss scaler, the records since the checkpoint before), ``config.yaml``, what
makes it a model folder by itself (config, tokenizer, …), and the marker of a whole folder. A sharding strategy writes
``model.rank-0.safetensors``, … instead, each with its rank's rows.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.atomic import make_folder, write_folder
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.marker import incomplete_reason
from pretrain.checkpoint.schema import KINDS, read_state, tensor_files, validation_error
from pretrain.distributed import sharding as tensors
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.filesystem import free_bytes, move

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext

SPARE_BYTES = 16 << 20  # what else a checkpoint needs on the disk, and the logs beside it


@dataclass(frozen=True)
class CheckpointStore:
    """Checkpoints under ``folder``; ``policy`` says which stay and how they are verified. ``files``: name → content of
    what else every checkpoint holds."""

    folder: Path
    policy: CheckpointConfig = field(default_factory=CheckpointConfig)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, state: dict[str, Any], *, world: DistributedContext, alive: Callable[[], None] = lambda: None
    ) -> int:
        """Write the checkpoint of ``step``, each rank its own pieces, then prune; return its size in bytes. ``state``: what
        `load` returns, and ``files``: those of this moment, like ``self.files``. ``alive`` is called after every file.

        Raises ``UserError`` naming place and cause (no permission, …), ``NoRoom`` where the disk is full; earlier
        checkpoints stay good.
        """
        engine = {key: state["engine"][key] for key in ("scaler", "tensors")}
        rest = engine | {k: v for k, v in state.items() if k not in ("engine", "files")} | {"ranks": world.size}
        one_file = {kind: world.sum(bool(state["engine"][kind])) == 1 for kind in KINDS}

        def fill(fresh: Path) -> list[Path]:
            written = []
            for kind in KINDS:
                file = fresh / (f"{kind}.safetensors" if one_file[kind] else f"{kind}.rank-{world.rank}.safetensors")
                if tensors.write(file, state["engine"][kind]):
                    written.append(file)
                alive()
            for name, content in (self._small_files(rest) | state.get("files", {})).items() if world.is_main else ():
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                (fresh / name).write_bytes(content)
                written.append(fresh / name)
                alive()
            return written

        if world.is_main:
            self._clean_up()
        size = write_folder(self.path(step), fill, world=world, hint=self.last_good, alive=alive)
        if world.is_main:
            self._prune()
        return size

    def _small_files(self, rest: dict[str, Any]) -> dict[str, bytes]:
        return {"state.json": json.dumps(rest).encode(), **self.files}

    def make_room(self, step: int, needed: int) -> str | None:
        """Why ``needed`` bytes can't be written, or ``None``. Where space is short, checkpoints go that would go anyway
        once the one of ``step`` is whole, but never the newest one.

        Raises ``UserError`` when the folder can't be looked at.
        """
        if self._free() >= needed + SPARE_BYTES:
            return None
        losses, digests = self._losses()
        for old in sorted(set(losses) - self.policy.kept(losses | {step: {}}, digests) - {max(losses, default=0)}):
            self._remove(old)
        free = self._free()
        if free >= needed + SPARE_BYTES:
            return None
        return (
            f"{self.path(step)} could not be written: it needs {needed / 2**30:.2f} GiB, {self.folder} has "
            f"{free / 2**30:.2f} GiB free; {self.last_good()}"
        )

    def _free(self) -> float:
        try:
            make_folder(self.folder)
            free = free_bytes(self.folder)
            return math.inf if free is None else free
        except OSError as error:
            raise UserError(f"{self.folder} can't be written: {error}; {self.last_good()}") from error

    def last_good(self) -> str:
        """Which checkpoint is left, for the end of an error message."""
        kept = self.whole()
        return f"the last good one is {self.path(kept[-1])}" if kept else "there is none before it"

    def steps(self) -> list[int]:
        """Steps of the folders that look like checkpoints, ascending; whole or not."""
        names = (re.fullmatch(r"step-(\d+)", p.name) for p in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def whole(self) -> list[int]:
        """Steps of the whole checkpoints, by the sizes of their files."""
        return [step for step in self.steps() if incomplete_reason(self.path(step)) is None]

    def newest(self, *, below: int | None = None) -> Path | None:
        """The newest whole checkpoint, of a step ``below``; says which newer ones were passed over and why. Deletes
        nothing; one that a kill kept from being replaced is put back."""
        for old in self.folder.glob("step-*.replaced"):
            if not old.with_suffix("").exists():
                move(old, old.with_suffix(""))
        for step in reversed([s for s in self.steps() if below is None or s < below]):
            path = self.path(step)
            reason = validation_error(path, verify=self.policy.verify)
            if reason is None:
                return path
            notice(f"checkpoint {path} passed over: {reason}")
        return None

    def archive_after(self, step: int) -> None:
        """Rename the checkpoints beyond ``step``, so that a run that goes back to it never picks up the other branch.

        Raises ``UserError`` where that can't be.
        """
        for later in [s for s in self.steps() if s > step]:
            path = self.path(later)
            try:
                aside = self.folder / f"set-aside-{path.name}-{path.lstat().st_mtime_ns}"  # it may be a link to nowhere
                move(path, aside)
            except OSError as error:
                raise UserError(f"{path} is of another branch and can't be moved aside: {error.strerror}") from error
            notice(f"{path} is of the branch that was left: kept as {aside.name}")

    def _losses(self) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, str | None]]]:
        """Of every complete checkpoint, by its step, what `losses_of` finds; one whose state can't be read counts as not
        evaluated."""
        losses: dict[int, dict[str, float]] = {}
        digests: dict[int, dict[str, str | None]] = {}
        for step in self.whole():
            losses[step], digests[step] = {}, {}
            with suppress(UserError):
                losses[step], digests[step] = losses_of(self.path(step))
        return losses, digests

    def _prune(self) -> None:
        if self.policy.keep_last is None:
            return
        losses, digests = self._losses()
        for step in sorted(set(losses) - self.policy.kept(losses, digests)):
            self._remove(step)

    def _remove(self, step: int) -> None:
        """Renamed first: a half deleted checkpoint never looks like a torn one."""
        doomed = self.folder / f"{self.path(step).name}.removed"
        try:
            move(self.path(step), doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            notice(f"checkpoint {self.path(step)} is no longer needed but can't be removed: {error}")

    def _clean_up(self) -> None:
        """What a kill has left of a folder being written or deleted."""
        for pattern in ("step-*.partial", "step-*.removed", "step-*.replaced"):
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)


def losses_of(checkpoint: Path) -> tuple[dict[str, float], dict[str, str | None]]:
    """By domain, the loss at the checkpoint's very step and a digest of what it was measured on (``None``: not known, of
    an earlier version); both empty when it was not evaluated at that step."""
    progress = read_state(checkpoint)["progress"]
    if progress.get("evaluated_at") != progress["step"]:
        return {}, {}
    return progress.get("losses", {}), {s["domain"]: s.get("digest") for s in progress.get("scores", [])}


def load(path: Path) -> dict[str, Any]:
    """A checkpoint: ``{engine: {model, optimizer, scaler, tensors}, loader, progress, rng}``; of model and optimizer the
    ``TensorFiles``, from which every rank reads its own rows.

    Raises ``UserError`` when the folder is no whole checkpoint.
    """
    reason = validation_error(path)
    if reason is not None:
        raise UserError(f"resume={path}: not a whole checkpoint: {reason}")
    state = read_state(path)
    state.pop("ranks", None)  # has said how many random states there must be
    engine: dict[str, Any] = {kind: tensor_files(path, kind) for kind in KINDS}
    state["engine"] = engine | {"scaler": state.pop("scaler"), "tensors": state.pop("tensors", None)}
    return state


def bytes_of(state: dict[str, Any]) -> int:
    """Size of this rank's tensors in ``state``."""
    pieces = (piece.tensor for kind in KINDS for piece in state["engine"][kind].values())
    return sum(tensor.numel() * tensor.element_size() for tensor in pieces)
