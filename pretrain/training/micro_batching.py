"""The division of one device's sequences of a step into micro-batches. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """``accumulation`` micro-batches of ``batch_size`` sequences. Divisions with an equal ``total`` train the same run."""

    batch_size: int
    accumulation: int

    @classmethod
    def from_config(cls, config: RunConfig) -> MicroBatching:
        """Return the division in the config."""
        return cls(config.micro_batch_size, config.gradient_accumulation_steps)

    @classmethod
    def from_record(cls, facts: dict[str, Any]) -> MicroBatching:
        """Read the division from run.json, where `facts` has put it."""
        return cls(facts["batch_size"], facts["gradient_accumulation_steps"])

    @property
    def total(self) -> int:
        return self.batch_size * self.accumulation

    def facts(self) -> dict[str, int]:
        """Return the entries of run.json, which a resumed run reads again."""
        return {"batch_size": self.batch_size, "gradient_accumulation_steps": self.accumulation}

    def sizes(self) -> list[int]:
        """Return every micro-batch size that divides ``total``, in ascending order."""
        return [size for size in range(1, self.total + 1) if self.total % size == 0]

    def of(self, size: int) -> MicroBatching:
        """Return the same total in micro-batches of ``size``."""
        return MicroBatching(size, self.total // size)

    def smaller(self) -> MicroBatching:
        """Return the same total in the largest micro-batches of at most half the size; a single sequence stays one."""
        return self.of(max(size for size in self.sizes() if 2 * size <= max(2, self.batch_size)))
