"""Token shards without tokens: of a corpus that another program tokenized, only the documents are written into the cache, and the
tokens are read where they are. Each document must end with the end-of-text token, and begin with BOS if the run uses it; only
where a file has no index, a document that a piece's border cuts in two may lack them there."""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pretrain.data.reading.opening import changed_while_read, stamp_of
from pretrain.data.reading.token_files import TOKEN_FORMATS, TokenFile, document_ends, open_tokens
from pretrain.data.reading.units import FileRange, WorkUnit, kind_of
from pretrain.data.store.token_shards import UNKNOWN_SIZE, PartWriter
from pretrain.runtime.errors import UserError


def token_piece(unit: WorkUnit) -> FileRange | None:
    """Return the piece of a unit that is a piece of a file of tokens; ``None`` for any other unit."""
    (piece,) = unit.pieces if len(unit.pieces) == 1 else (None,)
    return piece if piece is not None and kind_of(piece.format) in TOKEN_FORMATS else None


def fits_in_place(piece: FileRange, *, eot: int, bos: int | None, vocabulary: int) -> bool:
    """Return whether the documents of a piece have the tokens around them that those of the run have.

    Raises ``UserError`` for an id outside of the vocabulary, with its position in the file.
    """
    file = open_tokens(piece)
    tokens = file.read(piece.start, piece.stop)
    _check_ids(file, tokens, piece.start, vocabulary)
    ends = document_ends(file, piece, eot)
    cut_before, cut_behind = (file.ends is None and place not in (0, file.count) for place in (piece.start, piece.stop))
    starts = np.append(0, ends[:-1])
    stops, begins = tokens[ends - 1] == eot, tokens[starts] == bos
    stops[-1:] |= cut_behind
    begins[:1] |= cut_before
    return bool(stops.all() and (bos is None or begins.all()))


def write_in_place(piece: FileRange, writer: PartWriter, *, eot: int) -> dict[str, Any]:
    """Write the documents of a piece without their tokens. Return the entry of the shard's footer that names the tokens."""
    file = open_tokens(piece)
    tokens, start = file.read(piece.start, piece.stop), 0
    for index, end in enumerate(document_ends(file, piece, eot).tolist()):
        digest = xxhash.xxh3_64_intdigest(tokens[start:end].astype(np.int64).tobytes())
        writer.refer(end - start, digest=digest, size=UNKNOWN_SIZE, piece=0, index=index)
        start = end
    if stamp_of(piece.path) != piece.stamp:
        raise UserError(changed_while_read(piece.path))
    offset = file.offset + piece.start * file.dtype.itemsize
    return {"tokens_at": [piece.path, offset, *piece.stamp]}


def _check_ids(file: TokenFile, tokens: NDArray[Any], first: int, vocabulary: int) -> None:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        place = int(np.flatnonzero((tokens < 0) | (tokens >= vocabulary))[0])
        raise UserError(
            f"{file.path}, token {first + place:,}: id {int(tokens[place])}, but the model's tokenizer has ids 0 to "
            f"{vocabulary - 1}; the data was tokenized for another model"
        )
