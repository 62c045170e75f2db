"""How the sequences that one device computes in a step are divided into micro-batches. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """``accumulation`` micro-batches of ``batch_size`` sequences. An equal ``total`` is an equal run."""

    batch_size: int
    accumulation: int

    @classmethod
    def asked(cls, config: RunConfig) -> MicroBatching:
        """What the config says; ``batch_size=auto`` stands for 1 until it is known how many fit at once."""
        size = 1 if config.batch_size == "auto" else config.batch_size
        return cls(size, config.gradient_accumulation_steps)

    @classmethod
    def recorded(cls, facts: dict[str, Any]) -> MicroBatching:
        """What `facts` has made of it for run.json."""
        return cls(facts["batch_size"], facts["gradient_accumulation_steps"])

    @property
    def total(self) -> int:
        return self.batch_size * self.accumulation

    def facts(self) -> dict[str, int]:
        """For run.json, which a run that goes on reads again."""
        return {"batch_size": self.batch_size, "gradient_accumulation_steps": self.accumulation}

    def sizes(self) -> list[int]:
        """Every micro-batch that divides ``total``, the smallest first."""
        return [size for size in range(1, self.total + 1) if self.total % size == 0]

    def of(self, size: int) -> MicroBatching:
        """As much in micro-batches of ``size``."""
        return MicroBatching(size, self.total // size)

    def smaller(self) -> MicroBatching:
        """As much in the largest micro-batches of at most half the size; a single sequence stays one."""
        return self.of(max(size for size in self.sizes() if 2 * size <= max(2, self.batch_size)))
