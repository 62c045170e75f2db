"""What can be said about a model's folder without loading it: is it there, is it whole, does the run fit it."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from pretrain.errors import UserError

SAMPLE = Path(__file__).parent / "sample"
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def model_folder(name: str, *, revision: str | None = None, key: str = "model_name") -> Path:
    """The folder ``name`` stands for: the shipped ``sample``, a local one, or a Hub repository's, downloaded.

    Raises ``UserError`` when there is none, with the ways there are to have one.
    """
    if name == "sample":
        return SAMPLE
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{key}={name}: a file; a model is a folder with config.json and *.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}={name}: no such folder")
    return _download(name, revision, key)


def _download(name: str, revision: str | None, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    ways = (
        "without a network use model_name=sample, a local folder, or a model that is already in the Hugging Face cache"
    )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(WANTED)))
    except HFValidationError as error:
        raise UserError(f"{key}={name}: neither a folder nor a Hub id: {error}") from None
    except RepositoryNotFoundError:
        raise UserError(f"{key}={name}: no such folder here and no such model on the Hub (or it is private)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{key}={name}: no such folder here, and the Hub can't be reached ({reason}); {ways}") from None


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """config.json of a model folder. Raises ``UserError`` when it is missing or broken."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model_name={name}: {folder} has no config.json; a model is a folder saved by save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"model_name={name}: {file} can't be read: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"model_name={name}: {file} names no model_type")
    return config


def check_positions(config: dict[str, Any], sequence_length: int, name: str) -> None:
    """Raises ``UserError`` when the sequence is longer than the positions the model was made for."""
    text = config.get("text_config", config)
    for key in POSITION_KEYS:
        if isinstance(text.get(key), int) and sequence_length > text[key]:
            raise UserError(
                f"sequence_length={sequence_length}: {name} has {text[key]} positions ({key}); use at most that"
            )


def check_weights(folder: Path, name: str) -> None:
    """Raises ``UserError`` when weights are missing or torn. Reads headers only."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        files = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise UserError(f"model_name={name}: {folder} has no weights (model.safetensors)")
    for file in files:
        reason = torn(file)
        if reason:
            raise UserError(f"model_name={name}: {file} is torn: {reason}; fetch or save the model again")


def torn(file: Path) -> str | None:
    """Why a weights file can't be whole, or ``None``."""
    if not file.exists():
        return "the file is missing"
    if file.suffix == ".bin":
        return None if zipfile.is_zipfile(file) else "not a torch archive"
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size:
            return f"{size} bytes, not even its header fits"
        try:
            header = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its header is not safetensors"
    want = 8 + length + max(ends, default=0)
    return None if size == want else f"{size} bytes, its header says {want}"
