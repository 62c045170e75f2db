"""The data files of a dataset of Hugging Face ``datasets``, read in place. No Arrow copy is written, so that a dataset may be
larger than the disk. ``datasets`` only resolves which files there are; they are read by the readers of this project."""

from __future__ import annotations

import posixpath
from dataclasses import fields
from typing import Any

from pretrain.data.reading.units import SourceFile, Stamp
from pretrain.data.remote.backend import backend_of
from pretrain.data.remote.stream import patiently
from pretrain.data.sources.own_files import COMPRESSIONS
from pretrain.runtime.errors import UserError, did_you_mean
from pretrain.runtime.places import is_url

FORMATS = {"parquet": "parquet", "arrow": "arrow", "json": "json", "csv": "csv", "text": "lines"}  # builder → format
JSON_LINES = (".jsonl", ".ndjson")
SAME = ("name", "version", "data_dir", "data_files", "description", "features", "columns", "batch_size", "chunksize")


def streamed_files(builder: Any, split: str, described: str) -> list[SourceFile]:
    """Return the data files of a split.

    Args:
        builder: a ``DatasetBuilder`` whose data files are checked.
        split: name of the split; a slice would need the number of rows of every file.
        described: the dataset, for messages.

    Raises:
        UserError: the split does not exist or is a slice, or the files are of a kind that is not streamed.
    """
    if any(mark in split for mark in "[+"):
        raise UserError(f"{described}: a slice can't be streamed; dataset.max_tokens limits a dataset")
    found = builder.config.data_files or {}
    if split not in found:
        raise UserError(f"{described}: no such split{did_you_mean(split, [str(name) for name in found])}")
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in FORMATS:
        raise UserError(f"{described}: datasets of type {kind!r} are not streamed; set dataset.streaming=false")
    if options := _options(builder.config):
        raise UserError(f"{described}: its README.md sets {', '.join(options)}; set dataset.streaming=false")
    paths = [str(path) for path in found[split]]
    stamps = _stamps(paths)
    return [SourceFile(path, _format(path, FORMATS[kind], described), stamps.get(path)) for path in paths]


def _options(config: Any) -> list[str]:
    """Return the options of a builder's config that change how its files are read."""
    default = type(config)()
    names = [field.name for field in fields(config) if field.name not in SAME]
    return [name for name in names if getattr(config, name) != getattr(default, name)]


def _format(path: str, kind: str, described: str) -> str:
    stem, ending = posixpath.splitext(path.lower())
    if ending not in COMPRESSIONS:
        stem, ending = path.lower(), ""
    if ending not in ("", ".gz", ".zst") or (ending and kind in ("parquet", "arrow")):
        raise UserError(f"{described}: {path}: {ending} is not streamed; set dataset.streaming=false")
    return ("jsonl" if kind == "json" and stem.endswith(JSON_LINES) else kind) + ending


def _stamps(paths: list[str]) -> dict[str, Stamp]:
    """Return the stamps of remote files by a listing of the folder that has them all, instead of a request for each."""
    if not paths or not is_url(paths[0]):
        return {}
    folder = posixpath.commonpath([path.partition("://")[2] for path in paths])
    url = f"{paths[0].partition('://')[0]}://{folder if len(paths) > 1 else posixpath.dirname(folder)}"
    return patiently(url, lambda: dict(backend_of(url).below(url)))
