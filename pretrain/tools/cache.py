"""List the token cache, check it, and delete what has not been used for a while.

    python -m pretrain.tools.cache                                        # datasets, sizes, last use
    python -m pretrain.tools.cache prune --older-than 30                  # what would be deleted
    python -m pretrain.tools.cache prune --max-size 200 --delete          # the datasets used last fit into 200 GB
    python -m pretrain.tools.cache verify                                 # compare every part with its checksum

Nothing is deleted without --delete, and never what a running process uses. What was deleted is tokenized again by the next run
that needs it, if its text is still there; such a run resumes as before.

Exit code 0: done; 1: damaged parts were found; 2: a mistake.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.data.cache import cache_dir
from pretrain.data.store.token_shards import is_intact, open_part
from pretrain.runtime.console import complain, visible
from pretrain.runtime.errors import UserError
from pretrain.runtime.locks import is_held
from pretrain.runtime.memory import gib
from pretrain.runtime.redact import redact

DAY = 86_400.0
UNFINISHED_DAYS = 7.0  # parts of no dataset this young may belong to a start that was interrupted and will be continued
STORE = "{:>5}  {:>14}  {:>10}  {:>10}  {:>9}  {}"


@dataclass(frozen=True)
class Dataset:
    """A dataset of the cache.

    Attributes:
        manifest: its list of parts, whose time is that of its last use.
        name: its name in the metrics.
        parts: its parts.
    """

    manifest: Path
    name: str
    parts: tuple[Path, ...]

    @property
    def days(self) -> float:
        """Days since a run used it."""
        return _days(self.manifest)

    def in_use(self) -> bool:
        """Return whether a process has it open."""
        return is_held(self.manifest)


class Cache:
    """The datasets and parts of a cache folder; both are read once."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "stores").is_dir():
            raise UserError(f"{folder}: not a token cache; set PRETRAIN_CACHE or --cache")
        self.folder = folder
        self.datasets = sorted(_datasets(folder), key=lambda dataset: dataset.days)
        self.parts = {path: _size(path) for path in folder.glob("parts/*/*.tokens")}
        self.users = Counter(part for dataset in self.datasets for part in {*dataset.parts})

    def size(self, dataset: Dataset, *, own: bool = False) -> int:
        """Return the bytes of a dataset's parts; with ``own`` of those that no other dataset has."""
        return sum(self.parts.get(part, 0) for part in {*dataset.parts} if not own or self.users[part] == 1)

    def unused(self) -> list[Path]:
        """Return the parts of no dataset."""
        return [part for part in self.parts if part not in self.users]

    def is_being_filled(self) -> bool:
        """Return whether a dataset is being tokenized, or was interrupted a short time ago."""
        return any(_days(path) < UNFINISHED_DAYS for path in self.folder.glob("progress/*/*"))


def listing(cache: Cache) -> Iterator[str]:
    """Yield the lines of the table of datasets, those used last first."""
    yield STORE.format("parts", "tokens", "size", "alone", "last use", "dataset")
    for dataset in cache.datasets:
        found = [part for path in dataset.parts if (part := open_part(path))]
        missing = len(dataset.parts) - len(found)
        notes = [f"{missing} parts missing"] * bool(missing) + ["in use"] * dataset.in_use()
        yield STORE.format(
            len(found),
            f"{sum(part.num_tokens for part in found):,}",
            gib(cache.size(dataset)),
            gib(cache.size(dataset, own=True)),
            f"{dataset.days:.0f} d ago",
            dataset.name + (f" ({', '.join(notes)})" if notes else ""),
        )
    unused = cache.unused()
    yield f"parts of no dataset: {len(unused):,}, {gib(sum(cache.parts[part] for part in unused))}"
    for name in ("documents", "huggingface", "near"):
        yield f"{name}: {gib(_size(cache.folder / name))}"
    yield f"{cache.folder}: {gib(_size(cache.folder))}"


def chosen(cache: Cache, *, older_than: float | None, max_bytes: float | None) -> list[Dataset]:
    """Return the datasets to delete: those not used for ``older_than`` days, and then those used least recently until the parts
    of the others have at most ``max_bytes``. A dataset that a process uses is never among them."""
    found = [d for d in cache.datasets if older_than is not None and d.days > older_than and not d.in_use()]
    if max_bytes is None:
        return found
    users = cache.users - Counter(part for dataset in found for part in {*dataset.parts})
    left = sum(cache.parts.get(part, 0) for part in users)
    for dataset in reversed(cache.datasets):
        if left <= max_bytes:
            break
        if dataset in found or dataset.in_use():
            continue
        found.append(dataset)
        for part in {*dataset.parts}:
            users[part] -= 1
            left -= cache.parts.get(part, 0) if users[part] == 0 else 0
    return found


def prune(cache: Cache, found: list[Dataset], *, older_than: float | None, delete: bool) -> Iterator[str]:
    """Yield a line for everything that is deleted, or would be without ``delete``."""
    would = "" if delete else "would be "
    kept = {part for dataset in cache.datasets if dataset not in found for part in dataset.parts}
    for dataset in found:
        alone = [part for part in {*dataset.parts} - kept if part in cache.parts]
        kept |= {*alone}  # counted once
        size = sum(cache.parts[part] for part in alone)
        yield f"{would}deleted: {dataset.name}, used {dataset.days:.0f} days ago, {len(alone):,} parts, {gib(size)}"
        if delete:
            _delete([dataset.manifest, *alone])
    if cache.is_being_filled():
        yield "parts of no dataset are kept: a dataset is being tokenized, or its tokenization was interrupted"
        return
    limit = max(UNFINISHED_DAYS, older_than or 0)
    old = [part for part in cache.unused() if _days(part) > limit]
    folders = ("documents", "huggingface", "progress")
    old += [path for name in folders for path in cache.folder.glob(f"{name}/*") if _days(path) > limit]
    if old:
        size = sum(_size(path) for path in old)
        if delete:
            _delete(old)
        yield f"{would}deleted: {len(old):,} parts and folders of no dataset, older than {limit:.0f} days, {gib(size)}"


def damaged(cache: Cache) -> list[Path]:
    """Return the parts that are incomplete or differ from their checksum. Parts of earlier versions have none."""
    return [part for part in cache.parts if not is_intact(part)]


def _datasets(folder: Path) -> Iterator[Dataset]:
    """Yield the datasets whose manifest can be read. A path that leads out of the cache is ignored."""
    for manifest in folder.glob("stores/*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            content = json.loads(manifest.read_text())
            parts = [Path(os.path.normpath(folder / part)) for part in content["parts"]]
            inside = tuple(part for part in parts if part.parent.parent == folder / "parts")
            yield Dataset(manifest, visible(redact(str(content["name"]))), inside)


def _days(path: Path) -> float:
    with suppress(OSError):
        return (time.time() - path.lstat().st_mtime) / DAY
    return 0.0


def _size(path: Path) -> int:
    """Return the bytes of a file or of a folder, without following links."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            return sum(_size(Path(entry.path)) for entry in os.scandir(path))
        return path.lstat().st_size
    return 0


def _delete(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):  # another process has deleted it
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m pretrain.tools.cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", nargs="?", choices=("list", "prune", "verify"), default="list")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="the cache; by default that of the runs")
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="prune datasets that were not used for so long"
    )
    parser.add_argument(
        "--max-size", type=float, metavar="GB", help="prune the datasets used least recently beyond this size"
    )
    parser.add_argument("--delete", action="store_true", help="delete; without it, only list what would be deleted")
    asked = parser.parse_args()
    try:
        if asked.action == "prune" and asked.older_than is None and asked.max_size is None:
            raise UserError("prune needs --older-than DAYS or --max-size GB")
        if any(number is not None and not number >= 0 for number in (asked.older_than, asked.max_size)):
            raise UserError("--older-than and --max-size must be at least 0")
        raise SystemExit(_run(Cache((asked.cache or cache_dir()).absolute()), asked))
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except UserError as error:
        complain(f"error: {error}")
        raise SystemExit(2) from None


def _run(cache: Cache, asked: argparse.Namespace) -> int:
    """Print what was asked for, and return the exit code."""
    if asked.action == "list":
        print(*listing(cache), sep="\n", flush=True)
        return 0
    if asked.action == "verify":
        found = damaged(cache)
        print(
            *(f"damaged: {part}" for part in found), f"{len(found):,} of {len(cache.parts):,} parts damaged", sep="\n"
        )
        if asked.delete:
            _delete(found)
        return 1 if found else 0
    max_bytes = None if asked.max_size is None else asked.max_size * 1e9
    found_datasets = chosen(cache, older_than=asked.older_than, max_bytes=max_bytes)
    lines = [*prune(cache, found_datasets, older_than=asked.older_than, delete=asked.delete)]
    print(*(lines or ["nothing to delete"]), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    main()
