"""Blocks of complete documents: a document begins where there is room for all of it, instead of where the last one ends.

Best-fit decreasing (Ding et al. 2024, arXiv:2404.10830): documents are placed by descending length, each into the block with the
least room that is enough for it. Only a document that is longer than a block is cut, into chunks that overlap by one token: every
token but the first of a document is a target. The room that is left is filled with the end-of-text token, which is no target.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from pretrain.data.blocks import Blocks
from pretrain.data.store.token_store import TokenView, aranges


class BestFitBlocks(Blocks):
    """The blocks of a view, each of which holds whole chunks of documents. They are a pure function of the lengths of the
    documents and of ``sequence_length``. Memory: 28 bytes per chunk."""

    needs_starts = True

    def __init__(self, view: TokenView, sequence_length: int) -> None:
        super().__init__(view, sequence_length)
        starts, lengths, documents = _chunks(view.document_lengths(), sequence_length)
        order, self._first = best_fit(lengths, sequence_length + 1)
        self._starts, self._lengths, self._documents = starts[order], lengths[order], documents[order]

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def padding(self) -> float:
        """The share of padding in all positions."""
        return 1 - int(self._lengths.sum()) / max(len(self) * (self.sequence_length + 1), 1)

    def mean_targets(self, *, document_mask: bool) -> float:
        return int((self._lengths - 1).sum()) / len(self) if len(self) else float(self.sequence_length)

    def segments(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        chunks, _, offsets = self._placed(indices)
        inside = np.clip(
            self.sequence_length - offsets, 0, self._lengths[chunks]
        )  # the last token of a block is no input
        return self.view.segments(self._starts[chunks], inside, at=offsets)

    def documents(self, index: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for chunk in range(self._first[index], self._first[index + 1]):
            start = int(self._starts[chunk])
            yield int(self._numbers[self._documents[chunk]]), self.view.read(start, start + int(self._lengths[chunk]))

    def fill(
        self,
        tokens: NDArray[np.int64],
        begins: NDArray[np.bool_] | None,
        rows: NDArray[np.int64],
        indices: NDArray[np.int64],
    ) -> None:
        assert begins is not None
        tokens[rows], begins[rows] = self.view.store.eot, True  # padding: each token is a document of its own
        chunks, which, offsets = self._placed(indices)
        places = rows[which] * tokens.shape[1] + offsets
        flat, starts = tokens.reshape(-1), begins.reshape(-1)
        self.view.copy_into(flat, self._starts[chunks], self._lengths[chunks], places)
        starts[np.repeat(places, self._lengths[chunks]) + _counts(self._lengths[chunks])] = False
        starts[places] = True

    @cached_property
    def _numbers(self) -> NDArray[np.int64]:
        """The store number of each document of the view."""
        return self.view.document_numbers()

    def _placed(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the chunks of the blocks ``indices``, for each its position among ``indices`` and its offset in the block."""
        low, high = self._first[indices], self._first[indices + 1]
        chunks, which = aranges(low, high), np.repeat(np.arange(len(indices)), high - low)
        before = np.cumsum(self._lengths[chunks]) - self._lengths[chunks]
        first = np.cumsum(high - low) - (high - low)
        return chunks, which, before - before[first[which]] if len(chunks) else before


@lru_cache(maxsize=32)
def best_fit_blocks(view: TokenView, sequence_length: int) -> BestFitBlocks:
    """Return the blocks of a view, which are computed once."""
    return BestFitBlocks(view, sequence_length)


def _chunks(
    documents: NDArray[np.int64], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return start in the stream, length and number of the document of each chunk. Chunks of one token have no target and are
    left out."""
    counts = np.maximum(-(-(documents - 1) // sequence_length), 0)
    which = np.repeat(np.arange(len(documents)), counts)
    offset = _counts(counts) * sequence_length
    starts = (np.cumsum(documents) - documents)[which] + offset
    return starts, np.minimum(documents[which] - offset, sequence_length + 1), which


def best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the items by block, and the position of each block's first item followed by their number.

    A bit of ``rooms`` tells whether a block has this room: the least room that is enough is the lowest bit at or above a length.
    """
    descending = np.argsort(-lengths, kind="stable")
    blocks = np.empty(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = count = 0
    for item, length in zip(descending.tolist(), lengths[descending].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            block = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            block, room, count = count, capacity, count + 1
        blocks[item] = block
        if left := room - length:
            by_room[left].append(block)
            rooms |= 1 << left
    order = np.argsort(blocks, kind="stable")
    return order, np.searchsorted(blocks[order], np.arange(count + 1)).astype(np.int64)


def _counts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [0, …, lengths[0]-1, 0, …, lengths[1]-1, …]."""
    return aranges(np.zeros(len(lengths), np.int64), lengths)
