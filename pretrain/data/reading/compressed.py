"""Files as streams of plain bytes, decompressed as they are read, in bounded memory. A compressed file that is truncated or has
other data after its end raises an error, so that no text is lost silently."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

from pretrain.data.reading.opening import open_file
from pretrain.data.reading.units import FileRange
from pretrain.runtime.errors import UserError

READ_BYTES = 1 << 20
# Compressed zstd bytes that are fed at a time. A block of 4 bytes can expand to 128 KiB, so one step yields at most 64 MiB.
COMPRESSED_BYTES = 2 << 10
# The largest window that libzstd reads (``zstd --long=31``). The memory is allocated only for files that use it.
MAX_WINDOW_BYTES = 1 << 31


def is_compressed(piece: FileRange) -> bool:
    """Return whether the piece's file is compressed."""
    return piece.format.endswith((".gz", ".zst"))


def open_bytes(piece: FileRange, start: int | None = None) -> IO[bytes]:
    """Return a stream of the piece's file from byte ``start`` (by default that of the piece). A compressed file is always
    decompressed from its beginning. The caller closes the stream."""
    file = open_file(piece.path, piece.stamp)
    if piece.format.endswith(".gz"):
        return io.BufferedReader(_Decompressed(file, _gzip_blocks(file), piece.path), READ_BYTES)
    if piece.format.endswith(".zst"):
        return io.BufferedReader(_Decompressed(file, _zstd_blocks(file), piece.path), READ_BYTES)
    file.seek(piece.start if start is None else start)
    return file


def _gzip_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the decompressed bytes of a gzip file."""
    with gzip.open(file) as stream:
        while block := stream.read(READ_BYTES):
            yield block


def _zstd_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the decompressed bytes of a zstd file, frame by frame. The ``stream_reader`` of zstandard is not used, because it
    accepts an incomplete frame.

    Raises ``EOFError`` if the last frame is incomplete.
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
    """A raw stream over ``blocks`` of bytes. Decompression errors become ``UserError`` with the file's name. Closing the stream
    closes ``file``."""

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
