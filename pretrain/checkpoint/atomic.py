"""Atomic writing of folders by all ranks: the temporary folder of `pretrain.runtime.files`, with a marker of completeness.

The ranks share the disk: with several nodes, ``output_dir`` must be on a file system that all of them can access.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pretrain.checkpoint.marker import entry_of, write_marker
from pretrain.runtime.errors import NoRoom, UserError
from pretrain.runtime.files import begin_folder, finish_folder, partial_folder
from pretrain.runtime.filesystem import flush, set_mode

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext

Fill = Callable[[Path], Iterable[Path]]


def write_folder(
    path: Path,
    fill: Fill,
    *,
    world: DistributedContext,
    hint: Callable[[], str],
    marker: bool = True,
    alive: Callable[[], None] = lambda: None,
) -> int:
    """Write ``path`` atomically; return its size in bytes, on every rank.

    Every rank calls ``fill`` with a temporary folder and gets back the files that it wrote. When all ranks are done, the
    folder is flushed to disk and renamed to ``path``. The ``marker`` (sizes and checksums of all files) is written last.
    ``alive`` is called after every file.

    After an error the temporary folder is deleted and an older ``path`` is unchanged. Raises ``UserError`` on every rank,
    with path, cause and ``hint()``, if one rank can't write, and ``NoRoom`` if the disk is full.
    """
    partial = partial_folder(path)

    def with_path(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                return work()
            except (OSError, SafetensorError) as error:
                kind = NoRoom if _is_full(error) else UserError
                raise kind(f"{path} could not be written: {error}; {hint()}") from error

        return run

    try:
        world.on_main_rank(with_path(lambda: begin_folder(path)))
        parts = world.all_gather_object(
            with_path(lambda: _flush_files(partial, fill(partial), checksums=marker, alive=alive))
        )
        entries = {name: entry for part in parts for name, entry in part.items()}
        world.on_main_rank(with_path(lambda: _complete(path, entries if marker else None)))
    except BaseException:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return sum(entry["bytes"] for entry in entries.values())


def _is_full(error: OSError | SafetensorError) -> bool:
    """Return whether a disk or a quota is full. safetensors reports the error number in its message only."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)


def _flush_files(
    folder: Path, files: Iterable[Path], *, checksums: bool, alive: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """Flush this rank's ``files`` to disk; return size and checksum of each by its name in ``folder``."""
    entries = {}
    for file in files:
        set_mode(file, 0o666 & ~_umask())  # safetensors makes its files readable for the owner only
        entries[str(file.relative_to(folder))] = entry_of(file) if checksums else {"bytes": file.stat().st_size}
        flush(file)
        alive()
    return entries


def _complete(path: Path, entries: dict[str, dict[str, Any]] | None) -> None:
    """Write the marker after all files, then give the folder its name."""
    if entries is not None:
        flush(write_marker(partial_folder(path), entries))
    finish_folder(path)


@cache  # reading the umask requires setting it for a moment, which affects all threads
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
