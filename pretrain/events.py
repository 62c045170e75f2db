"""What the loop tells its listeners. Frozen: a listener watches and can never steer.

Tensors in an event stay on the device; only a listener that has something to show reads them, at a log step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Event:
    """``step``: optimizer steps done when the event happened."""

    step: int


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """``facts``: what stands in run.json (world size, strategy, versions, number of parameters, …). ``owes_evaluation``:
    this step is going to be evaluated, whatever is known of it from before. ``records``: those that came along with the
    checkpoint; a full disk or a lost machine may have kept them from metrics.jsonl."""

    total_steps: int
    resumed: bool
    owes_evaluation: bool = False
    records: tuple[dict[str, Any], ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StepDone(Event):
    """One optimizer step. ``loss``, ``grad_norm`` and ``skipped`` (steps without an update so far) are 0-d tensors.

    ``tokens``: target tokens so far, all ranks. ``step_tokens``: those of this step. ``epoch``: of the step's last
    sample, as a fraction. ``data_seconds``: how long the loop waited for its batch.
    """

    epoch: float
    tokens: int
    step_tokens: int
    loss: Tensor
    lr: float
    grad_norm: Tensor
    skipped: Tensor
    data_seconds: float


@dataclass(frozen=True, slots=True)
class DomainScore:
    """``loss`` in nats per target token; ``bytes`` of the text behind ``tokens``. ``delta_loss`` is against step 0."""

    domain: str
    role: str
    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    delta_loss: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    scores: tuple[DomainScore, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """The checkpoint of ``step`` has become whole, perhaps some steps later. ``blocked_seconds``: how long the loop stood
    still for it."""

    path: Path
    seconds: float
    blocked_seconds: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Exported(Event):
    """``seconds``: how long the loop stood still for a model folder; 0 where none was asked for."""

    seconds: float


@dataclass(frozen=True, slots=True)
class RolledBack(Event):
    """The run has gone back to ``step``, the last good checkpoint, because of what its guard found in ``bad_step``
    (``reason``: nonfinite · spike), and trains on from there."""

    bad_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """``status``: finished · stopped · failed. ``model``: the exported Hugging Face folder, if any."""

    status: str
    tokens: int
    model: Path | None = None
