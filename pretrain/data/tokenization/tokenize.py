"""Tokenization of a source into the token cache, before any process group exists. A small amount of text is tokenized in this
process (starting workers takes half a second), a larger one in child processes. Every work unit is a file of its own in the
cache, so a killed run loses at most one unit per worker, and datasets that share files share their tokens."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import xxhash

from pretrain.data.cache import cache_dir, ensure_content, exclusive, make_private, remove_abandoned
from pretrain.data.changed_files import files_of
from pretrain.data.reading.cut import cut
from pretrain.data.reading.opening import stamp_of
from pretrain.data.reading.readers import read
from pretrain.data.reading.units import OWN_UNIT_BYTES, FileRange, WorkUnit, group, key_of, reading
from pretrain.data.sources.base import Source
from pretrain.data.store.near_duplicates import check_installed
from pretrain.data.store.token_store import TokenStore
from pretrain.data.tokenization.encode import FORMAT, Encoder, Outcome
from pretrain.data.tokenization.in_place import token_piece
from pretrain.data.tokenization.workers import encode_in_workers
from pretrain.runtime.console import notice, progress_bar
from pretrain.runtime.errors import UserError

# Less text than this is tokenized in this process; the tokenizer's own threads use all cores. Between their calls a single core
# works (6 % of the CPU time in a profile of 11 MB). The break-even point of workers is estimated from that share and from their
# start-up time of about 0.7 s, not measured: some 50 MB on 8 cores.
WORKERS_FROM_BYTES = 64 << 20
YOUNG_SECONDS = 0.05  # a file modified this shortly before it was read could change again without a new mtime


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
    key = key_of(FORMAT, source.identity(), encoder.options.key())
    memory = cache / "files" / f"{key}.json"
    with exclusive(cache / "locks" / f"{key}.lock", source.domain):
        started_at = time.time()
        units = group(_pieces(source, cache, _recall(memory)))
        outcomes = _encode_all(units, encoder, num_workers, source.domain)
        _remember(memory, units, outcomes, started_at)
    store = TokenStore(
        _write_manifest(
            cache / "stores", source.domain, {"eot": eot} | ({} if bos is None else {"bos": bos}), units, outcomes
        )
    )
    store.files = files_of(units, (digests for _, digests in outcomes))
    if not store.num_documents:
        raise UserError(f"dataset {source.domain!r}: no text: {_why_empty(store, source)}")
    if copied := [
        piece
        for unit, part in zip(units, store.parts, strict=True)
        if part.tokens_at is None and (piece := token_piece(unit)) and piece.size >= OWN_UNIT_BYTES
    ]:
        notice(f"dataset {source.domain!r}: {_why_copied(copied, encoder)}")
    if encoder.near:
        store.kept("near")  # decided here, before other processes open the store
    return store


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


def _encoder(cache: Path, tokenizer_json: str, source: Source, *, eot: int, bos: int | None) -> Encoder:
    """Return the encoder whose parts are in ``cache``, where its tokenizer is written for the worker processes."""
    key = key_of(tokenizer_json)
    path = cache / "tokenizers" / f"{key}.json"
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


# Records of the files ------------------------------------------------------------------------------------------------


def _pieces(source: Source, cache: Path, remembered: dict[str, list[FileRange]]) -> Iterator[FileRange]:
    """Yield the pieces of all files. A file whose size, mtime and inode are unchanged since the last time is not opened."""
    for file in source.listed(cache):
        known = remembered.get(file.path)
        if known and known[0].format == file.format:
            with reading(file.path):
                same = known[0].stamp == (file.stamp or stamp_of(file.path))
            if same:
                yield from known
                continue
        yield from cut(file, source.options())


def _recall(memory: Path) -> dict[str, list[FileRange]]:
    """Return what ``_remember`` wrote. If the file is missing or damaged, return an empty dict; then all files are read again."""
    known: dict[str, list[FileRange]] = {}
    try:
        checksum, rows = json.loads(memory.read_text())
        if checksum != key_of(rows):
            return {}
        for path, kind, start, stop, size, stamp, digest in rows:
            known.setdefault(path, []).append(FileRange(path, kind, start, stop, size, tuple(stamp), digest))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return known


def _remember(memory: Path, units: list[WorkUnit], outcomes: list[Outcome], started_at: float) -> None:
    """Write the pieces with their digests, so that the next start opens no source file. Files modified so recently that they may
    still change without a new mtime are written without a digest and are read again."""
    pieces = []
    for unit, (_, digests) in zip(units, outcomes, strict=True):
        for piece, digest in zip(unit.pieces, digests, strict=True):
            known = digest if started_at - piece.stamp[1] / 1e9 > YOUNG_SECONDS else None
            pieces.append(piece if piece.digest == known else replace(piece, digest=known))
    rows = [[*vars(piece).values()] for piece in pieces]
    ensure_content(memory, json.dumps([key_of(rows), rows]).encode())


def _write_manifest(
    folder: Path, name: str, around: dict[str, int], units: list[WorkUnit], outcomes: list[Outcome]
) -> Path:
    """Write the manifest of the store and return its path. Its name is a hash of its content and it is never changed, so a store
    that a run has open is not changed by the next run."""
    content = {
        "name": name,
        **around,
        "parts": [str(path) for path, _ in outcomes],
        "units": [[(piece.path, piece.start) for piece in unit.pieces] for unit in units],
    }
    raw = json.dumps(content).encode()
    path = folder / f"{xxhash.xxh3_128_hexdigest(raw)}.json"
    ensure_content(path, raw)
    return path


# Encoding ------------------------------------------------------------------------------------------------------------


def _encode_all(units: list[WorkUnit], encoder: Encoder, num_workers: int, name: str) -> list[Outcome]:
    """Encode the units that are not in the cache and return the outcomes of all units in order."""
    outcomes = {index: outcome for index, unit in enumerate(units) if (outcome := encoder.finished(unit))}
    missing = [index for index in range(len(units)) if index not in outcomes]
    work = sum(units[index].size for index in missing)
    if missing:
        remove_abandoned(encoder.folder)
    num_workers = min(num_workers, len(missing))
    with progress_bar(f"tokenizing {name}", total=work, unit="B") as advance:
        if num_workers > 1 and work >= WORKERS_FROM_BYTES:
            outcomes |= encode_in_workers({index: units[index] for index in missing}, encoder, num_workers, advance)
        else:
            outcomes |= {index: encoder.encode(units[index], advance) for index in missing}
    return [outcomes[index] for index in range(len(units))]
