"""Merge models tensor by tensor into a Hugging Face folder.

Of every model at most one tensor is in memory, and of the result one: the weight files are written as a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from pretrain.checkpoint.atomic import write_folder
from pretrain.distributed.context import DistributedContext
from pretrain.merging import methods
from pretrain.merging.config import NEEDS_BASE, MergeConfig
from pretrain.merging.decay_weights import decay_weights
from pretrain.merging.inputs import Input, check_alike, open_checkpoints, open_input
from pretrain.merging.stream import write_stream
from pretrain.models.hub import export
from pretrain.models.hub.model_card import merge_card
from pretrain.runtime.console import progress_bar
from pretrain.runtime.errors import UserError
from pretrain.runtime.files import write_files

if TYPE_CHECKING:
    from pretrain.models.causal_lm import Pretrained


@dataclass(frozen=True)
class Merge:
    """A merge that can be carried out.

    Attributes:
        config: The method and its numbers.
        inputs: The models, each with its weight.
        weights: The weight of each model.
        base: The base model of the methods that have one.
        names: The tensors of the result.
    """

    config: MergeConfig
    inputs: list[Input]
    weights: list[float]
    base: Input | None
    names: list[str]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the first model's tensor."""
        dtype: torch.dtype = getattr(torch, self.inputs[0].files.dtype(name))
        return dtype

    def tensor(self, name: str) -> Tensor:
        """Return one tensor of the result, in fp32 or wider. Raises ``UserError`` for integers that are not equal everywhere."""
        reads: list[methods.Read] = [partial(one.files.read, name) for one in self.inputs]
        if self.dtype(name).is_floating_point:
            return self._merged(reads, name)
        first = reads[0]()
        if any(not torch.equal(first, read()) for read in reads[1:]):
            raise UserError(f"merge.models: the integers of {name} differ; only floating-point numbers are merged")
        return first

    def _merged(self, reads: list[methods.Read], name: str) -> Tensor:
        config = self.config
        if config.method == "slerp":
            return methods.slerp(reads, self.weights)
        if self.base is None:
            return methods.linear(reads, self.weights)
        base = partial(self.base.files.read, name)
        if config.method == "ties":
            return methods.ties(reads, self.weights, base=base, scale=config.scale, density=config.density)
        return methods.task_arithmetic(reads, self.weights, base=base, scale=config.scale)


def open_merge(config: MergeConfig, spec: Pretrained) -> Merge:
    """Open the models of ``config`` and check that they can be merged. ``spec`` has the other settings of a model."""
    config.check()
    if config.method == "wsm":
        inputs = open_checkpoints(config.models, spec, last=config.last)
        weights = decay_weights([one.step or 0 for one in inputs], config.decay)
    else:
        inputs, weights = [open_input("merge.models", name, spec) for name in config.models], config.shares
    base = open_input("merge.base", config.base, spec) if config.method in NEEDS_BASE and config.base else None
    every = [*inputs, *([base] if base else [])]
    check_alike(every)
    return Merge(config, inputs, weights, base, inputs[0].names)


def write_merged(merge: Merge, path: Path, *, shard_size: str, save_dtype: str | None) -> Path:
    """Write the result as the Hugging Face folder ``path``, completely or not at all; return ``path``.

    Args:
        shard_size: Largest weight file, such as ``5GB``.
        save_dtype: Dtype of the weights; ``None``: each has the dtype of the first model's.
    """
    first = merge.inputs[0]
    hf, tokenizer = first.outline.hf, first.spec.tokenizer(None)
    outline = _outline(merge, export.dtypes_for(hf, save_dtype))
    shards = export.split(outline, shard_size)
    names = export.shard_names(len(shards)) if len(shards) > 1 else ["model.safetensors"]
    small = export.companion_files(hf, tokenizer, dtype=export.dtype_of(outline)) | {"README.md": _card(merge)}
    if len(shards) > 1:
        small |= {export.INDEX: export.index_of(shards)}

    def fill(fresh: Path) -> list[Path]:
        with progress_bar("merging", total=len(outline)) as advance:
            for name, shard in zip(names, shards, strict=True):
                write_stream(fresh / name, {n: outline[n] for n in shard}, merge.tensor, alive=lambda: advance(1))
        return [fresh / name for name in names] + write_files(small, fresh)

    write_folder(path, fill, world=DistributedContext(), hint=lambda: "the models are unchanged", marker=False)
    return path


def _outline(merge: Merge, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return the tensors of the result without values."""
    files, found = merge.inputs[0].files, {}
    for name in merge.names:
        dtype = merge.dtype(name)
        dtype = dtypes.get(name, dtype) if dtype.is_floating_point else dtype
        found[name] = torch.empty(files.shape(name), dtype=dtype, device="meta")
    return found


def _card(merge: Merge) -> bytes:
    """Return the model card, which says from what the model was merged, and how."""
    models = [(one.name, weight) for one, weight in zip(merge.inputs, merge.weights, strict=True)]
    base = merge.base.name if merge.base else None
    return merge_card(models, method=merge.config.method, base=base, settings=merge.config.numbers).encode()


def mergekit_config(merge: Merge, *, save_dtype: str | None) -> str:
    """Return the YAML with which mergekit makes the same merge.

    Source: https://github.com/arcee-ai/mergekit, docs/merge_methods.md. mergekit reads a checkpoint of several processes only
    after task=export has written it as a model folder.
    """
    config, dtype = merge.config, save_dtype or str(merge.dtype(merge.names[0])).removeprefix("torch.")
    shared: dict[str, Any] = {"dtype": dtype, "tokenizer_source": "base" if merge.base else str(merge.inputs[0].folder)}
    folders = [str(one.folder) for one in merge.inputs]
    text: dict[str, Any]
    if config.method == "slerp":
        text = {"models": [{"model": folder} for folder in folders], "merge_method": "slerp", "base_model": folders[0]}
        text["parameters"] = {"t": merge.weights[1]}
        return yaml.safe_dump(text | shared, sort_keys=False)
    own = {"density": config.density} if config.method == "ties" else {}
    weighted = zip(folders, merge.weights, strict=True)
    text = {"models": [{"model": folder, "parameters": {"weight": weight, **own}} for folder, weight in weighted]}
    if merge.base is None:
        text |= {"merge_method": "linear", "parameters": {"normalize": False}}
    else:
        numbers = {"normalize": config.method == "ties", "lambda": config.scale}
        text |= {"merge_method": config.method, "base_model": str(merge.base.folder), "parameters": numbers}
    return yaml.safe_dump(text | shared, sort_keys=False)
