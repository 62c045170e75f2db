"""List the token cache, check it, and delete what has not been used for a while.

    python -m pretrain.tools.cache                                        # datasets, sizes, last use
    python -m pretrain.tools.cache prune --older-than 30                  # what would be deleted
    python -m pretrain.tools.cache prune --max-size 200 --delete          # the datasets used last fit into 200 GB
    python -m pretrain.tools.cache prune --runs runs/                     # the datasets that no run in runs/ uses
    python -m pretrain.tools.cache verify                                 # compare every part with its checksum

Nothing is deleted without --delete, never what a running process uses, and prune deletes nothing while a dataset is tokenized.
With --runs, the list says of each dataset which runs use it, and prune keeps those that a run uses.
What was deleted is tokenized again by the next run that needs it, if its text is still there; such a run resumes as before.

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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from pretrain.data.cache import cache_dir
from pretrain.data.store.near_duplicates import decision_path, keys_path
from pretrain.data.store.token_shards import is_intact, open_part
from pretrain.run.recorded_use import RecordedUse
from pretrain.runtime.console import visible
from pretrain.runtime.errors import UserError
from pretrain.runtime.locks import alone, is_held
from pretrain.runtime.memory import gib
from pretrain.runtime.redact import redact
from pretrain.tools.arguments import mistakes_in_one_line, tool_parser

DAY = 86_400.0
UNFINISHED_DAYS = 7.0  # parts of no dataset this young may belong to a start that was interrupted and will be continued
MOST_NAMED = 3  # runs that the list names for a dataset
STORE = "{:>5}  {:>14}  {:>10}  {:>10}  {:>9}  {}"


@dataclass(frozen=True)
class Dataset:
    """A dataset of the cache.

    Attributes:
        manifest: its list of parts, whose time is that of its last use.
        name: its name in the metrics.
        parts: its parts, in order.
        files: the files that it was made from.
    """

    manifest: Path
    name: str
    parts: tuple[Path, ...]
    files: frozenset[str]

    @property
    def days(self) -> float:
        """Days since a run used it."""
        return _days(self.manifest)

    def in_use(self) -> bool:
        """Return whether a process has it open."""
        return is_held(self.manifest)


class Cache:
    """The datasets and parts of a cache folder; both are read once. The size of a part includes that of its MinHash keys."""

    def __init__(self, folder: Path) -> None:
        folder = Path(os.path.realpath(folder))
        if not (folder / "stores").is_dir():
            raise UserError(f"{folder}: not a token cache; set PRETRAIN_CACHE or --cache")
        self.folder = folder
        lists = {path: _dataset(folder, path) for path in folder.glob("stores/*.json")}
        self.lists = {*lists}
        self.unreadable = sorted(path for path in lists if lists[path] is None and path.exists())
        self.datasets = sorted(filter(None, lists.values()), key=lambda dataset: dataset.days)
        found = folder.glob("parts/*/*.tokens")
        self.parts = {path: _size(path) + _size(keys_path(path, folder)) for path in found}
        self.users = Counter(part for dataset in self.datasets for part in {*dataset.parts})

    def size(self, dataset: Dataset, *, own: bool = False) -> int:
        """Return the bytes of a dataset's parts; with ``own`` of those that no other dataset has."""
        return sum(self.parts.get(part, 0) for part in {*dataset.parts} if not own or self.users[part] == 1)

    def unused(self) -> list[Path]:
        """Return the parts of no dataset."""
        return [part for part in self.parts if part not in self.users]

    def why_closed(self) -> str | None:
        """Return why it can't be known which parts are in use: a dataset is being tokenized, or was interrupted a short time ago,
        or a list can't be read, or is new."""
        if any(_days(path) < UNFINISHED_DAYS for path in self.folder.glob("progress/*/*")):
            return f"a dataset is being tokenized, or its tokenization was interrupted ({self.folder / 'progress'})"
        if self.unreadable:
            return (
                f"{visible(str(self.unreadable[0]))} is not a list of parts of this cache; delete it if it is damaged"
            )
        if not {*self.folder.glob("stores/*.json")} <= self.lists:
            return "a dataset was added just now; run the same command again"
        return None

    @contextmanager
    def free(self, datasets: Iterable[Dataset]) -> Iterator[list[Dataset]]:
        """Yield those of the datasets that no process uses. No process can open them meanwhile."""
        with ExitStack() as locks:
            yield [dataset for dataset in datasets if locks.enter_context(alone(dataset.manifest))]

    def delete_parts(self, parts: Iterable[Path]) -> None:
        """Delete parts and their MinHash keys."""
        _delete(path for part in parts for path in (part, keys_path(part, self.folder)))


def listing(cache: Cache, runs: RecordedUse | None = None) -> Iterator[str]:
    """Yield the lines of the table of datasets, those used last first."""
    yield STORE.format("parts", "tokens", "size", "alone", "last use", "dataset")
    for dataset in cache.datasets:
        found = [part for path in dataset.parts if (part := open_part(path))]
        missing = len(dataset.parts) - len(found)
        notes = [f"{missing} parts missing"] * bool(missing) + ["in use"] * dataset.in_use()
        notes += [] if runs is None else [_named(runs.using(dataset.manifest, dataset.files))]
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


def _named(runs: list[Path]) -> str:
    """Return the runs that use a dataset, for the list."""
    if not runs:
        return "used by no run"
    more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
    return f"used by {', '.join(visible(str(run)) for run in sorted(runs)[:MOST_NAMED])}{more}"


def chosen(
    cache: Cache, *, older_than: float | None, max_bytes: float | None, runs: RecordedUse | None = None
) -> list[Dataset]:
    """Return the datasets to delete: those not used for ``older_than`` days (any, where neither limit is given), and then those
    used least recently until the parts of the others have at most ``max_bytes``. A dataset that a process or one of ``runs``
    uses is never among them."""
    kept = [d for d in cache.datasets if d.in_use() or (runs is not None and runs.using(d.manifest, d.files))]
    if older_than is None and max_bytes is None:
        return [dataset for dataset in cache.datasets if dataset not in kept]
    found = [d for d in cache.datasets if older_than is not None and d.days > older_than and d not in kept]
    if max_bytes is None:
        return found
    users = cache.users - Counter(part for dataset in found for part in {*dataset.parts})
    left = sum(cache.parts.get(part, 0) for part in users)
    for dataset in reversed(cache.datasets):
        if left <= max_bytes:
            break
        if dataset in found or dataset in kept:
            continue
        found.append(dataset)
        for part in {*dataset.parts}:
            users[part] -= 1
            left -= cache.parts.get(part, 0) if users[part] == 0 else 0
    return found


def prune(cache: Cache, found: list[Dataset], *, older_than: float | None, delete: bool) -> Iterator[str]:
    """Yield a line for everything that is deleted, or would be without ``delete``."""
    if reason := cache.why_closed():
        yield f"nothing is deleted: {reason}"
        return
    with cache.free(found if delete else ()) as free:
        yield from (f"kept: {dataset.name}: a process uses it" for dataset in found if delete and dataset not in free)
        yield from _prune_datasets(cache, free if delete else found, delete=delete)
    yield from _prune_rest(cache, older_than=older_than, delete=delete)


def _prune_datasets(cache: Cache, found: list[Dataset], *, delete: bool) -> Iterator[str]:
    would = "" if delete else "would be "
    kept = {part for dataset in cache.datasets if dataset not in found for part in dataset.parts}
    for dataset in found:
        parts = [part for part in {*dataset.parts} - kept if part in cache.parts]
        kept |= {*parts}  # counted once
        size = sum(cache.parts[part] for part in parts)
        yield f"{would}deleted: {dataset.name}, used {dataset.days:.0f} days ago, {len(parts):,} parts, {gib(size)}"
        if delete:
            cache.delete_parts(parts)
            _delete([decision_path(dataset.parts, cache.folder), dataset.manifest])  # the list last: it has the lock


def _prune_rest(cache: Cache, *, older_than: float | None, delete: bool) -> Iterator[str]:
    """Parts of no dataset, what interrupted starts have left, and, by age only, copies of documents."""
    limit = max(UNFINISHED_DAYS, older_than or 0)
    parts = [part for part in cache.unused() if _days(part) > limit]
    names = ("progress",) if older_than is None else ("progress", "documents", "huggingface")
    folders = [path for name in names for path in cache.folder.glob(f"{name}/*") if _days(path) > limit]
    if parts or folders:
        size = sum(cache.parts[part] for part in parts) + sum(map(_size, folders))
        if delete:
            cache.delete_parts(parts)
            _delete(folders)
        yield (
            f"{'' if delete else 'would be '}deleted: {len(parts) + len(folders):,} parts and folders of no dataset, "
            f"older than {limit:.0f} days, {gib(size)}"
        )


def verify(cache: Cache, *, delete: bool) -> tuple[int, list[str]]:
    """Return the number of damaged parts, which are incomplete or differ from their checksum, and a line for each of them. With
    ``delete`` they are deleted, unless a process uses them. Parts of earlier versions have no checksum."""
    found = [part for part in cache.parts if _is_damaged(part)]
    users = [dataset for dataset in cache.datasets if not {*found}.isdisjoint(dataset.parts)]
    with cache.free(users if delete else ()) as free:
        in_use = {part for dataset in users if delete and dataset not in free for part in dataset.parts}
        if delete:
            cache.delete_parts(part for part in found if part not in in_use)
    return len(found), [f"damaged: {part}" + " (kept: a process uses it)" * (part in in_use) for part in found]


def _is_damaged(part: Path) -> bool:
    try:
        return not is_intact(part) and part.exists()
    except FileNotFoundError:  # another process has deleted it
        return False
    except OSError:  # the disk can't read it
        return True


def _dataset(folder: Path, manifest: Path) -> Dataset | None:
    """Return the dataset of a manifest; ``None`` if it can't be read, or names anything but parts of a cache. Manifests of
    earlier versions have absolute paths, also of the place from where the cache was moved."""
    try:
        content = json.loads(manifest.read_text())
        parts = tuple(_part(folder, part) for part in content["parts"])
        files = frozenset(str(path) for unit in content["units"] for path, _ in unit)
        return Dataset(manifest, visible(redact(str(content["name"]))), parts, files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _part(folder: Path, part: str) -> Path:
    """Return the place of a part in the cache at ``folder``. Raises ``ValueError`` if ``part`` is none of a cache."""
    parts, prefix, name = PurePath(part).parts[-3:]
    if parts != "parts" or ".." in (prefix, name):
        raise ValueError(part)
    return folder / parts / prefix / name


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
    parser = tool_parser("cache", __doc__)
    parser.add_argument("action", nargs="?", choices=("list", "prune", "verify"), default="list")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="the cache; by default that of the runs")
    parser.add_argument(
        "--older-than", type=float, metavar="DAYS", help="prune datasets that were not used for so long"
    )
    parser.add_argument(
        "--max-size", type=float, metavar="GB", help="prune the datasets used least recently beyond this size"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="runs are below it (again for each such folder): list what they use; prune keeps that",
    )
    parser.add_argument("--delete", action="store_true", help="delete; without it, only list what would be deleted")
    asked = parser.parse_args()
    with mistakes_in_one_line():
        if asked.action == "prune" and asked.older_than is None and asked.max_size is None and not asked.runs:
            raise UserError("prune needs --older-than DAYS, --max-size GB or --runs FOLDER")
        if any(number is not None and not number >= 0 for number in (asked.older_than, asked.max_size)):
            raise UserError("--older-than and --max-size must be at least 0")
        raise SystemExit(_run(Cache(asked.cache or cache_dir()), asked))


def _run(cache: Cache, asked: argparse.Namespace) -> int:
    """Print what was asked for, and return the exit code."""
    runs = RecordedUse.below(asked.runs) if asked.runs else None
    if asked.action == "list":
        print(*listing(cache, runs), sep="\n", flush=True)
        return 0
    if asked.action == "verify":
        number, lines = verify(cache, delete=asked.delete)
        print(*lines, f"{number:,} of {len(cache.parts):,} parts damaged", sep="\n")
        return 1 if number else 0
    max_bytes = None if asked.max_size is None else asked.max_size * 1e9
    found_datasets = chosen(cache, older_than=asked.older_than, max_bytes=max_bytes, runs=runs)
    lines = [*prune(cache, found_datasets, older_than=asked.older_than, delete=asked.delete)]
    print(*(lines or ["nothing to delete"]), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    main()
