"""Which datasets of the token cache a run uses: each run folder has the names of their lists, by which
`pretrain.tools.cache` finds what no run uses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.changed_files import load_files
from pretrain.run.leftovers import FILES, TOKENS, is_run
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.files import replace_file

if TYPE_CHECKING:
    from pretrain.run.prepare import Prepared

WITHOUT_RUNS = ("checkpoints", "model", "models", "logs")  # folders of a run, which are not searched for others


def record_use(folder: Path, prepared: Prepared) -> None:
    """Write the names of the datasets that a run trains on or is scored on into its folder. Raises ``OSError``."""
    views = [part.view for part in prepared.train.parts] + [view for _, _, view in prepared.domains]
    replace_file(folder / TOKENS, json.dumps(sorted({view.store.path.name for view in views})))


@dataclass(frozen=True)
class RecordedUse:
    """The datasets that the runs below some folders use.

    Attributes:
        datasets: run folder → file names of the lists of its datasets in the cache.
        files: run folder of an earlier version, which has recorded the files of its training data alone → these files.
    """

    datasets: Mapping[Path, frozenset[str]]
    files: Mapping[Path, frozenset[str]]

    @classmethod
    def below(cls, folders: Iterable[Path]) -> RecordedUse:
        """Find the runs below ``folders``, also behind links. Raises ``UserError`` for a folder or a record that can't be
        read."""
        datasets, files = {}, {}
        for run, names in _walk(folders):
            if TOKENS in names:
                datasets[run] = _names(run / TOKENS)
            elif FILES in names and "config.yaml" in names:
                files[run] = frozenset(load_files(run / FILES))
        return cls(datasets, files)

    def using(self, dataset: Path, files: frozenset[str]) -> list[Path]:
        """Return the runs that use a dataset.

        Args:
            dataset: its list of parts in the cache.
            files: the files that it was made from. A run of an earlier version counts if it has read all of them.
        """
        named = [run for run, names in self.datasets.items() if dataset.name in names]
        return named + [run for run, read in self.files.items() if files and files <= read]


def _walk(folders: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder once, with the names of its files. What a run itself writes is left out."""
    seen = set()
    for folder in folders:
        for name, inner, names in os.walk(folder, onerror=_unreadable, followlinks=True):
            place = os.path.realpath(name)
            if place in seen:
                inner.clear()
                continue
            seen.add(place)
            yield Path(name), names
            if not set(inner).isdisjoint(WITHOUT_RUNS) and (TOKENS in names or is_run(Path(name))):
                inner[:] = [other for other in inner if other not in WITHOUT_RUNS]


def _names(path: Path) -> frozenset[str]:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return frozenset(found)
        reason = "not a list of names"
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error)
    raise UserError(f"{path}: can't be read ({reason}), so it is not known what this run uses")


def _unreadable(error: OSError) -> None:
    raise UserError(f"--runs: {error.filename}: {error.strerror}")
