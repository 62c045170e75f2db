"""Blocks: windows of ``sequence_length`` + 1 tokens over the token stream of a view, without padding.

The stream is the concatenation of the documents. Each document is followed by its end-of-text token and, if the run uses
BOS, preceded by BOS. With BOS, every sequence also begins with BOS, even one that begins inside a document, because models
that were trained with BOS put much of their attention on it (Xiao et al. 2023, arXiv:2309.17453). BOS is never a target.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.batch import IGNORE, Batch
from pretrain.data.store.token_store import TokenView


class Blocks:
    """The blocks of a view. Block i is tokens [i*S, i*S + S]: neighbouring blocks share a token, so that every token except the
    first one and BOS is a target."""

    needs_starts = False  # whether the labels depend on where documents begin, also without a document mask or BOS

    def __init__(self, view: TokenView, sequence_length: int) -> None:
        self.view, self.sequence_length = view, sequence_length

    def __len__(self) -> int:
        return max(self.view.num_tokens - 1, 0) // self.sequence_length

    def mean_targets(self, *, document_mask: bool) -> float:
        """Return the mean number of targets of a block: all of its labels but the first tokens of documents, if these are not
        targets."""
        count = len(self)
        if not (document_mask or self.view.store.bos is not None) or not count:
            return float(self.sequence_length)
        stop = count * self.sequence_length + 1
        behind = len(self.view.document_starts(stop, self.view.num_tokens)) if stop < self.view.num_tokens else 0
        return self.sequence_length - (self.view.num_documents - 1 - behind) / count

    def segments(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Return the slices of the store's shards that the inputs of the blocks ``indices`` are, see `TokenView.segments`."""
        return self.view.segments(indices * self.sequence_length, self.sequence_length)

    def documents(self, index: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield the store number of each document in a block, and the tokens of it that are there."""
        start = index * self.sequence_length
        stop = start + self.sequence_length + 1
        borders = self.view.document_starts(start, stop) - start
        stretches = np.split(self.view.read(start, stop), borders[borders > 0])
        yield from zip(self.view.document_ids(start, stop).tolist(), stretches, strict=True)

    def fill(
        self,
        tokens: NDArray[np.int64],
        begins: NDArray[np.bool_] | None,
        rows: NDArray[np.int64],
        indices: NDArray[np.int64],
    ) -> None:
        """Write the blocks ``indices`` into ``rows`` of ``tokens`` [n, S+1], and into ``begins``, where it is given, at which
        tokens documents begin."""
        first, length = indices * self.sequence_length, self.sequence_length + 1
        self.view.gather(first, length, into=(tokens, rows))
        if begins is not None:
            begins[rows] = self.view.gather_starts(first, length)

    def batch(self, indices: NDArray[np.int64], *, document_mask: bool) -> Batch:
        """Return the blocks ``indices``, one per row."""
        shape = len(indices), self.sequence_length + 1
        tokens = np.empty(shape, np.int64)
        begins = np.zeros(shape, bool) if document_mask or self.bos is not None or self.needs_starts else None
        self.fill(tokens, begins, np.arange(len(indices)), indices)
        return packed(tokens, begins, document_mask=document_mask, bos=self.bos)

    @property
    def bos(self) -> int | None:
        """The token that begins every sequence and document; ``None`` if there is none."""
        return self.view.store.bos


def packed(
    tokens: NDArray[np.int64],
    begins: NDArray[np.bool_] | None,
    *,
    document_mask: bool,
    bos: int | NDArray[np.int64] | None = None,
) -> Batch:
    """Return inputs, labels and positions for tokens of shape [n, S+1].

    ``begins`` (same shape) marks the first token of each document; it is required with ``document_mask`` or ``bos``, and the
    marked tokens are not targets. With ``document_mask`` positions restart at them. ``bos`` replaces the first input of every
    row; it is one token, or one for each row, of which -1 replaces nothing.
    """
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    positions = None
    if begins is not None:
        labels[begins[:, 1:]] = IGNORE
    if bos is not None:
        inputs[:, 0] = np.where(np.asarray(bos) < 0, inputs[:, 0], bos)
    if begins is not None and document_mask:
        count = np.arange(inputs.shape[1])
        positions = torch.from_numpy(count - np.maximum.accumulate(np.where(begins[:, :-1], count, 0), axis=1))
    num_targets = int((labels != IGNORE).sum()) if begins is not None else labels.size
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), positions, num_targets)
