"""Datasets from the Hub or from local folders, loaded with ``datasets``. Its arrow files are read directly from its cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pretrain.data.cache import cache_dir
from pretrain.data.reading.units import SourceFile
from pretrain.data.sources.base import FileSource
from pretrain.data.sources.datasets_internals import fingerprint
from pretrain.data.sources.own_files import check_builder, check_cards, check_data_files, download_manager
from pretrain.runtime.errors import UserError, one_line

LOCAL_WAYS = (
    "text on this machine needs no network: dataset=local dataset.nameOrPath=<file, folder or save_to_disk folder>"
)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(FileSource):
    """A dataset that ``datasets.load_dataset`` can load.

    Attributes:
        nameOrPath: A dataset on the Hub, or a local folder without a script.
        subset: Configuration name of the dataset.
        split: Split, or a slice such as train[:10%].
        revision: Branch, tag or commit.
    """

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
        if not found or any(mark in self.split for mark in "[+"):  # a slice exists in memory only, so write it to disk
            from datasets import load_from_disk

            folder = cache_dir() / "huggingface" / fingerprint(dataset)
            if not (folder / "state.json").exists():  # written last
                dataset.save_to_disk(folder)
            found = [entry["filename"] for entry in load_from_disk(folder).cache_files]
        return [SourceFile(name, "arrow") for name in found]

    def _load(self) -> Any:
        """Run the three steps of ``datasets.load_dataset``, with checks between them of what would be read.

        Every error of ``datasets`` becomes a ``UserError``, because all of its input here comes from the user.
        """
        import datasets

        try:
            return self._checked_load()
        except UserError:
            raise
        except (
            ConnectionError,
            OSError,
        ) as error:  # DatasetNotFoundError is an OSError, offline mode a ConnectionError
            raise UserError(f"dataset.nameOrPath={self.nameOrPath}: {_reason(error)}; {LOCAL_WAYS}") from error
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError(f"{self.described()}: {_reason(error.__cause__ or error)}") from error
        except Exception as error:  # unknown subset or split, a script, a broken file
            raise UserError(f"{self.described()}: {_reason(error)}") from error

    def _checked_load(self) -> Any:
        """Return the dataset. Raises ``UserError`` when it would read other files than its own, or run code."""
        import datasets

        folder = Path(self.nameOrPath) if os.path.isdir(self.nameOrPath) else None
        if folder and any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            raise UserError(f"{self.described()}: a folder saved by datasets.save_to_disk is read with dataset=local")
        if folder:
            check_cards(folder)
        # A folder named "json" must not be taken for the builder of that name.
        path = os.path.join(os.curdir, self.nameOrPath) if folder and os.sep not in self.nameOrPath else self.nameOrPath
        builder = datasets.load_dataset_builder(path, self.subset, revision=self.revision)
        check_data_files(builder.config.data_files, folder, self._repository())
        check_builder(type(builder).__module__.rpartition(".")[2], self.described())
        builder.download_and_prepare(dl_manager=download_manager(builder))
        return builder.as_dataset(split=self.split)

    def _repository(self) -> str:
        """Return the prefix that ``datasets`` gives to the addresses of a Hub dataset's files."""
        name = self.nameOrPath.removeprefix("hf://")
        return name if name.startswith(("buckets/", "datasets/")) else f"datasets/{name}"


def _reason(error: BaseException) -> str:
    return one_line(error).rstrip(".")
