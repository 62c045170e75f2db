"""The token stream of a dataset and its views. The split into training and held-out documents is a way to look at
the parts, not a copy of them: another fraction, another share, another sequence length needs no new tokenization."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pretrain.data.changed_files import Files
from pretrain.data.order import _mix
from pretrain.data.store.token_shards import TokenShard, open_part
from pretrain.runtime.errors import UserError

Select = Callable[[NDArray[np.uint64]], NDArray[np.bool_]]  # document hashes -> which of them


@dataclass(frozen=True)
class Document:
    """Where document ``number`` of a store came from: the ``index``-th one of the piece of ``path`` that begins at
    ``start`` (bytes; for parquet the row group)."""

    number: int
    path: str
    start: int
    index: int
    hash: int


class TokenStore:
    """Memory-mapped parts in the order of their files. ``path`` is the small manifest that ``prepare`` wrote;
    workers open the store by it. ``files``: what ``prepare`` has read, empty where it was not this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: Files = {}
        manifest = json.loads(path.read_text())
        self.name: str = manifest["name"]
        self.eot: int = manifest["eot"]
        self.bos: int | None = manifest.get("bos")
        self._units: list[list[list[Any]]] = manifest["units"]
        found = [open_part(Path(part)) for part in manifest["parts"]]
        self.parts = [part for part in found if part is not None]
        if len(self.parts) < len(found):
            raise UserError(f"the token cache {path.parent} lost files since it was filled; run the same command again")
        self.part_tokens = np.cumsum([0, *(part.num_tokens for part in self.parts)])
        self.part_documents = np.cumsum([0, *(part.num_documents for part in self.parts)])

    @property
    def num_tokens(self) -> int:
        return int(self.part_tokens[-1])

    @property
    def num_documents(self) -> int:
        return int(self.part_documents[-1])

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def document(self, number: int) -> Document:
        """Where document ``number`` (in store order) is to be found."""
        index = int(np.searchsorted(self.part_documents, number, "right")) - 1
        part, inside = self.parts[index], number - int(self.part_documents[index])
        path, start = self._units[index][int(part.pieces[inside])]
        return Document(number, path, start, int(part.indices[inside]), int(part.hashes[inside]))

    def paths(self, index: int) -> list[str]:
        """The file of each piece of part ``index``."""
        return [path for path, _ in self._units[index]]

    def views(
        self, *, held_out: float, train_data_ratio: float = 1.0, deduplicate: bool = False
    ) -> tuple[TokenView, TokenView]:
        """(training view, held-out view). A document is held out when its hash is in the lowest ``held_out`` of all
        hashes: the same document on every machine, whatever else is in the dataset. Where that takes none (or all)
        of two or more different documents, the one with the smallest (largest) hash is the one held out (kept)."""
        limit = _hash_limit(self.parts, held_out)
        share = int(train_data_ratio * 2**64)
        first = _first_of_equals(self.parts) if deduplicate else None
        no_one = np.uint64(0) if limit is None else limit

        def is_held_out(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
            return np.zeros(len(hashes), bool) if limit is None else hashes <= no_one

        def is_training(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
            kept = ~is_held_out(hashes)
            return kept if share >= 2**64 else kept & (_mix(hashes) < np.uint64(share))

        return TokenView(self, is_training, first), TokenView(self, is_held_out, first)


class TokenView:
    """Some documents of a store as one contiguous stream of tokens, end-of-text tokens included.

    Kept per *run* of neighbouring selected documents, 24 bytes each; a run lies in one part.
    """

    def __init__(self, store: TokenStore, select: Select, keep: NDArray[np.bool_] | None = None) -> None:
        self.store, self._select, self._keep = store, select, keep
        parts, begins, lengths = [], [], []
        self.num_documents = self.num_bytes = 0
        for index, part in enumerate(store.parts):
            mask = self._mask(index)
            self.num_documents += int(mask.sum())
            self.num_bytes += int(part.sizes[mask].sum())
            edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
            bounds = np.concatenate([[0], part.ends])
            first, last = bounds[edges[::2]], bounds[edges[1::2]]
            parts.append(np.full(len(first), index, np.int32))
            begins.append(first)
            lengths.append(last - first)
        self._run_part = np.concatenate([np.empty(0, np.int32), *parts])
        self._run_begin = np.concatenate([np.empty(0, np.int64), *begins])  # in tokens of the part
        self._run_start = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)  # in tokens of the view

    @property
    def num_tokens(self) -> int:
        return int(self._run_start[-1])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream."""
        return self.gather(np.array([start]), stop - start)[0]

    def gather(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """int64 [len(starts), length]: the windows that begin at ``starts``, each wholly inside the stream."""
        found = np.empty(len(starts) * length, np.int64)
        parts, begins, ends, targets = self.segments(starts, length)
        tokens = {int(index): self.store.parts[index].tokens for index in np.unique(parts)}
        stops = targets + (ends - begins)
        for part, begin, end, target, stop in zip(
            parts.tolist(), begins.tolist(), ends.tolist(), targets.tolist(), stops.tolist(), strict=True
        ):
            found[target:stop] = tokens[part][begin:end]
        return found.reshape(len(starts), length)

    def gather_starts(self, starts: NDArray[np.int64], length: int) -> NDArray[np.bool_]:
        """bool [len(starts), length]: where in those windows a document begins."""
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
        """Positions in [start, stop) of the stream at which a document begins."""
        return np.flatnonzero(self.gather_starts(np.array([start]), stop - start)[0]) + start

    def document_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers in the store of the documents that have a token in [start, stop), in order."""
        found = [np.empty(0, np.int64)]
        for index, begin, end, _ in zip(*self.segments(np.array([start]), stop - start), strict=True):
            ends = self.store.parts[index].ends
            first, last = np.searchsorted(ends, [begin, end - 1], "right")
            found.append(np.arange(first, last + 1) + self.store.part_documents[index])
        return np.concatenate(found)

    def limited(self, max_tokens: int | None) -> TokenView:
        """A view of whole documents with at most ``max_tokens`` (but at least one document): those with the smallest
        hashes, a fair sample that stays the same when others are added."""
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

    def _mask(self, index: int) -> NDArray[np.bool_]:
        mask = self._select(np.asarray(self.store.parts[index].hashes))
        if self._keep is None:
            return mask
        first, last = self.store.part_documents[index : index + 2]
        return mask & self._keep[first:last]

    def segments(self, starts: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], ...]:
        """The windows cut at runs: (part, begin and end in its tokens, position in the flattened result)."""
        low = np.searchsorted(self._run_start, starts, "right") - 1
        high = np.searchsorted(self._run_start, starts + length, "left")
        runs = aranges(low, high)
        window = np.repeat(np.arange(len(starts)), high - low)
        begin = np.maximum(starts[window], self._run_start[runs])
        end = np.minimum(starts[window] + length, self._run_start[runs + 1])
        shift = self._run_begin[runs] - self._run_start[runs]
        return self._run_part[runs], begin + shift, end + shift, window * length + begin - starts[window]


def by_value(values: NDArray[Any]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(value, where it stands) for each that occurs, in one sort: a comparison with all of them for every value would be
    quadratic in the size of a corpus, of which a stretch in each part is looked up."""
    order = np.argsort(values, kind="stable")
    found, starts = np.unique(values[order], return_index=True)
    if len(found):
        yield from zip(found.tolist(), np.split(order, starts[1:]), strict=True)


def aranges(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.int64]:
    """[low[0], …, high[0]-1, low[1], …, high[1]-1, …]."""
    counts = high - low
    return np.repeat(high - np.cumsum(counts), counts) + np.arange(counts.sum())


def _hash_limit(parts: list[TokenShard], held_out: float) -> np.uint64 | None:
    """Documents with a hash up to this one are held out; ``None``: none are."""
    extremes = [value for part in parts if part.num_documents for value in (part.hashes.min(), part.hashes.max())]
    if held_out <= 0 or len(set(extremes)) < 2:
        return None
    limit = np.uint64(min(int(held_out * 2**64), 2**64 - 1))
    smallest, largest = min(extremes), max(extremes)
    if smallest > limit:
        return smallest
    return largest - np.uint64(1) if largest <= limit else limit


def _first_of_equals(parts: list[TokenShard]) -> NDArray[np.bool_]:
    hashes = np.concatenate([np.empty(0, np.uint64), *(part.hashes for part in parts)])
    keep = np.zeros(len(hashes), bool)
    keep[np.unique(hashes, return_index=True)[1]] = True
    return keep
