"""Datasets of the Hub, or local folders, through ``datasets.load_dataset``. Its arrow files are read where it put
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.data.cache import cache_dir
from pretrain.data.sources.base import Source
from pretrain.data.units import SourceFile
from pretrain.errors import UserError

LOCAL_WAYS = (
    "text on this machine needs no network: dataset=local dataset.nameOrPath=<file, folder or save_to_disk folder>"
)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Source):
    source: Literal["huggingface"] = "huggingface"
    nameOrPath: Annotated[str, Field(min_length=1)]
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def default_name(self) -> str:
        return self.nameOrPath.rstrip("/").rpartition("/")[2]

    def described(self) -> str:
        return f"dataset.nameOrPath={self.nameOrPath}, split {self.split}"

    def identity(self) -> list[Any]:
        return ["huggingface", self.nameOrPath, self.subset, self.split, self.revision]

    def files(self) -> list[SourceFile]:
        dataset = self._load()
        found = [entry["filename"] for entry in dataset.cache_files]
        if not found or any(mark in self.split for mark in "[+"):  # a slice is only in memory: write it out
            from datasets import load_from_disk

            folder = cache_dir() / "huggingface" / dataset._fingerprint
            if not (folder / "state.json").exists():  # written last
                dataset.save_to_disk(folder)
            found = [entry["filename"] for entry in load_from_disk(folder).cache_files]
        return [SourceFile(name, "arrow") for name in found]

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.nameOrPath, self.subset, split=self.split, revision=self.revision)
        except (
            ConnectionError,
            OSError,
        ) as error:  # DatasetNotFoundError is an OSError, offline mode a ConnectionError
            raise UserError(f"dataset.nameOrPath={self.nameOrPath}: {_first_line(error)}; {LOCAL_WAYS}") from error
        except (
            ValueError,
            RuntimeError,
            datasets.exceptions.DatasetsError,
        ) as error:  # unknown subset or split, a script
            raise UserError(f"{self.described()}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
