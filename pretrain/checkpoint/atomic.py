"""Folders that are whole or absent: written beside their place by all ranks, flushed to disk, marked complete, renamed.

The ranks share the disk: on several nodes ``output_dir`` lies on a file system that all of them see.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pretrain.errors import UserError
from pretrain.folders import is_below

if TYPE_CHECKING:
    from pretrain.world import World

MARKER = "COMPLETE.json"
FORMAT = 2


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(
    path: Path, fill: Callable[[Path], None], *, world: World, hint: Callable[[], str], marker: bool = True
) -> None:
    """Let every rank ``fill`` a fresh folder with its files; then it becomes ``path``, complete and on disk.

    The ``marker`` (sizes of all files) is written last. An error leaves nothing behind and an older ``path`` as it was.
    Raises ``UserError`` on every rank, naming place, cause and ``hint()``, when one of them can't write.
    """
    partial = path.with_name(f"{path.name}.partial")

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()

    def end() -> None:
        _complete(partial, marker=marker)
        replace_folder(partial, path)

    def told(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} could not be written: {error}; {hint()}") from error

        return run

    try:
        world.on_main(told(begin))
        world.each(told(lambda: fill(partial)))
        world.on_main(told(end))
    except BaseException:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _complete(folder: Path, *, marker: bool) -> None:
    """Everything in ``folder`` on disk, and the marker of a whole folder, last."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    for file in files:
        file.chmod(0o666 & ~_umask())  # safetensors makes its files for the owner alone
        flush(file)
    if marker:
        sizes = {str(f.relative_to(folder)): f.stat().st_size for f in files}
        (folder / MARKER).write_text(json.dumps({"format": FORMAT, "sizes": sizes}, indent=1))
        flush(folder / MARKER)
    flush(folder)


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
        if not is_below(name):
            return f"{MARKER} names {name!r}, which is outside the folder"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
    return None
