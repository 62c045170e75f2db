"""Training batches in the order of `SampleOrder`. The only state is the number of samples taken so far, of each part of a
mixture. Resuming therefore costs the same at any step, and the global batches do not depend on the number of ranks that share
them."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from queue import Full, Queue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.batch import IGNORE, Batch
from pretrain.data.blocks import packed
from pretrain.data.draw import Draw
from pretrain.data.evaluation import evaluation_batches
from pretrain.data.order import SampleOrder, mix_bits
from pretrain.data.store.token_store import DocumentOrigin, TokenView
from pretrain.data.training_data import TrainingData

__all__ = ["Loader", "evaluation_batches"]

PREFETCH = 2  # number of batches that are ready in advance
TOKENS_AT_ONCE = 1 << 19  # tokens that are prepared together, in as many batches as they make
POLL_SECONDS = 0.1  # how soon the thread notices that the iterator was closed


class Loader:
    """An endless iterable of this rank's share of each global batch: ``accumulation`` micro-batches of ``batch_size`` rows.

    The samples of a run form an endless sequence, see `SampleOrder`. A global batch consists of
    G = world_size * accumulation * batch_size consecutive samples. Row j of micro-batch m of rank r is sample
    ``(m * world_size + r) * batch_size + j`` of them.
    """

    def __init__(
        self,
        train: TokenView | TrainingData,
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
        steps: int = 1,
    ) -> None:
        """
        Args:
            train: the training documents, or the parts of a mixture of them.
            sequence_length: tokens per sequence.
            seed: seed of the order.
            batch_size: sequences per micro-batch of this rank.
            accumulation: micro-batches per global batch.
            rank: this rank among those that share the data.
            world_size: number of ranks that share the data.
            document_mask: whether attention and loss are restricted to within each document.
            first_sample: number of samples that were taken before.
            pin_memory: whether batches are in page-locked memory.
            steps: optimizer steps of the run, of which the phases of a mixture are shares.
        """
        self.train = TrainingData.of(train)
        self.document_mask, self.pin_memory = document_mask, pin_memory
        self.micro_batch_size = batch_size
        self.global_batch_size = batch_size * accumulation * world_size
        self.samples = first_sample
        self.blocks = self.train.blocks(sequence_length)
        self.sequence_length, self.seed = sequence_length, seed
        self.mean_targets = [blocks.mean_targets(document_mask=document_mask) for blocks in self.blocks]
        self.epoch_samples = self.train.epoch_samples(sequence_length)
        self._phases = self.train.draws(
            steps=steps, global_batch=self.global_batch_size, mean_targets=self.mean_targets
        )
        self.order = self._order(self._phases)
        self._origin: dict[str, Any] | None = None  # where an earlier start of the run had another mixture
        self._needs_starts = document_mask or any(
            blocks.bos is not None or blocks.needs_starts for blocks in self.blocks
        )
        weights = np.array([part.loss_weight for part in self.train.parts], np.float32)
        self._loss_weights = weights if (weights != 1).any() else None
        micro = np.arange(accumulation)[:, None] * world_size + rank
        self._own = (micro * batch_size + np.arange(batch_size)).reshape(-1)

    @property
    def epoch(self) -> float:
        """The number of passes over the new text so far; 1.5 is in the middle of the second pass."""
        return self.samples / self.epoch_samples

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
        return self.batches(first_sample, 1)[0]

    def batches(self, first_sample: int, count: int) -> list[Batch]:
        """Return this rank's share of ``count`` consecutive global batches. Many rows at a time take less time each."""
        starts = first_sample + self.global_batch_size * np.arange(count)
        samples = (starts[:, None] + self._own).reshape(-1)
        parts, blocks = self.order(samples)
        rows = self._rows(parts, blocks, samples)
        if self._loss_weights is not None:
            rows = replace(rows, loss_weights=torch.from_numpy(self._loss_weights[parts]))
        rows = replace(rows, first_sample=first_sample, micro_batch_size=self.micro_batch_size)
        return (
            [rows]
            if count == 1
            else [
                replace(
                    batch,
                    first_sample=start,
                    micro_batch_size=self.micro_batch_size,
                    num_targets=int((batch.labels.numpy() != IGNORE).sum()),
                )
                for batch, start in zip(rows.split(len(self._own)), starts.tolist(), strict=True)
            ]
        )

    def _rows(self, parts: NDArray[np.int64], blocks: NDArray[np.int64], samples: NDArray[np.int64]) -> Batch:
        """Return the given block of the given part in each row; ``samples`` are the numbers of the rows in the run."""
        present = np.unique(parts).tolist()
        if len(present) == 1 and self.train.parts[present[0]].fim is None:
            return self.blocks[present[0]].batch(blocks, document_mask=self.document_mask)
        tokens = np.empty((len(parts), self.sequence_length + 1), np.int64)
        bos = np.full(len(parts), -1)
        begins = np.zeros(tokens.shape, bool) if self._needs_starts else None
        for part in present:
            here, of_part = np.flatnonzero(parts == part), self.blocks[part]
            starts_count = self.document_mask or of_part.bos is not None or of_part.needs_starts
            if self.train.parts[part].fim is None:
                of_part.fill(tokens, begins if starts_count else None, here, blocks[here])
            else:
                marks = self._fill_rearranged(part, tokens, here, blocks[here], samples[here])
                if starts_count and begins is not None:
                    begins[here] = marks[here]
            bos[here] = -1 if of_part.bos is None else of_part.bos
        return packed(tokens, begins, document_mask=self.document_mask, bos=bos if (bos >= 0).any() else None)

    def _fill_rearranged(
        self,
        part: int,
        tokens: NDArray[np.int64],
        rows: NDArray[np.int64],
        blocks: NDArray[np.int64],
        samples: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Write blocks of a part into ``rows`` of ``tokens``, with documents rearranged by a function of seed and sample. Return
        where documents begin."""
        fim, store, marks = self.train.parts[part].fim, self.train.parts[part].view.store, np.zeros(tokens.shape, bool)
        assert fim is not None
        self.blocks[part].fill(tokens, marks, rows, blocks)
        seeds = mix_bits(np.uint64(self.seed & (2**64 - 1)) ^ mix_bits(samples.astype(np.uint64)))
        fim.apply(tokens, marks, rows, seeds, around={store.eot} | ({store.bos} if store.bos is not None else set()))
        return marks

    def texts(self, first_sample: int) -> Iterator[tuple[DocumentOrigin, NDArray[np.int64]]]:
        """Yield every document with a token in the global batch (of all ranks) that begins at ``first_sample``, in batch order,
        each with the first contiguous run of its tokens there."""
        seen: set[tuple[int, int]] = set()
        parts, blocks = self.order(first_sample + np.arange(self.global_batch_size))
        for part, block in zip(parts.tolist(), blocks.tolist(), strict=True):
            for number, tokens in self.blocks[part].documents(block):
                if (part, number) not in seen:
                    seen.add((part, number))
                    yield self.train.parts[part].view.store.document(number), tokens

    def wanted_shares(self, samples: int) -> list[float]:
        """Return the share of each part in the first ``samples`` samples of the run by the weights of its phases."""
        ends = [start for start, _ in self._phases[1:]] + [max(samples, self._phases[-1][0])]
        lengths = [max(min(end, samples) - start, 0) for (start, _), end in zip(self._phases, ends, strict=True)]
        shares = np.array([phase.shares for phase in self.train.phases])
        found: list[float] = (np.array(lengths) @ shares / max(samples, 1)).tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the samples taken so far, in total and of each part."""
        state = {"samples": self.samples, "parts": self._by_name(self.order.taken(self.samples))}
        return state if self._origin is None else state | {"origin": self._origin}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the number of samples taken. It takes effect with the next ``iter(loader)``.

        Where the run had another mixture so far, each part continues behind the samples that were taken of a part of its name.
        """
        self.samples, self._origin = state["samples"], state.get("origin")
        taken = state.get("parts") or {}
        if len(self.train.parts) == 1 and len(taken) <= 1:  # the name of a dataset that is no mixture may change
            taken = {self.train.parts[0].name: self.samples}
        self.order = self._order(self._phases, self._origin)
        if self._by_name(self.order.taken(self.samples)) != taken:
            self._origin = {"samples": self.samples, "parts": taken}
            self.order = self._order(self._phases, self._origin)

    def _by_name(self, counts: NDArray[np.int64]) -> dict[str, int]:
        found = {part.name: count for part, count in zip(self.train.parts, counts.tolist(), strict=True)}
        return found | {name: n for name, n in (self._origin or {}).get("parts", {}).items() if name not in found}

    def _order(self, phases: Sequence[tuple[int, Draw]], origin: dict[str, Any] | None = None) -> SampleOrder:
        """Return the order of this mixture, from sample 0 or from the sample ``origin`` on."""
        names = [part.name for part in self.train.parts]
        lengths = [len(blocks) for blocks in self.blocks]
        if origin is None:
            return SampleOrder(lengths, self.seed, phases)
        first, taken = origin["samples"], origin["parts"]
        current = max(number for number, (start, _) in enumerate(phases) if start <= first)
        remaining = [(max(start, first), draw) for start, draw in phases[current:]]
        return SampleOrder(lengths, self.seed, remaining, before=np.array([taken.get(name, 0) for name in names]))

    def _fill(self, ready: Queue[Batch | BaseException], stop: threading.Event, sample: int) -> None:
        try:
            at_once = 1  # the first batch comes early
            most = max(1, TOKENS_AT_ONCE // (len(self._own) * self.sequence_length))
            while not stop.is_set():
                for batch in self.batches(sample, at_once):
                    _put(ready, batch.pin() if self.pin_memory else batch, stop)
                sample += self.global_batch_size * at_once
                at_once = min(2 * at_once, most)
        except BaseException as error:  # errors of any type are raised again in the thread that reads
            _put(ready, error, stop)


def _put(ready: Queue[Batch | BaseException], item: Batch | BaseException, stop: threading.Event) -> None:
    """Put ``item`` into the queue as soon as there is space, unless ``stop`` is set."""
    while not stop.is_set():
        try:
            return ready.put(item, timeout=POLL_SECONDS)
        except Full:
            continue
    return None
