"""The checkpoints of a run: when they are saved, and what they hold besides the state of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint import store
from pretrain.checkpoint.adapt import adapted
from pretrain.checkpoint.schema import Identity, read_state
from pretrain.telemetry.interval import Interval

if TYPE_CHECKING:
    from pretrain.checkpoint.train_state import TrainState
    from pretrain.checkpoint.writer import AsyncCheckpointWriter
    from pretrain.distributed.context import DistributedContext
    from pretrain.telemetry.events import Saved

NEEDED = {name for name, key in Identity.model_fields.items() if key.is_required()}


@dataclass
class Checkpoints:
    """Saves and loads the state of a run.

    Attributes:
        writer: writes checkpoints, while training continues or at once (``None``: nothing is saved).
        fingerprint: what a checkpoint must have in common with the run that resumes from it (`Identity` in
            `pretrain.checkpoint.schema` has the keys; any text stands for a model, tokenizer or data of one's own).
        every: the interval of checkpoints in steps. The last step is always saved.
        resume_from: the checkpoint folder to resume from, or ``None``.
        unsaved_records: returns the records since the last checkpoint, which the next checkpoint will hold.
        files: returns further files of a checkpoint, by name, so that it can be loaded as a model; rank 0 writes them.
        records: the records in the checkpoint that was loaded, if it is a checkpoint of this run.
    """

    writer: AsyncCheckpointWriter | None = None
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    every: Interval = field(default_factory=lambda: Interval(None))
    resume_from: Path | None = None
    unsaved_records: Callable[[], list[dict[str, Any]]] = list
    files: Callable[[TrainState], dict[str, bytes]] = lambda state: {}
    records: list[dict[str, Any]] = field(default_factory=list)
    _delayed: bool = False

    def __post_init__(self) -> None:
        if self.writer is not None and (missing := sorted(NEEDED - self.fingerprint.keys())):
            raise ValueError(
                f"a checkpoint needs a fingerprint of its run, or it could not be resumed: {missing} missing"
            )

    def is_due(self, step: int, *, delay: bool) -> bool:
        """Return whether a checkpoint is due at ``step``. With ``delay`` it becomes due at the next step without it."""
        self._delayed |= self.every.due(step)
        return self._delayed and not delay

    def pauses_at(self, step: int) -> bool:
        """Return whether a checkpoint is due at ``step``, delayed or not."""
        return self._delayed or self.every.due(step)

    def save(self, progress: TrainState, state: dict[str, Any], *, at_once: bool) -> bool:
        """Save ``state`` as the checkpoint of the present step; see `AsyncCheckpointWriter.save`."""
        assert self.writer is not None
        self._delayed = False
        files = self.files(progress) if self.writer.world.is_main else {}
        own = {"identity": dict(self.fingerprint), "records": self.unsaved_records(), "files": files}
        return self.writer.save(progress.step, state | {"progress": progress.state_dict()} | own, at_once=at_once)

    def saved_state(self) -> dict[str, Any]:
        """Return the state, without tensors, of the checkpoint to resume from."""
        assert self.resume_from is not None
        return read_state(self.resume_from)

    def load(self, checkpoint: Path, *, world: DistributedContext | None = None) -> dict[str, Any]:
        """Load ``checkpoint``, adapted to this run. It may have been written by another strategy or number of ranks. With the
        ranks of ``world`` this is a collective, see `store.load`."""
        state = adapted(store.load(checkpoint, world=world), self.fingerprint)
        folder = self.writer and self.writer.store.folder.resolve()
        own = checkpoint.resolve().parent == folder
        self.records = state.get("records", []) if own else []  # another run's records are in its own files
        return state

    def to_roll_back_to(self, *, below: int | None) -> Path | None:
        """Return the newest checkpoint of a step less than ``below`` (``None``: the newest), else the newest of this run, else
        the one that it was resumed from. This is a collective, and it waits for the checkpoint that is being written."""
        if self.writer is None:
            return self.resume_from
        self.writer.wait()
        newest = self.writer.store.newest
        return self.writer.world.on_main_rank(lambda: newest(below=below) or newest()) or self.resume_from

    def best(self) -> Path | None:
        """Return the evaluated checkpoint with the lowest loss. This is a collective."""
        if self.writer is None:
            return None
        self.writer.wait()
        found: Path | None = self.writer.world.on_main_rank(self.writer.store.best)
        return found

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of a checkpoint; `saved` will raise the error."""
        return self.writer is not None and self.writer.failed

    def saved(self) -> Iterator[Saved]:
        """Yield the checkpoints that were completed since the last call. Raises the error that prevented one."""
        while self.writer is not None and (saved := self.writer.collect()) is not None:
            yield saved

    def close(self) -> None:
        """Wait until nothing is being written, without raising its errors."""
        if self.writer is not None:
            self.writer.close()
