"""Whether ranks that must hold the same numbers still do.

A replica that a fault of its device, its memory or a bug has changed stays another one to the end of the run, and only
rank 0's is saved: what the others add to every gradient is of no model that anybody has. So they compare themselves
before every save, by checksums.
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
    """A collective. Waits for the device, once.

    Raises ``ReplicasDiffer``, on every rank, where ranks hold the same part of the state with other bits in it.
    """
    world = engine.world
    if world.size == 1:
        return
    held = {f"{name} from {start_of(t)}": checksum(local(t)) for name, t in engine.replicated()}
    sums = torch.stack([s.to(world.device) for s in held.values()]).tolist() if held else []
    mine = (_digest(held), _digest(sums))
    every = world.all_gather_object(lambda: mine)
    groups = {part: [rank for rank, (theirs, _) in enumerate(every) if theirs == part] for part, _ in every}
    if all(len({every[rank][1] for rank in ranks}) == 1 for ranks in groups.values()):
        return
    all_sums = world.all_gather_object(lambda: dict(zip(held, sums, strict=True)))
    for ranks in groups.values():
        odd = _odd([all_sums[rank] for rank in ranks])
        if odd:
            names = sorted({name.rpartition(" from ")[0] for o in odd.values() for name in o})
            others = [ranks[i] for i in range(len(ranks)) if i not in odd]
            raise ReplicasDiffer(
                f"step {step}: rank {_listed([ranks[i] for i in odd])} has other numbers than rank {_listed(others)} in "
                f"{_listed(names)}: a fault of its device or memory, or a bug; nothing of this step is saved, and the "
                "same command continues from the last checkpoint"
            )


def _digest(values: Iterable[object]) -> str:
    return xxhash.xxh3_128_hexdigest(repr(list(values)).encode())


def _odd(sums: Sequence[dict[str, int]]) -> dict[int, list[str]]:
    """The ranks, by their place in ``sums``, that are not as most are (of equally many: as the first is), and the names
    under which they are not."""
    usual = max(sums, key=lambda one: (sums.count(one), -sums.index(one)))
    return {i: [n for n in s if s[n] != usual[n]] for i, s in enumerate(sums) if s != usual}


def _listed(items: Sequence[object]) -> str:
    shown = ", ".join(map(str, items[:NAMED]))
    return shown + (f" and {len(items) - NAMED} more" if len(items) > NAMED else "")
