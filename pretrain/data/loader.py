"""Training batches in the order of a stateless permutation. The only state is the number of samples taken so far. Resuming
therefore costs the same at any step, and the global batches do not depend on the number of ranks that share them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from dataclasses import replace
from queue import Full, Queue

import numpy as np
from numpy.typing import NDArray

from pretrain.data.batch import Batch
from pretrain.data.blocks import Blocks
from pretrain.data.evaluation import evaluation_batches
from pretrain.data.order import Permutation
from pretrain.data.store.token_store import DocumentOrigin, TokenView
from pretrain.runtime.errors import UserError

__all__ = ["Loader", "check_enough", "evaluation_batches"]

PREFETCH = 2  # number of batches that are prepared in advance
POLL_SECONDS = 0.1  # how soon the thread notices that the iterator was closed


class Loader:
    """An endless iterable of this rank's share of each global batch: ``accumulation`` micro-batches of ``batch_size`` rows.

    The samples of a run form an endless sequence: sample g is block ``permutation(g % n, epoch=g // n)`` of the n blocks. A
    global batch consists of G = world_size * accumulation * batch_size consecutive samples. Row j of micro-batch m of rank r
    is sample ``(m * world_size + r) * batch_size + j`` of them.
    """

    def __init__(
        self,
        view: TokenView,
        *,
        sequence_length: int,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        document_mask: bool = False,
        first_sample: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.blocks = Blocks(view, sequence_length)
        self.document_mask, self.pin_memory = document_mask, pin_memory
        self.permutation = Permutation(len(self.blocks), seed)
        self.micro_batch_size = batch_size
        self.global_batch_size = batch_size * accumulation * world_size
        self.samples = first_sample
        micro = np.arange(accumulation)[:, None] * world_size + rank
        self._own = (micro * batch_size + np.arange(batch_size)).reshape(-1)

    @property
    def num_blocks(self) -> int:
        """The number of samples in one epoch."""
        return len(self.blocks)

    @property
    def epoch(self) -> float:
        """The number of passes over the data so far; 1.5 is in the middle of the second pass."""
        return self.samples / len(self.blocks)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yield batches starting at sample ``self.samples``. A thread, which ends with the iterator, prepares them in advance."""
        ready: Queue[Batch | BaseException] = Queue(PREFETCH)
        stop = threading.Event()
        thread = threading.Thread(target=self._fill, args=(ready, stop, self.samples), name="loader", daemon=True)
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                self.samples = item.first_sample + self.global_batch_size
                yield item
        finally:
            stop.set()
            thread.join()

    def batch(self, first_sample: int) -> Batch:
        """Return this rank's share of the global batch that begins at ``first_sample``."""
        chosen = self.blocks_of(first_sample + self._own)
        batch = self.blocks.batch(chosen, document_mask=self.document_mask, first_sample=first_sample)
        return replace(batch, micro_batch_size=self.micro_batch_size)

    def texts(self, first_sample: int) -> Iterator[tuple[DocumentOrigin, NDArray[np.int64]]]:
        """Yield every document with a token in the global batch (of all ranks) that begins at ``first_sample``, in batch order,
        each with the first contiguous run of its tokens there."""
        length, view = self.blocks.sequence_length, self.blocks.view
        seen: set[int] = set()
        for index in self.blocks_of(first_sample + np.arange(self.global_batch_size)).tolist():
            start, stop = index * length, index * length + length + 1
            borders = view.document_starts(start, stop) - start
            stretches = np.split(view.read(start, stop), borders[borders > 0])
            for number, tokens in zip(view.document_ids(start, stop).tolist(), stretches, strict=True):
                if number not in seen:
                    seen.add(number)
                    yield view.store.document(number), tokens

    def state_dict(self) -> dict[str, int]:
        return {"samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Set the number of samples taken. It takes effect with the next ``iter(loader)``."""
        self.samples = state["samples"]

    def blocks_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the block index of each of the run's ``samples``."""
        epochs, positions = np.divmod(samples, len(self.blocks))
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = self.permutation(positions[here], epoch)
        return chosen

    def _fill(self, ready: Queue[Batch | BaseException], stop: threading.Event, sample: int) -> None:
        try:
            while not stop.is_set():
                batch = self.batch(sample)
                _put(ready, batch.pin() if self.pin_memory else batch, stop)
                sample += self.global_batch_size
        except BaseException as error:  # errors of any type are raised again in the thread that reads
            _put(ready, error, stop)


def check_enough(view: TokenView, *, sequence_length: int, global_batch: int) -> None:
    """Raise ``UserError`` when the training documents do not fill one global batch (in sequences, over all workers)."""
    found = len(Blocks(view, sequence_length))
    if found < global_batch:
        raise UserError(
            f"dataset {view.store.name!r}: too little text for one global batch: {view.num_tokens:,} training tokens "
            f"({view.num_documents:,} documents, {view.num_bytes:,} bytes) make {found:,} sequences of "
            f"{sequence_length}, but batch_size × gradient_accumulation_steps × workers = {global_batch:,} sequences "
            f"need {global_batch * sequence_length + 1:,} tokens; lower one of these, lower sequence_length or add text"
        )


def _put(ready: Queue[Batch | BaseException], item: Batch | BaseException, stop: threading.Event) -> None:
    """Put ``item`` into the queue as soon as there is space, unless ``stop`` is set."""
    while not stop.is_set():
        try:
            return ready.put(item, timeout=POLL_SECONDS)
        except Full:
            continue
    return None
