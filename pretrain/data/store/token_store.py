"""The token store of a dataset and its views. The split into training and held-out documents is a view of the shards and not a
copy of them, so another fraction, another ratio or another sequence length needs no new tokenization."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.data.changed_files import Files
from pretrain.data.order import mix_bits
from pretrain.data.store.token_shards import UNKNOWN_SIZE, TokenShard, open_part
from pretrain.runtime.errors import UserError
from pretrain.runtime.locks import hold_shared

Deduplicate = bool | Literal["exact", "near"]  # true is exact
Select = Callable[[NDArray[np.uint64]], NDArray[np.bool_]]  # document hashes -> mask of the selected documents


@dataclass(frozen=True)
class DocumentOrigin:
    """The origin of a document.

    Attributes:
        number: index of the document in its store.
        path: file from which it was read.
        start: first byte (for parquet the row group) of the piece of the file in which it is.
        index: index of the document within that piece.
        hash: hash of its text.
    """

    number: int
    path: str
    start: int
    index: int
    hash: int


class TokenStore:
    """Memory-mapped parts (token shards) in the order of their files.

    Attributes:
        path: the small manifest that ``prepare`` wrote; workers open the store from it.
        files: the files that ``prepare`` has read; empty if another process ran ``prepare``.
        name: name of the dataset.
        eot: id of the token that ends each document.
        bos: id of the token that begins each document; ``None`` if there is none.
        parts: the token shards.
        part_tokens: for each part the number of tokens before it, followed by the total.
        part_documents: for each part the number of documents before it, followed by the total.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Files = {}
        lost = UserError(
            f"the token cache {path.parent} has lost files since it was filled; run the same command again"
        )
        self._held = hold_shared(path)  # first: `pretrain.tools.cache` does not delete what is in use
        try:
            manifest = json.loads(path.read_text())
        except FileNotFoundError:
            raise lost from None
        self.name: str = manifest["name"]
        self.eot: int = manifest["eot"]
        self.bos: int | None = manifest.get("bos")
        self._units: list[list[list[Any]]] = manifest["units"]
        folder = path.parent.parent  # of the cache; manifests of earlier versions have absolute paths
        found = [open_part(folder / part) for part in manifest["parts"]]
        self.parts = [part for part in found if part is not None]
        if len(self.parts) < len(found):
            raise lost
        self.part_tokens = np.cumsum([0, *(part.num_tokens for part in self.parts)])
        self.part_documents = np.cumsum([0, *(part.num_documents for part in self.parts)])

    def __del__(self) -> None:
        if getattr(self, "_held", None) is not None:
            os.close(self._held)  # type: ignore[arg-type]
            self._held = None

    @property
    def num_tokens(self) -> int:
        return int(self.part_tokens[-1])

    @property
    def num_documents(self) -> int:
        return int(self.part_documents[-1])

    @property
    def num_bytes(self) -> int:
        """The bytes of text, without those of tokens that are read in place."""
        return sum(part.num_bytes for part in self.parts)

    def document(self, number: int) -> DocumentOrigin:
        """Return the origin of document ``number`` (in store order)."""
        index = int(np.searchsorted(self.part_documents, number, "right")) - 1
        part, inside = self.parts[index], number - int(self.part_documents[index])
        path, start = self._units[index][int(part.pieces[inside])]
        return DocumentOrigin(number, path, start, int(part.indices[inside]), int(part.hashes[inside]))

    def paths(self, index: int) -> list[str]:
        """Return the file of each piece of part ``index``."""
        return [path for path, _ in self._units[index]]

    def views(
        self, *, held_out: float, train_data_ratio: float = 1.0, deduplicate: Deduplicate = False
    ) -> tuple[TokenView, TokenView]:
        """Return (training view, held-out view).

        A document is held out when its hash is in the lowest fraction ``held_out`` of the hash range. The same documents are
        therefore held out on every machine, regardless of the rest of the dataset. If this selects none (or all) of two or more
        different documents, the one with the smallest hash is held out (the one with the largest hash is kept for training)."""
        limit = _hash_limit(self.parts, held_out)
        ratio_limit = int(train_data_ratio * 2**64)
        first = self.kept(deduplicate)

        def is_held_out(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
            return np.zeros(len(hashes), bool) if limit is None else hashes <= limit

        def is_training(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
            in_training = ~is_held_out(hashes)
            return in_training if ratio_limit >= 2**64 else in_training & (mix_bits(hashes) < np.uint64(ratio_limit))

        return TokenView(self, is_training, first), TokenView(self, is_held_out, first)

    def kept(self, deduplicate: Deduplicate) -> NDArray[np.bool_] | None:
        """Return a mask over all documents of those that deduplication keeps; ``None`` where it is off."""
        if deduplicate == "near":
            from pretrain.data.store.near_duplicates import kept_documents

            return kept_documents(self)
        return _first_occurrences(self.parts) if deduplicate else None


class TokenView:
    """Selected documents of a store as one contiguous stream of tokens, including the end-of-text tokens.

    ``select`` chooses documents by their hashes; ``keep``, a mask over all documents of the store, restricts the choice.
    """

    # The view stores runs. A run is a maximal range of neighbouring selected documents of one part; its tokens are contiguous
    # in the part and in the view. 24 bytes per run replace a list of documents or a copy of the tokens:
    #
    #   part 0   [doc0 doc1|  --  |doc3]     selected documents: 0, 1, 3 of part 0 and 0 of part 1
    #   part 1   [doc0|  --  ]               runs: A = doc0-doc1 and B = doc3 of part 0, C = doc0 of part 1
    #   view     A A A A A B B B C C C       _run_start = offsets of A, B, C and the end in the view
    #                                        _run_part, _run_begin = part of the run and offset in that part
    #
    # To read the window [s, s + n) of the view, `segments` finds by binary search in _run_start the runs that overlap it, clips
    # each of them to the window, and shifts the clipped ranges from view to part offsets (by _run_begin - _run_start). All
    # windows of a batch are processed at once. The result is a list of slices of parts, which `gather` copies.

    def __init__(self, store: TokenStore, select: Select, keep: NDArray[np.bool_] | None = None) -> None:
        self.store, self._select, self._keep = store, select, keep
        parts, begins, lengths = [], [], []
        self.num_documents = num_bytes = 0
        knows_sizes = True
        for index, part in enumerate(store.parts):
            mask = self._mask(index)
            self.num_documents += int(mask.sum())
            sizes = part.sizes[mask]
            num_bytes += int(sizes.sum())
            knows_sizes &= bool((sizes != UNKNOWN_SIZE).all())
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
            bounds = np.concatenate([[0], part.ends])
            first, last = bounds[edges[::2]], bounds[edges[1::2]]
            parts.append(np.full(len(first), index, np.int32))
            begins.append(first)
            lengths.append(last - first)
        # of text; ``None`` where tokens are read in place, of which the text is not known
        self.num_bytes = num_bytes if knows_sizes else None
        self._run_part = np.concatenate([np.empty(0, np.int32), *parts])
        self._run_begin = np.concatenate([np.empty(0, np.int64), *begins])  # offset in tokens of the part
        self._run_start = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)  # offset in tokens of the view

    @property
    def num_tokens(self) -> int:
        return int(self._run_start[-1])

    @property
    def num_duplicates(self) -> int:
        """The number of documents of the store that deduplication removes."""
        return 0 if self._keep is None else int((~self._keep).sum())

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return tokens [start, stop) of the stream."""
        return self.gather(np.array([start]), stop - start)[0]

    def gather(
        self, starts: NDArray[np.int64], length: int, into: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    ) -> NDArray[np.int64]:
        """Return int64 [len(starts), length]: the windows that begin at ``starts``. Each must be inside the stream.

        ``into`` is an array [m, length] and the rows of it that the windows are written to; the array is returned.
        """
        found = np.empty(len(starts) * length, np.int64) if into is None else into[0].reshape(-1)
        parts, begins, ends, targets = self.segments(starts, length)
        if into is not None:
            windows, inside = np.divmod(targets, length)
            targets = into[1][windows] * length + inside
        tokens = {int(index): self.store.parts[index].tokens for index in np.unique(parts)}
        stops = targets + (ends - begins)
        for part, begin, end, target, stop in zip(
            parts.tolist(), begins.tolist(), ends.tolist(), targets.tolist(), stops.tolist(), strict=True
        ):
            found[target:stop] = tokens[part][begin:end]
        return found.reshape(len(starts) if into is None else len(into[0]), length)

    def gather_starts(self, starts: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
        """Return bool [len(starts), length]: where in the windows that begin at ``starts`` a document begins."""
        found = np.zeros(len(starts) * length, bool)
        parts, begins, ends, targets = self.segments(starts, length)
        for index, here in by_value(parts):
            bounds = self.store.parts[index].ends  # document k begins at bounds[k - 1], the first at 0
            low = np.searchsorted(bounds, begins[here]) + (begins[here] > 0)
            high = np.searchsorted(bounds, ends[here]) + 1
            which = aranges(low, high)
            positions = np.where(which > 0, bounds[which - 1], 0)
            found[positions + np.repeat(targets[here] - begins[here], high - low)] = True
        return found.reshape(len(starts), length)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the positions in [start, stop) of the stream at which a document begins."""
        return np.flatnonzero(self.gather_starts(np.array([start]), stop - start)[0]) + start

    def document_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the store numbers of the documents that have a token in [start, stop), in order."""
        found = [np.empty(0, np.int64)]
        for index, begin, end, _ in zip(*self.segments(np.array([start]), stop - start), strict=True):
            ends = self.store.parts[index].ends
            first, last = np.searchsorted(ends, [begin, end - 1], "right")
            found.append(np.arange(first, last + 1) + self.store.part_documents[index])
        return np.concatenate(found)

    def limited(self, max_tokens: int | None) -> TokenView:
        """Return a view of complete documents with at most ``max_tokens`` tokens in total, but at least one document. The
        documents with the smallest hashes are chosen, an unbiased sample that changes little when documents are added."""
        if max_tokens is None or self.num_tokens <= max_tokens:
            return self
        hashes, lengths = [], []
        for index, part in enumerate(self.store.parts):
            mask = self._mask(index)
            hashes.append(part.hashes[mask])
            lengths.append(np.diff(part.ends, prepend=0)[mask])
        all_hashes = np.concatenate(hashes)
        order = np.argsort(all_hashes, kind="stable")
        fitting = int(np.searchsorted(np.cumsum(np.concatenate(lengths)[order]), max_tokens, "right"))
        limit = all_hashes[order[max(fitting - 1, 0)]]
        return TokenView(self.store, lambda some: self._select(some) & (some <= limit), self._keep)

    def hashes(self) -> Iterator[NDArray[np.uint64]]:
        """Yield the hashes of the documents, one shard of the store at a time."""
        for index, part in enumerate(self.store.parts):
            yield np.asarray(part.hashes)[self._mask(index)]

    def _mask(self, index: int) -> NDArray[np.bool_]:
        """Return which documents of part ``index`` are selected."""
        mask = self._select(np.asarray(self.store.parts[index].hashes))
        if self._keep is None:
            return mask
        first, last = self.store.part_documents[index : index + 2]
        return mask & self._keep[first:last]

    def document_lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each document of the view, in order."""
        parts = enumerate(self.store.parts)
        return np.concatenate(
            [np.empty(0, np.int64), *(np.diff(part.ends, prepend=0)[self._mask(index)] for index, part in parts)]
        )

    def document_numbers(self) -> NDArray[np.int64]:
        """Return the store number of each document of the view, in order."""
        return np.flatnonzero(np.concatenate([np.empty(0, bool), *map(self._mask, range(len(self.store.parts)))]))

    def copy_into(
        self,
        target: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        at: NDArray[np.int64],
    ) -> None:
        """Copy windows of several lengths to the positions ``at`` of ``target``."""
        parts, begins, ends, places = self.segments(starts, lengths, at=at)
        tokens = {int(index): self.store.parts[index].tokens for index in np.unique(parts)}
        for part, begin, end, place in zip(
            parts.tolist(), begins.tolist(), ends.tolist(), places.tolist(), strict=True
        ):
            target[place : place + end - begin] = tokens[part][begin:end]

    def segments(
        self, starts: NDArray[np.int64], length: int | NDArray[np.int64], at: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], ...]:
        """Return the slices of parts that make up the windows: (part, begin and end in the tokens of the part, position in the
        flattened result). A window that crosses runs yields several slices. ``at`` is the position of each window in the result;
        by default they follow one another."""
        # low and high: the half-open range of runs that overlap each window
        low = np.searchsorted(self._run_start, starts, "right") - 1
        high = np.searchsorted(self._run_start, starts + length, "left")
        runs = aranges(low, high)
        window = np.repeat(np.arange(len(starts)), high - low)
        begin = np.maximum(starts[window], self._run_start[runs])
        end = np.minimum((starts + length)[window], self._run_start[runs + 1])
        shift = self._run_begin[runs] - self._run_start[runs]
        place = window * length if at is None else at[window]
        return self._run_part[runs], begin + shift, end + shift, place + begin - starts[window]


def by_value(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (value, indices at which it occurs) for each distinct value. A single sort is used: comparing the array with every
    value would be quadratic in the size of a corpus when windows lie in all of its parts."""
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    if len(found):
        yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True)


def aranges(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the concatenated ranges [low[0], …, high[0]-1, low[1], …, high[1]-1, …]."""
    counts = high - low
    return np.repeat(high - np.cumsum(counts), counts) + np.arange(counts.sum())


def _hash_limit(parts: list[TokenShard], held_out: float) -> np.uint64 | None:
    """Return the largest hash of held-out documents; ``None`` if no document is held out."""
    extremes = [value for part in parts if part.num_documents for value in (part.hashes.min(), part.hashes.max())]
    if held_out <= 0 or (len(set(extremes)) < 2 and held_out < 1):
        return None
    limit = np.uint64(min(int(held_out * 2**64), 2**64 - 1))
    if held_out >= 1:
        return limit
    smallest, largest = min(extremes), max(extremes)
    if smallest > limit:
        return smallest
    return largest - np.uint64(1) if largest <= limit else limit


def _first_occurrences(parts: list[TokenShard]) -> NDArray[np.bool_]:
    """Return a mask over all documents that is True for the first document of each hash."""
    hashes = np.concatenate([np.empty(0, np.uint64), *(part.hashes for part in parts)])
    keep = np.zeros(len(hashes), bool)
    keep[np.unique(hashes, return_index=True)[1]] = True
    return keep
