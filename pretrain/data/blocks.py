"""Blocks: windows of ``sequence_length`` + 1 tokens over the token stream of a view, without padding.

The stream is the concatenation of the documents. Each document is followed by its end-of-text token and, if the run uses
BOS, preceded by BOS. With BOS, every sequence also begins with BOS, even one that begins inside a document, because models
that were trained with BOS put much of their attention on it (Xiao et al. 2023, arXiv:2309.17453). BOS is never a target.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.data.batch import IGNORE, Batch
from pretrain.data.store.token_store import TokenView


class Blocks:
    """The blocks of a view. Block i is tokens [i*S, i*S + S]: neighbouring blocks share a token, so that every token except the
    first one and BOS is a target."""

    def __init__(self, view: TokenView, sequence_length: int) -> None:
        self.view, self.sequence_length = view, sequence_length

    def __len__(self) -> int:
        return max(self.view.num_tokens - 1, 0) // self.sequence_length

    def batch(self, indices: NDArray[np.int64], *, document_mask: bool, first_sample: int = 0) -> Batch:
        """Return the blocks ``indices``, one per row."""
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
    """Return inputs, labels and positions for tokens of shape [n, S+1].

    ``begins`` (same shape) marks the first token of each document; it is required with ``document_mask`` or ``bos``, and the
    marked tokens are not targets. With ``document_mask`` positions restart at them. ``bos`` replaces the first input of every
    row.
    """
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
