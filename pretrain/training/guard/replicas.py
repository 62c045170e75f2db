"""A check that ranks which must hold the same numbers still do.

A replica that was changed by a faulty device, faulty memory or a bug stays different to the end of the run. Only the
replica of rank 0 is saved, so the others would contribute gradients of a model that no checkpoint holds. Therefore the
ranks compare checksums before every save.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import xxhash

from pretrain.distributed.sharding import checksum, local, start_of
from pretrain.runtime.errors import ReplicasDiffer

if TYPE_CHECKING:
    from pretrain.strategy.engine import Engine

NAMED = 3


def check_replicas(engine: Engine, step: int) -> None:
    """Compare the replicated state of all ranks. This is a collective, and it waits for the device once.

    Raises ``ReplicasDiffer`` on every rank if ranks hold the same part of the state with different bits.
    """
    world = engine.world
    if world.size == 1:
        return
    checksums = {f"{name} from {start_of(t)}": checksum(local(t)) for name, t in engine.replicated()}
    checksums = {name: checksums[name] for name in sorted(checksums)}  # ranks may keep them in different orders
    sums = torch.stack([s.to(world.device) for s in checksums.values()]).tolist() if checksums else []
    mine = (_digest(checksums), _digest(sums))
    digests = world.all_gather_object(lambda: mine)
    groups = {part: [rank for rank, (theirs, _) in enumerate(digests) if theirs == part] for part, _ in digests}
    if all(len({digests[rank][1] for rank in ranks}) == 1 for ranks in groups.values()):
        return
    all_sums = world.all_gather_object(lambda: dict(zip(checksums, sums, strict=True)))
    for ranks in groups.values():
        deviating = _deviating([all_sums[rank] for rank in ranks])
        if deviating:
            names = sorted({name.rpartition(" from ")[0] for o in deviating.values() for name in o})
            others = [ranks[i] for i in range(len(ranks)) if i not in deviating]
            raise ReplicasDiffer(
                f"step {step}: rank {_listed([ranks[i] for i in deviating])} has other numbers than rank {_listed(others)} in "
                f"{_listed(names)}: a fault of its device or memory, or a bug; nothing of this step is saved, and the "
                "same command continues from the last checkpoint"
            )


def _digest(values: Iterable[object]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(list(values)).encode())


def _deviating(sums: Sequence[dict[str, int]]) -> dict[int, list[str]]:
    """Return the ranks, by their index in ``sums``, that differ from the majority (in a tie, from the first rank), with the
    names of the tensors that differ."""
    majority = max(sums, key=lambda one: (sums.count(one), -sums.index(one)))
    return {i: [n for n in s if s[n] != majority[n]] for i, s in enumerate(sums) if s != majority}


def _listed(items: Sequence[object]) -> str:
    shown = ", ".join(map(str, items[:NAMED]))
    return shown + (f" and {len(items) - NAMED} more" if len(items) > NAMED else "")
