"""Files as streams of plain bytes, decompressed as they are read, in bounded memory. A compressed file that ends too early,
or has something else behind its end, is an error: none of its text is lost without a word."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

from pretrain.data.reading.units import FileRange
from pretrain.runtime.errors import UserError

READ_BYTES = 1 << 20
# Of zstd, at a time. A block of 4 bytes can stand for 128 KiB, so this bounds what one step may make: 64 MiB.
COMPRESSED_BYTES = 2 << 10
# The largest that libzstd reads (``zstd --long=31``); the memory is taken only for such a file.
MAX_WINDOW_BYTES = 1 << 31


def is_compressed(piece: FileRange) -> bool:
    return piece.format.endswith((".gz", ".zst"))


def open_bytes(piece: FileRange, start: int | None = None) -> IO[bytes]:
    """The bytes of the piece's file from ``start`` (default: the piece's) on; of a compressed file always all, decompressed.
    The caller closes it."""
    file = open(piece.path, "rb")  # noqa: SIM115
    if piece.format.endswith(".gz"):
        return io.BufferedReader(_Decompressed(file, _gzip_blocks(file), piece.path), READ_BYTES)
    if piece.format.endswith(".zst"):
        return io.BufferedReader(_Decompressed(file, _zstd_blocks(file), piece.path), READ_BYTES)
    file.seek(piece.start if start is None else start)
    return file


def _gzip_blocks(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(file) as stream:
        while block := stream.read(READ_BYTES):
            yield block


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: ``stream_reader`` of zstandard takes a frame without its end for a complete one.

    Raises ``EOFError`` where the last frame has no end.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    frame = None
    while compressed := file.read(COMPRESSED_BYTES):
        while compressed:
            frame = frame or decompressor.decompressobj()
            if block := frame.decompress(compressed):
                yield block
            compressed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("the last frame has no end")


class _Decompressed(io.RawIOBase):
    """A stream out of ``blocks`` of bytes, whose errors name the file. Closes ``file`` with itself."""

    def __init__(self, file: IO[bytes], blocks: Iterator[bytes], path: str) -> None:
        import zstandard

        self._file, self._blocks, self._path = file, blocks, path
        self._left = memoryview(b"")
        self._broken = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            try:
                self._left = memoryview(next(self._blocks, b""))
            except self._broken as error:
                raise UserError(f"{self._path}: cannot be decompressed, perhaps cut off ({error})") from error
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
