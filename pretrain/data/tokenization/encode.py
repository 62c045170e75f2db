"""The encoder: it turns one work unit into one token shard (part). It runs in the main process or in a worker, so the imports
are light."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.cache import cache_file
from pretrain.data.reading.readers import Document, digest, read_all
from pretrain.data.reading.token_files import open_tokens
from pretrain.data.reading.units import FileRange, ReadOptions, WorkUnit, key_of
from pretrain.data.store.near_duplicates import ensure_keys, has_keys
from pretrain.data.store.token_shards import PartWriter, open_part
from pretrain.data.tokenization.in_place import fits_in_place, token_piece, write_in_place
from pretrain.runtime.errors import UserError

FORMAT = 1  # version of the parts and of the readers' output; a new number invalidates every part
BATCH_BYTES = 1 << 20  # bytes of text encoded at a time: enough to use all cores, and little memory
Progress = Callable[[int], None]
Outcome = tuple[Path, list[str]]  # a part and the digests of the pieces of its unit


class Encoder:
    """An encoder of work units into parts. A part holds for each document ``bos`` (unless it is ``None``), its tokens, and
    ``eot``. The tokenizer is loaded when the first document needs it.

    Attributes:
        folder: folder of the parts.
        tokenizer_path: a tokenizer.json file.
        tokenizer_key: hash of that file.
        eot: id of the token that ends each document.
        options: how documents are read from files.
        bos: id of the token that begins each document; ``None`` if there is none.
        near: compute also the keys by which near duplicates are found.
    """

    def __init__(
        self,
        *,
        folder: Path,
        tokenizer_path: Path,
        tokenizer_key: str,
        eot: int,
        options: ReadOptions,
        bos: int | None = None,
        near: bool = False,
    ) -> None:
        self.folder, self.tokenizer_path, self.eot, self.options = (
            folder,
            tokenizer_path,
            eot,
            replace(options, eot=eot),
        )
        self.bos, self._before = bos, [] if bos is None else [bos]
        self.tokenizer_key, self.near = tokenizer_key, near
        self._tokenizer: Any = None

    def arguments(self) -> dict[str, Any]:
        """Return the constructor arguments of this encoder in JSON-serialisable form."""
        return {
            "folder": str(self.folder),
            "tokenizer_path": str(self.tokenizer_path),
            "tokenizer_key": self.tokenizer_key,
            "eot": self.eot,
            "bos": self.bos,
            "near": self.near,
            "options": asdict(self.options),
        }

    def finished(self, unit: WorkUnit) -> Outcome | None:
        """Return the outcome if all digests are known and the part exists, otherwise ``None``. No source file is opened."""
        digests = [piece.digest for piece in unit.pieces if piece.digest]
        path = self._path(digests)
        part = open_part(path) if len(digests) == len(unit.pieces) else None
        is_finished = part is not None and (not self.near or has_keys(part, self.folder.parent))
        return (path, digests) if is_finished else None

    def encode(self, unit: WorkUnit, progress: Progress) -> Outcome:
        """Write the part of ``unit``, unless it exists already. ``progress`` is called with amounts of bytes that add up to
        ``unit.size``."""
        digests = [piece.digest or digest(piece, self.options) for piece in unit.pieces]
        path, left = self._path(digests), unit.size
        if open_part(path) is None:
            self._load()
            if not self._in_place(unit, path):
                left -= self._write(unit, path, progress)
        if self.near and (part := open_part(path)):
            ensure_keys(part, self.folder.parent, eot=self.eot, bos=self.bos)
        progress(left)
        return path, digests

    def _write(self, unit: WorkUnit, path: Path, progress: Progress) -> int:
        """Write the part of ``unit`` with its tokens. Return the amount of bytes of which ``progress`` was called."""
        done = 0
        with cache_file(path) as file:
            writer = PartWriter(file, self.dtype)
            for batch in batches(unit, self.options, writer.skip):
                self._append(writer, batch)
                step = min(unit.size - done, sum(_size(document) for document, _, _ in batch))
                done += step
                progress(step)
            removed = {"removed": writer.num_removed} if self.options.where else {}
            writer.finish({"eot": self.eot, "vocabulary": self.vocabulary, **removed})
        return done

    def _in_place(self, unit: WorkUnit, path: Path) -> bool:
        """Write a part whose tokens stay in the file of another program. Return ``False`` where that is not possible."""
        piece = token_piece(unit)
        if piece is None or not fits_in_place(piece, eot=self.eot, bos=self.bos, vocabulary=self.vocabulary):
            return False
        with cache_file(path) as file:
            writer = PartWriter(file, open_tokens(piece).dtype)
            writer.finish(
                {"eot": self.eot, "vocabulary": self.vocabulary, **write_in_place(piece, writer, eot=self.eot)}
            )
        return True

    def _path(self, digests: list[str]) -> Path:
        """Return the path of the part, whose name is a hash of everything that determines its content."""
        key = key_of(FORMAT, self.tokenizer_key, self.eot, digests, *self._before)
        return self.part(key)

    def part(self, key: str) -> Path:
        """Return the path of the part with this key."""
        return self.folder / key[:2] / f"{key}.tokens"

    def _load(self) -> None:
        """Load the tokenizer, unless it is loaded already."""
        if self._tokenizer is not None:
            return
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that contains the text "<|endoftext|>" does not end there.
        self._tokenizer.encode_special_tokens = True
        self.vocabulary = 1 + max(max(self._tokenizer.get_vocab().values()), self.eot, *self._before)
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)

    def _append(self, writer: PartWriter, batch: list[tuple[Document, FileRange, tuple[int, int]]]) -> None:
        """Encode a batch of documents and write them to the part."""
        texts = [document for document, _, _ in batch if isinstance(document, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)) if texts else iter(())
        for document, piece, (number, index) in batch:
            if isinstance(document, str):
                raw = document.encode("utf-8", "surrogatepass")
                tokens = np.array([*self._before, *next(encoded).ids, self.eot], self.dtype)
            else:
                tokens = self._checked(document, piece, index)
                raw = document.tobytes()
            size = len(raw) if isinstance(document, str) else len(self._tokenizer.decode(document.tolist()).encode())
            writer.append(tokens, digest=xxhash.xxh3_64_intdigest(raw), size=size, piece=number, index=index)

    def _checked(self, tokens: NDArray[np.int64], piece: FileRange, index: int) -> NDArray[Any]:
        """Return ``tokens`` of a pretokenized dataset with BOS and end-of-text token added where they are missing. Raises
        ``UserError`` for ids outside of the vocabulary."""
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocabulary)][0]
            raise UserError(
                f"{piece.path}, document {index}: token id {wrong}, but the model's tokenizer has ids 0 to "
                f"{self.vocabulary - 1}; the data was tokenized for another model"
            )
        before = self._before if tokens[:1].tolist() != self._before else []
        return np.array([*before, *tokens, *([] if tokens[-1] == self.eot else [self.eot])])


def batches(
    unit: WorkUnit, options: ReadOptions, skip: Callable[[], None]
) -> Iterator[list[tuple[Document, FileRange, tuple[int, int]]]]:
    """Yield the documents of ``unit`` in batches of about ``BATCH_BYTES``, each document with its piece and (number of the piece
    in the unit, index of the document in the piece). ``skip`` is called for each document that ``where`` removes; it has an index
    too."""
    batch: list[tuple[Document, FileRange, tuple[int, int]]] = []
    waiting = 0
    for number, piece in enumerate(unit.pieces):
        for index, document in enumerate(read_all(piece, options)):
            if document is None:
                skip()
                continue
            batch.append((document, piece, (number, index)))
            waiting += _size(document)
            if waiting >= BATCH_BYTES:
                yield batch
                batch, waiting = [], 0
    if batch:
        yield batch


def _size(document: Document) -> int:
    """Return the approximate size of a document in bytes."""
    return len(document) if isinstance(document, str) else document.nbytes
