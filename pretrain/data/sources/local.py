"""Text on this machine: files, folders, globs, or folders saved by ``datasets.save_to_disk``."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.data.reading.units import SourceFile
from pretrain.data.sources.base import FileSource
from pretrain.data.sources.listing import in_folder, matching, notice_once, without_duplicates
from pretrain.data.sources.named import Places, each_once
from pretrain.runtime.errors import UserError, did_you_mean, one_line
from pretrain.runtime.folders import is_below
from pretrain.runtime.places import absolute, each, joined
from pretrain.runtime.strict_json import read_json

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIBLE = {"text", "jsonl", "json", "csv"}
SAVED_MARKS = ("state.json", "dataset_dict.json")


@dataclass(frozen=True, kw_only=True)
class Local(FileSource):
    """Local files, folders, globs or saved datasets.

    A file that is named, or matched by a glob or by ``pattern``, is read as plain text unless its extension is known.

    Attributes:
        nameOrPath: A file, a folder, a glob, or a folder saved by datasets.save_to_disk; or a list of them.
        pattern: Files of a folder to read as text regardless of their extension, such as '*.py'.
        format: auto | files: read the files one by one | hf: a folder saved by datasets.save_to_disk.
    """

    source: Literal["local"] = "local"
    nameOrPath: Places
    pattern: Annotated[str, Field(pattern="^[^/]")] | None = None  # relative to the folder
    format: Literal["auto", "files", "hf"] = "auto"

    def default_name(self) -> str:
        return joined([_name_of(place) for place in each(self.nameOrPath)])

    def described(self) -> str:
        return f"dataset.nameOrPath={', '.join(each(self.nameOrPath))}" + (
            f" with dataset.pattern={self.pattern}" if self.pattern else ""
        )

    def identity(self) -> list[Any]:
        paths = [absolute(place) for place in each(self.nameOrPath)]
        return ["local", paths[0] if isinstance(self.nameOrPath, str) else paths, self.pattern, self.format]

    def files(self) -> list[SourceFile]:
        if isinstance(self.nameOrPath, str):
            return self._at(self.nameOrPath)
        return each_once(file for place in self.nameOrPath for file in self._at(place))

    def _at(self, place: str) -> list[SourceFile]:
        """Return the files of one place. Raises ``UserError`` when it has none."""
        path = absolute(place)
        if os.path.isfile(path):
            return [SourceFile(path, format_of(path) or "text")]
        if os.path.isdir(path):
            return self._in_folder(Path(path), place)
        if glob.has_magic(path):
            if found := without_duplicates(matching(path)):
                return [SourceFile(name, format_of(name) or "text") for name in found]
            raise UserError(f"dataset.nameOrPath={place}: no file matches")
        if os.path.exists(path):
            raise UserError(
                f"dataset.nameOrPath={place}: neither a file nor a folder, and the text has to be read more than once"
            )
        raise UserError(f"dataset.nameOrPath={place}: no such file or folder{_near(Path(path))}")

    def _in_folder(self, folder: Path, place: str) -> list[SourceFile]:
        """Return the files of a folder. Raises ``UserError`` when it holds nothing that can be read."""
        saved = any((folder / mark).exists() for mark in SAVED_MARKS)
        if self.format == "hf" and not saved:
            raise UserError(
                f"dataset.nameOrPath={place}: not a folder saved by datasets.save_to_disk (dataset.format=hf)"
            )
        if saved and self.format != "files":
            return [SourceFile(str(name), "arrow") for name in saved_files(folder)]
        every = in_folder(str(folder), self.pattern or "*")
        known = {name: kind for name in every if (kind := format_of(name) or (self.pattern and "text"))}
        if known:
            if left_out := [name for name in every if name not in known]:
                notice_once(
                    f"{folder}: {len(left_out)} files are not read ({_endings(left_out)}); dataset.pattern chooses them"
                )
            return [SourceFile(name, known[name]) for name in without_duplicates(known)]
        if self.pattern:
            raise UserError(f"dataset.pattern={self.pattern}: no file in {place} matches")
        if not every:
            raise UserError(f"dataset.nameOrPath={place}: the folder is empty")
        raise UserError(
            f"dataset.nameOrPath={place}: no text in the folder; it holds {_endings(every)}, and without "
            f"dataset.pattern (such as '*.py') only {' '.join(FORMATS)} are read"
        )


def _name_of(place: str) -> str:
    """Return the last part of a path that is no pattern, without the extensions of a file."""
    path = Path(os.path.abspath(place))
    while glob.has_magic(path.name):
        path = path.parent
    return path.name if path.is_dir() else path.name.partition(".")[0] or path.name


def format_of(path: str) -> str | None:
    """Return the format by the file's extension; ``None`` if the extension is unknown."""
    stem, ending = os.path.splitext(path.lower())
    if ending in (".gz", ".zst"):
        inner = FORMATS.get(os.path.splitext(stem)[1])
        return inner + ending if inner in COMPRESSIBLE else None
    return FORMATS.get(ending)


def saved_files(folder: Path) -> list[Path]:
    """Return the arrow files of a saved dataset, or of its ``train`` split if it has several splits.

    https://huggingface.co/docs/datasets/process#save
    """
    if (folder / "dataset_dict.json").exists():
        splits = _field(folder / "dataset_dict.json", "splits")
        if not splits or not all(isinstance(name, str) for name in splits):
            raise UserError(f"{folder / 'dataset_dict.json'}: 'splits' is not a list of names")
        if "train" not in splits and len(splits) != 1:
            raise UserError(
                f"{folder}: splits {', '.join(splits)}, none of them 'train'; name the folder of one of them"
            )
        folder = _inside(folder, "train" if "train" in splits else splits[0])
    names = [
        isinstance(entry, dict) and entry.get("filename") for entry in _field(folder / "state.json", "_data_files")
    ]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / 'state.json'}: '_data_files' names no files")
    return [_inside(folder, str(name)) for name in names]


def _field(path: Path, key: str) -> list[Any]:
    """Return the list ``key`` of a JSON file that ``datasets`` wrote. Raises ``UserError`` if it has none."""
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); save the dataset again") from error
    if not isinstance(found, dict) or not isinstance(found.get(key), list):
        raise UserError(f"{path}: no list {key!r} in it; save the dataset again")
    return list(found[key])


def _inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``. Raises ``UserError`` if that is outside of the folder."""
    if not is_below(name):
        raise UserError(f"{folder}: its JSON names {name!r}, which is outside the folder")
    return folder / name


def _near(path: Path) -> str:
    """Return a "did you mean" hint with a similar name in the same folder; an empty string if there is none."""
    siblings = [name for name in os.listdir(path.parent) if name[0] != "."] if path.parent.is_dir() else []
    return did_you_mean(path.name, siblings) if 0 < len(siblings) <= 1000 else ""


def _endings(names: Iterable[str]) -> str:
    """Return the most frequent file extensions with their counts, for messages."""
    counts = Counter(os.path.splitext(name)[1] or "no ending" for name in names)
    return ", ".join(f"{count} × {ending}" for ending, count in counts.most_common(5))
