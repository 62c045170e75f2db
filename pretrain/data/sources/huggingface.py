"""Datasets from the Hub or from local folders, loaded with ``datasets``. Its arrow files are read directly from its cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pretrain.data.cache import cache_dir, used_now
from pretrain.data.reading.units import SourceFile
from pretrain.data.sources.base import FileSource
from pretrain.data.sources.datasets_internals import fingerprint
from pretrain.data.sources.named import Places, each_once
from pretrain.data.sources.own_files import check_builder, check_cards, check_data_files, download_manager
from pretrain.data.sources.streamed import streamed_files
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.places import each, joined

LOCAL_WAYS = (
    "text on this machine needs no network: dataset=local dataset.nameOrPath=<file, folder or save_to_disk folder>"
)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(FileSource):
    """A dataset that ``datasets.load_dataset`` can load.

    Attributes:
        nameOrPath: A dataset on the Hub, or a local folder without a script; or a list of them.
        subset: Configuration name of the dataset.
        split: Split, or a slice such as train[:10%].
        revision: Branch, tag or commit.
        streaming: true: read the dataset's files in place, without a copy in the cache of datasets; for a dataset that is
            larger than the disk.
    """

    source: Literal["huggingface"] = "huggingface"
    nameOrPath: Places
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    def default_name(self) -> str:
        return joined([place.rstrip("/").rpartition("/")[2] for place in each(self.nameOrPath)])

    def described(self) -> str:
        return self._described(", ".join(each(self.nameOrPath)))

    def identity(self) -> list[Any]:
        places = self.nameOrPath if isinstance(self.nameOrPath, str) else [*self.nameOrPath]
        streamed = ["streaming"] if self.streaming else []
        return ["huggingface", places, self.subset, self.split, self.revision, *streamed]

    def files(self) -> list[SourceFile]:
        if isinstance(self.nameOrPath, str):
            return self._files_of(self.nameOrPath)
        return each_once(file for place in self.nameOrPath for file in self._files_of(place))

    def _described(self, place: str) -> str:
        return f"dataset.nameOrPath={place}, split {self.split}"

    def _files_of(self, place: str) -> list[SourceFile]:
        """Return the files of one dataset: its own, or the arrow files in the cache of ``datasets``."""
        if self.streaming:
            with self._errors(place):
                return streamed_files(self._builder(place), self.split, self._described(place))
        with self._errors(place):
            builder = self._builder(place)
            builder.download_and_prepare(dl_manager=download_manager(builder))
            dataset = builder.as_dataset(split=self.split)
        found = [entry["filename"] for entry in dataset.cache_files]
        if not found or any(mark in self.split for mark in "[+"):  # a slice exists in memory only, so write it to disk
            from datasets import load_from_disk

            folder = cache_dir() / "huggingface" / fingerprint(dataset)
            if not (folder / "state.json").exists():  # written last
                dataset.save_to_disk(folder)
            used_now(folder)
            found = [entry["filename"] for entry in load_from_disk(folder).cache_files]
        return [SourceFile(name, "arrow") for name in found]

    @contextmanager
    def _errors(self, place: str) -> Iterator[None]:
        """Convert every error of ``datasets`` into a ``UserError``, because all of its input here comes from the user."""
        import datasets

        try:
            yield
        except UserError:
            raise
        except (
            ConnectionError,
            OSError,
        ) as error:  # DatasetNotFoundError is an OSError, offline mode a ConnectionError
            raise UserError(f"dataset.nameOrPath={place}: {_reason(error)}; {LOCAL_WAYS}") from error
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError(f"{self._described(place)}: {_reason(error.__cause__ or error)}") from error
        except Exception as error:  # unknown subset or split, a script, a broken file
            raise UserError(f"{self._described(place)}: {_reason(error)}") from error

    def _builder(self, place: str) -> Any:
        """Return the builder of a dataset. Raises ``UserError`` when it would read other files than its own, or run code."""
        import datasets

        folder = Path(place) if os.path.isdir(place) else None
        if folder and any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json")):
            raise UserError(
                f"{self._described(place)}: a folder saved by datasets.save_to_disk is read with dataset=local"
            )
        if folder:
            check_cards(folder)
        # A folder named "json" must not be taken for the builder of that name.
        path = os.path.join(os.curdir, place) if folder and os.sep not in place else place
        builder = datasets.load_dataset_builder(path, self.subset, revision=self.revision)
        check_data_files(builder.config.data_files, folder, repository(place))
        check_builder(type(builder).__module__.rpartition(".")[2], self._described(place))
        return builder


def repository(place: str) -> str:
    """Return the prefix that ``datasets`` gives to the addresses of a Hub dataset's files."""
    name = place.removeprefix("hf://")
    return name if name.startswith(("buckets/", "datasets/")) else f"datasets/{name}"


def _reason(error: BaseException) -> str:
    return one_line(error).rstrip(".")
