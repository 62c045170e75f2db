"""The documents of a source that is not made of files. They are kept in the cache as JSON lines, under the source's fingerprint.

Everything that works on files then works on them: tokenizing in several processes, going on after a kill, and a restart that
reads nothing. The segments are written atomically, and a list of them at the end, without which all are written again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.cache import cache_file, ensure_content, exclusive, make_private, remove_abandoned, used_now
from pretrain.data.reading.records import SURROGATE
from pretrain.data.reading.units import UNIT_BYTES, SourceFile, key_of
from pretrain.runtime.console import progress_bar
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.sources.base import Source

LIST = "segments.json"  # name → size in bytes of each segment


def kept_documents(source: Source, cache: Path) -> list[SourceFile]:
    """Return the files with the documents of ``source``; they are written into ``cache`` unless they are there and complete.

    One process writes, others wait for it. Raises ``UserError`` where other users could change the files.
    """
    make_private(cache)
    replaces = ["replace"] if source.errors == "replace" else []  # else an error would be kept, or be lost
    key = key_of(source.identity(), source.text_column, *replaces)
    folder = cache / "documents" / key
    with exclusive(cache / "locks" / f"documents-{key}.lock", source.domain):
        sizes = _complete(folder)
        if sizes is None:
            remove_abandoned(folder.parent)
            sizes = {path.name: path.stat().st_size for path in _write(source, folder)}
            ensure_content(folder / LIST, json.dumps(sizes).encode())
        used_now(folder)
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
    with progress_bar(f"reading {source.domain}", total=None, unit="B") as advance:
        for number, segment in enumerate(_segments(source), 1):
            path = folder / f"{number:05d}.jsonl"
            with cache_file(path) as file:
                file.write(segment)
            advance(len(segment))
            yield path


def _segments(source: Source) -> Iterator[bytes]:
    """Yield the documents as JSON lines, some at a time. The source is read here, where an OSError is its own."""
    lines, size = [], 0
    for number, document in enumerate(source.documents(), 1):
        lines.append(_line(source, document, number))
        size += len(lines[-1])
        if size >= UNIT_BYTES:
            yield b"".join(lines)
            lines, size = [], 0
    if lines:
        yield b"".join(lines)


def _line(source: Source, document: object, number: int) -> bytes:
    if not isinstance(document, str):
        raise UserError(f"{source.described()}: documents() has yielded a {type(document).__name__}, not a text")
    if source.errors != "replace" and (found := SURROGATE.search(document)):
        raise UserError(
            f"{source.described()}: document {number} of documents() has half of a surrogate pair (\\u{ord(found[0]):04x}) at "
            f"character {found.start()}, which is not a character; yield it without, or read it with dataset.errors=replace"
        )
    return json.dumps({source.text_column: document}).encode() + b"\n"
