"""Blocks: the stream of a view cut into windows of ``sequence_length`` + 1 tokens, without padding.

The stream is the documents one after the other, each with its end-of-text token behind it and, where a run has one, its BOS
before it. Then every sequence begins with BOS too, also where it begins inside a document: models that were trained with it put
much of their attention there (Xiao et al. 2023, arXiv:2309.17453). BOS is never a target: nothing has to foresee it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.batch import IGNORE, Batch
from pretrain.data.store.token_store import TokenView


class Blocks:
    """Block i is tokens [i*S, i*S + S] of the view: neighbours share a token, so that every token but the first is a
    target (but BOS)."""

    def __init__(self, view: TokenView, sequence_length: int) -> None:
        self.view, self.sequence_length = view, sequence_length

    def __len__(self) -> int:
        return max(self.view.num_tokens - 1, 0) // self.sequence_length

    def batch(self, indices: NDArray[np.int64], *, document_mask: bool, first_sample: int = 0) -> Batch:
        """The blocks ``indices``, one a row."""
        starts, length, bos = indices * self.sequence_length, self.sequence_length + 1, self.view.store.bos
        begins = self.view.gather_starts(starts, length) if document_mask or bos is not None else None
        tokens = self.view.gather(starts, length)
        return packed(tokens, begins, document_mask=document_mask, bos=bos, first_sample=first_sample)


def packed(
    tokens: NDArray[np.int64],
    begins: NDArray[np.bool_] | None,
    *,
    document_mask: bool,
    bos: int | None = None,
    first_sample: int = 0,
) -> Batch:
    """Inputs, labels and positions out of [n, S+1] tokens. ``begins`` (same shape) marks the documents' first tokens, which
    are then no targets; needed with a document mask, with which positions restart there, and with ``bos``, which takes the
    place of every row's first input."""
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    positions = None
    if begins is not None:
        labels[begins[:, 1:]] = IGNORE
    if bos is not None:
        inputs[:, 0] = bos
    if begins is not None and document_mask:
        count = np.arange(inputs.shape[1])
        positions = torch.from_numpy(count - np.maximum.accumulate(np.where(begins[:, :-1], count, 0), axis=1))
    num_targets = int((labels != IGNORE).sum()) if begins is not None else labels.size
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), positions, num_targets, first_sample)
