"""Blocks: the stream of a view cut into windows of ``sequence_length`` + 1 tokens, without padding."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pretrain.batch import IGNORE, Batch
from pretrain.data.store import TokenView


class Blocks:
    """Block i is tokens [i*S, i*S + S] of the view: neighbours share a token, so that every token but the first is a
    target."""

    def __init__(self, view: TokenView, sequence_length: int) -> None:
        self.view, self.sequence_length = view, sequence_length

    def __len__(self) -> int:
        return max(self.view.num_tokens - 1, 0) // self.sequence_length

    def batch(self, indices: NDArray[np.int64], *, document_mask: bool, first_sample: int = 0) -> Batch:
        """The blocks ``indices``, one a row."""
        starts, length = indices * self.sequence_length, self.sequence_length + 1
        begins = self.view.gather_starts(starts, length) if document_mask else None
        return packed(self.view.gather(starts, length), begins, first_sample=first_sample)


def packed(tokens: NDArray[np.int64], begins: NDArray[np.bool_] | None, *, first_sample: int = 0) -> Batch:
    """Inputs, labels and positions out of [n, S+1] tokens. ``begins`` (same shape) marks the documents' first
    tokens; with it, positions restart there and no token is predicted across the border. ``None``: no document mask."""
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    positions = None
    if begins is not None:
        labels[begins[:, 1:]] = IGNORE
        count = np.arange(inputs.shape[1])
        positions = torch.from_numpy(count - np.maximum.accumulate(np.where(begins[:, :-1], count, 0), axis=1))
    num_targets = int((labels != IGNORE).sum()) if begins is not None else labels.size
    return Batch(torch.from_numpy(inputs), torch.from_numpy(labels), positions, num_targets, first_sample)
