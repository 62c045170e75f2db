"""Folders that ``datasets.save_to_disk`` has written, on this machine or elsewhere.

https://huggingface.co/docs/datasets/process#save
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.folders import is_below
from pretrain.runtime.strict_json import parse_json

MARKS = ("state.json", "dataset_dict.json")
NOT_SAVED = "not a folder saved by datasets.save_to_disk (dataset.format=hf)"
Load = Callable[[str], bytes]  # path or URL of a file → its content; raises OSError and UserError


def saved_files(folder: str, *, several: bool, load: Load) -> list[str]:
    """Return the arrow files of a saved dataset, or with ``several`` splits of its ``train`` split."""
    if several:
        splits = _field(f"{folder}/dataset_dict.json", "splits", load)
        if not splits or not all(isinstance(name, str) for name in splits):
            raise UserError(f"{folder}/dataset_dict.json: 'splits' is not a list of names")
        if "train" not in splits and len(splits) != 1:
            raise UserError(
                f"{folder}: splits {', '.join(splits)}, none of them 'train'; name the folder of one of them"
            )
        folder = _inside(folder, "train" if "train" in splits else splits[0])
    names = [
        isinstance(entry, dict) and entry.get("filename")
        for entry in _field(f"{folder}/state.json", "_data_files", load)
    ]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder}/state.json: '_data_files' names no files")
    return [_inside(folder, str(name)) for name in names]


def _field(path: str, key: str, load: Load) -> list[Any]:
    """Return the list ``key`` of a JSON file that ``datasets`` wrote. Raises ``UserError`` if it has none."""
    try:
        found = parse_json(load(path))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); save the dataset again") from error
    if not isinstance(found, dict) or not isinstance(found.get(key), list):
        raise UserError(f"{path}: no list {key!r} in it; save the dataset again")
    return list(found[key])


def _inside(folder: str, name: str) -> str:
    """Return ``folder/name``. Raises ``UserError`` if that is outside of the folder."""
    if not is_below(name):
        raise UserError(f"{folder}: its JSON names {name!r}, which is outside the folder")
    return f"{folder}/{name}"
