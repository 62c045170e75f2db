"""Counts of what a run has read so far, by part and by source. No state is saved: the samples up to a cursor are a function of
(seed, phases, index), so the count is exact after any resume. Complete epochs are counted once and multiplied."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from pretrain.data.blocks import Blocks
from pretrain.data.loader import Loader
from pretrain.data.reading.units import printable
from pretrain.data.store.token_store import TokenStore, aranges, by_value
from pretrain.telemetry.events import PartCount, SourceCount

MAX_SOURCES = 16  # the most sources of a part in a record
OTHERS = "(others)"
BATCH = 1 << 18  # number of samples that are counted at a time

Counts = NDArray[np.int64]  # [sources, 2]: tokens, documents


class DataStatistics:
    """Tokens and documents read, by part and by source."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._parts = [
            PartStatistics(blocks, partial(loader.order.blocks, index)) for index, blocks in enumerate(loader.blocks)
        ]

    def sources(self, samples: int) -> dict[str, SourceCount]:
        """Return the counts of the first ``samples`` samples of the run by source; in a mixture by ``part/source``."""
        taken = self._loader.order.taken(samples).tolist()
        found = [part.at(count) for part, count in zip(self._parts, taken, strict=True)]
        if len(found) == 1:
            return found[0]
        names = (part.name for part in self._loader.train.parts)
        return {f"{name}/{key}": counts[key] for name, counts in zip(names, found, strict=True) for key in counts}

    def parts(self, samples: int) -> dict[str, PartCount]:
        """Return what the first ``samples`` samples of the run hold of each part."""
        taken, wanted = self._loader.order.taken(samples), self._loader.wanted_shares(samples)
        tokens = [round(count * mean) for count, mean in zip(taken.tolist(), self._loader.mean_targets, strict=True)]
        total, lengths = sum(tokens) or 1, map(len, self._loader.blocks)
        rows = zip(self._loader.train.parts, tokens, wanted, taken.tolist(), lengths, strict=True)
        return {
            part.name: PartCount(count, count / total, share, samples_taken / max(length, 1))
            for part, count, share, samples_taken, length in rows
        }


class PartStatistics:
    """Tokens and documents read of one part, by source. A source is a file, or a folder if there are more than ``MAX_SOURCES``
    files. With more than ``MAX_SOURCES`` sources, all but the largest (by tokens per epoch) are counted together as
    ``OTHERS``.

    ``order`` returns the blocks that some samples of the part are.
    """

    def __init__(self, blocks: Blocks, order: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> None:
        self._blocks, self._order = blocks, order
        self._view = blocks.view
        self._epoch, self._samples = -1, 0  # ``_partial`` counts the first ``_samples`` samples of this epoch
        self._partial: Counts

    def at(self, samples: int) -> dict[str, SourceCount]:
        """Return the counts of the first ``samples`` samples of the part; fast if it can continue from the previous call."""
        length = max(len(self._blocks), 1)
        epochs, in_epoch = divmod(samples, length)
        if epochs != self._epoch or in_epoch < self._samples:
            self._epoch, self._samples, self._partial = epochs, 0, self._zeros()
        while self._samples < in_epoch:
            stop = min(in_epoch, self._samples + BATCH)
            numbers = epochs * length + np.arange(self._samples, stop)
            self._partial += self._count(self._order(numbers))
            self._samples = stop
        return self._largest(self._partial + epochs * self._per_epoch if epochs else self._partial)

    @cached_property
    def _per_epoch(self) -> Counts:
        """The counts of one epoch."""
        counts = self._zeros()
        for start in range(0, len(self._blocks), BATCH):
            counts += self._count(np.arange(start, min(start + BATCH, len(self._blocks))))
        return counts

    @cached_property
    def _shown(self) -> NDArray[np.int64]:
        """The numbers of the sources that have an entry of their own in a record."""
        if len(self._names) <= MAX_SOURCES:
            return np.arange(len(self._names))
        return np.sort(np.argsort(-self._per_epoch[:, 0], kind="stable")[: MAX_SOURCES - 1])

    def _largest(self, counts: Counts) -> dict[str, SourceCount]:
        """Return ``counts`` by name, with the sources that are not shown summed up as ``OTHERS``."""
        found = {self._names[i]: SourceCount(*counts[i].tolist()) for i in self._shown.tolist()}
        if len(self._names) > MAX_SOURCES:
            found[OTHERS] = SourceCount(*np.delete(counts, self._shown, axis=0).sum(0).tolist())
        return found

    def _zeros(self) -> Counts:
        return np.zeros((len(self._names), 2), np.int64)

    def _count(self, blocks: NDArray[np.int64]) -> Counts:
        """Return the counts of ``blocks``."""
        counts = self._zeros()
        parts, begins, ends, _ = self._blocks.segments(blocks)
        for index, here in by_value(parts):
            self._count_part(index, begins[here], ends[here], counts)
        return counts

    def _count_part(self, index: int, begins: NDArray[np.int64], ends: NDArray[np.int64], counts: Counts) -> None:
        """Add to ``counts`` the token ranges [begin, end) of a part. A range may span several of the part's files."""
        part, (sources, bounds) = self._view.store.parts[index], self._files[index]
        low = np.searchsorted(bounds, begins, "right") - 1
        high = np.searchsorted(bounds, ends, "left")
        which, window = aranges(low, high), np.repeat(np.arange(len(begins)), high - low)
        first, last = np.maximum(begins[window], bounds[which]), np.minimum(ends[window], bounds[which + 1])
        documents = _begun(part.ends, last) - _begun(part.ends, first)
        np.add.at(counts, sources[which], np.stack([last - first, documents], 1))

    @cached_property
    def _names(self) -> list[str]:
        return sorted(set(self._by_path.values()))

    @cached_property
    def _by_path(self) -> dict[str, str]:
        store = self._view.store
        return names({path for index in range(len(store.parts)) for path in store.paths(index)})

    @cached_property
    def _files(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each part: the source of each piece, and the token offsets at which the pieces begin, followed by the end."""
        numbers = {name: number for number, name in enumerate(self._names)}
        store = self._view.store
        return [self._pieces(store, index, numbers) for index in range(len(store.parts))]

    def _pieces(
        self, store: TokenStore, index: int, numbers: dict[str, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return for part ``index`` the source number of each piece, and the token offsets of the pieces followed by the end."""
        part, paths = store.parts[index], store.paths(index)
        documents = np.searchsorted(part.pieces, np.arange(len(paths)), "right")  # number up to the end of each piece
        bounds = np.concatenate([[0], part.ends])[np.concatenate([[0], documents])]
        return np.array([numbers[self._by_path[path]] for path in paths]), bounds


def _begun(ends: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many documents begin in the first ``tokens`` tokens of a part. The first document begins at 0, every other one
    at the end of its predecessor."""
    return np.searchsorted(ends, tokens) + (tokens > 0)


def names(paths: set[str]) -> dict[str, str]:
    """Return the name of the source of each file: its path relative to the common folder, or, if there are more than
    ``MAX_SOURCES`` files, the first folder of that path."""
    parents = {os.path.dirname(path) for path in paths}
    try:
        root = os.path.commonpath(parents) if parents else ""
    except ValueError:  # some relative, some absolute
        root = ""
    inside = {path: PurePath(os.path.relpath(path, root) if root else path) for path in paths}
    if len(paths) <= MAX_SOURCES:
        return {path: printable(str(short)) for path, short in inside.items()}
    return {path: printable(short.parts[0]) if len(short.parts) > 1 else "." for path, short in inside.items()}
