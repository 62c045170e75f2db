"""Tokenization of a source into the token cache, before any process group exists. A small amount of text is tokenized in this
process (starting workers takes half a second), a larger one in child processes. Every work unit is a file of its own in the
cache, so a killed run loses at most one unit per worker, and datasets that share files share their tokens."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from pretrain.data.cache import (
    cache_dir,
    cache_file,
    ensure_content,
    exclusive,
    make_private,
    remove_abandoned,
    used_now,
)
from pretrain.data.changed_files import files_of
from pretrain.data.reading.cut import cut
from pretrain.data.reading.opening import stamp_of
from pretrain.data.reading.readers import read
from pretrain.data.reading.units import OWN_UNIT_BYTES, FileRange, SourceFile, WorkUnit, group, key_of, reading
from pretrain.data.sources.base import Source
from pretrain.data.store.near_duplicates import check_installed
from pretrain.data.store.token_shards import open_part, write_first
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization.encode import FORMAT, Encoder, Outcome, Progress
from pretrain.data.tokenization.files_record import recall, remember
from pretrain.data.tokenization.in_place import token_piece
from pretrain.data.tokenization.shared_work import SharedWork, UnitRecords
from pretrain.data.tokenization.workers import encode_in_workers
from pretrain.runtime.console import notice, progress_bar
from pretrain.runtime.errors import UserError
from pretrain.runtime.places import is_url

# Less text than this is tokenized in this process; the tokenizer's own threads use all cores. Between their calls a single core
# works (6 % of the CPU time in a profile of 11 MB). The break-even point of workers is estimated from that share and from their
# start-up time of about 0.7 s, not measured: some 50 MB on 8 cores.
WORKERS_FROM_BYTES = 64 << 20
BYTES_PER_TOKEN = 4  # a guess, for the progress bar and the number of workers
OPENED_AT_ONCE = 8  # remote files
ONE_PROCESS = "memory://"  # files that exist in this process only


def prepare(
    source: Source,
    *,
    tokenizer_json: str,
    eot: int,
    bos: int | None = None,
    num_workers: int | None = None,
    cache: Path | None = None,
) -> TokenStore:
    """Tokenize what is not yet in the cache and return the store of all documents.

    Args:
        source: the dataset.
        tokenizer_json: the text of a ``tokenizer.json``.
        eot: id of the token that ends each document.
        bos: id of the token that begins each document; ``None`` if there is none.
        num_workers: number of worker processes; by default that of the source, or else one per usable core.
        cache: folder of the token cache; by default ``cache_dir()``.

    Raises:
        UserError: a file is missing, is not of its format or has no text, or the disk is full. Finished units are kept.
    """
    cache = cache or cache_dir()
    make_private(cache)
    num_workers = num_workers or source.num_workers or default_workers()
    encoder = _encoder(cache, tokenizer_json, source, eot=eot, bos=bos)
    units, outcomes = _tokenized_units(source, cache, encoder, num_workers)
    boundaries = {"eot": eot} | ({} if bos is None else {"bos": bos})
    store = TokenStore(_write_manifest(cache / "stores", source.domain, boundaries, units, outcomes))
    store.files = files_of(units, (digests for _, digests in outcomes))
    if not store.num_documents:
        raise UserError(f"dataset {source.domain!r}: no text: {_why_empty(store, source)}")
    if copied := _copied_pieces(units, store):
        notice(f"dataset {source.domain!r}: {_why_copied(copied, encoder)}")
    if encoder.near:
        store.kept("near")  # decided here, before other processes open the store
    return store


def cached_size(
    source: Source, *, tokenizer_json: str, eot: int, bos: int | None = None, cache: Path | None = None
) -> tuple[int, int] | None:
    """Return the number of tokens of a source in the token cache and the bytes that they take there, without a look at its files.

    The result is ``None`` unless all of its documents were tokenized before. Of the arguments see `prepare`.
    """
    cache = cache or cache_dir()
    if source.max_tokens is not None:
        return None
    encoder = _encoder(cache, tokenizer_json, source, eot=eot, bos=bos, write=False)
    memory = cache / "files" / f"{key_of(FORMAT, source.identity(), encoder.options.key())}.json"
    units = list(group(piece for pieces in recall(memory).values() for piece in pieces))
    outcomes = [encoder.finished(unit) for unit in units]
    if not units or None in outcomes:
        return None
    paths = [outcome[0] for outcome in outcomes if outcome is not None]
    parts = [open_part(path) for path in paths]
    return sum(part.num_tokens for part in parts if part), sum(path.stat().st_size for path in paths)


def _tokenized_units(
    source: Source, cache: Path, encoder: Encoder, num_workers: int
) -> tuple[list[WorkUnit], list[Outcome]]:
    """Tokenize the units of the source that are not in the cache, and return all units with their outcomes."""
    limit = [] if source.max_tokens is None else [source.max_tokens]
    key = key_of(FORMAT, source.identity(), encoder.options.key(), *limit)
    memory, started_at = cache / "files" / f"{key}.json", time.time()
    progress = cache / "progress" / key_of(key, encoder.tokenizer_key, encoder.eot, encoder.bos)
    records = UnitRecords(progress, memory, started_at)
    if source.max_tokens is None:
        with exclusive(cache / "locks" / f"{key}.lock", source.domain):
            units = list(group(_pieces(source, cache, recall(memory))))
            if any(piece.digest is None for unit in units for piece in unit.pieces):
                # other processes need not cut the files again
                remember(memory, units, ([piece.digest for piece in unit.pieces] for unit in units), started_at)
        outcomes = _encode_all(units, encoder, records, num_workers, source.domain)
    else:
        lazily = group(_pieces(source, cache, recall(memory)))
        units, outcomes = _encode_first(source.max_tokens, lazily, encoder, records, num_workers, source.domain)
    remember(memory, units, (digests for _, digests in outcomes), started_at)
    records.remove()
    if source.max_tokens is None:
        return units, outcomes
    outcomes = _limited(source.max_tokens, outcomes, encoder)
    return units[: len(outcomes)], outcomes


def _copied_pieces(units: list[WorkUnit], store: TokenStore) -> list[FileRange]:
    """Return the large files of token ids that could not be read in place."""
    return [
        piece
        for unit, part in zip(units, store.parts, strict=True)
        if part.tokens_at is None and (piece := token_piece(unit)) and piece.size >= OWN_UNIT_BYTES
    ]


def _why_copied(pieces: list[FileRange], encoder: Encoder) -> str:
    """Return why token ids of other programs are copied into the cache."""
    begin = "" if encoder.bos is None else f", or not all begin with BOS ({encoder.bos})"
    return (
        f"{sum(piece.size for piece in pieces):,} bytes of token ids, such as of {pieces[0].path}, are copied into the cache, "
        f"because their documents do not all end with the separator ({encoder.eot}){begin}; dataset.separator and dataset.bos "
        "name the tokens of the corpus"
    )


def _why_empty(store: TokenStore, source: Source) -> str:
    """Return why a dataset has no documents."""
    if removed := sum(part.num_removed for part in store.parts):
        return f"dataset.where={source.where!r} removes all {removed:,} documents of {source.described()}"
    return f"every document of {source.described()} is empty"


def _encoder(
    cache: Path, tokenizer_json: str, source: Source, *, eot: int, bos: int | None, write: bool = True
) -> Encoder:
    """Return the encoder whose parts are in ``cache``, where its tokenizer is written for the worker processes."""
    key = key_of(tokenizer_json)
    path = cache / "tokenizers" / f"{key}.json"
    if write:
        ensure_content(path, tokenizer_json.encode())
    near = source.deduplicate == "near"
    if near:
        check_installed()
    return Encoder(
        folder=cache / "parts",
        tokenizer_path=path,
        tokenizer_key=key,
        eot=eot,
        options=source.options(),
        bos=bos,
        near=near,
    )


def training_texts(source: Source) -> Iterator[str]:
    """Yield the texts on which a tokenizer is trained: the documents that ``TokenStore.views`` would not hold out."""
    limit = source.held_out * 2**64
    for piece in _pieces(source, cache_dir(), {}):
        for document in read(piece, source.options()):
            if not isinstance(document, str):
                raise UserError(f"{piece.path}: token ids, not text: a tokenizer cannot be trained on them")
            if xxhash.xxh3_64_intdigest(document.encode("utf-8", "surrogatepass")) > limit:
                yield document


def default_workers() -> int:
    """Return one worker per core, but 1 (this process) on one or two cores. There the tokenizer's own threads already keep the
    cores busy, and two workers took a quarter more CPU time for the same text."""
    return usable_cores() if usable_cores() > 2 else 1


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Pieces and units -----------------------------------------------------------------------------------------------------


def _pieces(source: Source, cache: Path, remembered: dict[str, list[FileRange]]) -> Iterator[FileRange]:
    """Yield the pieces of all files. A file whose size, mtime and inode are unchanged since the last time is not opened. Remote
    files are opened some at a time, because each takes some requests."""
    # With max_tokens only the first pieces of the last file may be remembered.
    partial = None if source.max_tokens is None else next(reversed(remembered), None)

    def pieces(file: SourceFile) -> list[FileRange]:
        known = remembered.get(file.path, [])
        if known and known[0].format == file.format and file.path != partial:
            with reading(file.path):
                if known[0].stamp == (file.stamp or stamp_of(file.path)):
                    return known
        digests = {replace(piece, digest=None): piece.digest for piece in known}
        return [replace(piece, digest=digests.get(piece)) for piece in cut(file, source.options())]

    files = source.listed(cache)
    if not any(is_url(file.path) for file in files):
        yield from (piece for file in files for piece in pieces(file))
        return
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        waiting: deque[Future[list[FileRange]]] = deque()
        for file in files:
            waiting.append(pool.submit(pieces, file))
            if len(waiting) > 2 * OPENED_AT_ONCE:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _write_manifest(
    folder: Path, name: str, around: dict[str, int], units: list[WorkUnit], outcomes: list[Outcome]
) -> Path:
    """Write the manifest of the store and return its path. Its name is a hash of its content and it is never changed, so a store
    that a run has open is not changed by the next run."""
    content = {
        "name": name,
        **around,
        "parts": [path.relative_to(folder.parent).as_posix() for path, _ in outcomes],
        "units": [[(piece.path, piece.start) for piece in unit.pieces] for unit in units],
    }
    raw = json.dumps(content).encode()
    path = folder / f"{xxhash.xxh3_128_hexdigest(raw)}.json"
    ensure_content(path, raw)
    used_now(path)
    return path


# Encoding ------------------------------------------------------------------------------------------------------------


def _encode_all(
    units: list[WorkUnit], encoder: Encoder, records: UnitRecords, num_workers: int, name: str
) -> list[Outcome]:
    """Encode the units that are not in the cache and return the outcomes of all units in order."""
    outcomes = {index: outcome for index, unit in enumerate(units) if (outcome := encoder.finished(unit))}
    missing = [(index, unit) for index, unit in enumerate(units) if index not in outcomes]
    if missing:
        remove_abandoned(encoder.folder)
    work = sum(unit.size for _, unit in missing)
    if any(piece.path.startswith(ONE_PROCESS) for _, unit in missing for piece in unit.pieces):
        num_workers = 1
    num_workers = min(num_workers, len(missing)) if work >= WORKERS_FROM_BYTES else 1
    with progress_bar(f"tokenizing {name}", total=work, unit="B") as advance:
        shared = SharedWork(missing, encoder, records, progress=advance)
        _encode(shared, encoder, num_workers, advance)
    outcomes |= shared.outcomes
    return [outcomes[index] for index in range(len(units))]


def _encode_first(
    max_tokens: int, units: Iterator[WorkUnit], encoder: Encoder, records: UnitRecords, num_workers: int, name: str
) -> tuple[list[WorkUnit], list[Outcome]]:
    """Encode units until the first of them hold ``max_tokens`` tokens, and return these with their outcomes."""
    num_workers = num_workers if BYTES_PER_TOKEN * max_tokens >= WORKERS_FROM_BYTES else 1
    with progress_bar(f"tokenizing {name}", total=BYTES_PER_TOKEN * max_tokens, unit="B") as advance:
        shared = SharedWork(enumerate(units), encoder, records, max_tokens=max_tokens, progress=advance)
        _encode(shared, encoder, num_workers, advance)
    first = shared.first()
    return [shared.units[index] for index in first], [shared.outcomes[index] for index in first]


def _encode(shared: SharedWork, encoder: Encoder, num_workers: int, advance: Progress) -> None:
    """Encode the units of ``shared`` in this process, or in several."""
    if num_workers > 1:
        encode_in_workers(shared, encoder, num_workers, advance)
        return
    while (claim := shared.take()) is not None:
        try:
            shared.finish(claim, encoder.encode(claim.unit, advance))
        finally:
            claim.lock.release()


def _limited(max_tokens: int, outcomes: list[Outcome], encoder: Encoder) -> list[Outcome]:
    """Return ``outcomes`` with a shorter last part, so that all parts hold the first complete documents of at most ``max_tokens``
    tokens together, at least one. The shorter part is a file of the cache too."""
    before = 0
    for index, (path, digests) in enumerate(outcomes):
        part = open_part(path)
        if part is None or before + part.num_tokens < max_tokens:
            before += part.num_tokens if part else 0
            continue
        documents = max(int(np.searchsorted(part.ends, max_tokens - before, "right")), 0 if before else 1)
        if documents == part.num_documents:
            return outcomes[: index + 1]
        shorter = encoder.part(key_of(FORMAT, "first", documents, path.stem))
        if documents and open_part(shorter) is None:
            with cache_file(shorter) as file:
                write_first(part, documents, file, {"eot": encoder.eot})
        return [*outcomes[:index], *([(shorter, digests)] if documents else [])]
    return outcomes
