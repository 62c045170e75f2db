"""Checks of a model's folder without loading the model: whether it exists, is complete, and fits the run.

Only JSON and safetensors headers are read. Pickled weights are refused, because reading a pickle can run code.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import xxhash

from pretrain.runtime.errors import UserError, one_line
from pretrain.runtime.filesystem import expanded
from pretrain.runtime.folders import is_below, marked_files

SAMPLE = Path(__file__).parents[1] / "sample"
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
LAYER_KEYS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
# More layers than any model has. Building so many takes minutes, and only then would it turn out that they have no weights.
MANY_LAYERS = 10_000
PIECES = "model.rank-*.safetensors"  # the files of a checkpoint that several processes have written
BITS = {  # bits per value, by the dtype's name in a safetensors header
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def model_folder(
    name: str, *, revision: str | None = None, key: str = "model_name", code: bool = False, weights: bool = True
) -> Path:
    """Return the folder of model ``name``: the shipped ``sample``, a local folder, or the snapshot of a Hub repository, which is
    downloaded.

    With ``code=True`` Python files are downloaded too, with ``weights=False`` no weights.

    Raises ``UserError``, which names the alternatives, when there is no
    such model.
    """
    if name == "sample":
        return SAMPLE
    path = expanded(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{key}={name}: a file; a model is a folder with config.json and *.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}={name}: no such folder")
    wanted = [pattern for pattern in WANTED if weights or pattern != "*.safetensors"]
    return _download(name, revision, key, [*wanted, "*.py"] if code else wanted)


def _download(name: str, revision: str | None, key: str, wanted: list[str]) -> Path:
    import httpx
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except errors.HFValidationError as error:
        raise UserError(f"{key}={name}: neither a folder nor a Hub id: {one_line(error)}") from None
    except errors.GatedRepoError:
        raise UserError(f"{key}={name}: accept its terms on the Hub, then run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision={revision}: {name} has no such branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{key}={name}: no such folder here and no such model on the Hub (or it is private)") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(
            f"{key}={name}: no such folder here, not in the Hugging Face cache, and the Hub can't be reached "
            f"({type(error).__name__}); without a network use model_name=sample, a local folder, or HF_HOME=<a cache>"
        ) from None


def read_object(file: Path, *, label: str) -> dict[str, Any] | None:
    """Return the JSON object in a file of a model's folder; ``None`` if the file does not exist. Raises ``UserError``, in which
    the file is called ``label``, when it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{label} can't be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{label}: not a JSON object, but {type(content).__name__}")
    return content


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return config.json of a model folder. Raises ``UserError`` when it is missing or invalid."""
    file = folder / "config.json"
    config = read_object(file, label=f"model_name={name}: {file}")
    if config is None:
        raise UserError(f"model_name={name}: {folder} has no config.json; a model is a folder saved by save_pretrained")
    if "model_type" not in config:
        raise UserError(f"model_name={name}: {file} names no model_type")
    if not isinstance(config["model_type"], str):
        raise UserError(f"model_name={name}: {file}: model_type is {str(config['model_type'])[:80]!r}, not a name")
    return config


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return the text part of a multimodal model's config; any other config is returned unchanged."""
    text = config.get("text_config")
    return text if text and isinstance(text, dict) else config


def check_positions(config: dict[str, Any], sequence_length: int, name: str) -> None:
    """Raise ``UserError`` when the sequence is longer than the model's positions."""
    for key in POSITION_KEYS:
        limit = text_part(config).get(key)
        if isinstance(limit, int) and 0 < limit < sequence_length:
            factor = -(-sequence_length // limit)
            longer = f", or extend them: 'model.overrides={{rope_scaling: {{rope_type: yarn, factor: {factor}.0}}}}'"
            is_rotary = any(rope in text_part(config) for rope in ("rope_theta", "rope_scaling", "rope_parameters"))
            raise UserError(
                f"sequence_length={sequence_length}: {name} has {limit} positions ({key}); use at most that"
                + (longer if is_rotary else "")
            )


def check_vocabulary(config: dict[str, Any], tokens: int, name: str) -> None:
    """Raise ``UserError`` when a tokenizer with ``tokens`` ids needs more rows than the embedding has."""
    rows = text_part(config).get("vocab_size")
    if isinstance(rows, int) and tokens > rows:
        raise UserError(
            f"model_name={name}: the tokenizer has {tokens} token ids, the embedding {rows} rows, so they do not belong to "
            "one model; set model.tokenizer_name to the model's own, or resize the embedding once (transformers: "
            f"model.resize_token_embeddings({tokens}), then save_pretrained)"
        )


def vocabulary_size(folder: Path) -> int:
    """Return the largest token id of tokenizer.json + 1; 0 without that file. Raises ``UserError`` when it is invalid."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return 0
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        added = [token["id"] for token in tokenizer.get("added_tokens") or []]
        return 1 + max(ids + added, default=-1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not a valid tokenizer: {type(error).__name__}: {str(error)[:200]}") from None


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files. Raises ``UserError`` when there are none, pickled ones only, or when one of several is
    missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    shards = marked_files(folder, "model*.safetensors")  # the files of a checkpoint
    if (folder / "adapter_config.json").exists():  # with peft, transformers would load its base model
        raise UserError(
            f"model_name={name}: {folder} is an adapter (adapter_config.json); merge it into its model first (peft: "
            "merge_and_unload, then save_pretrained)"
        )
    if not shards and single.exists():
        return [single]
    if not shards and index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [shard for shard in shards if not is_below(shard)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"model_name={name}: {index} is invalid: {type(error).__name__}: {error}") from None
        if outside:
            raise UserError(f"model_name={name}: {index} names {outside[0]!r}, which is outside the folder")
    gone = [shard for shard in shards if not os.path.isfile(folder / shard)]  # also of a name that no file can have
    if gone:
        raise UserError(
            f"model_name={name}: {len(gone)} of {len(shards)} weight files are missing, e.g. {gone[0][:200]}"
        )
    if shards:
        return [folder / shard for shard in shards]
    pieces = sorted(folder.glob(PIECES))
    if pieces:
        return pieces
    for pickled in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")):
        raise UserError(
            f"model_name={name}: {pickled} is pickled; reading a pickle can run any code, so only safetensors are read. "
            "Convert it if you trust it (from_pretrained, then save_pretrained), or use a revision that has them"
        )
    raise UserError(f"model_name={name}: {folder} has no weights (model.safetensors); model=scratch needs none")


def check_weights(folder: Path, name: str) -> None:
    """Raise ``UserError`` when weight files are missing or incomplete. Only headers are read."""
    for file in weight_files(folder, name):
        try:
            reason = invalid_reason(file)
        except OSError as error:  # the path is a folder, or the file may not be read
            raise UserError(f"model_name={name}: {file} can't be read: {error.strerror}") from None
        if reason:
            raise UserError(
                f"model_name={name}: {file} is not a complete safetensors file: {reason}; "
                "download or save the model again"
            )


def check_layers(config: dict[str, Any], folder: Path, name: str) -> None:
    """Raise ``UserError`` when the config has more layers or experts than all weight files together have tensors."""
    for key in LAYER_KEYS:
        layers = text_part(config).get(key)
        if isinstance(layers, int) and layers > MANY_LAYERS:
            tensors = sum(_tensor_count(file) for file in weight_files(folder, name))
            if layers > tensors:
                raise UserError(
                    f"model_name={name}: config.json has {key}={str(layers)[:20]}, its files hold {tensors} tensors in all"
                )


def _tensor_count(file: Path) -> int:
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return len(header.keys() - {"__metadata__"})


def invalid_reason(file: Path) -> str | None:
    """Return why a safetensors file is incomplete or invalid, or ``None``. Layout: https://huggingface.co/docs/safetensors"""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if 8 + length > size:
            return f"{size} bytes, its header does not fit"
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            places = sorted(_place(name, entry) for name, entry in header.items())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"its header is not safetensors ({type(error).__name__}: {str(error)[:100]})"
    end = 0
    for start, stop, name in places:
        if start != end:
            return f"{name[:80]} begins at byte {start} by its header, {end} expected"
        end = stop
    want = 8 + length + end
    return None if size == want else f"{size} bytes, {want} expected by its header"


def _place(name: str, entry: dict[str, Any]) -> tuple[int, int, str]:
    """Return first byte, last byte + 1 and name of a tensor. Raises ``ValueError`` when they contradict its shape and dtype."""
    start, stop = entry["data_offsets"]
    shape, bits = entry["shape"], BITS[entry["dtype"]]
    if not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
        raise ValueError(f"{name[:80]}: sizes that are not valid numbers")
    if (stop - start) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{name[:80]}: {stop - start} bytes for {entry['dtype']} of {shape}")
    return start, stop, name


def fingerprint(paths: list[Path]) -> str:
    """Return a hash of the name, size, first MiB and last MiB of each file. It distinguishes models without reading all bytes."""
    digest = xxhash.xxh3_64()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()
