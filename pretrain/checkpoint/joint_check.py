"""The check of a checkpoint by all ranks together, of which each opens only its share of the files.

Whether the shards of a tensor of R rows hold every row exactly once is found without gathering them. Every shard leads from its
first row to the row after its last one, and no shard leads back. So together they are one way from row 0 to row R if and only
if each row is left as often as it is reached, except that 0 is left once and R reached once. Each rank adds a hash of (tensor,
row) for every row that one of its shards leaves, and subtracts it for every row that is reached; the sum over all ranks is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import SafetensorError

from pretrain.checkpoint.config import Verify
from pretrain.checkpoint.marker import damage, read_marker
from pretrain.checkpoint.schema import (
    KINDS,
    check_folder_name,
    check_optimizer_names,
    read_state,
    tensor_files,
    validation_error,
)
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext

UNREADABLE = "rank 0 can read it, another rank can't read its share of the files"
BITS = 40  # of a hash: the sum over 2²³ shards fits into 64 bits


def joint_validation_error(path: Path, *, world: DistributedContext, verify: Verify = "size") -> str | None:
    """Return on every rank why a checkpoint can't be loaded, or ``None``, as `validation_error` does. This is a collective."""
    if world.size == 1:
        return validation_error(path, verify=verify)
    difference, failed = 0, False
    try:
        difference = _difference(path, world, verify)
    except (OSError, UserError, ValueError, SafetensorError):
        failed = True
    if not world.any_rank(failed)[0] and world.sum(difference) == 0:
        return None
    return world.on_main_rank(lambda: validation_error(path, verify=verify) or UNREADABLE)


def _difference(path: Path, world: DistributedContext, verify: Verify) -> int:
    """Return this rank's part of a sum that is 0 for a complete checkpoint. Raises an error for a file of this rank's share that
    is damaged, and for a state.json without the list of tensors, which only early versions have written."""
    entries = sorted(read_marker(path).files.items())
    for name, entry in entries[world.rank :: world.size]:
        if reason := damage(path, name, entry, verify):
            raise ValueError(reason)
    state = read_state(path)
    check_folder_name(path, state["progress"]["step"])
    manifest = state.get("tensors")
    if manifest is None or not manifest["model"]:
        raise ValueError("no list of its tensors, or no weights")
    check_optimizer_names(manifest["optimizer"], manifest["model"], state)
    return sum(_of_kind(path, kind, manifest.get(kind, {}), world) for kind in KINDS)


def _of_kind(path: Path, kind: str, described: dict[str, Any], world: DistributedContext) -> int:
    share = tensor_files(path, kind, described, share=slice(world.rank, None, world.size))
    found = sum(
        _hash(kind, name, first) - _hash(kind, name, stop) for name, first, stop in share.ranges() if first < stop
    )
    if world.is_main:
        for name, (_, shape) in described.items():
            found -= _hash(kind, name, 0) - _hash(kind, name, shape[0] if shape else 1)
    return found


def _hash(kind: str, name: str, row: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{kind} {name} {row}".encode()) >> (64 - BITS)
