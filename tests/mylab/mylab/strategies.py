"""Strategies: ours under other settings."""

from dataclasses import dataclass

from pretrain.strategy.ddp import Ddp
from pretrain.strategy.fsdp import Fsdp
from pretrain.strategy.single import Single


@dataclass(frozen=True)
class Alone(Single):
    """One process, which says so in run.json."""


@dataclass(frozen=True)
class SmallBuckets(Ddp):
    """DDP with buckets that suit a small model."""

    bucket_cap_mb: float = 0.01


@dataclass(frozen=True)
class Sharded(Fsdp):
    """FSDP that reduces gradients of the last micro-batch only."""

    accumulate_unsharded: bool = True
