"""Readers of documents from pieces of files: one generator per format, in bounded memory. A document is text, or token ids if
the data was tokenized elsewhere. Every error names the file and the place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import xxhash

from pretrain.data.prose import docstrings, package_description, topics
from pretrain.data.reading.csv_records import csv_documents, header
from pretrain.data.reading.json_records import json_values, jsonl
from pretrain.data.reading.opening import changed_while_read, open_file, stamp_of
from pretrain.data.reading.records import BLOCK_BYTES, Document, blocks, decode, lines
from pretrain.data.reading.rows import documents_of_texts
from pretrain.data.reading.sections import sections
from pretrain.data.reading.tables import arrow, parquet, parquet_bytes, readable_table, schema_bytes
from pretrain.data.reading.token_files import TOKEN_FORMATS, token_blocks, token_documents
from pretrain.data.reading.units import FileRange, ReadOptions, key_of, kind_of, reading
from pretrain.runtime.errors import UserError

__all__ = ["READERS", "Document", "digest", "read", "read_all"]


def read(piece: FileRange, options: ReadOptions) -> Iterator[Document]:
    """Yield the documents of ``piece`` in order, without those that hold only white space and those that ``where`` removes.

    Raises:
        UserError: the file is not valid in its format, or it changed since it was listed.
    """
    return (document for document in read_all(piece, options) if document is not None)


def read_all(piece: FileRange, options: ReadOptions) -> Iterator[Document | None]:
    """Yield what `read` yields, and ``None`` for each document that ``where`` removes."""
    with reading(piece.path):
        for document in _documents(piece, options):
            if document is None or not _is_blank(document):
                yield document
        if stamp_of(piece.path) != piece.stamp:
            raise UserError(changed_while_read(piece.path))


def _documents(piece: FileRange, options: ReadOptions) -> Iterator[Document | None]:
    """Yield the documents of ``piece``, and ``None`` for each that ``where`` removes."""
    kind = kind_of(piece.format)
    documents = READERS[kind](piece, options)
    if not options.by_rows or kind in ROW_FORMATS:
        return documents
    texts = (document for document in documents if document is not None and not _is_blank(document))
    return documents_of_texts(texts, options, piece.path)


def _is_blank(document: Document) -> bool:
    return not len(document) or (isinstance(document, str) and document.isspace())


def digest(piece: FileRange, options: ReadOptions) -> str:
    """Return a hash of the bytes that determine what ``read`` yields."""
    is_tokens = kind_of(piece.format) in TOKEN_FORMATS
    state = xxhash.xxh3_128(key_of("tokens" if is_tokens else piece.format, *options.values()).encode())
    if is_tokens:
        with reading(piece.path):
            for block in token_blocks(piece):
                state.update(block)
        return state.hexdigest()
    with reading(piece.path), open_file(piece.path, piece.stamp) as file:
        for start, stop in _deciding_bytes(piece, options):
            file.seek(start)
            while start < stop and (block := file.read(min(stop - start, BLOCK_BYTES))):
                state.update(block)
                start += len(block)
    return state.hexdigest()


def _deciding_bytes(piece: FileRange, options: ReadOptions) -> Iterator[tuple[int, int]]:
    """Yield the byte ranges of the file on which the content of ``piece`` depends; the header or schema comes first."""
    if piece.format == "parquet":
        with readable_table(piece.path, "parquet"):
            yield from parquet_bytes(piece, options)
        return
    if piece.format == "csv" and piece.start:
        yield 0, header(piece, options)[1]
    if piece.format == "arrow":
        with readable_table(piece.path, "arrow"):
            yield 0, schema_bytes(piece.path, piece.stamp)
    yield piece.start, piece.stop


def _text(piece: FileRange, options: ReadOptions) -> Iterator[str]:
    """Yield the sections of plain text. If a block ends inside a line, its last section is prepended to the next block, so that
    no word is cut there."""
    left = ""
    for offset, block in blocks(piece):
        *found, left = sections(left + decode(block, piece, offset, options), options.max_document_chars)
        yield from found
        if block.endswith(b"\n"):
            yield left
            left = ""
    yield left


def _full_text(piece: FileRange, options: ReadOptions) -> str:
    """Return the text of ``piece``."""
    return "".join(decode(block, piece, offset, options) for offset, block in blocks(piece))


def _text_lines(piece: FileRange, options: ReadOptions) -> Iterator[str]:
    """Yield each line of plain text as a document, as the builder ``text`` of ``datasets`` does."""
    for offset, raw in lines(piece):
        line = decode(raw, piece, offset, options)
        yield from line.replace("\r\n", "\n").replace("\r", "\n").split("\n")


READERS: dict[str, Callable[[FileRange, ReadOptions], Iterator[Document | None]]] = {
    "text": _text,
    "lines": _text_lines,
    "jsonl": jsonl,
    "json": json_values,
    "csv": csv_documents,
    "parquet": parquet,
    "arrow": arrow,
    **dict.fromkeys(TOKEN_FORMATS, token_documents),
    "docstrings": lambda piece, options: docstrings(_full_text(piece, options), options.max_document_chars),
    "description": lambda piece, options: package_description(_full_text(piece, options), options.max_document_chars),
    "topics": lambda piece, options: topics(_full_text(piece, options)),
}
ROW_FORMATS = ("jsonl", "json", "csv", "parquet", "arrow")  # their documents are rows with columns
