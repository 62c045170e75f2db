"""Folders that are whole or absent: written beside their place, flushed to disk, marked complete, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARKER = "COMPLETE.json"
FORMAT = 1


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: Path, *, marker: bool = True) -> Iterator[Path]:
    """Yield a fresh folder to fill; on leaving without an error it becomes ``path``, complete and on disk.

    The ``marker`` (sizes of all files) is written last. An error leaves nothing behind and an older ``path`` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        files = sorted(f for f in partial.rglob("*") if f.is_file())
        for file in files:
            file.chmod(0o666 & ~_umask())  # safetensors makes its files for the owner alone
            flush(file)
        if marker:
            sizes = {str(f.relative_to(partial)): f.stat().st_size for f in files}
            (partial / MARKER).write_text(json.dumps({"format": FORMAT, "sizes": sizes}, indent=1))
            flush(partial / MARKER)
        flush(partial)
        replace_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def replace_folder(new: Path, path: Path) -> None:
    """Put ``new`` in the place of ``path``, moving an older ``path`` aside first and deleting it last."""
    old = path.with_name(f"{path.name}.replaced")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
    os.rename(new, path)
    flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def missing_or_torn(path: Path) -> str | None:
    """Why the folder can't be trusted, or ``None`` when it is whole (marker there, every file of the recorded size)."""
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text())
    except FileNotFoundError:
        return f"no {MARKER}"
    except (OSError, ValueError) as error:
        return f"unreadable {MARKER}: {error}"
    if marker.get("format") != FORMAT:
        return f"format {marker.get('format')!r}, this version reads {FORMAT}"
    for name, size in marker["sizes"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    return None
