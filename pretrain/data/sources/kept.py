"""The documents of a source that is not made of files. They are kept in the cache as JSON lines, under the source's fingerprint.

Everything that works on files then works on them: tokenizing in several processes, going on after a kill, and a restart that
reads nothing. The segments are written atomically, and a list of them at the end, without which all are written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.cache import atomic_file, ensure_content, remove_abandoned
from pretrain.data.reading.units import UNIT_BYTES, SourceFile, key_of
from pretrain.runtime.console import progress_bar
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.sources.base import Source

LIST = "segments.json"  # name → size in bytes of each segment


def kept_documents(source: Source, cache: Path) -> list[SourceFile]:
    """Return the files with the documents of ``source``; they are written into ``cache`` unless they are there and complete."""
    folder = cache / "documents" / key_of(source.identity(), source.text_column)
    sizes = _complete(folder)
    if sizes is None:
        remove_abandoned(folder.parent)
        sizes = {path.name: path.stat().st_size for path in _write(source, folder)}
        ensure_content(folder / LIST, json.dumps(sizes).encode())
    return [SourceFile(str(folder / name), "jsonl") for name in sizes]


def _complete(folder: Path) -> dict[str, int] | None:
    """Return the segments of a complete folder with their sizes, or ``None``."""
    try:
        sizes: dict[str, int] = json.loads((folder / LIST).read_text())
        return sizes if all((folder / name).stat().st_size == size for name, size in sizes.items()) else None
    except (OSError, ValueError, AttributeError):
        return None


def _write(source: Source, folder: Path) -> Iterator[Path]:
    """Write segments of about ``UNIT_BYTES``, each of which is one work unit of the tokenization, and yield their paths."""
    documents, number = iter(source.documents()), 0
    with progress_bar(f"reading {source.domain}", total=None, unit="B") as advance:
        while (document := next(documents, None)) is not None:
            number, size = number + 1, 0
            path = folder / f"{number:05d}.jsonl"
            with atomic_file(path) as file:
                while document is not None and size < UNIT_BYTES:
                    line = _line(source, document)
                    file.write(line)
                    size += len(line)
                    advance(len(line))
                    document = next(documents, None) if size < UNIT_BYTES else None
            yield path


def _line(source: Source, document: object) -> bytes:
    if not isinstance(document, str):
        raise UserError(f"{source.described()}: documents() has yielded a {type(document).__name__}, not a text")
    return json.dumps({source.text_column: document}).encode() + b"\n"
