"""The memory of a step for any number of sequences and layers, from the traces of a few small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pretrain.plan.trace import PHASES, Trace, Traced
from pretrain.plan.traced_model import layers_of, period_of, traced_spec

SHALLOW = (
    4  # layers of the smaller of two traced models, at least: fewer than FSDP gathers at a time would show too little
)
Kinds = dict[str, float]


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest memory of a step on one device: the phase in which it occurs, and the bytes by kind."""

    phase: str
    kinds: Kinds

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class StepMemory:
    """The memory of a step with micro-batches of any size.

    Attributes:
        layers: layers of the model; ``None``: all traces have the whole model.
        corners: traces by (rows, layers); two numbers of rows, and one or two numbers of layers.
        fixed: bytes by kind that every phase has in addition.
    """

    layers: int | None
    corners: dict[tuple[int, int], Trace]
    fixed: Kinds = field(default_factory=dict)

    def phase(self, name: str, rows: int) -> Kinds:
        """Return the bytes by kind at the peak of a phase with micro-batches of ``rows`` sequences."""
        return (
            self._extrapolated(rows, lambda trace: trace.usage[name].peak if name in trace.usage else {}) | self.fixed
        )

    def peak(self, rows: int) -> Peak:
        """Return the peak of a step with micro-batches of ``rows`` sequences."""
        return max((Peak(name, self.phase(name, rows)) for name in PHASES), key=lambda peak: peak.total)

    def between_steps(self) -> Kinds:
        """Return the bytes by kind that exist before and after a step."""
        rows = next(iter(self.corners))[0]
        return self._extrapolated(rows, lambda trace: trace.usage["update"].end)

    def communicated(self) -> Kinds:
        """Return the bytes that one rank gathers for each micro-batch, and that it reduces."""
        rows = next(iter(self.corners))[0]
        return self._extrapolated(rows, lambda trace: dict(trace.communicated))

    def largest(self, limit: float, *, most: int) -> int:
        """Return the largest number of rows, at most ``most``, whose peak is at most ``limit`` bytes; 0 if none is."""
        if self.peak(1).total > limit:
            return 0
        low, high = 1, most + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle).total <= limit else (low, middle)
        return low

    def _extrapolated(self, rows: int, value: Callable[[Trace], Any]) -> Kinds:
        """Return what ``value`` gives for ``rows`` and all layers: linear in both."""
        row_counts = sorted({r for r, _ in self.corners})
        depths = sorted({d for _, d in self.corners})
        found = {(r, d): value(trace) for (r, d), trace in self.corners.items()}
        kinds = {kind for corner in found.values() for kind in corner}
        result = {}
        for kind in kinds:
            by_rows = []
            for r in row_counts:
                numbers = [found[r, d].get(kind, 0.0) for d in depths]
                by_rows.append(_line(depths, numbers, self.layers or depths[-1]))
            result[kind] = max(0.0, _line(row_counts, by_rows, rows))
        return result


def _line(places: list[int], values: list[float], place: float) -> float:
    """Return the value at ``place`` of the line through the first and the last of ``values``."""
    if len(places) == 1 or place == places[0]:
        return values[0]
    slope = (values[-1] - values[0]) / (places[-1] - places[0])
    return values[-1] + slope * (place - places[-1])


def step_memory(traced: Traced, *, rows: int, checkpointing: Any = None, in_full: bool = False) -> StepMemory:
    """Trace steps with ``rows`` and twice as many sequences, of two shallow models or, with ``in_full``, of the whole one."""
    config = traced.spec.hf_config()
    given = traced.spec.gradient_checkpointing if checkpointing is None else checkpointing
    layers, period = layers_of(traced.spec), period_of(config, given)
    depths: list[int | None] = [None]
    if layers is not None and not traced.config.transforms and not in_full:
        smaller = layers % period + period * -(-SHALLOW // period)
        larger = smaller + period * -(-2 // period)
        depths = [smaller, larger] if larger < layers else [None]
    corners = {}
    for depth in depths:
        spec = traced_spec(traced.spec, checkpointing=checkpointing, layers=depth)
        for n in (rows, 2 * rows):
            corners[n, depth or 0] = traced.step(n, spec)
    return StepMemory(layers if depths != [None] else None, corners)
