"""The held-out documents as evaluation batches, in order and including the last token, with the exact number of text bytes
for bits per byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from pretrain.data.batch import IGNORE, Batch
from pretrain.data.blocks import packed
from pretrain.data.store.token_store import TokenView

PROMPT_WINDOW = 1 << 16  # number of tokens that are searched for prompts; a view may be too long to search all of it


class EvaluationBatches(Sequence[Batch]):
    """A sequence of batches that are built when they are indexed.

    Without a document mask an end-of-text token is put before the stream, so that every token is predicted once and
    loss / ln 2 / num_bytes is exact. With a document mask no document's first token is a target. If documents begin with BOS,
    BOS is not a target, no token is put before the stream, and loss / ln 2 / num_bytes is exact with a document mask too.

    Attributes:
        num_bytes: bytes of text that are scored.
        num_tokens: number of targets.
        num_documents: number of documents.
        num_blocks: number of sequences.
    """

    def __init__(self, view: TokenView, *, sequence_length: int, batch_size: int, document_mask: bool) -> None:
        self.view, self.sequence_length = view, sequence_length
        self.batch_size, self.document_mask = batch_size, document_mask
        self.num_bytes, self.num_documents = view.num_bytes, view.num_documents
        self.bos = view.store.bos
        self.num_tokens = view.num_tokens - (view.num_documents if document_mask or self.bos is not None else 0)
        self._first = 0 if self.bos is None else 1  # index of the first label; the stream's first BOS is not a label
        self.num_blocks = -(-(view.num_tokens - self._first) // sequence_length)

    def digest(self) -> str:
        """Return a hash of all inputs, targets and positions that does not depend on ``batch_size``. Two streams with the same
        digest have the same loss, up to rounding."""
        hashes = [xxhash.xxh3_64() for _ in range(3)]
        for batch in self:
            for found, tensor in zip(hashes, (batch.input_ids, batch.labels, batch.position_ids), strict=True):
                found.update(b"" if tensor is None else tensor.numpy().tobytes())
        return "".join(found.hexdigest() for found in hashes)

    def __len__(self) -> int:
        return -(-self.num_blocks // self.batch_size)

    def __getitem__(self, index: int) -> Batch:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        length, eot = self.sequence_length, self.view.store.eot
        rows = min(self.batch_size, self.num_blocks - index * self.batch_size)
        start = self._first + index * self.batch_size * length  # of the labels; inputs start one token earlier
        stop = min(start + rows * length, self.view.num_tokens)
        before = [eot] if start == 0 else self.view.read(start - 1, start)
        padding = np.full(start + rows * length - stop, eot)
        stream = np.concatenate([before, self.view.read(start, stop), padding]).astype(np.int64)
        begins = np.zeros(len(stream), bool)
        begins[0] = True
        begins[1 + self.view.document_starts(start, stop) - start] = True
        marked = _rows(begins, rows, length) if self.document_mask or self.bos is not None else None
        batch = packed(_rows(stream, rows, length), marked, document_mask=self.document_mask, bos=self.bos)
        if len(padding):
            batch.labels.view(-1)[-len(padding) :] = IGNORE
        num_targets = int((batch.labels != IGNORE).sum())
        return Batch(batch.input_ids, batch.labels, batch.position_ids, num_targets, index * self.batch_size)


def evaluation_batches(
    view: TokenView, sequence_length: int, batch_size: int, document_mask: bool = False, max_tokens: int | None = None
) -> EvaluationBatches:
    """Return the batches over ``view``, or over complete documents of it with at most ``max_tokens`` tokens in total."""
    chosen = view.limited(max_tokens)
    return EvaluationBatches(
        chosen, sequence_length=sequence_length, batch_size=batch_size, document_mask=document_mask
    )


def first_tokens(view: TokenView, count: int, length: int) -> list[list[int]]:
    """Return the first ``length`` tokens of ``count`` documents, without BOS and separator. The choice is deterministic: the
    first documents of at least ``length`` tokens, then the others. Only documents within the view's first ``PROMPT_WINDOW``
    tokens are considered."""
    stop = min(view.num_tokens, PROMPT_WINDOW)
    starts = view.document_starts(0, stop)
    lengths = np.diff(starts, append=stop) - 1
    if view.store.bos is not None:
        starts, lengths = starts + 1, lengths - 1
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    chosen = np.argsort(lengths < length, kind="stable")[:count]
    return [view.read(starts[i], starts[i] + min(length, lengths[i])).tolist() for i in chosen]


def _rows(stream: np.ndarray, rows: int, length: int) -> np.ndarray:
    """Return windows [rows, length + 1] that overlap by one token."""
    return np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length][:rows].copy()
