"""Named tensors of any shape and sharding in a checkpoint: the state of an optimizer or of a hook.

`pack` returns what each rank writes, and `restore` copies it back into tensors of the same shape and sharding. What is sharded
or replicated can be restored on any number of ranks; tensors that belong to one rank need the same number.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from pretrain.distributed.sharding import (
    Manifest,
    TensorFiles,
    TensorShard,
    by_rows,
    described,
    fill,
    local,
    local_shard,
    manifest,
    writers,
)
from pretrain.runtime.console import notice
from pretrain.runtime.errors import UserError

if TYPE_CHECKING:
    from pretrain.distributed.context import DistributedContext

OF_RANK = re.compile(
    r"rank-([0-9]{1,9})-of-([0-9]{1,9})/(.*)", re.DOTALL
)  # the name of a tensor that belongs to one rank
AS_BEFORE = (
    "resume with the strategy and the number of processes of before, or start a new run from the checkpoint's weights "
    "(model_name=<checkpoint>)"
)


def pack(
    named: Mapping[str, Tensor],
    *,
    world: DistributedContext,
    replicas: Container[str] = (),
    rank_local: set[str] | None = None,
    owners: dict[str, int] | None = None,
) -> tuple[dict[str, TensorShard], Manifest]:
    """Return the shards of ``named`` that this rank has to write, and dtype and full shape of every tensor that any rank
    writes. This is a collective.

    Each tensor is saved by its own shape and sharding. A DTensor is saved by rows, so that any number of ranks can read it.
    A plain tensor that all ranks hold with the same bits is saved once. Any other plain tensor belongs to its rank (for
    example a moment of the local shard): every rank saves its own as ``rank-<r>-of-<n>/<name>``, and only n ranks can read
    it.

    Args:
        named: The tensors of this rank. DTensors must be the same on all ranks; plain tensors may differ.
        world: The ranks.
        replicas: Names of plain tensors that are known to be equal on all ranks, so that their bits are not compared.
        rank_local: The names that an earlier call has found to belong to their rank; this call adds to them. They are not
            compared again, and the notice about them is not repeated.
        owners: Receives the rank that writes each tensor that all ranks hold, if the ranks share them; ``None``: rank 0 writes
            them.

    Raises:
        UserError: On every rank, if a tensor can't be saved, or if a DTensor does not exist on all ranks.
    """
    rank_local = set() if rank_local is None else rank_local
    found = _found_rank_local(named, world, replicas, rank_local) if world.size > 1 else _checked(named)
    if world.is_main and found - rank_local:
        notice(
            f"{min(found)}{f' and {len(found) - 1} more tensors' if len(found) > 1 else ''} of the checkpoint belong to one "
            f"rank and can't be resharded: a resume needs {world.size} processes and the same strategy"
        )
    rank_local |= found
    whole = {n: t.full_tensor() for n, t in sorted(named.items()) if isinstance(t, DTensor) and not by_rows(t)}
    shared = {n: whole.get(n, t) for n, t in named.items()}
    own = {own_name(n, world): shared.pop(n) for n in sorted(found) if n in shared}
    if owners is not None:
        owners |= writers(shared, world.size)
    by = owners or {}
    shards = {n: s for n, t in shared.items() if (s := local_shard(t, is_main=by.get(n, 0) == world.rank)) is not None}
    shards |= {n: TensorShard(t.detach(), 0, tuple(t.shape)) for n, t in own.items()}
    described_here = manifest(own)
    everywhere = world.all_gather_object(lambda: described_here) if found else []
    return shards, manifest(shared) | {n: d for of_rank in everywhere for n, d in of_rank.items()}


def restore(files: TensorFiles, *, like: Mapping[str, Tensor], world: DistributedContext, prefix: str = "") -> None:
    """Copy the tensors of ``files``, which `pack` has made, into those of ``like``, in place: each rank its own part. Only
    the names in ``files`` that start with ``prefix`` are restored.

    Raises ``UserError``, and changes nothing, if the files hold other names or shapes, or tensors that belong to the ranks of
    another number of processes or of another strategy.
    """
    names = {name: saved for name, saved in saved_names(files, world).items() if name.startswith(prefix)}
    if mismatched := like.keys() ^ names.keys():
        where = "the checkpoint only" if mismatched - like.keys() else "this run only"
        raise UserError(f"saved tensors that do not fit: {', '.join(sorted(mismatched)[:5])} in {where}")
    check_shapes(files, like, names)
    for name, tensor in like.items():
        fill(tensor, files, names[name])


def check_shapes(files: TensorFiles, like: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Raise ``UserError`` if a tensor of ``like`` has another shape than the one in ``files``. ``names`` are `saved_names`."""
    for name, tensor in like.items():
        saved, here = files.shape(names[name]), tuple(tensor.shape)
        if saved != here:
            raise UserError(f"{name} has shape {saved} in the checkpoint and {here} here; {AS_BEFORE}")


def saved_names(files: TensorFiles, world: DistributedContext) -> dict[str, str]:
    """Return the names in ``files`` of the tensors that this rank restores, by their names without a rank.

    Raises ``UserError`` if ``files`` hold tensors that belong to the ranks of another number of processes, or a name twice.
    """
    names = {}
    for saved in sorted(files.keys()):
        found = OF_RANK.fullmatch(saved)
        if found and int(found[2]) != world.size:
            raise UserError(
                f"{found[3]} was saved by each of {found[2]} processes for itself and can't be resharded (this run has "
                f"{world.size}); {AS_BEFORE}"
            )
        if found is None or int(found[1]) == world.rank:
            name = name_of(saved)
            if name in names:
                raise UserError(f"{name} is in the checkpoint more than once")
            names[name] = saved
    return names


def own_name(name: str, world: DistributedContext) -> str:
    """Return the name under which this rank saves a tensor that belongs to it."""
    return f"rank-{world.rank}-of-{world.size}/{name}"


def name_of(saved: str) -> str:
    """Return the name of a tensor without the rank to which it belongs."""
    found = OF_RANK.fullmatch(saved)
    return found[3] if found else saved


def _checked(named: Mapping[str, Tensor]) -> set[str]:
    """Return the empty set. Raises ``UserError`` for a tensor that can't be saved."""
    for name, tensor in named.items():
        part = local(tensor)
        reason = None
        if type(part) not in (Tensor, torch.nn.Parameter):
            reason = f"its class {type(part).__name__} has a layout of its own"
        elif part.layout != torch.strided or part.is_quantized or part.is_complex() or part.is_meta:
            reason = f"it is {part.layout}, {part.dtype}, on {part.device}"
        elif isinstance(tensor, DTensor) and not all(type(p) in (Replicate, Shard) for p in tensor.placements):
            reason = f"it is distributed as {tensor.placements}"
        if reason:
            raise UserError(f"{name} can't be saved in a checkpoint: {reason}")
    return set()


def _found_rank_local(
    named: Mapping[str, Tensor], world: DistributedContext, replicas: Container[str], known: set[str]
) -> set[str]:
    """Return the names of the tensors that are not the same on all ranks, including those that are ``known`` to differ."""

    def signatures() -> dict[str, tuple[Any, ...]]:
        _checked(named)
        compared = {n for n, t in named.items() if not isinstance(t, DTensor) and n not in replicas and n not in known}
        return {
            n: (isinstance(t, DTensor), *described(t), _digest(t) if n in compared else n in known)
            for n, t in named.items()
        }

    mine: dict[str, tuple[Any, ...]] = {}

    def summary() -> str:
        mine.update(signatures())
        return xxhash.xxh3_128_hexdigest(repr(sorted(mine.items())).encode())

    if len(set(world.all_gather_object(summary))) == 1:
        return {name for name in named if name in known}
    every = world.all_gather_object(lambda: mine)
    names = set().union(*every)
    found = {n for n in names if n in known or any(one.get(n) != every[0].get(n) for one in every)}
    for name in sorted(found):
        if any(one[name][0] for one in every if name in one):
            raise UserError(f"{name} can't be saved in a checkpoint: it is sharded, but not the same on all ranks")
    return found


def _digest(tensor: Tensor) -> str:
    """Return a digest of a plain tensor's bits."""
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(bits.numpy().data)
