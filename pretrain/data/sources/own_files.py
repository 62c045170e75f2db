"""Checks that ``datasets`` reads only files of the dataset's own folder or Hub repository, and no archives. Without them, a
README.md or a link in the folder could name any path or URL as the data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.data.sources.datasets_internals import downloads_folder
from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.folders import is_below, is_inside

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".rar", ".7z")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".lz4")
CARDS = ("README.md", ".huggingface.yaml")
# Other builders unpickle (pandas), or open files that a file names (hdf5).
BUILDERS = ("arrow", "csv", "json", "parquet", "text", "xml")
NOT_UNPACKED = "archives are not unpacked; unpack it and name the folder with dataset=local"


def check_cards(folder: Path) -> None:
    """Raise ``UserError`` when a dataset card names paths or URLs outside of ``folder``, before ``datasets`` resolves them.

    https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    for card in (folder / name for name in CARDS):
        if card.is_file():
            for name in _named_in(_card(card)):
                if "://" in name or "::" in name or name.startswith("~") or not is_below(name):
                    raise UserError(f"{card}: it names data outside its folder ({name!r}), which is not read")


def check_builder(name: str, described: str) -> None:
    """Raise ``UserError`` for a builder of ``datasets`` that does more than read text from its data files."""
    if name not in BUILDERS:
        raise UserError(f"{described}: datasets of type {name!r} are not supported, only {', '.join(BUILDERS)}")


def check_data_files(found: Any, folder: Path | None, repository: str) -> None:
    """Raise ``UserError`` when one of the data files that ``datasets`` has found (split → paths) is an archive or is outside of
    ``folder``, or, for a Hub dataset (``folder`` is ``None``), outside of ``repository``."""
    for name in (str(path) for paths in (found or {}).values() for path in paths):
        if _ending(name) in ARCHIVES:
            raise UserError(f"{name}: {NOT_UNPACKED}")
        inside = (
            is_inside(Path(name), folder) if folder else name.startswith((f"hf://{repository}@", f"hf://{repository}/"))
        )
        if not inside:
            raise UserError(
                f"dataset.nameOrPath={folder or repository}: its data is outside of it ({name}) and is not read"
            )


def download_manager(builder: Any) -> Any:
    """Return the ``DownloadManager`` that ``builder`` would create itself, except that it never opens an archive, regardless of
    the file's name."""
    from datasets import DownloadConfig, DownloadManager
    from datasets.utils.extract import Extractor
    from datasets.utils.py_utils import NestedDataStructure

    class SingleFiles(DownloadManager):
        """A download manager that decompresses single files and refuses archives."""

        def extract(self, path_or_paths: Any) -> Any:
            for path in NestedDataStructure(path_or_paths).flatten():
                if Extractor.infer_extractor_format(path) in ("tar", "zip", "rar", "7z"):
                    raise UserError(f"{path}: {NOT_UNPACKED}")
            return super().extract(path_or_paths)

        def iter_archive(self, path_or_buf: Any) -> Any:
            raise UserError(f"{path_or_buf}: {NOT_UNPACKED}")

    options = DownloadConfig(cache_dir=downloads_folder(builder), use_etag=False, token=builder.token)
    return SingleFiles(
        dataset_name=builder.dataset_name,
        data_dir=builder.config.data_dir,
        download_config=options,
        base_path=builder.base_path,
        record_checksums=False,
    )


def _card(path: Path) -> Any:
    """Return the YAML metadata of a dataset card. Raises ``UserError`` if it can't be read."""
    import yaml
    from huggingface_hub import DatasetCard

    try:
        if path.suffix == ".yaml":
            return yaml.safe_load(path.read_text(encoding="utf-8"))
        return DatasetCard.load(path).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: its YAML cannot be read ({one_line(error)})") from error


def _named_in(card: Any) -> Iterator[str]:
    """Yield every data path that a configuration of the card names."""
    configs = card.get("configs") if isinstance(card, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            yield from _strings([config.get("data_files"), config.get("data_dir")], set())


def _strings(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield all strings in nested lists and mappings. Each container is visited once, because YAML aliases can be recursive."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item, seen)


def _ending(name: str) -> str:
    """Return the file extension; that of the archive for a compressed archive (``.tar.gz`` → ``.tar``)."""
    stem, ending = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if ending in COMPRESSIONS and os.path.splitext(stem)[1] in ARCHIVES else ending
