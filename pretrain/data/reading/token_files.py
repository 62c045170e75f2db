"""Corpora that other programs tokenized: token ids in one flat file, with or without an index of the documents beside it.

| format | tokens | documents |
|---|---|---|
| ``megatron`` | Megatron-LM's ``.bin`` | ``.idx`` (``megatron/core/datasets/indexed_dataset.py``) |
| ``datatrove`` | ``.ds`` of datatrove and nanotron | ``.ds.index``: uint64, end of each document in tokens |
| ``npy`` | an array of integers of numpy | end with the end-of-text token |
| ``llmc`` | ``.bin`` of llm.c: a header of 256 int32 | end with the end-of-text token |
| ``tokens`` | integers without any header, such as nanoGPT's ``.bin`` | end with the end-of-text token |

A format is followed by ``@`` and the size and mtime of the index, so that a changed index is noticed, or by ``.`` and the dtype.
Nothing that an index claims is believed: sizes are compared with those of the files before anything of that size is allocated.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pretrain.data.reading.opening import changed_while_read, stamp_of
from pretrain.data.reading.units import FileRange, ReadOptions, SourceFile, Stamp, kind_of
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.filesystem import read_at

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOKEN_FORMATS = ("megatron", "datatrove", "npy", "llmc", "tokens")
PIECE_BYTES = 64 << 20  # of one piece
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = 34  # bytes: magic, version, dtype, number of sequences, number of documents
MEGATRON_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLMC_HEADER = 1024  # bytes
LLMC_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version); GPT-2's tokens, Llama 3's
RAW_TYPES = ("uint16", "uint32", "int32", "int64")


@dataclass(frozen=True)
class TokenFile:
    """The tokens of a file.

    Attributes:
        path: the file.
        dtype: type of a token, little-endian.
        offset: first byte of the tokens.
        count: number of tokens.
        ends: end of each document in tokens, ascending; ``None`` if the end-of-text token ends them.
    """

    path: str
    dtype: np.dtype[Any]
    offset: int
    count: int
    ends: NDArray[np.int64] | None = None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the tokens [start, stop). Raises ``UserError`` if the file became shorter."""
        size = self.dtype.itemsize
        with open(self.path, "rb") as file:
            try:
                return read_at(file.fileno(), self.offset + start * size, (stop - start) * size).view(self.dtype)
            except EOFError as error:
                raise UserError(changed_while_read(self.path)) from error


def token_format(path: str) -> str | None:
    """Return the format of a file of tokens by its name and what lies beside it; ``None`` if it is none."""
    if path.endswith(".npy"):
        return "npy"
    if path.endswith(".ds"):
        return f"datatrove@{_stamp(path + '.index')}"
    if path.endswith(".bin"):
        if _begins(_index(path), len(MEGATRON_MAGIC)) == MEGATRON_MAGIC:
            return f"megatron@{_stamp(_index(path))}"
        header = _begins(path, 8)
        if len(header) == 8 and struct.unpack("<2i", header) in LLMC_TYPES:
            return "llmc"
    return None


def beside(path: str) -> tuple[str, ...]:
    """Return the files that belong to a file of tokens."""
    return (_index(path), f"{path}.index", f"{path}.metadata")


def open_tokens(file: SourceFile | FileRange) -> TokenFile:
    """Return the tokens of a file. Raises ``UserError`` if the file, or its index, is not what it claims to be."""
    return _opened(file.path, file.format, stamp_of(file.path))


@lru_cache(maxsize=4)
def _opened(path: str, form: str, stamp: Stamp) -> TokenFile:
    size = stamp[0]
    opened = {"megatron": _megatron, "datatrove": _datatrove, "npy": _npy, "llmc": _llmc}.get(kind_of(form))
    return _raw(path, form.partition(".")[2], size) if opened is None else opened(path, size)


def token_pieces(file: SourceFile, options: ReadOptions) -> Iterator[tuple[int, int, int]]:
    """Yield (first token, end, bytes) of the pieces of a file. A piece ends with a document if there is an index."""
    import numpy as np

    if options.by_rows:
        raise UserError(f"{file.path}: token ids have no columns for dataset.where or dataset.text_template")
    found = open_tokens(file)
    step, start = max(1, PIECE_BYTES // found.dtype.itemsize), 0
    while start < found.count:
        stop = min(start + step, found.count)
        if found.ends is not None:
            stop = int(found.ends[np.searchsorted(found.ends, stop)])
        yield start, stop, (stop - start) * found.dtype.itemsize
        start = stop


def document_ends(file: TokenFile, piece: FileRange, eot: int) -> NDArray[np.int64]:
    """Return the end of each document of a piece, in tokens from the beginning of the piece; empty ones are left out."""
    import numpy as np

    if file.ends is not None:
        first, last = np.searchsorted(file.ends, [piece.start, piece.stop], "right")
        ends = file.ends[first:last] - piece.start
    else:
        ends = np.flatnonzero(file.read(piece.start, piece.stop) == eot) + 1
        if not len(ends) or ends[-1] < piece.stop - piece.start:
            ends = np.append(ends, piece.stop - piece.start)
    return np.unique(ends)


def token_documents(piece: FileRange, options: ReadOptions) -> Iterator[NDArray[np.int64]]:
    """Yield the documents of a piece."""
    import numpy as np

    file = open_tokens(piece)
    tokens, start = file.read(piece.start, piece.stop), 0
    for end in document_ends(file, piece, -1 if options.eot is None else options.eot).tolist():
        yield tokens[start:end].astype(np.int64)
        start = end


def token_blocks(piece: FileRange) -> Iterator[bytes]:
    """Yield what determines the documents of a piece: the type and the bytes of the tokens, and the ends of documents."""
    file = open_tokens(piece)
    yield str(file.dtype).encode()
    if file.ends is not None:
        yield document_ends(file, piece, -1).tobytes()
    for start in range(piece.start, piece.stop, 1 << 22):
        yield file.read(start, min(start + (1 << 22), piece.stop)).tobytes()


# Formats -------------------------------------------------------------------------------------------------------------


def _megatron(path: str, size: int) -> TokenFile:
    """https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/datasets/indexed_dataset.py"""
    import numpy as np

    index = _index(path)
    raw = _bytes_of(index)
    if len(raw) < MEGATRON_HEADER or raw[: len(MEGATRON_MAGIC)].tobytes() != MEGATRON_MAGIC:
        raise UserError(f"{index}: not an index of Megatron-LM")
    version, code, sequences, documents = struct.unpack("<QBQQ", raw[9:MEGATRON_HEADER].tobytes())
    if version != 1 or code not in MEGATRON_TYPES:
        raise UserError(f"{index}: version {version} with tokens of type {code}, not version 1 with integers")
    wanted = MEGATRON_HEADER + 12 * sequences + 8 * documents
    if len(raw) not in (wanted, wanted + sequences):  # the mode of each sequence is optional
        raise UserError(
            f"{index}: {len(raw):,} bytes, but {sequences:,} sequences and {documents:,} documents need {wanted:,}; cut off?"
        )
    dtype = np.dtype(MEGATRON_TYPES[code])
    lengths = raw[MEGATRON_HEADER : MEGATRON_HEADER + 4 * sequences].view("<i4")
    pointers = raw[MEGATRON_HEADER + 4 * sequences : MEGATRON_HEADER + 12 * sequences].view("<i8")
    borders = raw[MEGATRON_HEADER + 12 * sequences : wanted].view("<i8")
    if sequences and int(lengths.min()) < 0:
        raise UserError(f"{index}: sequence {int(lengths.argmin()):,} has a negative length")
    stops = np.cumsum(lengths, dtype=np.int64)
    count = int(stops[-1]) if sequences else 0
    if count * dtype.itemsize != size:
        raise UserError(
            f"{path}: {size:,} bytes, but its index counts {count:,} tokens of {dtype.itemsize} bytes; cut off?"
        )
    if not np.array_equal(pointers, (stops - lengths) * dtype.itemsize):
        raise UserError(f"{index}: its sequences do not follow one another in the .bin")
    if not documents or borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any():
        raise UserError(f"{index}: its document indices do not ascend from 0 to {sequences:,}, the number of sequences")
    ends = np.concatenate([np.zeros(1, np.int64), stops])[borders[1:]]
    return TokenFile(path, dtype, 0, count, ends)


def _datatrove(path: str, size: int) -> TokenFile:
    """https://github.com/huggingface/datatrove/blob/main/src/datatrove/pipeline/tokens/tokenizer.py"""
    import numpy as np

    index = f"{path}.index"
    if not os.path.exists(index):
        raise UserError(f"{path}: no {os.path.basename(index)} beside it, which has the ends of the documents")
    raw = _bytes_of(index)
    if len(raw) % 8:
        raise UserError(f"{index}: {len(raw):,} bytes, not a multiple of 8; cut off?")
    unsigned = raw.view("<u8")
    if not len(unsigned) or int(unsigned.max()) > size:
        raise UserError(f"{index}: documents that end beyond the {size:,} bytes of the .ds; cut off?")
    ends = unsigned.astype(np.int64)
    if (np.diff(ends) < 0).any():
        raise UserError(f"{index}: the ends of the documents do not ascend")
    width = size // int(ends[-1]) if ends[-1] else 0
    if width not in (2, 4) or width * int(ends[-1]) != size:
        raise UserError(
            f"{path}: {size:,} bytes, but its index counts {int(ends[-1]):,} tokens of 2 or 4 bytes; cut off?"
        )
    return TokenFile(path, np.dtype(f"<u{width}"), 0, int(ends[-1]), ends)


def _npy(path: str, size: int) -> TokenFile:
    import numpy as np

    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # the header is a dict in Python's syntax; what damages it can raise almost any error
        raise UserError(f"{path}: not a readable .npy file, perhaps cut off ({one_line(error)})") from error
    if array.dtype.kind not in "iu" or array.dtype != array.dtype.newbyteorder("<"):
        raise UserError(f"{path}: an array of {array.dtype.str}, not of little-endian integers")
    if not array.flags.c_contiguous:
        raise UserError(f"{path}: an array in Fortran order; save it with numpy.ascontiguousarray")
    return TokenFile(path, array.dtype, int(array.offset), array.size)


def _llmc(path: str, size: int) -> TokenFile:
    """https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py"""
    import numpy as np

    magic, version, count = struct.unpack("<3i", _begins(path, 12).ljust(12, b"\0"))
    dtype = np.dtype(LLMC_TYPES.get((magic, version), "<u2"))
    if (magic, version) not in LLMC_TYPES or count < 0 or LLMC_HEADER + count * dtype.itemsize != size:
        raise UserError(f"{path}: {size:,} bytes, but its header counts {count:,} tokens; cut off?")
    return TokenFile(path, dtype, LLMC_HEADER, count)


def _raw(path: str, name: str, size: int) -> TokenFile:
    import numpy as np

    dtype = np.dtype(name).newbyteorder("<")
    if size % dtype.itemsize:
        raise UserError(
            f"{path}: {size:,} bytes, not a multiple of {dtype.itemsize} (dataset.token_dtype={name}); cut off?"
        )
    return TokenFile(path, dtype, 0, size // dtype.itemsize)


def _index(path: str) -> str:
    return path.removesuffix(".bin") + ".idx"


def _bytes_of(path: str) -> NDArray[np.uint8]:
    import numpy as np

    found = np.fromfile(path, np.uint8)
    if not len(found):
        raise UserError(f"{path}: empty")
    return found


def _begins(path: str, count: int) -> bytes:
    """Return the first bytes of a file; none if it can't be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError:
        return b""


def _stamp(path: str) -> str:
    try:
        found: Stamp | tuple[int, ...] = (os.stat(path).st_size, os.stat(path).st_mtime_ns)
    except OSError:
        found = (0,)
    return "-".join(map(str, found))
