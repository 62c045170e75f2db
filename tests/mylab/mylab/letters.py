"""A dataset of files that are named in a way of our own."""

from dataclasses import dataclass
from pathlib import Path

from pretrain.data.reading.units import SourceFile
from pretrain.data.sources.base import FileSource


@dataclass(frozen=True, kw_only=True)
class Letters(FileSource):
    folder: str

    def default_name(self):
        return "letters"

    def described(self):
        return f"dataset.folder={self.folder}"

    def identity(self):
        return ["letters", self.folder]

    def files(self):
        return [SourceFile(str(path), "text") for path in sorted(Path(self.folder).glob("letter-*"))]
