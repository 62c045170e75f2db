"""An interval in steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """An action that is due every ``steps`` steps: ``Interval(10).due(step)`` is true at 10, 20, …. ``Interval(None)`` is
    never due."""

    steps: int | None

    def due(self, step: int) -> bool:
        """Return whether the action is due after ``step`` steps."""
        return self.steps is not None and step > 0 and step % self.steps == 0
