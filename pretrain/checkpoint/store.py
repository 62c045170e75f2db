"""The checkpoints of one run. They consist of safetensors and JSON, so that reading one never runs code, and other tools
can read them too.

The folder ``step-00000020/`` holds ``model.safetensors`` (Hugging Face names), ``optimizer.safetensors``
(``<parameter>/<moment>``), ``state.json`` (progress, data cursor, RNG, loss scaler, the records since the previous
checkpoint), ``config.yaml``, the files that make it a model folder (config, tokenizer, …), and the marker of a complete
folder. A sharding strategy writes ``model.rank-0.safetensors``, … instead, each with the rows of its rank. If hooks keep
tensors, they are in ``hook.safetensors`` (``<hook>/<key>``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.atomic import write_folder
from pretrain.checkpoint.config import CheckpointConfig
from pretrain.checkpoint.joint_check import UNREADABLE, joint_validation_error
from pretrain.checkpoint.marker import incomplete_reason
from pretrain.checkpoint.schema import KINDS, read_state, tensor_files, validation_error
from pretrain.distributed import sharding as tensors
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import make_folder, remove_folder, remove_leftovers, write_files
from pretrain.runtime.filesystem import free_bytes, move

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext

IN_JSON = ("scaler", "tensors", "owners", "optimizer_values")  # parts of an engine's state that are in state.json
SPARE_BYTES = 16 << 20  # space for a checkpoint's other files and for the logs


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints under ``folder``. ``policy`` determines which are kept and how they are verified. ``files`` maps the
    names of further files that every checkpoint holds to their content. ``checked`` has the results of `checked_by`."""

    folder: Path
    policy: CheckpointConfig = field(default_factory=CheckpointConfig)
    files: Mapping[str, bytes] = field(default_factory=dict)
    checked: Mapping[Path, str | None] = field(default_factory=dict)

    def checked_by(self, world: DistributedContext, *, resume: str) -> CheckpointStore:
        """Return this store after all ranks together have checked which of the checkpoints that ``resume`` may choose is valid,
        so that rank 0, which chooses, need not open the files of all ranks. This is a collective."""
        if world.size == 1 or resume == "never":
            return self
        checked: dict[Path, str | None] = {}
        for paths in world.on_main_rank(lambda: [newest_first(p) for p in (self.folder, *_named(resume))]):
            for path in paths:
                reason = joint_validation_error(path, world=world, verify=self.policy.verify)
                if reason != UNREADABLE:  # which `load` will refuse, and which is no reason to choose another one
                    checked[path] = reason
                if reason in (None, UNREADABLE):
                    break
        return replace(self, checked=checked)

    def reason(self, path: Path) -> str | None:
        """Return why a checkpoint can't be loaded, or ``None``; see `validation_error`."""
        return self.checked[path] if path in self.checked else validation_error(path, verify=self.policy.verify)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(
        self, step: int, state: dict[str, Any], *, world: DistributedContext, alive: Callable[[], None] = lambda: None
    ) -> int:
        """Write the checkpoint of ``step``, each rank its local shards, then delete old ones; return its size in bytes.

        ``state`` has the structure that `load` returns, and may have ``files`` of this step in addition to ``self.files``.
        ``alive`` is called after every file. Raises ``UserError`` with path and cause (no permission, …), and ``NoRoom`` if
        the disk is full; earlier checkpoints stay valid.
        """
        engine = {key: state["engine"][key] for key in IN_JSON if key in state["engine"]}
        rest = engine | {k: v for k, v in state.items() if k not in ("engine", "files")} | {"ranks": world.size}
        shards = {kind: state["engine"].get(kind, {}) for kind in KINDS}
        one_file = {kind: world.sum(bool(shards[kind])) == 1 for kind in KINDS}

        def fill(fresh: Path) -> list[Path]:
            written = []
            for kind in KINDS:
                file = fresh / (f"{kind}.safetensors" if one_file[kind] else f"{kind}.rank-{world.rank}.safetensors")
                if tensors.write(file, shards[kind]):
                    written.append(file)
                    alive()
            if world.is_main:
                written += write_files(self._small_files(rest) | state.get("files", {}), fresh, alive)
            return written

        if world.is_main:
            remove_leftovers(self.folder, "step-*")
        size = write_folder(self.path(step), fill, world=world, hint=self.last_good, alive=alive)
        if world.is_main:
            self._prune()
        return size

    def _small_files(self, rest: dict[str, Any]) -> dict[str, bytes]:
        return {"state.json": json.dumps(rest).encode(), **_index(rest), **self.files}

    def make_room(self, step: int, needed: int) -> str | None:
        """Return why ``needed`` bytes can't be written, or ``None``. If space is short, this deletes the checkpoints that would
        be deleted after the one of ``step`` is complete, but never the newest one.

        Raises ``UserError`` if the folder can't be created or its free space can't be read.
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
        """Return which valid checkpoint is left, as the end of an error message."""
        steps = self.complete_steps()
        return f"the last valid checkpoint is {self.path(steps[-1])}" if steps else "there is no earlier checkpoint"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoint folders, complete or not, in ascending order."""
        return [int(path.name.removeprefix("step-")) for path in reversed(newest_first(self.folder))]

    def complete_steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, checked by the sizes of their files."""
        return [step for step in self.steps() if incomplete_reason(self.path(step)) is None]

    def newest(self, *, below: int | None = None) -> Path | None:
        """Return the newest valid checkpoint (of a step less than ``below``), and report which newer ones were skipped and why.

        This deletes nothing. If a process was killed while it replaced a checkpoint, the old one is restored.
        """
        for old in self.folder.glob("step-*.replaced"):
            if not old.with_suffix("").exists():
                move(old, old.with_suffix(""))
        for step in reversed([s for s in self.steps() if below is None or s < below]):
            path = self.path(step)
            reason = self.reason(path)
            if reason is None:
                return path
            notice(f"checkpoint {path} skipped: {reason}")
        return None

    def best(self) -> Path | None:
        """Return the complete checkpoint with the lowest loss by ``policy.best_by``, among those that were evaluated on the same
        text as the last of them; ``None`` if none was evaluated at its own step."""
        ranked = self.policy.ranked(*self._losses())
        newest = max(ranked.values(), key=max, default=None)
        return None if newest is None else self.path(newest[0])

    def archive_after(self, step: int) -> None:
        """Rename the checkpoints after ``step``, so that a run that resumes from it never loads those of the other branch.

        Raises ``UserError`` if one can't be renamed.
        """
        for later in [s for s in self.steps() if s > step]:
            path = self.path(later)
            try:
                aside = self.folder / f"set-aside-{path.name}-{path.lstat().st_mtime_ns}"  # may be a dangling link
                move(path, aside)
            except OSError as error:
                raise UserError(f"{path} belongs to another branch and can't be renamed: {error.strerror}") from error
            notice(f"{path} belongs to a branch that was abandoned: kept as {aside.name}")

    def _losses(self) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, str | None]]]:
        """Return the results of `losses_of` for every complete checkpoint, by step. A checkpoint whose state can't be read
        counts as not evaluated."""
        losses: dict[int, dict[str, float]] = {}
        digests: dict[int, dict[str, str | None]] = {}
        for step in self.complete_steps():
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
        """Delete a checkpoint."""
        try:
            remove_folder(self.path(step))
        except OSError as error:
            notice(f"checkpoint {self.path(step)} is no longer needed but can't be removed: {error}")


def _index(state: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the file with which ``from_pretrained`` finds the weights in the files of several ranks, if they are full tensors.

    Source: https://huggingface.co/docs/transformers/big_models#shard-metadata
    """
    owners = (state.get("owners") or {}).get("model", {})
    if not owners or owners.keys() != state["tensors"]["model"].keys():
        return {}
    names = {name: f"model.rank-{rank}.safetensors" for name, rank in owners.items()}
    return {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": names}).encode()}


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoint folders in ``folder``, complete or not, the newest first; or ``folder``, if it is a checkpoint."""
    if re.fullmatch(r"step-\d+", folder.name) and (folder / "state.json").is_file():
        return [folder]
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _named(resume: str) -> list[Path]:
    """Return where the checkpoints of a run or the checkpoint are that ``resume`` names."""
    return [] if resume == "auto" else [Path(resume) / "checkpoints", Path(resume)]


def losses_of(checkpoint: Path) -> tuple[dict[str, float], dict[str, str | None]]:
    """Return by domain the loss at exactly the checkpoint's step, and a digest of the text on which it was measured (``None``:
    unknown, from an earlier version). Both are empty if the run did not evaluate at that step."""
    progress = read_state(checkpoint)["progress"]
    if progress.get("evaluated_at") != progress["step"]:
        return {}, {}
    scores = progress.get("scores", [])
    losses = {s["domain"]: s["loss"] for s in scores} or progress.get(
        "losses", {}
    )  # of an earlier version without scores
    return losses, {s["domain"]: s.get("digest") for s in scores}


def load(path: Path, *, world: DistributedContext | None = None) -> dict[str, Any]:
    """Load a checkpoint as ``{engine: {model, optimizer, hook, scaler, …}, loader, progress, rng, …}``. Model, optimizer
    and hook are ``TensorFiles``, from which every rank reads its own rows. ``hooks``, if there, has the hooks' plain values.

    With the ranks of ``world`` this is a collective, and each of them opens only the files that hold its own rows, and for the
    check of all files an equal share of them.

    Raises ``UserError`` if the folder is not a valid, complete checkpoint.
    """
    shared = world is not None and world.size > 1
    reason = validation_error(path) if world is None else joint_validation_error(path, world=world)
    if reason is not None:
        raise UserError(f"resume={path}: not a complete checkpoint: {reason}")
    state = read_state(path)
    state.pop("ranks", None)  # only needed to validate the number of random states
    described, owners = (state.get("tensors") if shared else None), state.get("owners") or {}
    engine: dict[str, Any] = {
        kind: tensor_files(path, kind, described and described.get(kind, {}), owners.get(kind)) for kind in KINDS
    }
    state["engine"] = engine | {key: state.pop(key, None) for key in IN_JSON}
    return state


def bytes_of(state: dict[str, Any]) -> int:
    """Return the size of this rank's tensors in ``state``."""
    shards = (shard.tensor for kind in KINDS for shard in state["engine"].get(kind, {}).values())
    return sum(tensor.numel() * tensor.element_size() for tensor in shards)
