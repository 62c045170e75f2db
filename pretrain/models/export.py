"""The final model as a Hugging Face folder: config, safetensors, generation config and tokenizer, for ``from_pretrained``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.tensors import Piece, write

if TYPE_CHECKING:
    from pretrain.models.language_model import LanguageModel
    from pretrain.world import World


def own_share(
    weights: Iterable[tuple[str, Tensor]], *, dtype: str | None, world: World, sharded: bool
) -> dict[str, Tensor]:
    """The weights that this rank will write, whole, on the host, in ``dtype`` (``None``: their own).

    ``sharded``: every rank takes its part of the names, so that none ever holds the model; else rank 0 takes all.
    """
    target: torch.dtype | None = getattr(torch, dtype) if dtype else None
    own = {}
    for number, (name, tensor) in enumerate(weights):
        if world.rank == (number % world.size if sharded else 0):
            own[name] = tensor.to("cpu", target if tensor.is_floating_point() else None)
    return own


def save(
    model: LanguageModel, own: dict[str, Tensor], tokenizer: Any, folder: Path, *, world: World, sharded: bool
) -> None:
    """Write this rank's part of the folder; see ``own_share``."""
    hf, trained_in = model.hf, model.hf.config.dtype
    if sharded:
        write(folder / _shard(world.rank, world.size), {n: Piece(t, 0, tuple(t.shape)) for n, t in own.items()})
        hf.config.architectures = [type(hf).__name__.removeprefix("FSDP")]
    elif world.is_main:
        hf.save_pretrained(str(folder), state_dict=dict(own))  # it empties what it is given
    if world.is_main:
        _adopt_special_tokens(hf, tokenizer)
        hf.config.use_cache = True  # off only for training
        hf.config.dtype = next(iter(own.values())).dtype
        hf.config.save_pretrained(str(folder))
        hf.generation_config.save_pretrained(str(folder))
        hf.config.use_cache, hf.config.dtype = False, trained_in
        tokenizer.save_pretrained(str(folder))


def own_files(folder: Path, *, world: World, sharded: bool) -> list[Path]:
    """What this rank has written into ``folder``: of the main rank all but the others' shards."""
    others = {_shard(rank, world.size) for rank in range(1, world.size)} if sharded else set()
    if world.is_main:
        return [f for f in folder.rglob("*") if f.is_file() and f.name not in others]
    return [f for f in (folder / _shard(world.rank, world.size),) if f.exists()]


def save_index(names: list[dict[str, int]], folder: Path) -> None:
    """Tell ``from_pretrained`` which file of a sharded folder has which weight. ``names``: name → bytes, by rank."""
    size = sum(sum(part.values()) for part in names)
    files = {name: _shard(rank, len(names)) for rank, part in enumerate(names) for name in part}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shard(rank: int, size: int) -> str:
    return f"model-{rank + 1:05d}-of-{size:05d}.safetensors"


def _adopt_special_tokens(hf: Any, tokenizer: Any) -> None:
    """Let the model's configs name the tokens that documents really ended with (a config from nothing names others)."""
    ends = hf.config.eos_token_id
    if tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends]):
        return
    for config in (hf.config, hf.generation_config):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, key, getattr(tokenizer, key))
