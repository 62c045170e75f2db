"""Text in files: those of this machine, or of an object store or a web server by their URLs."""

from __future__ import annotations

import glob
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.data.reading.token_files import beside, token_format
from pretrain.data.reading.units import SourceFile
from pretrain.data.remote.addresses import path_of
from pretrain.data.sources.base import FileSource
from pretrain.data.sources.formats import local_format, named_format, with_formats
from pretrain.data.sources.listing import in_folder, matching, without_duplicates
from pretrain.data.sources.named import Places, each_once
from pretrain.data.sources.remote_files import remote_files
from pretrain.data.sources.saved import MARKS, NOT_SAVED, saved_files
from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.runtime.places import absolute, each, is_url, joined

LISTED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Local(FileSource):
    """Files, folders, globs or saved datasets, by path or URL.

    A file that is named, or matched by a glob or by ``pattern``, is read as plain text unless its extension is known.

    Attributes:
        nameOrPath: A file, a folder, a glob, or a folder saved by datasets.save_to_disk, as a path or a URL (s3:// gs:// az://
            hf:// https://); or a list of them.
        pattern: Files of a folder to read as text regardless of their extension, such as '*.py'.
        format: auto | files: read the files one by one | hf: a folder saved by datasets.save_to_disk | tokens: .bin files of
            token ids without a header or an index, such as nanoGPT's.
        token_dtype: Type of the token ids with format=tokens: uint16 | uint32 | int32 | int64.
    """

    source: Literal["local"] = "local"
    nameOrPath: Places
    pattern: Annotated[str, Field(pattern="^[^/]")] | None = None  # relative to the folder
    format: Literal["auto", "files", "hf", "tokens"] = "auto"
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"

    def default_name(self) -> str:
        return joined([_name_of(place) for place in each(self.nameOrPath)])

    def described(self) -> str:
        return f"dataset.nameOrPath={', '.join(each(self.nameOrPath))}" + (
            f" with dataset.pattern={self.pattern}" if self.pattern else ""
        )

    def identity(self) -> list[Any]:
        paths = [absolute(place) for place in each(self.nameOrPath)]
        path = paths[0] if isinstance(self.nameOrPath, str) else paths
        return ["local", path, self.pattern, self.format, *([self.token_dtype] if self.format == "tokens" else [])]

    def files(self) -> list[SourceFile]:
        if isinstance(self.nameOrPath, str):
            return self._at(self.nameOrPath)
        with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:  # a list of addresses is a request each
            return each_once(file for files in pool.map(self._at, self.nameOrPath) for file in files)

    def _at(self, place: str) -> list[SourceFile]:
        """Return the files of one place. Raises ``UserError`` when it has none."""
        if is_url(place):
            return remote_files(place, pattern=self.pattern, format=self.format)
        path = absolute(place)
        if os.path.isfile(path):
            return [SourceFile(path, named_format(path, self._token_dtype))]
        if os.path.isdir(path):
            return self._in_folder(path, place)
        if glob.has_magic(path):
            if found := without_duplicates(matching(path)):
                sidecars = {other for name in found if token_format(name) for other in beside(name)}
                return [
                    SourceFile(name, named_format(name, self._token_dtype)) for name in found if name not in sidecars
                ]
            raise UserError(f"dataset.nameOrPath={place}: no file matches")
        if os.path.exists(path):
            raise UserError(
                f"dataset.nameOrPath={place}: neither a file nor a folder, and the text has to be read more than once"
            )
        raise UserError(f"dataset.nameOrPath={place}: no such file or folder{_near(Path(path))}")

    @property
    def _token_dtype(self) -> str | None:
        return self.token_dtype if self.format == "tokens" else None

    def _in_folder(self, folder: str, place: str) -> list[SourceFile]:
        """Return the files of a folder. Raises ``UserError`` when it holds nothing that can be read."""
        marks = [mark for mark in MARKS if os.path.exists(os.path.join(folder, mark))]
        if self.format == "hf" and not marks:
            raise UserError(f"dataset.nameOrPath={place}: {NOT_SAVED}")
        if marks and self.format != "files":
            names = saved_files(folder, several="dataset_dict.json" in marks, load=_content)
            return [SourceFile(name, "arrow") for name in names]
        form = partial(local_format, token_dtype=self._token_dtype, matched=self.pattern is not None)
        known = with_formats(in_folder(folder, self.pattern or "*"), place, self.pattern, form)
        return [SourceFile(name, known[name]) for name in without_duplicates(known)]


def _name_of(place: str) -> str:
    """Return the last part of a path that is no pattern, without the extensions of a file."""
    path = Path("/", path_of(place).partition("://")[2]) if is_url(place) else Path(os.path.abspath(place))
    while glob.has_magic(path.name):
        path = path.parent
    return path.name if path.is_dir() else path.name.partition(".")[0] or path.name


def _content(path: str) -> bytes:
    if not os.path.isfile(path):  # reading a pipe would block
        raise FileNotFoundError(f"{path} is missing")
    return Path(path).read_bytes()


def _near(path: Path) -> str:
    """Return a "did you mean" hint with a similar name in the same folder; an empty string if there is none."""
    siblings = [name for name in os.listdir(path.parent) if name[0] != "."] if path.parent.is_dir() else []
    return did_you_mean(path.name, siblings) if 0 < len(siblings) <= 1000 else ""
