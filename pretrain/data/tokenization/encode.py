"""One unit in, one part out. Runs in the main process or in a worker: light imports only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.cache import whole_or_absent
from pretrain.data.reading.readers import Document, digest, read
from pretrain.data.reading.units import FileRange, ReadOptions, WorkUnit, key_of
from pretrain.data.store.token_shards import PartWriter, open_part
from pretrain.runtime.errors import UserError

FORMAT = 1  # of parts and of what the readers make of files; another number makes every part anew
BATCH_BYTES = 1 << 20  # text that is encoded at a time: enough for all cores, little for memory
Progress = Callable[[int], None]
Outcome = tuple[Path, list[str]]  # a part and the digests of its unit's pieces


class Encoder:
    """Turns units into parts of ``folder``: of each document ``bos`` (``None``: nothing), its tokens, ``eot``. The tokenizer
    is loaded when the first document needs it."""

    def __init__(
        self,
        *,
        folder: Path,
        tokenizer_path: Path,
        tokenizer_key: str,
        eot: int,
        options: ReadOptions,
        bos: int | None = None,
    ) -> None:
        self.folder, self.tokenizer_path, self.eot, self.options = folder, tokenizer_path, eot, options
        self.bos, self._before = bos, [] if bos is None else [bos]
        self.tokenizer_key = tokenizer_key
        self._tokenizer: Any = None

    def arguments(self) -> dict[str, Any]:
        """The arguments that make this encoder again, fit for JSON."""
        return {
            "folder": str(self.folder),
            "tokenizer_path": str(self.tokenizer_path),
            "tokenizer_key": self.tokenizer_key,
            "eot": self.eot,
            "bos": self.bos,
            "options": asdict(self.options),
        }

    def finished(self, unit: WorkUnit) -> Outcome | None:
        """The outcome when all digests are known and the part is there; no source file is opened."""
        digests = [piece.digest for piece in unit.pieces if piece.digest]
        path = self._path(digests)
        return (path, digests) if len(digests) == len(unit.pieces) and open_part(path) else None

    def encode(self, unit: WorkUnit, progress: Progress) -> Outcome:
        """Make the part of ``unit``; nothing is tokenized when it is already there. ``progress`` gets ``unit.size``
        in all."""
        digests = [piece.digest or digest(piece, self.options) for piece in unit.pieces]
        path, left = self._path(digests), unit.size
        if open_part(path) is None:
            self._load()
            with whole_or_absent(path) as file:
                writer = PartWriter(file, self.dtype)
                for batch in batches(unit, self.options):
                    self._append(writer, batch)
                    step = min(left, sum(_size(document) for document, _, _ in batch))
                    left -= step
                    progress(step)
                writer.finish({"eot": self.eot, "vocabulary": self.vocabulary})
        progress(left)
        return path, digests

    def _path(self, digests: list[str]) -> Path:
        key = key_of(FORMAT, self.tokenizer_key, self.eot, digests, *self._before)
        return self.folder / key[:2] / f"{key}.tokens"

    def _load(self) -> None:
        if self._tokenizer is not None:
            return
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(self.tokenizer_path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # the *text* "<|endoftext|>" in a document ends no document
        self.vocabulary = 1 + max(max(self._tokenizer.get_vocab().values()), self.eot, *self._before)
        self.dtype = np.dtype(np.uint16 if self.vocabulary <= 1 << 16 else np.uint32)

    def _append(self, writer: PartWriter, batch: list[tuple[Document, FileRange, tuple[int, int]]]) -> None:
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
        """Token ids from elsewhere with the tokens that go around a document, where they lack them."""
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            wrong = tokens[(tokens < 0) | (tokens >= self.vocabulary)][0]
            raise UserError(
                f"{piece.path}, document {index}: token id {wrong}, but the model's tokenizer has ids 0 to "
                f"{self.vocabulary - 1}; the data was tokenized for another model"
            )
        before = self._before if tokens[:1].tolist() != self._before else []
        return np.array([*before, *tokens, *([] if tokens[-1] == self.eot else [self.eot])])


def batches(unit: WorkUnit, options: ReadOptions) -> Iterator[list[tuple[Document, FileRange, tuple[int, int]]]]:
    """Documents with (number of the piece in the unit, index in the piece), about BATCH_BYTES at a time."""
    batch: list[tuple[Document, FileRange, tuple[int, int]]] = []
    waiting = 0
    for number, piece in enumerate(unit.pieces):
        for index, document in enumerate(read(piece, options)):
            batch.append((document, piece, (number, index)))
            waiting += _size(document)
            if waiting >= BATCH_BYTES:
                yield batch
                batch, waiting = [], 0
    if batch:
        yield batch


def _size(document: Document) -> int:
    return len(document) if isinstance(document, str) else document.nbytes
