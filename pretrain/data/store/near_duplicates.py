"""Near duplicates by MinHash: documents that share most of their sequences of five tokens, of which the first one is kept.

Each document has ``BANDS`` keys. A key is a hash of ``ROWS`` MinHash values of the document's shingles, so two documents whose
shingles have a Jaccard similarity of s share a key with the probability 1 - (1 - s^8)^14: 5 % at 0.5, 56 % at 0.7, 92 % at 0.8.
Documents that share a key, also over others, form a group. The numbers are those of FineWeb (Penedo et al. 2024,
arXiv:2406.17557), the method that of Broder (1997). MinHash is computed by ``datasketch``.

The keys of a part are a pure function of its tokens. They are kept in the cache as a file of 112 bytes per document, and the
decision for all parts of a store as another of one bit per document, which is all that a second start reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.cache import cache_file, exclusive
from pretrain.data.order import mix_bits
from pretrain.data.reading.units import key_of
from pretrain.data.store.token_shards import TokenShard
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.store.token_store import TokenStore, TokenView

VERSION = 1  # of the keys; another number computes all of them again
BANDS, ROWS = 14, 8
SHINGLE = 5  # tokens
SEED = 1
MOST_SHINGLES = 1 << 15  # of which the MinHash values are computed at once: some 15 MB


def check_installed() -> None:
    """Raise ``UserError`` unless the library of MinHash is installed."""
    from importlib.util import find_spec

    if find_spec("datasketch") is None:
        raise UserError("dataset.deduplicate=near needs datasketch: pip install 'pretrain[near]'")


def ensure_keys(part: TokenShard, cache: Path, *, eot: int, bos: int | None) -> Path:
    """Return the file with the keys of a part; it is computed if it is not in the cache, or incomplete."""
    path = keys_path(part.path, cache)
    if not has_keys(part, cache):
        keys = np.concatenate([np.empty(0, np.uint64), *band_keys(part, eot=eot, bos=bos)])
        with cache_file(path) as file:
            file.write(keys.reshape(-1, BANDS).T.astype("<u8").tobytes())
    return path


def has_keys(part: TokenShard, cache: Path) -> bool:
    """Return whether the keys of a part are in the cache."""
    path = keys_path(part.path, cache)
    return path.exists() and path.stat().st_size == BANDS * 8 * part.num_documents


def keys_path(part: Path, cache: Path) -> Path:
    """Return the file for the keys of the part at ``part``."""
    return cache / "near" / part.parent.name / f"{part.stem}-{VERSION}.keys"


def decision_path(parts: Iterable[Path], cache: Path) -> Path:
    """Return the file for the decision about the parts of a store."""
    return cache / "near" / f"{key_of(VERSION, [part.name for part in parts])}.kept"


def band_keys(part: TokenShard, *, eot: int, bos: int | None) -> Iterator[NDArray[np.uint64]]:
    """Yield uint64 [BANDS] for each document of a part. The tokens around a document are not part of it."""
    from datasketch import MinHash

    sketch = MinHash(num_perm=BANDS * ROWS, seed=SEED, hashfunc=int, scheme="affine32")
    for start, end in itertools.pairwise([0, *part.ends.tolist()]):
        tokens = part.tokens[start:end]
        first = int(bos is not None and start < end and int(tokens[0]) == bos)
        last = int(start + first < end and int(tokens[-1]) == eot)
        sketch.clear()
        hashes = np.unique(_shingles(tokens[first : len(tokens) - last].astype(np.uint64)))
        for first in range(0, len(hashes), MOST_SHINGLES):
            sketch.update_batch(hashes[first : first + MOST_SHINGLES].tolist())
        values = sketch.hashvalues.astype("<u4").reshape(BANDS, ROWS)
        yield np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in values], np.uint64)


def _shingles(tokens: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return a hash of each sequence of ``SHINGLE`` tokens; of all tokens where there are fewer."""
    width = min(SHINGLE, len(tokens))
    found = np.zeros(len(tokens) - width + 1, np.uint64)
    for offset in range(width):
        found = mix_bits(found ^ tokens[offset : offset + len(found)])
    return (found >> np.uint64(32)).astype(np.uint32)


def kept_documents(store: TokenStore) -> NDArray[np.bool_]:
    """Return a mask over all documents of the store that is True for the first document of each group.

    One process decides, others wait for it. The decision depends on the tokens alone.
    """
    cache = store.path.parent.parent
    path = decision_path([part.path for part in store.parts], cache)
    packed = _decision(path, store.num_documents)
    if packed is None:
        check_installed()
        with exclusive(cache / "locks" / f"near-{path.stem}.lock", store.name):
            files = [ensure_keys(part, cache, eot=store.eot, bos=store.bos) for part in store.parts]
            packed = np.packbits(_firsts(files, [part.num_documents for part in store.parts]))
            with cache_file(path) as file:
                file.write(packed.tobytes())
    return np.unpackbits(packed, count=store.num_documents).astype(bool)


def nearly_common(one: TokenView, other: TokenView) -> int:
    """Return how many documents of ``other`` share a key with a document of ``one``. The keys of both are in the cache."""
    found = np.zeros(other.num_documents, bool)
    for band in range(BANDS):
        found |= np.isin(_keys(other, band), _keys(one, band))
    return int(found.sum())


def _keys(view: TokenView, band: int) -> NDArray[Any]:
    """Return the keys of a band of the documents of a view."""
    parts, cache = view.store.parts, view.store.path.parent.parent
    files = [keys_path(part.path, cache) for part in parts]
    keys = [np.empty(0, np.uint64), *_band(files, [part.num_documents for part in parts], band)]
    return np.concatenate(keys)[view.document_numbers()]


def _decision(path: Path, num_documents: int) -> NDArray[np.uint8] | None:
    """Return the decision in the cache; ``None`` if there is none, or an incomplete one."""
    try:
        packed = np.fromfile(path, np.uint8)
    except OSError:
        return None
    return packed if len(packed) == -(-num_documents // 8) else None


def _firsts(files: list[Path], counts: list[int]) -> NDArray[np.bool_]:
    """Return which documents are the first of their group.

    Each document starts with its own number as a label. The documents that share a key take their smallest label, band after
    band, and a label is replaced by the label of the document that it names, until nothing changes. One band is in memory at a
    time.
    """
    labels = np.arange(sum(counts))
    changed = True
    while changed:
        changed = False
        for band in range(BANDS):
            order, starts = _groups(files, counts, band)
            if len(starts):
                before = labels[order]
                smallest = np.minimum.reduceat(before, starts)
                found = np.repeat(smallest, np.diff(starts, append=len(order)))
                changed |= bool((found != before).any())
                labels[order] = found
                np.minimum.at(labels, before, found)  # the former label too, so that a chain is halved by each pass
        while not np.array_equal(shorter := labels[labels], labels):
            labels = shorter
    return labels == np.arange(len(labels))


def _groups(files: list[Path], counts: list[int], band: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the documents that share their key of a band with another one, sorted by key, and where each group begins there."""
    keys = np.concatenate([np.empty(0, np.uint64), *_band(files, counts, band)])
    order = np.argsort(keys, kind="stable")
    new = np.concatenate([[True], keys[order][1:] != keys[order][:-1]])[: len(keys)]
    alone = new & np.append(new[1:], True)[: len(keys)]
    order, new = order[~alone], new[~alone]
    return order, np.flatnonzero(new)


def _band(files: list[Path], counts: list[int], band: int) -> Iterator[NDArray[Any]]:
    for path, count in zip(files, counts, strict=True):
        yield np.fromfile(path, "<u8", count=count, offset=8 * count * band)
