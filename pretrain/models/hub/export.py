"""Export of the model as a Hugging Face folder: safetensors of a bounded size, config, generation config, tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.distributed.sharding import TensorShard, write
from pretrain.models.dtypes import dtypes_in

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext

INDEX = "model.safetensors.index.json"  # says which weight is in which file
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}  # as transformers reads them
Sizes = dict[str, int]  # weight → bytes


def weights_to_write(
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtypes: Mapping[str, torch.dtype],
    world: DistributedContext,
    sharded: bool,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the full weights that this rank will write, in host memory, each cast to its dtype in ``dtypes`` (a weight that
    is not listed keeps its own).

    With ``sharded=True`` the names are distributed over the ranks, so that no rank holds all weights; otherwise rank 0 takes all.
    ``convert`` is called on rank 0 with a copy of all weights, before the cast, and returns those to write. It needs
    ``sharded=False``; its ``UserError`` is raised on every rank.
    """
    assert not (sharded and convert)

    def cast(name: str, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", dtypes.get(name) if tensor.is_floating_point() else None)

    own: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(weights):
        if world.rank == (number % world.size if sharded else 0):
            own[name] = cast(name, tensor) if convert is None else tensor.to("cpu", copy=True)
    if convert is None:
        return own
    converted: dict[str, Tensor] = {}
    world.on_main_rank(lambda: converted.update(convert(own)))
    own.clear()
    return {name: cast(name, converted.pop(name)).contiguous() for name in [*converted]}


def dtypes_for(hf: Any, save_dtype: str | None) -> dict[str, torch.dtype]:
    """Return the dtype in which each weight of ``hf`` is saved under ``model.save_dtype``. Weights that transformers keeps in
    fp32 stay in fp32. Without ``save_dtype`` the dict is empty: each weight keeps its dtype."""
    return dtypes_in(hf, getattr(torch, save_dtype)) if save_dtype else {}


def dtype_of(weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the dtype that most floating-point values have; ``None`` when there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        sizes[tensor.dtype] += tensor.numel() if tensor.is_floating_point() else 0
    found = sizes.most_common(1)
    return found[0][0] if found and found[0][1] else None


def save_full(hf: Any, own: dict[str, Tensor], folder: Path, *, shard_size: str) -> list[Path]:
    """Write all weights with transformers' ``save_pretrained``, which converts them back into the layout that their architecture
    has on the Hub. ``own`` is emptied: the weights of a file are released when it is written. Return the files."""
    trained_in = hf.config.dtype
    hf.save_pretrained(str(folder), state_dict=own, max_shard_size=shard_size)
    hf.config.dtype = trained_in
    return [file for file in folder.iterdir() if file.is_file()]


def split(own: Mapping[str, Tensor], shard_size: str) -> list[Sizes]:
    """Assign the weights of ``own``, in order, to files of at most ``shard_size``. A larger weight gets a file of its own."""
    limit = int(shard_size[:-2]) * UNITS[shard_size[-2:]]
    files: list[Sizes] = []
    for name, tensor in own.items():
        size = tensor.numel() * tensor.element_size()
        if not files or sum(files[-1].values()) + size > limit:
            files.append({})
        files[-1][name] = size
    return files


def save_shards(own: dict[str, Tensor], folder: Path, *, plan: list[list[Sizes]], rank: int) -> list[Path]:
    """Write this rank's files, and on rank 0 the index from which ``from_pretrained`` reads which file has which weight.

    ``plan`` is the result of ``split`` on each rank. Return the files.
    """
    shards = [shard for files in plan for shard in files]
    names = shard_names(len(shards))
    before = sum(len(files) for files in plan[:rank])
    written = []
    for name, shard in zip(names[before:], plan[rank], strict=False):
        write(folder / name, {n: TensorShard(own[n], 0, tuple(own[n].shape)) for n in shard})
        written.append(folder / name)
    if rank == 0:
        written.append(folder / INDEX)
        written[-1].write_bytes(index_of(shards))
    return written


def shard_names(count: int) -> list[str]:
    """Return the names of ``count`` weight files, as transformers numbers them."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(shards: Sequence[Sizes]) -> bytes:
    """Return the content of the index of several weight files."""
    weight_map = {
        weight: name for name, sizes in zip(shard_names(len(shards)), shards, strict=True) for weight in sizes
    }
    total = sum(sum(sizes.values()) for sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2) + "\n").encode()


def companion_files(
    hf: Any, tokenizer: Any, *, dtype: torch.dtype | None, separator: int | None = None
) -> dict[str, bytes]:
    """Return the files that a model folder needs in addition to the weights, by name: both configs, the tokenizer, and the code
    of a model that has its own.

    ``dtype`` is the dtype of the weights; ``None`` leaves it to the program that loads them. ``separator`` is the token that
    ended the training documents; ``None`` stands for the tokenizer's eos_token.
    """
    from transformers.dynamic_module_utils import custom_object_save

    config, generation = deepcopy(hf.config), deepcopy(hf.generation_config)
    _adopt_special_tokens(config, generation, tokenizer, separator)
    config.use_cache = True  # it is off only during training
    config.dtype = dtype
    config.architectures = [type(hf).__name__.removeprefix("FSDP")]
    with TemporaryDirectory() as name:
        folder = Path(name)
        if hf.is_remote_code():
            custom_object_save(hf, name, config=config)
        config.save_pretrained(name)
        generation.to_json_file(folder / "generation_config.json")
        tokenizer.save_pretrained(name)
        return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def _adopt_special_tokens(config: Any, generation: Any, tokenizer: Any, separator: int | None) -> None:
    """Set the special tokens of both configs to those of the training documents. A default config names other tokens and is
    overwritten; the tokens of a trained model stay. Generation also ends at ``separator``."""
    end = separator if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end not in (*end_ids(config), *end_ids(generation)):
        for each in (config, generation):
            each.bos_token_id, each.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id
            each.eos_token_id = end
    if separator is not None and separator not in end_ids(generation):
        generation.eos_token_id = [*end_ids(generation), separator]


def end_ids(config: Any) -> list[int]:
    """Return the eos_token_ids of a config, which may name one, several or none."""
    named = getattr(config, "eos_token_id", None)
    return named if isinstance(named, list) else [] if named is None else [named]
