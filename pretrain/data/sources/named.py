"""The places that ``nameOrPath`` names: one, or a list of them whose files are read in this order, each once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from pretrain.data.reading.units import SourceFile, reading
from pretrain.data.sources.listing import notice_once
from pretrain.runtime.places import is_url

Place = Annotated[str, Field(min_length=1)]
Places = Place | Annotated[list[Place], Field(min_length=1)]


def each_once(files: Iterable[SourceFile]) -> list[SourceFile]:
    """Return ``files`` without those that come again, also under another name. A notice reports how many did."""
    kept: dict[object, SourceFile] = {}
    again = []
    for file in files:
        if kept.setdefault(_identity(file.path), file) is not file:
            again.append(file.path)
    if again:
        notice_once(
            f"dataset.nameOrPath: {len(again)} files are named more than once, such as {again[0]}; each is read once"
        )
    return list(kept.values())


def _identity(path: str) -> object:
    """Return what two names of the same file share."""
    if is_url(path):
        return path
    with reading(path):
        found = os.stat(path)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) if found.st_ino else path
