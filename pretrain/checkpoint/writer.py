"""Writing checkpoints while training continues. The loop waits only for a copy of the state; a thread writes it.

One checkpoint is written at a time. An error in the thread is raised by `collect`, which the loop calls after every step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.checkpoint.store import KINDS, bytes_of
from pretrain.distributed.sharding import TensorShard
from pretrain.runtime.console import notice
from pretrain.runtime.errors import NoRoom
from pretrain.telemetry.events import Saved

if TYPE_CHECKING:
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.distributed.context import DistributedContext


class AsyncCheckpointWriter:
    """Saves into ``store``, with ``background`` in a thread. The threads of all ranks use a process group of their own, with
    ``timeout_seconds`` for each collective. ``alive`` is called after every file."""

    def __init__(
        self,
        store: CheckpointStore,
        *,
        world: DistributedContext,
        background: bool,
        timeout_seconds: float = 1800,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.world = world
        self._thread_world = world.with_own_group(timeout_seconds=timeout_seconds) if background else None
        self._alive = alive
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved: deque[Saved] = deque()

    @property
    def failed(self) -> bool:
        """Whether the thread of this rank has ended with an error that the next `collect` will raise."""
        return self._error is not None

    def save(self, step: int, state: dict[str, Any], *, at_once: bool) -> bool:
        """Save ``state`` as the checkpoint of ``step``, with ``at_once`` before returning, because the run ends.

        If the disk is full, the run continues without this checkpoint; the result is False if that is known before writing
        starts. Raises ``UserError`` on every rank for any other error that prevents writing, and with ``at_once`` also if
        the disk is full.
        """
        started_at = time.perf_counter()
        self.wait()
        needed = self.world.sum(bytes_of(state))
        reason = self.world.on_main_rank(lambda: self.store.make_room(step, needed))
        if reason is not None:
            if at_once:
                raise NoRoom(reason)
            self._continue_without(reason)
            return False
        if at_once:
            self._write(step, state, self.world, started_at)
        elif self._thread_world is None:
            try:
                self._write(step, state, self.world, started_at)
            except NoRoom as error:
                self._continue_without(error)
        else:
            copied, ready = self._copies.take(state)
            blocked_seconds = time.perf_counter() - started_at
            arguments = (step, copied, self._thread_world, started_at, blocked_seconds)
            self._thread = threading.Thread(
                target=self._write_in_thread, args=(ready, arguments), name="saver", daemon=True
            )
            self._thread.start()
        return True

    def wait(self) -> None:
        """Wait until nothing is being written. Raises the error that prevented a checkpoint from being written."""
        self.close()
        self._raise()

    def close(self) -> None:
        """Wait until nothing is being written, without raising its errors."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def collect(self) -> Saved | None:
        """Return the next checkpoint that was completed since the last call, if any. Raises each error once, like `wait`."""
        self._raise()
        return self._saved.popleft() if self._saved else None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _continue_without(self, reason: object) -> None:
        if self.world.is_main:
            notice(f"error: {reason}; the run continues")

    def _write_in_thread(self, ready: Callable[[], None], arguments: tuple[Any, ...]) -> None:
        """Write a checkpoint in the thread."""
        try:
            ready()
            self._write(*arguments)
        except NoRoom as error:
            self._continue_without(error)
        except BaseException as error:  # `collect` raises it in the loop
            self._error = error

    def _write(
        self,
        step: int,
        state: dict[str, Any],
        world: DistributedContext,
        started_at: float,
        blocked_seconds: float | None = None,
    ) -> None:
        size = self.store.save(step, state, world=world, alive=self._alive)
        seconds = time.perf_counter() - started_at
        blocked = seconds if blocked_seconds is None else blocked_seconds
        self._saved.append(Saved(step, self.store.path(step), seconds, blocked, size))


class HostCopies:
    """Copies of a state's tensors in host memory. The memory is reused, because allocating it takes longer than the copy.

    Copies from a GPU are queued after the step that produced the state, and the host does not wait for them.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def take(self, state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        """Return ``state`` with copied shards, and a function that must be called before they are read."""
        engine = dict(state["engine"])
        for kind in KINDS:
            engine[kind] = {name: self._copy((kind, name), shard) for name, shard in engine.get(kind, {}).items()}
        ready: Callable[[], None] = lambda: None  # noqa: E731
        if torch.cuda.is_available():
            event = torch.cuda.Event()
            event.record()
            ready = event.synchronize
        return state | {"engine": engine}, ready

    def _copy(self, key: tuple[str, str], shard: TensorShard) -> TensorShard:
        source = shard.tensor
        memory = self._memory.get(key)
        if memory is None or memory.shape != source.shape or memory.dtype != source.dtype:
            memory = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._memory[key] = memory
        memory.copy_(source, non_blocking=True)
        return TensorShard(memory, shard.start, shard.shape)
